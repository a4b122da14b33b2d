"""Where threads and memory are kept: LangGraph's savers and stores over SQLite and Postgres."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from ..errors import SettingsError

if TYPE_CHECKING:
    from langgraph.checkpoint.base import BaseCheckpointSaver
    from langgraph.store.base import BaseStore

_Kept = Literal["threads", "memory"]
_SETTINGS: dict[_Kept, str] = {"threads": "DEEPREC_CHECKPOINTS", "memory": "DEEPREC_MEMORY"}
_POSTGRES = ("postgresql://", "postgres://")
_CONNECTIONS = 8
_CONNECT_TIMEOUT_S = 15.0


def serializer() -> JsonPlusSerializer:
    """Read and write a run's state, and nothing else: a checkpoint can name any class."""
    own = [("deeprec.graph.state", name) for name in ("RecommendationRequest", "Limits")]
    return JsonPlusSerializer(allowed_msgpack_modules=own)


def is_postgres(source: str) -> bool:
    """Whether a source is the address of a Postgres database, else the path of a SQLite file."""
    return source.startswith(_POSTGRES)


def shown(source: str) -> str:
    """Name a source in a message: of an address without its password."""
    if not is_postgres(source):
        return source
    return f"the database {urlsplit(source).path.lstrip('/')} at {urlsplit(source).hostname}"


@asynccontextmanager
async def open_checkpointer(source: str) -> AsyncIterator[BaseCheckpointSaver[Any]]:
    """Open a SQLite file or a Postgres database, with its tables made where they are missing.

    To be used in the event loop that it was opened in. Raises SettingsError where the package for
    it is missing, or it can't be opened.
    """
    async with _opened(source, "threads") as checkpointer:
        yield checkpointer


@asynccontextmanager
async def open_store(source: str) -> AsyncIterator[BaseStore]:
    """Open a store for users' memory (memory.py), as `open_checkpointer` opens one for threads.

    Its calls that block are for other threads than the loop's.
    """
    async with _opened(source, "memory") as store:
        yield store


def _opened(source: str, what: _Kept) -> AbstractAsyncContextManager[Any]:
    return _postgres(source, what) if is_postgres(source) else _sqlite(source, what)


@asynccontextmanager
async def _sqlite(source: str, what: _Kept) -> AsyncIterator[Any]:
    try:
        import aiosqlite
        from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
        from langgraph.store.sqlite.aio import AsyncSqliteStore
    except ImportError as error:
        raise _missing(what, "SQLite", "server", error) from error
    try:
        Path(source).parent.mkdir(parents=True, exist_ok=True)
        # The store begins and commits by itself, the saver leaves it to the connection.
        options = {"isolation_level": None} if what == "memory" else {}
        connection = await aiosqlite.connect(source, **options)
    except (OSError, aiosqlite.Error) as error:
        raise _closed(source, what, error) from error
    try:
        kept = (
            AsyncSqliteStore(connection)
            if what == "memory"
            else AsyncSqliteSaver(connection, serde=serializer())
        )
        try:
            await kept.setup()
        except aiosqlite.Error as error:
            raise _closed(source, what, error) from error
        yield kept
    finally:
        await connection.close()


@asynccontextmanager
async def _postgres(source: str, what: _Kept) -> AsyncIterator[Any]:
    try:
        import psycopg
        from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
        from langgraph.store.postgres.aio import AsyncPostgresStore
        from psycopg.rows import dict_row
        from psycopg_pool import AsyncConnectionPool
    except ImportError as error:
        raise _missing(what, "Postgres", "postgres", error) from error
    # What LangGraph asks of the connections that it is given.
    options = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
    pool = AsyncConnectionPool(source, kwargs=options, max_size=_CONNECTIONS, open=False)
    try:
        try:
            await pool.open(wait=True, timeout=_CONNECT_TIMEOUT_S)
            kept = (
                AsyncPostgresStore(pool)
                if what == "memory"
                else AsyncPostgresSaver(pool, serde=serializer())
            )
            await kept.setup()
        except psycopg.Error as error:
            raise _closed(source, what, error) from error
        yield kept
    finally:
        await pool.close()


def _missing(what: _Kept, where: str, extra: str, error: ImportError) -> SettingsError:
    return SettingsError(
        f"keeping {what} in {where} takes a package that is missing ({error}): run "
        f"`pip install deeprec-agent[{extra}]`"
    )


def _closed(source: str, what: _Kept, error: Exception) -> SettingsError:
    return SettingsError(
        f"{shown(source)} can't be opened for {what}: {error}. Correct {_SETTINGS[what]}: the "
        "path of a SQLite file, or postgresql://user@host/database."
    )
