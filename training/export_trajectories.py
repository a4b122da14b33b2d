"""Export finished runs as one file of trajectories.

    python training/export_trajectories.py checkpoints.sqlite runs.parquet
    python training/export_trajectories.py postgresql://user@host/db runs.parquet --thread 42
    python training/export_trajectories.py runs/grpo runs.parquet

The source is a LangGraph checkpointer (a SQLite file or a Postgres address) or a run folder. Every
finished run of every thread is exported; runs that are still going on or broke off are not. A run's
target is taken from its config's metadata ({"metadata": {"target": "an item id"}}), where given.
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deeprec.errors import TrajectoryError
from deeprec.graph.engine.tokenizer import load_tokenizer
from deeprec.graph.persistence import is_postgres, serializer, shown
from deeprec.settings import load_settings
from deeprec.terminal import tells_errors
from deeprec.training.trajectories import Trajectory, model_fingerprint
from deeprec.training.trajectory_file import iter_trajectories, write_trajectories

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple

_SQLITE = b"SQLite format 3\0"


def from_checkpointer(
    checkpointer: BaseCheckpointSaver[Any], model: str, *, thread: str | None = None
) -> Iterator[Trajectory]:
    """Trajectories of the finished runs in a checkpointer, oldest first.

    `model` is the name or folder of the LLM that made them: its tokenizer decodes them. `thread`
    takes one thread's runs only.
    """
    tokenizer = load_tokenizer(model)
    fingerprint = model_fingerprint(model)
    only: RunnableConfig | None = (
        None if thread is None else {"configurable": {"thread_id": thread}}
    )
    finished = [saved for saved in checkpointer.list(only) if _is_finished(saved)]
    threads: dict[str, list[CheckpointTuple]] = {}
    for saved in finished:
        threads.setdefault(saved.config["configurable"]["thread_id"], []).append(saved)
    # Ids of checkpoints grow with time.
    for saved in sorted(finished, key=lambda saved: saved.checkpoint["id"]):
        where = saved.config["configurable"]
        if any(_goes_on(saved, other) for other in threads[where["thread_id"]]):
            continue  # the user sent its answer back: the last round holds all
        target = saved.metadata.get("target")
        yield Trajectory.from_state(
            saved.checkpoint["channel_values"],
            tokenizer,
            id=f"{where['thread_id']}/{where['checkpoint_id']}",
            model=model,
            model_fingerprint=fingerprint,
            target=None if target is None else str(target),
        )


def _is_finished(saved: CheckpointTuple) -> bool:
    """Whether this checkpoint is the one that a run's last node left.

    A run writes `usage` once, at its end. Where nothing in the checkpoint is newer, the run has
    just ended; a later run on the same thread makes other channels newer until it ends as well.
    """
    versions = saved.checkpoint["channel_versions"]
    values = saved.checkpoint["channel_values"]
    if not {"segments", "usage"} <= values.keys():
        return False  # before the end of a thread's first run, or of another graph
    return bool(versions["usage"] == max(versions.values()))


def _goes_on(saved: CheckpointTuple, other: CheckpointTuple) -> bool:
    """Whether the other checkpoint of the thread is of the same run, some rounds later."""
    before, after = (at.checkpoint["channel_values"]["segments"] for at in (saved, other))
    return len(before) < len(after) and after[: len(before)] == before


@contextmanager
def open_checkpointer(source: str) -> Iterator[BaseCheckpointSaver[Any]]:
    """Open a SQLite file (read-only) or a Postgres database. Raises TrajectoryError."""
    serde = serializer()
    if is_postgres(source):
        try:
            import psycopg
            from langgraph.checkpoint.postgres import PostgresSaver
        except ImportError as error:
            raise _missing("Postgres", "langgraph-checkpoint-postgres", error) from error
        try:
            with PostgresSaver.from_conn_string(source) as postgres:
                postgres.serde = serde
                yield postgres
        except psycopg.Error as error:
            raise _unreadable(source, error) from error
        return
    try:
        from langgraph.checkpoint.sqlite import SqliteSaver
    except ImportError as error:
        raise _missing("SQLite", "langgraph-checkpoint-sqlite", error) from error
    address = f"{Path(source).resolve().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(address, uri=True, check_same_thread=False)) as database:
            yield SqliteSaver(database, serde=serde)
    except sqlite3.Error as error:
        raise _unreadable(source, error) from error


def _unreadable(source: str, error: Exception) -> TrajectoryError:
    return TrajectoryError(
        f"{shown(source)} can't be read as LangGraph's checkpoints: {error}. Give the database "
        "that its SqliteSaver or PostgresSaver writes."
    )


def _missing(what: str, package: str, error: ImportError) -> TrajectoryError:
    return TrajectoryError(
        f"checkpoints in {what} need {package} ({error}): run `pip install {package}`"
    )


def export(source: str, output: Path, *, model: str, thread: str | None = None) -> int:
    """Write the finished runs of `source` to `output`; gives their number.

    Raises TrajectoryError for a source that is none or holds no finished run.
    """
    path = Path(source)
    if path.is_dir():
        if thread is not None:
            raise TrajectoryError(f"{source} is a run folder, which has no threads: leave --thread")
        return write_trajectories(output, iter_trajectories(path))
    if not is_postgres(source) and not _is_sqlite(path):
        raise TrajectoryError(
            f"{source} holds no runs: give a SQLite file of LangGraph's checkpointer, an address "
            "postgresql://…, or a run folder"
        )
    with open_checkpointer(source) as checkpointer:
        runs = list(from_checkpointer(checkpointer, model, thread=thread))
    if not runs:
        of = f"thread {thread!r} of {shown(source)}" if thread is not None else shown(source)
        raise TrajectoryError(
            f"{of} holds no finished run. Threads of the `deeprec` graph are exported once their "
            "run has ended."
        )
    return write_trajectories(output, runs)


def _is_sqlite(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_SQLITE)) == _SQLITE


@tells_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="SQLite file, postgresql:// address, or run folder")
    parser.add_argument("output", type=Path, help="Parquet file to write")
    parser.add_argument("--model", help="hub name or folder of the LLM that made the runs")
    parser.add_argument("--thread", help="this LangGraph thread only")
    given = parser.parse_args(arguments)
    model = given.model or load_settings().model_name
    count = export(given.source, given.output, model=model, thread=given.thread)
    print(f"{count} trajectories are in {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
