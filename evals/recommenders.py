"""Everything that can be judged, behind one interface: users in, a ranked list for each out.

A recommender never sees a target. To add one: a class with `recommend` here (or in a module of its
own), its fields as an `Entry` in config.py, and a case in `recommender_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..configuration import write_text
from ..errors import RequestError
from ..tools.retriever import RetrievalRequest, Retriever
from ..tools.trm.baselines import Markov
from ..tools.trm.vocabulary import Vocabulary, history_preference
from ..tools.workspace import Workspace
from .config import MarkovEntry, Past, PopularityEntry, RecBoleEntry, TRMEntry
from .recbole.peer import PeerResult, run_recbole
from .store import Ranking
from .task import Task, User

_BLOCK = 64  # users whose scores of all items are held at the same time


class Recommender(Protocol):
    """Ranks items for users."""

    def recommend(self, users: Sequence[User]) -> Iterator[Ranking]:
        """One ranking for each user, as it is ready, in any order.

        A user who can't be served gets a ranking with a `failure`. What is wrong with the list
        (repeated or unknown ids, too few) is found by whoever judges it.
        """
        ...


def recommender_of(
    entry: PopularityEntry | MarkovEntry | TRMEntry | RecBoleEntry,
    task: Task,
    workspace: Workspace,
    *,
    past: Past,
    depth: int,
    seed: int,
    fitted: Path,
) -> Recommender:
    """The recommender that a configuration names; lists hold `depth` items where so many are
    eligible. `fitted` is the file where what a peer of this entry answered is kept, so that it is
    fitted once. Raises DeepRecError where a part of the workspace is missing.
    """
    if isinstance(entry, RecBoleEntry):
        return Peer(entry, task, depth, past, seed, fitted)
    if isinstance(entry, TRMEntry):
        return TRMAlone(task, workspace.retriever, depth, past, entry.preference == "history")
    if isinstance(entry, MarkovEntry):
        markov = Markov(task.split.train, len(task.data.items))
        return Scored(task, markov.scores, depth, past)
    popular = task.popularity
    return Scored(task, lambda some: np.tile(popular, (len(some), 1)), depth, past)


@dataclass(frozen=True)
class Scored:
    """Ranks by scores of the whole catalog: `scores` takes histories as item indices, and gives
    `[users, items]`. Ties keep the order of the data set.
    """

    task: Task
    scores: Callable[[Sequence[NDArray[np.int64]]], NDArray[np.floating]]
    depth: int
    past: Past

    def recommend(self, users: Sequence[User]) -> Iterator[Ranking]:
        """See Recommender."""
        index, items = self.task.data.item_index, self.task.data.items
        for start in range(0, len(users), _BLOCK):
            block = users[start : start + _BLOCK]
            histories = [np.array([index[item] for item in user.history]) for user in block]
            table = self.scores(histories)
            for user, history, row in zip(block, histories, table, strict=True):
                order = np.argsort(-row, kind="stable")
                if self.past == "excluded":
                    order = order[~np.isin(order, history)]
                yield Ranking(user=user.id, items=tuple(items[at].id for at in order[: self.depth]))


@dataclass(frozen=True)
class Peer:
    """Ranks by a model of RecBole. It is fitted when it is first asked, for all test users and
    under both rules for the past, and its answers are kept in the file `fitted`.
    """

    entry: RecBoleEntry
    task: Task
    depth: int
    past: Past
    seed: int
    fitted: Path

    def recommend(self, users: Sequence[User]) -> Iterator[Ranking]:
        """See Recommender. Raises EvaluationError where RecBole's environment is missing, or what
        was kept is damaged.
        """
        ranked = {ranking.user: ranking for ranking in self._result().rankings}
        for user in users:
            found = ranked[user.id]
            items = found.past_included if self.past == "included" else found.past_excluded
            yield Ranking(user=user.id, items=tuple(items))

    def _result(self) -> PeerResult:
        if self.fitted.exists():
            return PeerResult.read(self.fitted, self.task.targets)
        result = run_recbole(
            self.task.data,
            self.entry.model,
            epochs=self.entry.epochs,
            seed=self.seed,
            threads=self.entry.threads,
            top=self.depth,
            options=self.entry.options,
            python=self.entry.python,
        )
        write_text(self.fitted, result.model_dump_json(indent=1) + "\n")
        return result


@dataclass(frozen=True)
class TRMAlone:
    """One list of the retriever for each user, without a preference or with the history's own;
    a wish takes its place.

    Users are asked one by one: in a batch a score may differ in its last digit, and a run that was
    cut off would end otherwise than one that was not. A user whose history nothing describes has
    no preference.
    """

    task: Task
    retriever: Retriever
    depth: int
    past: Past
    prefer: bool

    def recommend(self, users: Sequence[User]) -> Iterator[Ranking]:
        """See Recommender."""
        data, now = self.task.data, self.retriever.catalog.snapshot
        vocabulary = Vocabulary.build(data.items)
        for user in users:
            gone = frozenset(user.history) if self.past == "excluded" else frozenset()
            preference = user.wish.preference
            if preference is None and self.prefer:
                history = [data.item_index[item] for item in user.history]
                preference = history_preference(vocabulary, history)
            request = RetrievalRequest(
                history=user.history,
                preference=preference,
                k=min(self.depth, now.allowed(gone, user.wish.filters).count),
                exclude=gone,
                filters=user.wish.filters,
            )
            try:
                (found,) = self.retriever.retrieve([request])
            except RequestError as error:  # nothing is eligible, or nothing of the history is left
                yield Ranking(user=user.id, items=(), failure=str(error))
            else:
                yield Ranking(user=user.id, items=tuple(item.id for item in found))
