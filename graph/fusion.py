"""Reciprocal rank fusion of retrieved lists: the order that fills what the policy left open."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

RRF_CONSTANT = 60
"""The constant of Cormack, Clarke and Büttcher, SIGIR 2009."""


def reciprocal_rank_fusion(lists: Iterable[Sequence[str]]) -> list[str]:
    """Ids of all lists, best first, by the sum of 1 / (60 + rank) over the lists that hold them.

    Ranks count from 1; ties keep the order of first appearance.
    """
    scores: defaultdict[str, float] = defaultdict(float)
    for ids in lists:
        for rank, id_ in enumerate(ids, 1):
            scores[id_] += 1 / (RRF_CONSTANT + rank)
    return sorted(scores, key=scores.__getitem__, reverse=True)
