"""The rank node: the policy's answer, resolved to item ids, filled where it left lines open."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..errors import CatalogError, EncoderError, RequestError
from . import protocol
from .engine.base import Constraint
from .explanations import explanations
from .format_rules import check_format
from .fusion import reciprocal_rank_fusion
from .nodes import eligible, numbering, retrieve
from .resources import Resources
from .run import MIN_GENERATION, LimitReachedError, Step, closing
from .state import Recommendation, RunSettings, Source, State, StopReason, Usage
from .transcript import last_round, said_last

if TYPE_CHECKING:
    from ..tools.catalog import Catalog

_END_TOKENS = 2
_SLACK = 1.5  # a grammar lets a line be spelled in more tokens than the tokenizer would take


async def rank(resources: Resources, state: State) -> dict[str, Any]:
    """Get the answer from the policy, and make the response.

    A run that failed gets no generation: its answer is filled from the fused lists, or from the
    TRM alone where nothing was retrieved. With `on_limit="fail"` or `fill=False` nothing is.
    """
    step = Step(resources.engine, state)
    settings = step.settings
    stop_reason: StopReason = state["stop_reason"] or "no_answer"
    failure = state.get("failure")
    turns: Sequence[Mapping[str, Any]] = state.get("turns", [])
    numbers = numbering(turns)
    candidates = [resources.listed(item_id) for item_id in eligible(resources, state, numbers)]
    by_head = settings.rank == "head"
    written = ""  # of the head's list, as the policy would have written it
    answer: list[str | None] = []
    if failure is None:
        try:
            if by_head:
                written, answer = await _rank_by_head(resources, step, state, candidates)
            else:
                await _write_answer(step, stop_reason, candidates, numbers)
        except LimitReachedError as limit:
            stop_reason = limit.reason
            failure = {"reason": limit.reason, "detail": limit.detail}
    pieces = step.pieces()
    entries = protocol.parse_answer(written or said_last(pieces)) or []
    if not by_head:
        answer = protocol.resolve_entries(entries, candidates, numbers, settings.answer_form)
    retrievals = sum(turn["refused"] is None and bool(turn["preference"]) for turn in turns)
    violations = check_format(
        [*last_round(pieces), ("forced", written)],
        k=settings.k,
        retrievals=retrievals,
        entries=entries,
        resolved=answer,
        scripts=resources.scripts,
    )
    lines: list[tuple[str, Source]] = []
    if failure is None or settings.on_limit == "answer":
        lines = await _lines(resources, step, state, answer)
    scores = _best_scores(turns)
    explained: Mapping[str, Mapping[str, Any]] = {}
    if settings.explain:
        listed = [item_id for item_id, _ in lines]
        explained = explanations(listed, turns, state["history_ids"], resources.catalog)
    return finished(
        step,
        state,
        resources.catalog,
        lines,
        scores=scores,
        explained=explained,
        retrievals=retrievals,
        answer=answer,
        violations=violations,
        stop_reason=stop_reason,
        failure=failure,
    )


def finished(
    step: Step,
    state: State,
    catalog: Catalog,
    lines: Sequence[tuple[str, Source]],
    *,
    scores: Mapping[str, float],
    explained: Mapping[str, Mapping[str, Any]],
    retrievals: int,
    **changes: Any,
) -> dict[str, Any]:
    """Return the state update that ends a run: its list, what the run cost, and `changes`.

    `lines` are item ids with who put them there, best first; `scores` and `explained` are by id.
    """
    update = step.update(
        recommendations=[
            Recommendation(
                id=item_id,
                title=catalog.display_title(item_id),
                rank=position,
                source=source,
                score=scores.get(item_id),
                **explained.get(item_id, {}),
            ).model_dump()
            for position, (item_id, source) in enumerate(lines, 1)
        ],
        **changes,
    )
    transcript = step.transcript
    usage = Usage(
        prompt_tokens=transcript.count("prompt"),
        policy_tokens=transcript.count("policy"),
        guided_tokens=transcript.count("guided"),
        chat_tokens=transcript.count("chat"),
        forced_tokens=transcript.count("forced"),
        environment_tokens=transcript.count("environment", "user"),
        generations=int(state["counts"]["generations"]) + step.generations,
        retrievals=retrievals,
        seconds=state["counts"]["seconds"] + update["counts"]["seconds"],
    )
    return {**update, "usage": usage.model_dump()}


def check_ranker(resources: Resources, settings: RunSettings) -> None:
    """Raise RequestError where the head is to rank and none is loaded."""
    if settings.rank == "head" and resources.ranker is None:
        raise RequestError(
            "rank is 'head' and no recommendation head is loaded: name its folder in "
            "DEEPREC_HEAD, or set rank to 'generate'"
        )


async def _rank_by_head(
    resources: Resources,
    step: Step,
    state: State,
    candidates: Sequence[protocol.ListedItem],
) -> tuple[str, list[str | None]]:
    """Let the head order the candidates by the history and the last thought: one forward pass.

    Gives the list as the policy would have written it, for the format rules, and its item ids.
    Nothing of it enters the transcript but the end of the thought. Raises LimitReachedError.
    """
    from .r2ec.readings import user_ids

    if resources.ranker is None:
        raise RuntimeError("check_ranker lets no such run begin")
    said = step.text(since_list=True)
    if protocol.END_THINK not in said:
        step.write("forced", f"\n{protocol.END_THINK}")
    thought = protocol.parse_turn(said).thought
    history = [
        resources.listed(item) for item in state["history_ids"][-resources.ranker.history_length :]
    ]
    ids = user_ids(history, thought, resources.ranker.backbone.tokenizer)
    left = step.check_time()
    try:
        async with asyncio.timeout(left):
            user = await asyncio.wrap_future(resources.ranker.submit(ids))
            # In a thread: where the catalog has changed, the LLM reads what is new first.
            best = await asyncio.to_thread(
                resources.ranker.best,
                user,
                step.settings.k,
                among=[item.id for item in candidates],
            )
    except TimeoutError as error:
        raise LimitReachedError("time_budget", "the time budget ran out in the ranking") from error
    titles = {item.id: item.title for item in candidates}
    lines = [f"{rank}. {titles[item.id]}" for rank, item in enumerate(best, 1)]
    text = "\n".join(["", protocol.BEGIN_ANSWER, *lines, protocol.END_ANSWER])
    return text, [item.id for item in best]


async def _write_answer(
    step: Step,
    stop_reason: StopReason,
    candidates: Sequence[protocol.ListedItem],
    numbers: Mapping[str, int],
) -> None:
    """Let the policy write its list; raises LimitReachedError."""
    guided = step.settings.decoding == "guided"
    text = step.text(since_list=True)
    if protocol.parse_answer(text) is not None and not guided:
        return  # it wrote the list within its thought; the format rules say what that is worth
    if guided or stop_reason != "answered":
        step.write("forced", closing(text))
    if guided:
        await _choose_lines(step, candidates, numbers)
        return
    result = await step.generate(stop=(protocol.END_ANSWER,))
    if result.finish == "stop" and step.trainable:
        # Whether the policy ends here is its own doing: a trained one writes end-of-sequence.
        with suppress(LimitReachedError):  # the list is complete and stands without it
            await step.generate(max_tokens=_END_TOKENS)


async def _choose_lines(
    step: Step, candidates: Sequence[protocol.ListedItem], numbers: Mapping[str, int]
) -> None:
    """Guided answer: line by line the policy picks among what is retrieved and not yet listed."""
    by_number = step.settings.answer_form == "numbers"
    labels = [f"#{numbers[item.id]}" if by_number else item.title for item in candidates]
    lengths = {label: len(step.encode(f" {label}\n")) for label in labels}
    tokens = {label: max(MIN_GENERATION, int(_SLACK * n)) for label, n in lengths.items()}
    end = step.encode(protocol.END_ANSWER)
    for position in range(1, min(step.settings.k, len(labels)) + 1):
        number = step.encode(f"{position}.")
        room = step.room(reserve=len(number) + len(end) + 1)
        fitting = [label for label in labels if tokens[label] <= room]
        if not fitting:
            break  # the rest is filled
        step.write_ids("forced", number)
        result = await step.generate(
            max_tokens=max(tokens[label] for label in fitting),
            stop=("\n",),
            constraint=Constraint(choices=tuple(f" {label}\n" for label in fitting)),
            reserve=len(end) + 1,
        )
        written = step.pieces()[-1][1].strip() if result.finish == "stop" else ""
        if written not in labels:
            break  # cut off all the same; the rest is filled
        labels.remove(written)
    step.write_ids("forced", end)
    step.write_ids("forced", [step.eos_token_id])


async def _lines(
    resources: Resources, step: Step, state: State, answer: Sequence[str | None]
) -> list[tuple[str, Source]]:
    """K distinct items: the policy's own lines, then fused lists, then the TRM alone."""
    k = step.settings.k
    own: Source = "guided" if step.settings.decoding == "guided" else "policy"
    if step.settings.rank == "head":
        own = "head"
    lines: dict[str, Source] = {item: own for item in answer if item is not None}
    if step.settings.fill:
        fused = reciprocal_rank_fusion(
            [item["id"] for item in turn["retrieved"]] for turn in state.get("turns", [])
        )
        for item_id in eligible(resources, state, fused):
            lines.setdefault(item_id, "fused")
        if len(lines) < k:
            with suppress(CatalogError, EncoderError):  # a shorter list is better than none
                for item in await retrieve(resources, state, None, k + len(lines)):
                    lines.setdefault(item.id, "trm")
    return list(lines.items())[:k]


def _best_scores(turns: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for turn in turns:
        for item in turn["retrieved"]:
            scores[item["id"]] = max(item["score"], scores.get(item["id"], float("-inf")))
    return scores
