"""What every recommender is asked: test users with their past, and what they took next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..errors import EvaluationError
from ..tools.filters import Filters
from ..tools.interactions import InteractionData, Split
from ..tools.trm.baselines import popularity

_HEAD = 0.2  # share of the catalog that counts as popular
_COLD = 5  # an item with fewer interactions in training counts as cold


@dataclass(frozen=True)
class Wish:
    """What a user asks for beside the past, in the form that the recommender takes."""

    words: str | None = None  # as people say it
    preference: str | None = None  # as the TRM reads it
    filters: Filters = field(default_factory=Filters)


@dataclass(frozen=True)
class User:
    """What a recommender may know: the past as item ids, oldest first, and what the user asks for.
    Not the target.
    """

    id: str
    history: tuple[str, ...]
    wish: Wish = Wish()


@dataclass(frozen=True, eq=False)
class Task:
    """Test users in the order of the data set, and the held-out item of each."""

    data: InteractionData
    split: Split
    users: tuple[User, ...]
    targets: Mapping[str, str]  # user id → item id

    @classmethod
    def of(cls, data: InteractionData, split: Split, *, limit: int | None, seed: int) -> Task:
        """All test users, or a random sample of them that depends on `seed` alone.

        Raises EvaluationError where there is none.
        """
        rows = np.flatnonzero(split.test >= 0)
        if not len(rows):
            raise EvaluationError(
                f"data set {data.name!r} has no test user: none of its {len(data.user_ids)} users "
                "has three interactions. Give longer histories."
            )
        if limit is not None and limit < len(rows):
            rows = np.sort(np.random.default_rng(seed).permutation(rows)[:limit])
        ids = [item.id for item in data.items]
        users = tuple(
            User(data.user_ids[row], tuple(ids[item] for item in split.test_history(int(row))))
            for row in rows
        )
        targets = {user.id: ids[split.test[row]] for user, row in zip(users, rows, strict=True)}
        return cls(data, split, users, targets)

    @cached_property
    def popularity(self) -> NDArray[np.float64]:
        """How often each item occurs in the training part, `[items]`."""
        return popularity(self.split.train, len(self.data.items))

    @cached_property
    def groups(self) -> dict[str, NDArray[np.bool_]]:
        """Which users, `[users]`, belong to each group that is judged apart."""
        target = np.array([self.data.item_index[item] for item in self.targets.values()])
        lengths = np.array([len(user.history) for user in self.users])
        middle = int(np.median(lengths))
        counts = self.popularity[target]
        # Ties take the catalog's order, so that the head has the size that its name says.
        place = np.empty(len(self.popularity), dtype=np.int64)
        place[np.argsort(-self.popularity, kind="stable")] = np.arange(len(place))
        popular = place[target] < _HEAD * len(place)
        cold = counts < _COLD
        return {
            f"warm target ({_COLD} or more in training)": ~cold,
            f"cold target (fewer than {_COLD})": cold,
            f"short history (at most {middle})": lengths <= middle,
            f"long history (more than {middle})": lengths > middle,
            f"popular target (of the top {_HEAD:.0%} of items)": popular,
            "tail target (of the rest)": ~popular,
        }

    @property
    def repeats(self) -> int:
        """Users whose target is in their past: no list that excludes the past can hit it."""
        return sum(self.targets[user.id] in user.history for user in self.users)
