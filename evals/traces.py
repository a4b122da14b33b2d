"""Runs that the report tells: a few of each outcome, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..graph.nodes import numbering
from ..graph.state import RecommendationResponse
from .judge import Answers
from .results import Outcome, Trace, TracedItem, TracedTurn
from .task import Task, User

_HISTORY = 10  # latest items of the past


def tell(every: Sequence[Answers], task: Task, *, most: int) -> tuple[Trace, ...]:
    """At most `most` runs of each agent and outcome, the first in the order of the users."""
    return tuple(
        trace
        for answers in every
        if answers.settings is not None
        for trace in _of(answers, task, most)
    )


def _of(answers: Answers, task: Task, most: int) -> Iterator[Trace]:
    told: dict[str, int] = {}
    for user in task.users:
        ranking = answers.rankings.get(user.id)
        if ranking is None or ranking.run is None:
            continue
        outcome = _outcome(ranking.run, task.targets[user.id])
        told[outcome] = told.get(outcome, 0) + 1
        if told[outcome] <= most:
            yield _trace(answers, user, ranking.run, outcome, task)


def _outcome(run: RecommendationResponse, target: str) -> str:
    if run.failure is not None:
        return "failed"
    if any(line.id == target for line in run.recommendations):
        return "hit"
    if any(item.id == target for turn in run.turns for item in turn.retrieved):
        return "retrieved, then ranked out"
    return "never retrieved"


def _trace(
    answers: Answers, user: User, run: RecommendationResponse, outcome: str, task: Task
) -> Trace:
    target = task.targets[user.id]
    items = task.data.items
    numbered = answers.settings is not None and answers.settings.answer_form == "numbers"
    numbers = numbering(turn.model_dump() for turn in run.turns) if numbered else {}

    def title(item: str) -> str:
        return items[task.data.item_index[item]].title

    return Trace(
        recommender=answers.name,
        user=user.id,
        outcome=outcome,
        history=tuple(title(item) for item in user.history[-_HISTORY:]),
        target=title(target),
        turns=tuple(
            TracedTurn(
                thought=turn.thought,
                preference=turn.preference,
                refused=turn.refused,
                retrieved=tuple(
                    TracedItem(
                        title=item.title,
                        score=item.score,
                        hit=item.id == target,
                        number=numbers.get(item.id),
                    )
                    for item in turn.retrieved
                ),
            )
            for turn in run.turns
        ),
        list=tuple(
            Outcome(title=line.title, source=line.source, hit=line.id == target)
            for line in run.recommendations
        ),
        stop_reason=run.stop_reason,
        broken_rules=tuple(run.violations),
        failure=run.failure.detail if run.failure else None,
        tokens=run.usage.written_tokens,
        seconds=run.usage.seconds,
    )
