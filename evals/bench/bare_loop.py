"""The agent's loop without LangGraph: the least that a run costs, and the lock-step schedule.

Runs are played as rollouts are: free decoding, a limit ends a run without a list. The generations
and searches that are asked for, and the transcripts, are those of the graph.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from ...graph import protocol
from ...graph.engine.base import Generation, GenerationRequest
from ...graph.format_rules import Violation, check_format
from ...graph.nodes import numbering, refusal, shown
from ...graph.resources import Resources
from ...graph.run import MIN_GENERATION, answer_tokens, generation_seed
from ...graph.state import RunSettings, Turn
from ...graph.transcript import Author, Segment, Transcript, pieces, segment
from ...tools.retriever import RetrievalRequest

_END_TOKENS = 2  # for the end of the sequence, after a list that is complete


@dataclass
class Played:
    """What a run left behind."""

    segments: list[Segment] = field(default_factory=list)
    turns: list[dict[str, object]] = field(default_factory=list)
    answer: list[str | None] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)


async def play(resources: Resources, history: Sequence[str], settings: RunSettings) -> Played:
    """Play one run; it waits for its own generations and searches alone."""
    run = _Run(resources, history, settings)
    async for _ in run.turns():
        pass
    return run.finished()


async def play_in_lock_step(
    resources: Resources, histories: Sequence[Sequence[str]], settings: Sequence[RunSettings]
) -> list[Played]:
    """Play runs as the paper's authors do: in each turn all wait for the slowest."""
    runs = [_Run(resources, *each) for each in zip(histories, settings, strict=True)]
    going = [run.turns() for run in runs]
    while going:
        went_on = await asyncio.gather(*(anext(turns, None) for turns in going))
        going = [turns for turns, on in zip(going, went_on, strict=True) if on is not None]
    return [run.finished() for run in runs]


class _Run:
    def __init__(self, resources: Resources, history: Sequence[str], settings: RunSettings) -> None:
        self._resources = resources
        self._settings = settings
        self._history = tuple(history)
        self._excluded = frozenset(history)
        self._played = Played()
        self._ids: list[int] = []
        read = [resources.listed(item) for item in history[-settings.history_length :]]
        messages = protocol.build_messages(read, k=settings.k, answer_form=settings.answer_form)
        tokenizer = resources.engine.tokenizer
        self._add(
            "prompt",
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False),
        )

    async def turns(self) -> AsyncIterator[bool]:
        """Play turn by turn, the answer included; yields after each but the last."""
        settings, turns = self._settings, self._played.turns
        stops = (protocol.END_PREFERENCE, protocol.END_THINK)
        while True:
            said = await self._generate(stops, reserve=answer_tokens(settings))
            if said is None or said.finish != "stop":
                return
            parsed = protocol.parse_turn(self._latest())
            if said.stop_string == protocol.END_THINK:
                if parsed.thought:
                    turns.append(Turn(thought=parsed.thought).model_dump())
                await self._answer()
                return
            if len(turns) >= settings.limits.max_retrievals or not await self._search(parsed):
                return
            yield True

    async def _search(self, asked: protocol.ParsedTurn) -> bool:
        """Answer a preference; False where the list doesn't fit."""
        settings, turns, resources = self._settings, self._played.turns, self._resources
        refused = refusal(asked.preference, turns)
        found = []
        if refused is None:
            request = RetrievalRequest(
                history=self._history,
                preference=protocol.searched_preference(asked.preference),
                k=settings.retrieve_n,
                exclude=self._excluded,
            )
            found = await asyncio.wrap_future(resources.retriever.submit(request))
        items = [
            {"id": item.id, "title": resources.catalog.display_title(item.id), "score": item.score}
            for item in found
        ]
        numbers = numbering([*turns, {"retrieved": items}])
        text = (
            protocol.render_retrieved(
                shown(resources, [item.id for item in found], settings),
                numbers,
                settings.answer_form,
            )
            if refused is None
            else protocol.render_refusal(refused)
        )
        ids = resources.engine.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) > self._room() - answer_tokens(settings):
            return False
        self._add("environment", ids)
        turn = Turn(thought=asked.thought, preference=asked.preference, refused=refused)
        turns.append({**turn.model_dump(), "retrieved": items})
        return True

    async def _answer(self) -> None:
        if protocol.parse_answer(self._latest()) is None:
            said = await self._generate((protocol.END_ANSWER,))
            if said is not None and said.finish == "stop":
                await self._generate((), max_tokens=_END_TOKENS)

    def finished(self) -> Played:
        """Read the answer, and check its form."""
        played, settings, resources = self._played, self._settings, self._resources
        numbers = numbering(played.turns)
        entries = protocol.parse_answer(self._latest()) or []
        retrieved = [resources.listed(item) for item in numbers]
        played.answer = protocol.resolve_entries(entries, retrieved, numbers, settings.answer_form)
        played.violations = check_format(
            pieces(Transcript(played.segments), resources.engine.tokenizer),
            k=settings.k,
            retrievals=sum(
                turn["refused"] is None and bool(turn["preference"]) for turn in played.turns
            ),
            entries=entries,
            resolved=played.answer,
            scripts=resources.scripts,
        )
        return played

    def _latest(self) -> str:
        """Text since the last list."""
        found = pieces(
            Transcript(self._played.segments), self._resources.engine.tokenizer, since_list=True
        )
        return "".join(text for _, text in found)

    def _room(self) -> int:
        most = min(self._settings.limits.max_total_tokens, self._resources.engine.max_model_len)
        return most - len(self._ids)

    async def _generate(
        self, stop: tuple[str, ...], *, reserve: int = 0, max_tokens: int | None = None
    ) -> Generation | None:
        """Let the policy go on; None where there is no room."""
        settings, room = self._settings, self._room() - reserve
        if room < MIN_GENERATION:
            return None
        bound = min(room, settings.limits.max_new_tokens)
        said = await self._resources.engine.generate(
            GenerationRequest(
                prompt_ids=tuple(self._ids),
                max_tokens=bound if max_tokens is None else min(bound, max_tokens),
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=generation_seed(settings, len(self._ids)),
                stop=stop,
            )
        )
        self._add("policy", said.ids, said.logprobs)
        return said

    def _add(
        self, author: Author, ids: Sequence[int], logprobs: Sequence[float] | None = None
    ) -> None:
        self._played.segments.append(segment(author, ids, logprobs))
        self._ids.extend(ids)
