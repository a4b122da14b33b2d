"""Metrics of ranked lists by item id, and what is wrong with a list.

One item is relevant to a user: the held-out one. Recall@n is then 1 or 0 (a hit among the first
n), NDCG@n is 1 / log2(1 + rank), and MRR is 1 / rank; ir_measures computes them. Every place of a
list counts as it stands: an id that repeats or is unknown is a miss at its place, and a list that
is short or missing misses.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ir_measures.measures import Measure

KNOWN_METRICS = "recall@N, ndcg@N and mrr"
_METRIC = re.compile(r"(recall|ndcg)@([1-9]\d*)|mrr")


def parse_metric(name: str, k: int) -> tuple[str, int]:
    """Kind and cutoff of a metric; mrr is cut at `k`, the length of the judged lists.

    Raises ValueError for one that is not known, or reaches beyond `k`.
    """
    match = _METRIC.fullmatch(name)
    if match is None:
        raise ValueError(f"there is no metric {name!r}: known are {KNOWN_METRICS}")
    if match[1] is None:
        return "mrr", k
    if int(match[2]) > k:
        raise ValueError(f"{name!r} reaches beyond the k = {k} places that are judged: raise k")
    return match[1], int(match[2])


@dataclass(frozen=True)
class Checked:
    """A list as it is judged: at each place an id, or None where the place can't be a hit."""

    places: tuple[str | None, ...]
    duplicates: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    past: tuple[str, ...] = ()  # what the user has had, where that was to be left out


def check(
    items: Sequence[str | None], k: int, known: Collection[str], past: Collection[str] = ()
) -> Checked:
    """The first `k` places of a list. None (a line that named nothing) is an unknown id."""
    places: list[str | None] = []
    duplicates, unknown, seen = [], [], []
    met: set[str] = set()
    for item in items[:k]:
        places.append(None)
        if item is None or item not in known:
            unknown.append("(nothing)" if item is None else item)
        elif item in met:
            duplicates.append(item)
        elif item in past:
            seen.append(item)
        else:
            places[-1] = item
        if item is not None:
            met.add(item)
    return Checked(tuple(places), tuple(duplicates), tuple(unknown), tuple(seen))


def ranks(lists: Iterable[Checked], targets: Iterable[str]) -> NDArray[np.int64]:
    """One-based rank of each list's target, 0 where it is absent: `[users]`."""
    return np.array(
        [
            checked.places.index(target) + 1 if target in checked.places else 0
            for checked, target in zip(lists, targets, strict=True)
        ],
        dtype=np.int64,
    )


def values(found: NDArray[np.int64], names: Sequence[str], k: int) -> NDArray[np.float64]:
    """Each user's value of each metric, `[metrics, users]`, from one-based ranks (0: a miss).

    No name may be given twice.
    """
    import ir_measures
    from ir_measures import RR, R, nDCG

    kinds = {"recall": R, "ndcg": nDCG, "mrr": RR}
    measures: dict[Measure, int] = {}
    for row, name in enumerate(names):
        kind, cutoff = parse_metric(name, k)
        measures[kinds[kind] @ cutoff] = row
    # The library sees places, not ids: what stands there was resolved before.
    judged = {str(user): {"target": 1} for user in range(len(found))}
    run = {
        str(user): {"target" if place == rank else f"place {place}": k - place for place in _to(k)}
        for user, rank in enumerate(found.tolist())
    }
    table = np.zeros((len(names), len(found)))
    for metric in ir_measures.iter_calc(list(measures), judged, run):
        table[measures[metric.measure], int(metric.query_id)] = metric.value
    return table


def _to(k: int) -> range:
    return range(1, k + 1)


def coverage(lists: Iterable[Checked], n_items: int) -> float:
    """Share of the catalog that stands in anybody's list."""
    return len({item for checked in lists for item in checked.places if item}) / n_items


def novelty(lists: Iterable[Checked], popularity: Mapping[str, float], n_users: int) -> float:
    """Mean self-information of a list's items in bits, averaged over users whose list is not
    empty: -log2 of the share of users who have an item (Zhou et al., PNAS 2010), one user added
    to both counts so that an item that nobody has is finite.
    """
    means = [
        np.mean([-np.log2((popularity[item] + 1) / (n_users + 1)) for item in items])
        for items in (_items(checked) for checked in lists)
        if items
    ]
    return float(np.mean(means)) if means else 0.0


def diversity(
    lists: Iterable[Checked], index: Mapping[str, int], embeddings: NDArray[np.float32]
) -> float:
    """Mean of 1 - cosine over the pairs of a list (intra-list distance, Ziegler et al., WWW 2005),
    averaged over lists of two items at least. `embeddings` are unit vectors `[items, dim]`.
    """
    means = []
    for checked in lists:
        items = _items(checked)
        if len(items) > 1:
            vectors = embeddings[[index[item] for item in items]]
            pairs = tuple(zip(*combinations(range(len(items)), 2), strict=True))
            means.append(1 - (vectors @ vectors.T)[pairs].mean())
    return float(np.mean(means)) if means else 0.0


def _items(checked: Checked) -> list[str]:
    return [item for item in checked.places if item is not None]
