"""Where threads are kept: LangGraph's checkpointers over SQLite and Postgres."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from ..errors import SettingsError

if TYPE_CHECKING:
    from langgraph.checkpoint.base import BaseCheckpointSaver

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
    opened = _postgres(source) if is_postgres(source) else _sqlite(source)
    async with opened as checkpointer:
        yield checkpointer


@asynccontextmanager
async def _sqlite(source: str) -> AsyncIterator[BaseCheckpointSaver[Any]]:
    try:
        import aiosqlite
        from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
    except ImportError as error:
        raise _missing("SQLite", "server", error) from error
    try:
        Path(source).parent.mkdir(parents=True, exist_ok=True)
        connection = await aiosqlite.connect(source)
    except (OSError, aiosqlite.Error) as error:
        raise _closed(source, error) from error
    try:
        saver = AsyncSqliteSaver(connection, serde=serializer())
        try:
            await saver.setup()
        except aiosqlite.Error as error:
            raise _closed(source, error) from error
        yield saver
    finally:
        await connection.close()


@asynccontextmanager
async def _postgres(source: str) -> AsyncIterator[BaseCheckpointSaver[Any]]:
    try:
        import psycopg
        from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
        from psycopg.rows import dict_row
        from psycopg_pool import AsyncConnectionPool
    except ImportError as error:
        raise _missing("Postgres", "postgres", error) from error
    # What AsyncPostgresSaver asks of the connections that it is given.
    options = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
    pool = AsyncConnectionPool(source, kwargs=options, max_size=_CONNECTIONS, open=False)
    try:
        try:
            await pool.open(wait=True, timeout=_CONNECT_TIMEOUT_S)
            saver = AsyncPostgresSaver(pool, serde=serializer())
            await saver.setup()
        except psycopg.Error as error:
            raise _closed(source, error) from error
        yield saver
    finally:
        await pool.close()


def _missing(what: str, extra: str, error: ImportError) -> SettingsError:
    return SettingsError(
        f"threads in {what} need a package ({error}): run `pip install deeprec-agent[{extra}]`"
    )


def _closed(source: str, error: Exception) -> SettingsError:
    return SettingsError(
        f"{shown(source)} can't be opened for threads: {error}. Correct DEEPREC_CHECKPOINTS: the "
        "path of a SQLite file, or postgresql://user@host/database."
    )
