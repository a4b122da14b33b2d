"""The nodes of the loop: read_request, then think and call_trm in turns, then rank (ranking.py).

think lets the policy reason until it asks for a retrieval or closes its thought; call_trm answers
with what the TRM found. Free decoding leaves everything to the policy; guided decoding adds a
grammar for the preference and for the choice to go on, and nothing else.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from langgraph.types import Overwrite

from ..errors import CatalogError, EncoderError, RequestError
from ..tools.filters import Filters
from ..tools.retriever import RetrievalRequest
from ..tools.titles import sanitise
from . import protocol
from .engine.base import Constraint
from .memory import Memory
from .requests import resolve_request
from .resources import Resources, Shelf
from .run import LimitReachedError, Step, answer_tokens
from .state import (
    OUTAGES,
    RecommendationRequest,
    RetrievedItem,
    RunSettings,
    State,
    StopReason,
    Turn,
)
from .transcript import segment
from .wishes import POOL, lean, leanings_of

# Guided thoughts are free, but for their first words: an untuned model that is given none copies
# the prompt instead of reasoning about the user.
_LEADS = (
    "This user seems to like",
    "Another side of this user is",
    "What is still missing here is",
)
_LAST_LEAD = "All in all, this user will enjoy"
_PREFERENCE_TOKENS = 64
_LEAST_THOUGHT = 256  # tokens that a run must have for its thoughts and lists
_REMEMBERED = 8  # likes, and dislikes, of earlier runs that the prompt tells
_FREE_WORD = "[a-z]{2,12}(-[a-z]{2,12})?"
_FREE_PHRASE = f"{_FREE_WORD}( {_FREE_WORD}){{0,3}}"
_REGEX_SPECIAL = re.compile(r"([\\^$.|?*+()\[\]{}])")


def read_request(
    resources: Shelf,
    request: RecommendationRequest,
    defaults: RunSettings,
    memory: Memory | None = None,
    write: Callable[..., list[dict[str, str]]] = protocol.build_messages,
    needs: Callable[[RunSettings], tuple[int, int]] = lambda run: (
        answer_tokens(run),
        _LEAST_THOUGHT,
    ),
) -> dict[str, Any]:
    """Check a request against the catalog and write the prompt. Raises RequestError.

    `memory` is the user's: what they told before is read, and what they tell now is added.
    `write` makes the prompt's messages, of the arguments of protocol.build_messages. `needs` says
    how many tokens a run takes for its answer, and for its thoughts at least.
    """
    started = time.monotonic()
    engine = resources.engine
    notes = memory.notes() if memory else []
    rejected = [note.item for note in notes if note.kind == "rejected" and note.item]
    settings, history, wishes = resolve_request(
        request, defaults, resources.catalog, resources.histories, rejected
    )
    read = [resources.listed(item) for item in history[-settings.history_length :]]
    messages = write(
        read,
        k=settings.k,
        answer_form=settings.answer_form,
        wishes=wishes.words,
        likes=[sanitise(note.about) for note in notes if note.kind == "like"][-_REMEMBERED:],
        dislikes=[sanitise(note.about) for note in notes if note.kind == "dislike"][-_REMEMBERED:],
    )
    prompt: list[int] = engine.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    total = min(settings.limits.max_total_tokens, engine.max_model_len)
    answer, thought = needs(settings)
    if len(prompt) + answer + thought > total:
        raise RequestError(
            f"the prompt takes {len(prompt)} of {total} tokens and the answer about {answer}, "
            "which leaves no room to think: lower history_length or k, or raise the engine's "
            "max_model_len"
        )
    if memory:
        memory.add_tastes(wishes.tastes)
    return {
        "run": settings.model_dump(mode="json"),
        "model": engine.name,
        "user": request.user_id,
        "history_ids": list(history),
        "where": wishes.where,
        "leanings": [asdict(leaning) for leaning in wishes.leanings],
        "excluded": [*rejected, *wishes.named],
        "understood_wishes": [wish.model_dump() for wish in wishes.understood],
        "round_began": {"turns": 0, "seconds": 0.0},
        "segments": Overwrite([segment("prompt", prompt)]),
        "turns": Overwrite([]),
        "counts": Overwrite({"seconds": time.monotonic() - started, "generations": 0.0}),
        "pending": None,
        "stop_reason": None,
        "failure": None,
    }


def this_round(state: State) -> list[dict[str, Any]]:
    """Turns since the user last sent an answer back; all where that never happened."""
    return state.get("turns", [])[int(state["round_began"]["turns"]) :]


async def think(resources: Resources, state: State) -> dict[str, Any]:
    """Let the policy reason until it asks for a retrieval, closes its thought, or hits a limit."""
    step = Step(resources.engine, state)
    try:
        if step.settings.decoding == "free":
            reason = await _think_freely(step, searches=len(this_round(state)))
        else:
            reason = await _think_guided(resources, step, state)
    except LimitReachedError as limit:
        return _stop(step, limit.reason, limit.detail)
    parsed = protocol.parse_turn(step.text(since_list=True))
    if reason is not None:
        return _stop(step, reason)
    return step.update(
        next_node="call_trm", pending={"thought": parsed.thought, "preference": parsed.preference}
    )


def _stop(step: Step, reason: StopReason, detail: str = "") -> dict[str, Any]:
    """End the thinking: keep the last thought, and say why it ended where no list will come."""
    failed = reason != "answered" and (
        step.settings.on_limit == "fail" or reason == "time_budget" or reason in OUTAGES
    )
    parsed = protocol.parse_turn(step.text(since_list=True))
    turns = [Turn(thought=parsed.thought).model_dump()] if parsed.thought else []
    return step.update(
        next_node="rank",
        pending=None,
        turns=turns,
        stop_reason=reason,
        failure={"reason": reason, "detail": detail or f"stopped by {reason}"} if failed else None,
    )


async def _think_freely(step: Step, *, searches: int) -> StopReason | None:
    """Generate once. Returns why the thinking is over, None where a retrieval is asked for."""
    result = await step.generate(
        stop=(protocol.END_PREFERENCE, protocol.END_THINK),
        reserve=step.answer_reserve(),
    )
    if result.finish == "length":
        full = step.room(reserve=step.answer_reserve()) <= 0
        return "trajectory_length" if full else "generation_length"
    if result.finish == "eos":
        return "no_answer"
    if result.stop_string == protocol.END_THINK:
        return "answered"
    return "max_retrievals" if searches >= step.limits.max_retrievals else None


async def _think_guided(resources: Resources, step: Step, state: State) -> StopReason | None:
    """Think freely, then choose by grammar: search (and for what) or stop.

    Returns why the thinking is over, None where a retrieval is asked for.
    """
    reserve = step.answer_reserve()
    turns = this_round(state)
    # A refused search doesn't count as one that was made, but does towards their bound.
    may_stop = sum(turn["refused"] is None for turn in turns) >= step.limits.min_retrievals
    may_search = len(turns) < step.limits.max_retrievals
    lead = _LEADS[len(turns) % len(_LEADS)] if may_search else _LAST_LEAD
    step.write("forced", lead if turns else f"{protocol.BEGIN_THINK}\n{lead}")
    end = protocol.END_THINK if may_stop else protocol.BEGIN_ANSWER
    # What is written after it for the policy must not be taken from the answer's room.
    opening = len(step.encode(f"\n{protocol.BEGIN_PREFERENCE}"))
    thought = await step.generate(
        max_tokens=step.settings.thought_tokens,
        stop=("\n", protocol.BEGIN_PREFERENCE, protocol.BEGIN_ITEMS, end),
        reserve=reserve + opening,
    )
    if thought.stop_string == protocol.END_THINK:
        return "answered"
    if not may_search:
        return "max_retrievals"
    if thought.stop_string != protocol.BEGIN_PREFERENCE:
        step.write("forced", "\n")
        if not may_stop:
            step.write("forced", protocol.BEGIN_PREFERENCE)
        else:
            options = (protocol.BEGIN_PREFERENCE, protocol.END_THINK)
            choice = await step.generate(
                max_tokens=32, stop=options, constraint=Constraint(choices=options), reserve=reserve
            )
            if choice.stop_string == protocol.END_THINK:
                return "answered"
            if not choice.ids:
                step.write("forced", protocol.BEGIN_PREFERENCE)
    used = [turn["preference"] for turn in state["turns"] if turn["preference"]]
    vocabulary = resources.vocabulary(state["history_ids"], used)
    preference = await step.generate(
        max_tokens=_PREFERENCE_TOKENS,
        stop=(protocol.END_PREFERENCE,),
        constraint=Constraint(regex=preference_regex(vocabulary)),
        reserve=reserve,
    )
    if not preference.ids:
        step.write("forced", f" {next(iter(vocabulary), protocol.ANYTHING)} ")
    if preference.stop_string is None:
        step.write("forced", protocol.END_PREFERENCE)
    return None


def preference_regex(vocabulary: Sequence[str]) -> str:
    """Grammar of a guided preference: one of the catalog's words, then up to two more phrases,
    each the catalog's or free.

    With an empty vocabulary the first phrase is free as well.
    """
    words = [_REGEX_SPECIAL.sub(r"\\\1", value) for value in vocabulary]
    lead = f"({'|'.join(words or [_FREE_PHRASE])})"
    more = f"(; ({'|'.join([*words, _FREE_PHRASE])})){{0,2}}"
    end = _REGEX_SPECIAL.sub(r"\\\1", protocol.END_PREFERENCE)
    return f" {lead}{more} {end}"


async def call_trm(resources: Resources, state: State) -> dict[str, Any]:
    """Answer the pending preference with the TRM's list, or refuse it in words."""
    step = Step(resources.engine, state)
    pending = state["pending"] or {}
    written = protocol.parse_turn(step.text(since_list=True)).preference
    preference: str | None = pending["preference"]
    edited = preference != written  # by a person, or by a client that changed the thread's state
    if edited:
        preference = protocol.normalise_preference(sanitise(preference or "")) or None
    turns = state.get("turns", [])
    refused = refusal(preference, this_round(state))
    found: list[RetrievedItem] = []
    if refused is None:
        try:
            left = step.check_time()
            async with asyncio.timeout(left):
                wish = protocol.searched_preference(preference)
                found = await retrieve(resources, state, wish, step.settings.retrieve_n)
        except (TimeoutError, LimitReachedError):
            return _stop(step, "time_budget", "the time budget ran out in a retrieval")
        except (CatalogError, EncoderError) as error:
            return _stop(step, "retrieval_failure", str(error))
    turn = Turn(
        thought=pending["thought"],
        preference=preference,
        retrieved=found,
        refused=refused,
        asked_by="user" if edited else "policy",
    ).model_dump()
    numbers = numbering([*turns, turn])
    text = (
        protocol.render_refusal(refused)
        if refused is not None
        else protocol.render_retrieved(
            shown(resources, [item.id for item in found], step.settings),
            numbers,
            step.settings.answer_form,
        )
    )
    if edited and preference is not None:
        text = protocol.render_edit(preference) + text
    ids = step.encode(text)
    if len(ids) > step.room(reserve=step.answer_reserve()):
        return _stop(step, "trajectory_length", "a retrieved list doesn't fit any more")
    step.write_ids("environment", ids)
    return step.update(pending=None, turns=[turn])


def shown(
    resources: Resources, item_ids: Iterable[str], settings: RunSettings
) -> list[protocol.ListedItem]:
    """Return retrieved items as the policy reads them."""
    items = [resources.listed(item_id) for item_id in item_ids]
    return items if settings.list_attributes else [replace(item, attributes=()) for item in items]


def refusal(preference: str | None, turns: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a preference is not searched for after these turns; None where it is."""
    if preference is None:
        return "no preference stands between the markers"
    key = protocol.preference_key(preference)
    asked = {protocol.preference_key(t["preference"]) for t in turns if t["preference"]}
    return "this preference was searched for already; try another one" if key in asked else None


async def retrieve(
    resources: Resources, state: State, preference: str | None, n: int
) -> list[RetrievedItem]:
    """Return the TRM's best `n` eligible items; fewer where the filters leave fewer.

    Where the user leans to or away from an item, they are the best of a larger pool, reordered.
    """
    filters = Filters.all_of(state["where"])
    exclude = unwanted(state)
    most = resources.catalog.snapshot.allowed(exclude, filters).count
    leanings = leanings_of(state["leanings"])
    request = RetrievalRequest(
        history=tuple(state["history_ids"]),
        preference=preference,
        k=min(n * POOL if leanings else n, most),
        exclude=exclude,
        filters=filters,
    )
    scored = await asyncio.wrap_future(resources.retriever.submit(request))
    if leanings:
        scored = lean(scored, leanings, resources.catalog)[:n]
    return [
        RetrievedItem(id=item.id, title=resources.catalog.display_title(item.id), score=item.score)
        for item in scored
    ]


def unwanted(state: State) -> frozenset[str]:
    """Ids of items that are never listed: those of the history and those that the user refused."""
    return frozenset([*state["history_ids"], *state["excluded"]])


def eligible(resources: Resources, state: State, item_ids: Iterable[str]) -> list[str]:
    """Those of the items that may be listed now: a later round can rule out what was found."""
    now = resources.catalog.snapshot
    ids = list(item_ids)
    may = now.allowed(unwanted(state), Filters.all_of(state["where"]))
    return [id_ for id_, held in zip(ids, may.of(now.positions(ids)), strict=True) if held]


def numbering(turns: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Number of each retrieved item, counted from 1 through all turns by first appearance."""
    ids = dict.fromkeys(item["id"] for turn in turns for item in turn["retrieved"])
    return {id_: number for number, id_ in enumerate(ids, 1)}
