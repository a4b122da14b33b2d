"""Reciprocal rank fusion of retrieved lists: the order that fills what the policy left open."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

RRF_CONSTANT = 60
"""The constant of Cormack, Clarke and Büttcher, SIGIR 2009."""


def reciprocal_rank_fusion(
    lists: Iterable[Sequence[str]], *, first_weight: float = 1.0, constant: float = RRF_CONSTANT
) -> list[str]:
    """Ids of all lists, best first, by the sum of w / (constant + rank) over the lists that hold
    them; w is `first_weight` for the first list, 1 for the others.

    Ranks count from 1; ties keep the order of first appearance.
    """
    scores: defaultdict[str, float] = defaultdict(float)
    for at, ids in enumerate(lists):
        weight = 1.0 if at else first_weight
        for rank, id_ in enumerate(ids, 1):
            scores[id_] += weight / (constant + rank)
    return sorted(scores, key=scores.__getitem__, reverse=True)
