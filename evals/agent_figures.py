"""What an agent's stored runs say beyond its lists: searches, candidates, format, cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..graph.fusion import reciprocal_rank_fusion
from ..graph.state import RecommendationResponse, RunSettings, Usage
from .config import Price
from .results import AgentFigures, Cost, ListName, TurnPoint
from .significance import Interval, intervals, paired_p

_READ, _GENERATED = ("prompt", "forced", "environment"), ("policy", "guided", "chat")
_AUTHORS = (*_READ, *_GENERATED)


def is_strict(response: RecommendationResponse) -> bool:
    """Whether a run counts in strict evaluation: it ended by itself and broke no format rule."""
    ended = response.failure is None and response.stop_reason == "answered"
    return ended and not response.violations


def answered(
    runs: Sequence[RecommendationResponse | None],
) -> list[RecommendationResponse | None]:
    """The runs, None in the place of a failed one: it is a miss, whatever a server would have
    filled its list with. A run that hit a limit and was answered all the same has not failed.
    """
    return [None if run is None or run.failure is not None else run for run in runs]


def lists_of(
    runs: Sequence[RecommendationResponse | None], *, free: bool, searches: bool = True
) -> dict[ListName, list[list[str | None]]]:
    """Each run's lists; empty where it failed or there is none. Strict ones exist in free decoding
    alone.

    An agent that never searches has one list, and no format to keep to.
    """
    runs = answered(runs)
    named: dict[ListName, list[list[str | None]]] = {}
    if not searches:
        named["ranked"] = [[line.id for line in run.recommendations] if run else [] for run in runs]
        return named
    if free:
        named["strict"] = [list(run.answer) if run and is_strict(run) else [] for run in runs]
    named["served"] = [[line.id for line in run.recommendations] if run else [] for run in runs]
    named["fused"] = [
        [*reciprocal_rank_fusion([item.id for item in turn.retrieved] for turn in run.turns)]
        if run
        else []
        for run in runs
    ]
    return named


@dataclass(frozen=True)
class Runs:
    """The runs of one agent, in the order of the users; None where a request was refused.

    `alone` holds the one-based rank of each user's target in the TRM's own long list (0: absent),
    or nothing where no such list was asked for.
    """

    recommender: str
    settings: RunSettings
    runs: Sequence[RecommendationResponse | None]
    targets: Sequence[str]
    alone: NDArray[np.int64] | None
    resamples: int
    seed: int
    seconds: Sequence[float | None] = ()  # between answers, see Ranking
    price: Price | None = None
    searches: bool = True  # else there is no format that a run could keep to

    def figures(self) -> AgentFigures:
        """All figures; a run that failed counts as one that found and wrote nothing, and one that
        was refused took nothing either.
        """
        there = [run for run in self.runs if run is not None]
        judged = answered(self.runs)
        own = [run for run in judged if run is not None]
        answers = [[item for item in run.answer if item is not None] for run in own]
        lines = [line for run in own for line in run.recommendations]
        sizes = np.array([len(found) for found in self._candidates(None)])
        found = self._found(None)
        longer = self._longer(sizes)
        filled = [sum(line.filled for line in run.recommendations) if run else 0 for run in judged]
        usages = [Usage() if run is None else run.usage for run in self.runs]
        seconds = np.array([usage.seconds for usage in usages])
        tokens = {
            author: _mean(getattr(usage, f"{author}_tokens") for usage in usages)
            for author in _AUTHORS
        }
        strict = [run is not None and is_strict(run) for run in self.runs]
        return AgentFigures(
            recommender=self.recommender,
            settings=self.settings.model_dump(mode="json"),
            users=len(self.runs),
            failures=_counted(
                run.failure.reason if run is not None and run.failure else "refused"
                for run in self.runs
                if run is None or run.failure is not None
            ),
            stop_reasons=_counted(run.stop_reason for run in there),
            searches=dict(sorted(Counter(len(lists) for lists in self._lists).items())),
            candidates=self._interval(sizes),
            candidate_counts=tuple(sizes.tolist()),
            found=self._interval(found),
            longer=None if longer is None else self._interval(longer),
            found_versus_longer_p=None
            if longer is None
            else paired_p(found, longer, resamples=self.resamples, seed=self.seed),
            turns=self._turns(),
            strict=self._interval(strict)
            if self.searches and self.settings.decoding == "free"
            else None,
            broken_rules=_counted(rule for run in there for rule in run.violations),
            answer_lines=sum(len(run.answer) for run in own),
            invented_lines=sum(run.answer.count(None) for run in own),
            repeated_lines=sum(len(ids) - len(set(ids)) for ids in answers),
            lines_by_source=_counted(line.source for line in lines),
            filled_lines=self._interval(filled),
            tokens=tokens,
            generations=_mean(usage.generations for usage in usages),
            seconds={
                "mean": float(seconds.mean()),
                "median": float(np.median(seconds)),
                "95th percentile": float(np.quantile(seconds, 0.95)),
            },
            cost=self._cost(tokens),
        )

    def _cost(self, tokens: Mapping[str, float]) -> Cost:
        known = [one for one in self.seconds if one is not None]
        seconds = 1000 * _mean(known) if known and len(known) == len(self.seconds) else None
        per_hour = None if self.price is None else self.price.per_hour
        return Cost(
            tokens_read=1000 * sum(tokens[author] for author in _READ),
            tokens_generated=1000 * sum(tokens[author] for author in _GENERATED),
            machine_seconds=seconds,
            price=None if seconds is None or per_hour is None else seconds / 3600 * per_hour,
            currency=None if self.price is None else self.price.currency,
        )

    @cached_property
    def _lists(self) -> list[list[list[str]]]:
        """Each run's retrieved lists, as ids."""
        return [
            [[item.id for item in turn.retrieved] for turn in run.turns if turn.retrieved]
            if run
            else []
            for run in answered(self.runs)
        ]

    def _candidates(self, searches: int | None) -> list[set[str]]:
        """Distinct items that each run's first searches retrieved (None: all its searches)."""
        return [{item for found in lists[:searches] for item in found} for lists in self._lists]

    def _found(self, searches: int | None) -> NDArray[np.float64]:
        pairs = zip(self._candidates(searches), self.targets, strict=True)
        return np.array([target in found for found, target in pairs], dtype=np.float64)

    def _longer(self, sizes: NDArray[np.int64]) -> NDArray[np.float64] | None:
        if self.alone is None:
            return None
        return ((self.alone > 0) & (self.alone <= sizes)).astype(np.float64)

    def _turns(self) -> tuple[TurnPoint, ...]:
        """The curve; a run that stopped earlier keeps what it had."""
        points = []
        for searches in range(1, max((len(lists) for lists in self._lists), default=0) + 1):
            sizes = np.array([len(found) for found in self._candidates(searches)])
            longer = self._longer(sizes)
            points.append(
                TurnPoint(
                    searches=searches,
                    runs=sum(len(lists) >= searches for lists in self._lists),
                    candidates=float(sizes.mean()),
                    found=self._interval(self._found(searches)),
                    longer=None if longer is None else self._interval(longer),
                )
            )
        return tuple(points)

    def _interval(self, values: Iterable[float] | NDArray[np.floating]) -> Interval:
        table = np.array([list(values)], dtype=np.float64)
        (found,) = intervals(table, resamples=self.resamples, seed=self.seed)
        return found


def _counted(values: Iterable[str]) -> dict[str, int]:
    counts: Mapping[str, int] = Counter(values)
    return dict(sorted(counts.items()))


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
