"""How sure a mean over users is: bootstrap intervals and a paired randomisation test (scipy)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

CONFIDENCE = 0.95
_AT_ONCE = 20_000_000  # values resampled at the same time: 160 MB


class Interval(BaseModel):
    """A mean over users and its bootstrap interval; none where there are fewer than two users."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: float
    low: float | None = None
    high: float | None = None


def intervals(table: NDArray[np.float64], *, resamples: int, seed: int) -> list[Interval]:
    """Mean of each row of `[rows, users]`, with the percentile bootstrap over users."""
    from scipy.stats import bootstrap

    rows, users = table.shape
    if users < 2:
        return [Interval(mean=float(row.mean()) if users else 0.0) for row in table]
    limits = bootstrap(
        (table,),
        np.mean,
        axis=-1,
        n_resamples=resamples,
        batch=max(1, _AT_ONCE // (rows * users)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    ends = zip(table.mean(axis=1), limits.low, limits.high, strict=True)
    return [Interval(mean=float(m), low=float(low), high=float(high)) for m, low, high in ends]


def paired_p(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], *, resamples: int, seed: int
) -> float:
    """Two-sided p of the mean difference over the same users `[users]`: the paired randomisation
    test (Smucker, Allan and Carterette, CIKM 2007), exact where the users are few.
    """
    from scipy.stats import permutation_test

    # A pair without a difference is the same either way round.
    differ = ours != theirs
    pairs = int(differ.sum())
    if pairs < 2:  # one difference is as extreme either way
        return 1.0
    found = permutation_test(
        (ours[differ], theirs[differ]),
        _difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _AT_ONCE // (2 * pairs)),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def adjusted(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for how many there are (Benjamini and Hochberg)."""
    from scipy.stats import false_discovery_control

    return [float(p) for p in false_discovery_control(p_values)] if p_values else []


def _difference(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], axis: int
) -> NDArray[np.float64]:
    return np.asarray(ours.mean(axis=axis) - theirs.mean(axis=axis))
