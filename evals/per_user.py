"""per_user.parquet: each user's rank and metrics under each row, for tests across runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..configuration import replacing
from ..errors import EvaluationError
from .judge import Judged
from .task import Task

PER_USER = "per_user.parquet"


def write_per_user(
    folder: Path, task: Task, metrics: Sequence[str], lists: Sequence[Judged]
) -> None:
    """Write one line per row and user: row, user, target, rank (1 is best, null: absent), and the
    metrics by their names. Raises SettingsError.
    """
    users = pa.array([user.id for user in task.users], pa.string())
    targets = pa.array([task.targets[user.id] for user in task.users], pa.string())
    tables = [
        pa.table(
            {
                "row": pa.array([one.row.label] * len(users), pa.string()),
                "user": users,
                "target": targets,
                "rank": pa.array(one.ranks, mask=one.ranks == 0),
                **{name: one.table[at] for at, name in enumerate(metrics)},
            }
        )
        for one in lists
    ]
    with replacing(folder / PER_USER) as path:
        pq.write_table(pa.concat_tables(tables), path)


def read_per_user(folder: Path, metric: str) -> dict[str, dict[str, float]]:
    """Row → user → value of a metric. Raises EvaluationError where the file can't be read."""
    path = folder / PER_USER
    try:
        table = pq.read_table(path, columns=["row", "user", metric])
    except (OSError, ValueError, pa.ArrowException) as error:
        raise EvaluationError(
            f"{path} can't be read: {error}. Run its `deeprec eval` again; rankings are kept."
        ) from error
    found: dict[str, dict[str, float]] = {}
    for row, user, value in zip(*(column.to_pylist() for column in table.columns), strict=True):
        found.setdefault(row, {})[user] = value
    return found


def paired(
    ours: dict[str, float], theirs: dict[str, float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Both rows' values in the same order; None where they are not of the same users."""
    if ours.keys() != theirs.keys():
        return None
    return np.array(list(ours.values())), np.array([theirs[user] for user in ours])
