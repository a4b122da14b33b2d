"""Baselines by progress: a token is compared with the runs that had come as far.

GRPO compares a run as a whole with its group, so that a run which searched too seldom pushes down
every word of an answer that could not be right any more. Here each token has the baseline of its
own place: how often the run had searched by then, and whether its answer had begun. That is the
idea of GiGPO (arXiv 2505.10978, groups of steps that start from the same state) with states that a
run's protocol gives. A baseline follows from what stands before the token and from other runs
alone, so that the gradient keeps its mean and loses variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from ..graph import protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .trajectories import Trajectory

Place = tuple[int, bool]
"""Lists and refusals read so far; whether the thinking is closed."""

_LEAST_OTHERS = 2


def places(run: Trajectory, tokenizer: PreTrainedTokenizerBase) -> list[Place]:
    """Place of each token after the prompt. What closes the thinking is still a thought's."""
    found: list[Place] = []
    read = 0
    for author, tokens in groupby(zip(run.authors, run.completion_ids, strict=True), _author):
        ids = [id_ for _, id_ in tokens]
        if author == "policy":
            thought = _thought_tokens(ids, tokenizer)
            found += [(read, at >= thought) for at in range(len(ids))]
        else:
            found += [(read, False)] * len(ids)
            read += 1
    return found


def _author(token: tuple[str, int]) -> str:
    return token[0]


def _thought_tokens(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens up to the one that completes the end of the thinking; all where nothing does."""
    if protocol.END_THINK not in tokenizer.decode(ids):
        return len(ids)
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        if protocol.END_THINK in tokenizer.decode(ids[:middle]):
            high = middle
        else:
            low = middle + 1
    return low


def baselines(
    totals: Sequence[float | None], group_size: int, reached: Sequence[Sequence[Place]]
) -> list[list[float]]:
    """What is to be taken off a run's advantage at each of its tokens.

    Args:
        totals: rewards of the step's runs, groups in one piece; None where there is none.
        group_size: runs of a group.
        reached: `places` of each run.

    A run's distance from its group's mean is what is compared. The baseline of a place is the mean
    of the other runs that came there, 0 where fewer than two others did.

    """
    values = np.array([np.nan if total is None else total for total in totals], dtype=float)
    grouped = values.reshape(-1, group_size)
    known = ~np.isnan(grouped)
    means = np.where(known, grouped, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    distances = (grouped - means[:, None]).ravel()
    sums: dict[Place, float] = {}
    counts: dict[Place, int] = {}
    for distance, own in zip(distances, reached, strict=True):
        for place in set(own) if not np.isnan(distance) else ():
            sums[place] = sums.get(place, 0.0) + distance
            counts[place] = counts.get(place, 0) + 1

    def baseline(place: Place, distance: float) -> float:
        counted = not np.isnan(distance)
        others = counts.get(place, 0) - counted
        rest = sums.get(place, 0.0) - (distance if counted else 0.0)
        return rest / others if others >= _LEAST_OTHERS else 0.0

    return [
        [at[place] for place in own]
        for distance, own in zip(distances, reached, strict=True)
        for at in [{place: baseline(place, distance) for place in set(own)}]
    ]
