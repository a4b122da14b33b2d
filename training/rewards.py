"""Hierarchical rewards (METHOD.md §4; arXiv 2505.16810): each a function, combined by stage.

The authors' format rule and point reward mind neither a list that names one title ten times nor
titles that were never retrieved, and a repeated preference earns as much as a new one. `Rules`
says what such lines and preferences are worth here. All matching is by item id.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, model_validator

from ..graph import protocol
from ..graph.format_rules import AUTHORS_RULES, Violation
from ..graph.likeness import mean_cosines
from ..graph.state import OUTAGES
from ..tools.trm.preferences import embed_preferences
from .trajectories import Rewards, Trajectory

if TYPE_CHECKING:
    from ..tools.catalog import Catalog
    from ..tools.text_encoder import TextEncoder

RewardName = Literal["format", "invocation", "diversity", "hit", "rank", "point"]
REWARDS: tuple[RewardName, ...] = get_args(RewardName)

Stage = Literal["cold_start", "recommendation"]
STAGES: Mapping[Stage, tuple[RewardName, ...]] = {
    "cold_start": ("format", "invocation", "diversity"),
    "recommendation": ("format", "hit", "rank", "point"),
}
"""What each stage is trained on. The other rewards are computed for the log."""

Rules = Literal["strict", "zero", "authors"]
"""What repetition and invention are worth.

strict: a line that repeats, or names nothing that was retrieved, breaks the format. zero: such a
line breaks nothing and scores nothing. authors: the authors' rules as they are, a line scores
wherever its title is found in the catalog, and as often as it stands there. A preference that was
asked before counts for nothing but under `authors`.
"""

FormatRule = Violation | Literal["unfinished"]
"""A rule of graph/format_rules.py, or `unfinished`: a limit ended the run (DESIGN decision 3)."""

_AT_MOST = 3
_STEP = 0.5
_DIVERSITY = 0.2
_RANK = 0.2
_POINT = 10.0


def format_scores(
    violations: Sequence[Violation], *, finished: bool, rules: Rules = "strict"
) -> dict[FormatRule, float]:
    """Score per rule, 0 if kept and -1 if broken. METHOD.md §4, "format = -1 when".

    Only `strict` holds a policy to `duplicate_line` and `not_retrieved`, which are not the
    authors'. `finished` is False for a run that a limit ended.
    """
    held: tuple[Violation, ...] = get_args(Violation) if rules == "strict" else AUTHORS_RULES
    scores: dict[FormatRule, float] = {rule: -float(rule in violations) for rule in held}
    return {**scores, "unfinished": -float(not finished)}


def format_reward(scores: Mapping[FormatRule, float]) -> float:
    """0 if every rule is kept, else -1. METHOD.md §4, format."""
    return min(scores.values())


def invocation_reward(retrievals: int) -> float:
    """0.5·(min(n, 3) - 1) for n >= 1 retrievals, 0 for none. METHOD.md §4, invocation."""
    return _STEP * (min(retrievals, _AT_MOST) - 1) if retrievals >= 1 else 0.0


def diversity_reward(preferences: NDArray[np.float32]) -> float:
    """0.2·(1 - mean pairwise cosine), 0 for fewer than two. METHOD.md §4, diversity.

    `preferences` float32 [n, dim] are the text embeddings of p_1 … p_n, of any length but 0.
    """
    if len(preferences) < 2:
        return 0.0
    return _DIVERSITY * (1.0 - mean_cosine(preferences))


def mean_cosine(vectors: NDArray[np.float32]) -> float:
    """Mean cosine over all pairs of two or more vectors [n, dim]."""
    cosines = _unit(vectors) @ _unit(vectors).T
    return float(cosines[np.triu_indices(len(vectors), k=1)].mean())


def hit_reward(answer: Sequence[str | None], target: str, k: int) -> float:
    """1 if the target is among the first K lines, else 0. METHOD.md §4, hit and rank: its 1."""
    return float(target in answer[:k])


def rank_reward(answer: Sequence[str | None], target: str, k: int) -> float:
    """0.2·(K - r) for a target first named at zero-based rank r < K, else 0. METHOD.md §4, hit
    and rank: the rest of it.
    """
    return _RANK * (k - answer.index(target)) if target in answer[:k] else 0.0


def point_reward(similarities: Sequence[float], k: int) -> float:
    """10·Σ w_i s_i / Σ w_i with w_i = (1 - i/K)², i the zero-based line. METHOD.md §4, point.

    `similarities` are the s_i of at most K lines; lines that are not there count as 0.
    """
    weights = (1.0 - np.arange(k) / k) ** 2
    given = np.zeros(k)
    given[: len(similarities)] = similarities
    return float(_POINT * (weights @ given) / weights.sum())


class RewardConfig(BaseModel):
    """What runs are rewarded for in one stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: Stage
    # What repetition and invention are worth.
    rules: Rules = "strict"
    # Factor of each reward of the stage; one that is not named counts once.
    weights: dict[str, float] = {}

    @model_validator(mode="after")
    def _weights_name_rewards(self) -> RewardConfig:
        used = STAGES[self.stage]
        for name, weight in self.weights.items():
            if name not in used:
                what = "no reward" if name not in REWARDS else f"no reward of stage {self.stage!r}"
                raise ValueError(
                    f"weights name {name!r}, which is {what}: take some of {', '.join(used)}"
                )
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {name!r} is {weight}: take a finite number")
        if not any(self.weight(name) for name in used):
            raise ValueError("every weight is 0, so that nothing is rewarded: set one of them")
        return self

    def weight(self, name: RewardName) -> float:
        """Factor of a reward of the stage."""
        return self.weights.get(name, 1.0)

    def total(self, rewards: Rewards) -> float | None:
        """Weighted sum of the stage's rewards, None where one that counts is None."""
        terms = [
            (self.weight(name), getattr(rewards, name))
            for name in STAGES[self.stage]
            if self.weight(name)
        ]
        if any(value is None for _, value in terms):
            return None
        return float(sum(weight * value for weight, value in terms))


class ItemLikeness:
    """How alike two items are: the mean of the cosines of their text and their ID embeddings.

    Args:
        ids: item ids.
        text: text embeddings [n, text_dim] of the items.
        vectors: the TRM's vectors of them [n, dim], which are its ID embeddings (METHOD.md §3,
            e_v); of items that were not in its training they are made of the text.

    """

    def __init__(
        self, ids: Sequence[str], text: NDArray[np.float32], vectors: NDArray[np.float32]
    ) -> None:
        self._at = {id_: position for position, id_ in enumerate(ids)}
        self._tables = (text, vectors)

    @classmethod
    def of(cls, catalog: Catalog) -> ItemLikeness:
        """Items and embeddings of a catalog, as they are now."""
        now = catalog.snapshot
        return cls(now.ids, now.text_embeddings, now.vectors)

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._at

    def __call__(self, items: Sequence[str | None], target: str) -> list[float]:
        """Likeness of each item to the target, -1 to 1; 0 for None. Both must be known."""
        rows = [self._at[item] for item in items if item is not None]
        found = iter(mean_cosines(self._tables, rows, self._at[target]).tolist())
        return [0.0 if item is None else next(found) for item in items]


class Rewarder:
    """Rewards of batches of runs. One call of the encoder and one look-up of titles a batch."""

    def __init__(self, config: RewardConfig, encoder: TextEncoder, catalog: Catalog) -> None:
        self.config = config
        self._encoder = encoder
        self._catalog = catalog
        self._likeness = ItemLikeness.of(catalog)

    def __call__(self, runs: Sequence[Trajectory]) -> list[Rewards]:
        """Rewards of each run, its total in the configured stage among them.

        A run that the engine or the retriever failed has none, nor has one whose course a user
        changed: that was not the policy's doing.
        Without a target, or with one that the catalog does not hold, the outcome's rewards are
        None; where the format is broken they are 0.
        """
        asked = [counted_preferences(run, self.config.rules) for run in runs]
        texts = [text for preferences in asked for text in preferences]
        vectors = embed_preferences(self._encoder, texts) if texts else np.zeros((0, 1), np.float32)
        answers = self._answers(runs)
        rewarded = []
        start = 0
        for run, preferences, answer in zip(runs, asked, answers, strict=True):
            own = vectors[start : start + len(preferences)]
            start += len(preferences)
            rewarded.append(self._reward(run, own, answer))
        return rewarded

    def _reward(
        self, run: Trajectory, preferences: NDArray[np.float32], answer: Sequence[str | None]
    ) -> Rewards:
        if run.stop_reason in OUTAGES or run.with_people:
            return Rewards()
        formed = format_reward(self.format_scores(run))
        hit: float | None = None
        rank: float | None = None
        point: float | None = None
        if run.target is not None and run.target in self._likeness:
            hit = rank = point = 0.0
            if formed == 0:
                k = run.settings.k
                hit = hit_reward(answer, run.target, k)
                rank = rank_reward(answer, run.target, k)
                point = point_reward(self._likeness(answer[:k], run.target), k)
        rewards = Rewards(
            format=formed,
            invocation=invocation_reward(len(preferences)),
            diversity=diversity_reward(preferences),
            hit=hit,
            rank=rank,
            point=point,
        )
        return rewards.model_copy(update={"total": self.config.total(rewards)})

    def format_scores(self, run: Trajectory) -> dict[FormatRule, float]:
        """Score per format rule, for the log."""
        return format_scores(run.violations, finished=is_finished(run), rules=self.config.rules)

    def _answers(self, runs: Sequence[Trajectory]) -> list[list[str | None]]:
        """Item ids of the answers' lines, as the rules let them count."""
        if self.config.rules != "authors":
            return [_first_named(run.answer) for run in runs]
        titled = [run for run in runs if run.settings.answer_form == "titles"]
        now = self._catalog.snapshot
        items = [
            protocol.ListedItem(id_, title) for id_, title in zip(now.ids, now.titles, strict=True)
        ]
        entries = [entry for run in titled for entry in run.entries]
        # Lines that the policy did not read off a list count as well, if their title exists.
        found = iter(protocol.resolve_entries(entries, items, {}, "titles"))
        return [
            [next(found) for _ in run.entries]
            if run.settings.answer_form == "titles"
            else list(run.answer)
            for run in runs
        ]


def is_finished(run: Trajectory) -> bool:
    """Whether the policy ended the run itself, and no limit did."""
    return run.failure is None and run.stop_reason == "answered"


def counted_preferences(run: Trajectory, rules: Rules) -> list[str]:
    """Preferences that count as retrievals: those that were answered with a list.

    Under the authors' rules also those that were refused for being asked before.
    """
    return [
        turn.preference
        for turn in run.turns
        if turn.preference is not None and (turn.refused is None or rules == "authors")
    ]


def _first_named(answer: Sequence[str | None]) -> list[str | None]:
    seen: set[str | None] = set()
    named: list[str | None] = []
    for item in answer:
        named.append(None if item in seen else item)
        seen.add(item)
    return named


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    # A vector of length 0 is like nothing.
    unit: NDArray[np.float32] = vectors / np.where(lengths == 0, 1, lengths)
    return unit
