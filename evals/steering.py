"""Steering: users state a wish, and lists are compared with those that they get without it.

A wish is made of the user's past and the catalog alone; targets are not at hand here. The idea is
that of preference discerning (Paischer et al., arXiv 2412.08604).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..errors import EvaluationError
from ..tools.filters import AttributeIndex, Filters
from ..tools.interactions import Item
from ..tools.titles import display_titles
from ..tools.trm.vocabulary import Vocabulary
from .config import AgentEntry, Entry, EvalRun, TRMEntry, Way, WishKind
from .metrics import Checked, check, ranks, values
from .results import Steered
from .significance import intervals
from .store import Ranking
from .task import Task, User, Wish

_LATEST = 20  # items of the past that wishes are made of
_TITLE_CHARS = 150


def ways_of(entry: Entry, kind: WishKind) -> tuple[Way, ...]:
    """How a recommender can be told such a wish; not at all for those that take none."""
    if isinstance(entry, AgentEntry):
        return ("words",)
    if isinstance(entry, TRMEntry):
        return ("preference",) if kind == "more_like" else ("preference", "filter")
    return ()


@dataclass(frozen=True, eq=False)
class Stated:
    """One user's wish in every form, and how far each item fulfils it, `[items]`: 1 or 0, or the
    cosine of its text to that of the item that the wish names.
    """

    words: str
    preference: str
    filters: Filters
    fit: NDArray[np.floating]

    def told(self, way: Way) -> Wish:
        """The wish in one form."""
        if way == "words":
            return Wish(words=self.words)
        if way == "filter":
            return Wish(filters=self.filters)
        return Wish(preference=self.preference)


class Wishes:
    """States wishes: only one of the main values of the user's past, drawn by `seed`; none of its
    commonest; more like one of its items, drawn too. A value counts where `k` items that the user
    has not had are left. `embeddings` are the items' texts as unit vectors.
    """

    def __init__(
        self, items: Sequence[Item], embeddings: NDArray[np.float32], *, k: int, seed: int
    ) -> None:
        self._index = {item.id: at for at, item in enumerate(items)}
        self._titles = display_titles(items)
        self._vocabulary = Vocabulary.build(items)
        primary = self._vocabulary.primary
        # A year stands as its decade in the vocabulary, and no filter knows that.
        self._values = {value for item in items for value in item.attributes.get(primary, ())}
        self._mask = lru_cache(maxsize=None)(AttributeIndex(items).mask)
        self._embeddings = embeddings
        self._k, self._seed = k, seed

    def of(self, kind: WishKind, users: Sequence[User]) -> dict[str, Stated]:
        """The wish of each user who can state one, by id. Raises EvaluationError where none can."""
        found = {}
        for at, user in enumerate(users):
            rng = np.random.default_rng([self._seed, at])
            past = [self._index[item] for item in user.history]
            if kind == "more_like":
                wish: Stated | None = self._more_like(int(rng.choice(past[-_LATEST:])))
            else:
                wish = self._of_value(kind, past, rng)
            if wish is not None:
                found[user.id] = wish
        if not found:
            raise EvaluationError(
                f"no user can state the wish {kind!r}: no attribute value of their latest items "
                f"leaves {self._k} items to recommend. Drop it from steering."
            )
        return found

    def _of_value(
        self, kind: WishKind, past: Sequence[int], rng: np.random.Generator
    ) -> Stated | None:
        vocabulary, attribute = self._vocabulary, self._vocabulary.primary
        terms = vocabulary.history_terms(past[-_LATEST:], len(vocabulary.terms))
        open_ = []
        for value in vocabulary.phrases(terms):
            if value not in self._values:
                continue
            only = kind == "only"
            filters = Filters.parse({attribute: value if only else {"not": [value]}})
            fit = self._mask(filters)
            if np.delete(fit, past).sum() < self._k:
                continue
            words = f"only {value}" if only else f"no {value}"
            preference = f"{attribute}: {value}" if only else words
            open_.append(Stated(words, preference, filters, fit.astype(float)))
        if not open_:
            return None
        return open_[int(rng.integers(len(open_)))] if kind == "only" else open_[0]

    def _more_like(self, item: int) -> Stated:
        title = self._titles[item][:_TITLE_CHARS]
        fit = self._embeddings @ self._embeddings[item]
        return Stated(f"more like {title}", f"similar to {title}", Filters(), fit)


@dataclass(frozen=True)
class Steering:
    """Compares lists with and without wishes."""

    task: Task
    config: EvalRun

    def figures(
        self,
        name: str,
        kind: WishKind,
        way: Way,
        stated: Mapping[str, Stated],
        before: Mapping[str, Ranking],
        after: Mapping[str, Ranking],
    ) -> Steered:
        """Over the users who stated the wish; a place that holds no item fulfils nothing."""
        asked = [user for user in self.task.users if user.id in stated]
        lists = [self._lists(rankings, asked) for rankings in (before, after)]
        fits = [self._fit(some, asked, stated) for some in lists]
        targets = [self.task.targets[user.id] for user in asked]
        metric = [
            values(ranks(some, targets), [self.config.compare_by], self.config.k)[0]
            for some in lists
        ]
        rows = (*fits, fits[1] - fits[0], *metric, metric[1] - metric[0])
        found = intervals(np.array(rows), resamples=self.config.resamples, seed=self.config.seed)
        return Steered(
            recommender=name,
            wish=kind,
            way=way,
            example=stated[asked[0].id].words,
            users=len(asked),
            failures=sum(after[user.id].failure is not None for user in asked),
            fit_before=found[0],
            fit_after=found[1],
            fit_change=found[2],
            metric_before=found[3],
            metric_after=found[4],
            metric_change=found[5],
        )

    def _lists(self, rankings: Mapping[str, Ranking], asked: Sequence[User]) -> list[Checked]:
        known: Collection[str] = self.task.data.item_index
        return [
            check(rankings[user.id].items, self.config.k, known, user.history) for user in asked
        ]

    def _fit(
        self, lists: Sequence[Checked], asked: Sequence[User], stated: Mapping[str, Stated]
    ) -> NDArray[np.float64]:
        index, k = self.task.data.item_index, self.config.k
        return np.array(
            [
                sum(float(stated[user.id].fit[index[item]]) for item in one.places if item) / k
                for one, user in zip(lists, asked, strict=True)
            ]
        )
