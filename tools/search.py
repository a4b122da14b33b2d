"""Exact inner-product search with masks: pure functions over float32 matrices on the CPU.

A product of matrices and torch's top-k is as quick as numpy's at every size measured, and the
scores stay where the TRM and the blend of lists need them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NOTHING = np.zeros(0, dtype=np.int64)
_MAX_SCORES = 2**25  # scores held at a time: 128 MiB
_SAMPLE = 2048  # items that stand for all that were not scored


@dataclass(frozen=True)
class Allowed:
    """Which of n items one user may be shown: those in `mask` that `excluded` does not list."""

    size: int
    mask: NDArray[np.bool_] | None = None  # [n]; None allows all
    excluded: NDArray[np.int64] = field(default_factory=lambda: NOTHING)  # positions, rising

    @property
    def count(self) -> int:
        """How many items are allowed."""
        if self.mask is None:
            return self.size - len(self.excluded)
        return int(self.mask.sum()) - int(self.mask[self.excluded].sum())

    def of(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """`[m]`, True where the item at that position is allowed."""
        held = np.ones(len(positions), dtype=np.bool_)
        if len(self.excluded):
            at = np.searchsorted(self.excluded, positions).clip(max=len(self.excluded) - 1)
            held = self.excluded[at] != positions
        return held if self.mask is None else held & self.mask[positions]


def scores(users: Tensor, items: Tensor, allowed: Sequence[Allowed]) -> Tensor:
    """Inner products `[B, n]` of `users` `[B, d]` and `items` `[n, d]`, -inf where not allowed."""
    # For a lone user the product of matrix and vector is read along the rows of `items`.
    found = (items @ users[0])[None] if len(users) == 1 else users @ items.T
    for row, may in enumerate(allowed):
        if may.mask is not None:
            found[row].masked_fill_(torch.from_numpy(~may.mask), float("-inf"))
        if len(may.excluded):
            found[row, torch.from_numpy(may.excluded)] = float("-inf")
    return found


def sample_rest(may: Allowed, found: NDArray[np.int64]) -> tuple[NDArray[np.int64], float]:
    """Positions of a uniform sample of the allowed items that `found` does not hold, and how many
    items each of them stands for. The same question has the same answer.
    """
    if may.mask is None:
        drawn = _drawn(may.size)
    else:
        open_ = np.flatnonzero(may.mask)
        drawn = open_[_drawn(len(open_))]
    sample = drawn[may.of(drawn) & ~np.isin(drawn, found)]
    return sample, (may.count - len(found)) / len(sample) if len(sample) else 1.0


@lru_cache(maxsize=64)
def _drawn(n: int) -> NDArray[np.int64]:
    """Some of 0 to n - 1, all where n is small."""
    return np.random.default_rng(0).choice(n, min(n, _SAMPLE), replace=False)


def chunks(rows: int, columns: int) -> list[slice]:
    """Slices of `rows` such that a slice's scores of `columns` items fit in memory."""
    step = max(1, _MAX_SCORES // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
