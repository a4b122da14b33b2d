"""How alike items of the catalog are, by what is said of them and by who liked them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ..tools.snapshot import Snapshot


def likeness(now: Snapshot, items: Sequence[str], to: str) -> NDArray[np.float32]:
    """Mean of the cosines of text embeddings and of TRM vectors between `items` and `to`, float32
    [items], -1 to 1. All must be in the catalog.
    """
    tables = (now.text_embeddings, now.vectors)
    return mean_cosines(tables, now.positions(items), now.position(to))


def mean_cosines(
    tables: Sequence[NDArray[np.float32]], rows: Sequence[int] | NDArray[np.int64], to: int
) -> NDArray[np.float32]:
    """Cosine between `rows` and the row `to` of a table, the mean over the tables, float32 [rows].

    A row of length 0 is like nothing.
    """
    each = [_cosines(table[rows], table[to]) for table in tables]
    return np.asarray(sum(each) / len(each), dtype=np.float32)


def _cosines(rows: NDArray[np.float32], to: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(to)
    return np.asarray(rows @ to / np.where(lengths == 0, 1, lengths), dtype=np.float32)
