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
    rows, at = now.positions(items), int(now.positions([to])[0])
    text, vectors = (_cosines(m[rows], m[at]) for m in (now.text_embeddings, now.vectors))
    return np.asarray((text + vectors) / 2, dtype=np.float32)


def _cosines(rows: NDArray[np.float32], to: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(to)
    # A vector of length 0 is like nothing.
    return np.asarray(rows @ to / np.where(lengths == 0, 1, lengths), dtype=np.float32)
