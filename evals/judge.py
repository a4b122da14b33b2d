"""From stored rankings to rows: every list of every recommender, judged alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..graph.state import RunSettings
from .agent_figures import Runs, lists_of
from .config import AgentEntry, Entry, EvalRun, Past, TRMEntry
from .metrics import Checked, check, coverage, diversity, novelty, ranks, values
from .results import AgentFigures, Group, ListName, Row, Versus
from .significance import Interval, adjusted, intervals, paired_p
from .store import Ranking
from .task import Task

_EXAMPLES = 5


@dataclass(frozen=True)
class Answers:
    """What one recommender answered, for the users that it was asked about.

    `settings` are those of an agent's runs.
    """

    name: str
    entry: Entry
    past: Past
    rankings: Mapping[str, Ranking]
    settings: RunSettings | None = None


@dataclass(frozen=True)
class Judged:
    """One list: a `[metrics, users]` table, and its row without the comparison."""

    row: Row
    is_baseline: bool
    table: NDArray[np.float64]
    ranks: NDArray[np.int64]  # one-based, 0: absent


@dataclass(frozen=True)
class Judge:
    """Judges answers to one task. `embeddings` are the items' texts as unit vectors."""

    task: Task
    config: EvalRun
    embeddings: NDArray[np.float32]

    def lists(self, every: Sequence[Answers]) -> list[Judged]:
        """All lists in the order of the configuration, tested against the best baseline."""
        found = [judged for answers in every for judged in self._of(answers)]
        return self._compared(found)

    def agents(self, every: Sequence[Answers]) -> tuple[AgentFigures, ...]:
        """Figures of the agents' runs."""
        alone = self._alone(every)
        return tuple(
            Runs(
                recommender=answers.name,
                settings=answers.settings,
                runs=[None if one is None else one.run for one in self._rankings(answers)],
                targets=self._targets,
                alone=alone,
                resamples=self.config.resamples,
                seed=self.config.seed,
                seconds=[one.seconds for one in answers.rankings.values()],
                price=self.config.cost,
                searches=answers.entry.kind != "r2ec",
            ).figures()
            for answers in every
            if answers.settings is not None
        )

    def _of(self, answers: Answers) -> list[Judged]:
        rankings = self._rankings(answers)
        if isinstance(answers.entry, AgentEntry):
            free = answers.settings is not None and answers.settings.decoding == "free"
            runs = [None if one is None else one.run for one in rankings]
            named = lists_of(runs, free=free, searches=answers.entry.kind != "r2ec")
        else:
            named = {"ranked": [[] if one is None else list(one.items) for one in rankings]}
        failures = sum(one is None or one.failure is not None for one in rankings)
        return [self._judged(answers, name, lists, failures) for name, lists in named.items()]

    def _judged(
        self, answers: Answers, name: ListName, lists: Sequence[list[str | None]], failures: int
    ) -> Judged:
        k, users = self.config.k, self.task.users
        gone = answers.past == "excluded"
        checked = [
            check(items, k, self.task.data.item_index, user.history if gone else ())
            for items, user in zip(lists, users, strict=True)
        ]
        found = ranks(checked, self._targets)
        table = values(found, self.config.metrics, k)
        row = Row(
            recommender=answers.name,
            list=name,
            past=answers.past,
            users=len(users),
            failures=failures,
            short=sum(len(one.places) < k for one in checked),
            duplicates=sum(len(one.duplicates) for one in checked),
            unknown=sum(len(one.unknown) for one in checked),
            from_past=sum(len(one.past) for one in checked),
            examples=self._faults(checked),
            metrics=self._intervals(table),
            groups={
                group: Group(users=int(of.sum()), metrics=self._intervals(table[:, of]))
                for group, of in self.task.groups.items()
            },
            coverage=coverage(checked, len(self.task.data.items)),
            novelty=novelty(checked, self._owners, len(self.task.data.user_ids)),
            diversity=diversity(checked, self.task.data.item_index, self.embeddings),
            versus=None,
        )
        return Judged(row, not isinstance(answers.entry, AgentEntry), table, found)

    def _compared(self, found: Sequence[Judged]) -> list[Judged]:
        """With each row's difference to the best baseline under the same rule for the past as the
        agents'; without baselines as they are.
        """
        at = self.config.metrics.index(self.config.compare_by)
        baselines = [one for one in found if one.is_baseline and one.row.past == "excluded"]
        best = max(baselines, key=lambda one: one.table[at].mean(), default=None)
        if best is None:
            return list(found)
        others = [one for one in found if one is not best]
        test = {"resamples": self.config.resamples, "seed": self.config.seed}
        p_values = [paired_p(one.table[at], best.table[at], **test) for one in others]
        versus = {
            id(one): Versus(
                baseline=best.row.label,
                metric=self.config.compare_by,
                difference=intervals((one.table[at] - best.table[at])[None], **test)[0],
                p=p,
                p_adjusted=p_adjusted,
            )
            for one, p, p_adjusted in zip(others, p_values, adjusted(p_values), strict=True)
        }
        return [
            replace(one, row=one.row.model_copy(update={"versus": versus.get(id(one))}))
            for one in found
        ]

    def _alone(self, every: Sequence[Answers]) -> NDArray[np.int64] | None:
        """Where the TRM's own list, no preference given and the past excluded, holds the target."""
        for answers in every:
            entry = answers.entry
            plain = isinstance(entry, TRMEntry) and entry.preference == "none"
            if plain and answers.past == "excluded":
                lists = [[] if one is None else one.items for one in self._rankings(answers)]
                whole = [check(items, len(items), self.task.data.item_index) for items in lists]
                return ranks(whole, self._targets)
        return None

    def _rankings(self, answers: Answers) -> list[Ranking | None]:
        return [answers.rankings.get(user.id) for user in self.task.users]

    @property
    def _targets(self) -> list[str]:
        return [self.task.targets[user.id] for user in self.task.users]

    @cached_property
    def _owners(self) -> dict[str, float]:
        """How many users had each item in the training part."""
        counts = np.zeros(len(self.task.data.items))
        for sequence in self.task.split.train:
            counts[np.unique(sequence)] += 1
        return {item.id: float(n) for item, n in zip(self.task.data.items, counts, strict=True)}

    def _intervals(self, table: NDArray[np.float64]) -> dict[str, Interval]:
        found = intervals(table, resamples=self.config.resamples, seed=self.config.seed)
        return dict(zip(self.config.metrics, found, strict=True))

    def _faults(self, checked: Sequence[Checked]) -> tuple[str, ...]:
        told = []
        for user, one in zip(self.task.users, checked, strict=True):
            told += [f"user {user.id}: {item!r} repeats" for item in one.duplicates]
            told += [f"user {user.id}: {item!r} is unknown" for item in one.unknown]
            told += [f"user {user.id}: {item!r} is from the past" for item in one.past]
        return tuple(told[:_EXAMPLES])
