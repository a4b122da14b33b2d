"""The nodes of R2ec: think writes one thought, rank scores the catalog by the state after it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from ...errors import CatalogError, HeadError, RequestError
from ...tools.filters import Filters
from ...tools.retriever import ScoredItem
from .. import protocol
from ..explanations import explanations
from ..nodes import unwanted
from ..ranking import finished
from ..resources import Shelf
from ..run import LimitReachedError, Step
from ..state import OUTAGES, RunSettings, State, StopReason, Turn
from ..wishes import POOL, lean, leanings_of
from .ranker import HeadRanker
from .readings import CLOSING, OPENING, without_thought

_AROUND = 32  # tokens of the markers around a thought, more or less
_NEW = " It is new to the head, which scores it by its text alone."


@dataclass(frozen=True, kw_only=True)
class HeadShelf(Shelf):
    """What the nodes work with: engine, catalog, histories and the recommendation head."""

    ranker: HeadRanker


def check_asks_nobody(settings: RunSettings) -> None:
    """Raise RequestError for what R2ec doesn't do."""
    if settings.ask_before_search or settings.ask_after_ranking:
        raise RequestError(
            "R2ec asks nobody: leave ask_before_search and ask_after_ranking out, or ask the "
            "graph 'deeprec'"
        )


def needs(settings: RunSettings) -> tuple[int, int]:
    """Tokens of an answer, and of a thought with all that is written around it."""
    return 0, _AROUND + (settings.thought_tokens if settings.reasoning else 0)


async def think(resources: HeadShelf, state: State) -> dict[str, Any]:
    """Let the policy write its thought, `thought_tokens` long at most, and close it for it."""
    step = Step(resources.engine, state)
    if not step.settings.reasoning:
        step.write("forced", without_thought())
        return _closed(step, "answered")
    step.write("forced", OPENING)
    end = len(step.encode(CLOSING))
    try:
        said = await step.generate(
            max_tokens=step.settings.thought_tokens, stop=(protocol.END_THINK,), reserve=end
        )
    except LimitReachedError as limit:
        step.write("forced", CLOSING)  # it ranks by the history alone
        return _closed(step, limit.reason, limit.detail)
    closed = said.stop_string is not None
    step.write("forced", CLOSING.partition(protocol.END_THINK)[2] if closed else CLOSING)
    return _closed(step, "answered" if said.finish != "length" else "generation_length")


def _closed(step: Step, reason: StopReason, detail: str = "") -> dict[str, Any]:
    thought = protocol.parse_turn(step.text()).thought
    failed = bool(detail) and (
        step.settings.on_limit == "fail" or reason == "time_budget" or reason in OUTAGES
    )
    return step.update(
        next_node="rank",
        pending=None,
        turns=[Turn(thought=thought).model_dump()] if thought else [],
        stop_reason=reason,
        failure={"reason": reason, "detail": detail} if failed else None,
    )


async def rank(resources: HeadShelf, state: State) -> dict[str, Any]:
    """Order the whole catalog by the head, and make the response; nothing is decoded.

    A run whose thought failed is ranked by its history; with `on_limit="fail"` it has no list.
    """
    step = Step(resources.engine, state)
    settings = step.settings
    stop_reason, failure = state["stop_reason"], state.get("failure")
    found: list[ScoredItem] = []
    if failure is None or settings.on_limit == "answer":
        try:
            found = await _best(resources, step, state)
        except (CatalogError, HeadError) as error:
            stop_reason = "retrieval_failure"
            failure = {"reason": stop_reason, "detail": str(error)}
    ids = [item.id for item in found]
    reasons: dict[str, dict[str, Any]] = {}
    if settings.explain and ids:
        reasons = explanations(ids, [], state["history_ids"], resources.catalog)
        table = await asyncio.to_thread(resources.ranker.table)
        for new in table.untrained.intersection(ids):
            reasons[new]["reason"] += _NEW
    return finished(
        step,
        state,
        resources.catalog,
        [(item, "head") for item in ids],
        scores={item.id: item.score for item in found},
        explained=reasons,
        retrievals=0,
        answer=ids,
        violations=[],
        stop_reason=stop_reason,
        failure=failure,
    )


async def _best(resources: HeadShelf, step: Step, state: State) -> list[ScoredItem]:
    ranker, k = resources.ranker, step.settings.k
    user = await asyncio.wrap_future(ranker.submit(step.transcript.ids))
    leanings = leanings_of(state["leanings"])
    # In a thread: where the catalog has changed, the LLM reads what is new first.
    found = await asyncio.to_thread(
        ranker.best,
        user,
        k * POOL if leanings else k,
        exclude=unwanted(state),
        filters=Filters.all_of(state["where"]),
    )
    return lean(found, leanings, resources.catalog)[:k] if leanings else found
