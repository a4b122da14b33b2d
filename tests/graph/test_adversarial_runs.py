"""Whole runs of the real graph, whatever the policy writes: they end in bounds, serve K items or
fail with a reason, and know of each token who wrote it."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from typing import Any, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from deeprec.graph import protocol
from deeprec.graph.build import build_graph
from deeprec.graph.display import response_lines
from deeprec.graph.engine.base import Constraint, Finish, Generation, GenerationRequest
from deeprec.graph.state import RecommendationResponse, RunSettings, State
from deeprec.graph.transcript import Transcript, segment_ids
from deeprec.tools.retriever import Retriever

from . import policies
from .conftest import ScriptedEngine

MAX_MODEL_LEN = 4096
HISTORY = ["0", "1", "2"]
_SEARCHES = (" Comedy; quiet", " Drama", " Horror; 1990s; western", " Western")


class AdversaryEngine(ScriptedEngine):
    """Says texts over and over, token by token; tokens that spell a stop string may say more.

    Under a grammar it says what that allows, or is cut off within.
    """

    def __init__(self, said: Sequence[str | list[int]] = ("",)) -> None:
        super().__init__([], MAX_MODEL_LEN)
        self.say(said)

    def say(self, said: Sequence[str | list[int]]) -> None:
        self.calls.clear()
        self._said = said

    def submit(self, request: GenerationRequest) -> Any:
        said = self._said[len(self.calls) % len(self._said)]
        self.script = [said if isinstance(said, str) else self._text(said)]
        return super().submit(request)

    def _generate(self, said: str, request: GenerationRequest) -> Generation:
        if request.constraint is not None:
            said = _allowed(request.constraint, len(said))
        ids = _encoded(self, said)[: request.max_tokens]
        finish: Finish = "length" if len(ids) == request.max_tokens else "eos"
        stop_string = None
        text = self._text(ids)
        if _stops(text, request):
            lengths = range(len(ids) + 1)
            stopped = bisect_left(lengths, True, key=lambda n: _stops(self._text(ids[:n]), request))
            ids, finish = ids[:stopped], "stop"
            text = self._text(ids)
            stop_string = min((s for s in request.stop if s in text), key=text.find)
        elif finish == "eos":
            ids = [*ids, self.tokenizer.eos_token_id]
        return Generation(tuple(ids), (-0.5,) * len(ids), finish, stop_string)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids)))


def _stops(text: str, request: GenerationRequest) -> bool:
    return any(stop in text for stop in request.stop)


def _allowed(constraint: Constraint, draw: int) -> str:
    if constraint.choices:
        return constraint.choices[draw % len(constraint.choices)]
    said = f"{_SEARCHES[draw % len(_SEARCHES)]} {protocol.END_PREFERENCE}"
    fits = re.fullmatch(constraint.regex, said)
    return said if fits else f" {protocol.ANYTHING}"


@lru_cache(maxsize=512)
def _ids(text: str) -> tuple[int, ...]:
    return tuple(AdversaryEngine().tokenizer.encode(text, add_special_tokens=False))


def _encoded(engine: AdversaryEngine, text: str) -> list[int]:
    """No token spells half of a surrogate pair, and none ends a text but end-of-sequence."""
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return [token for token in _ids(whole) if token != engine.tokenizer.eos_token_id]


@dataclass
class Arena:
    """The graph, compiled once, and the engine that plays the policy."""

    graph: Any
    engine: AdversaryEngine
    ids: frozenset[str]

    def run(self, said: Sequence[str | list[int]], settings: RunSettings) -> dict[str, Any]:
        self.engine.say(said)
        state: dict[str, Any] = self.graph.invoke(
            {"user_id": "u"}, context=settings, output_keys=list(State.__annotations__)
        )
        return state


@pytest.fixture(scope="module")
def arena(retriever: Retriever) -> Arena:
    engine = AdversaryEngine()
    graph = build_graph(engine, retriever, histories={"u": HISTORY})
    return Arena(graph, engine, frozenset(retriever.catalog.ids))


tokens = st.lists(st.integers(0, 49_151), max_size=40)  # SmolLM2's vocabulary
scripts = st.lists(st.one_of(policies.texts, policies.texts, tokens), min_size=1, max_size=5)


def settings_of(mode: Literal["serve", "train"]) -> st.SearchStrategy[RunSettings]:
    limits = st.fixed_dictionaries(
        {
            "max_retrievals": st.integers(1, 4),
            "min_retrievals": st.integers(0, 2),
            "max_new_tokens": st.sampled_from([16, 64, 2048]),
            "max_total_tokens": st.sampled_from([720, 1000, 2048, 16384]),
        }
    )
    fields: dict[str, st.SearchStrategy[Any]] = {
        "k": st.integers(1, 4),
        "retrieve_n": st.sampled_from([1, 4, 8]),
        "answer_form": st.sampled_from(["titles", "numbers"]),
        "list_attributes": st.booleans(),
        "limits": limits,
    }
    if mode == "serve":
        fields["decoding"] = st.sampled_from(["free", "guided"])
        fields["explain"] = st.booleans()
        fixed: dict[str, Any] = {"on_limit": "answer", "fill": True}
    else:
        fixed = {"on_limit": "fail", "fill": False, "decoding": "free"}
    return st.fixed_dictionaries(fields).map(
        lambda drawn: RunSettings.model_validate({**drawn, **fixed})
    )


def check_bounds(arena: Arena, state: dict[str, Any], settings: RunSettings) -> None:
    limits = settings.limits
    asked = [turn for turn in state["turns"] if turn["preference"] or turn["refused"]]
    assert len(asked) <= limits.max_retrievals
    assert len(state["turns"]) <= len(asked) + 1
    total = min(limits.max_total_tokens, MAX_MODEL_LEN)
    assert len(Transcript(state["segments"])) <= total
    for request, said in arena.engine.calls:
        assert len(said.ids) <= request.max_tokens
        assert request.constraint or request.max_tokens <= limits.max_new_tokens


def check_authors(arena: Arena, state: dict[str, Any]) -> None:
    """Ids are what the engine was given and returned; the mask marks what it sampled freely."""
    prompt, *rest = state["segments"]
    ids = segment_ids(prompt).tolist()
    mask: list[int] = []
    calls = iter(arena.engine.calls)
    for piece in rest:
        written = segment_ids(piece).tolist()
        sampled = piece["author"] in ("policy", "guided")
        if sampled:
            request, said = next(calls)
            assert list(request.prompt_ids) == ids
            assert list(said.ids) == written
            assert (piece["author"] == "guided") == (request.constraint is not None)
        ids += written
        mask += [int(piece["author"] == "policy")] * len(written)
    assert next(calls, None) is None
    transcript = Transcript(state["segments"])
    assert transcript.ids == ids
    assert transcript.completion_ids == ids[len(transcript.prompt_ids) :]
    assert transcript.env_mask == mask
    free = [said for request, said in arena.engine.calls if request.constraint is None]
    assert sum(transcript.env_mask) == sum(len(said.ids) for said in free)
    assert sum(transcript.logprobs) == pytest.approx(
        -0.5 * sum(len(said.ids) for _, said in arena.engine.calls)
    )


def check_shown(response: RecommendationResponse) -> None:
    """Nothing that the policy wrote drives a terminal, and all of it can be stored."""
    told = StringIO()
    console = Console(file=told, force_terminal=False, width=200)
    for line in response_lines(response, trace=True):
        console.print(line)
    shown = told.getvalue()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    response.model_dump_json().encode()


def play(
    arena: Arena, said: list[str | list[int]], settings: RunSettings
) -> RecommendationResponse:
    """Play a run, and check what holds for every run."""
    state = arena.run(said, settings)
    check_bounds(arena, state, settings)
    check_authors(arena, state)
    fields = RecommendationResponse.model_fields
    response = RecommendationResponse.model_validate({name: state[name] for name in fields})
    check_shown(response)
    return response


@given(said=scripts, settings=settings_of("serve"))
# A thought that took all the room but the answer's, and was then opened a preference for.
@example(
    said=[
        (protocol.BEGIN_THINK * policies.LONG)[: policies.LONG],
        "<think>" * 6,
        "",
        "<think>" * 2,
    ],
    settings=RunSettings.model_validate(
        {
            "k": 1,
            "retrieve_n": 8,
            "answer_form": "numbers",
            "limits": {
                "max_retrievals": 3,
                "min_retrievals": 2,
                "max_new_tokens": 64,
                "max_total_tokens": 720,
            },
        }
    ),
)
def test_a_served_run_ends_in_bounds_with_k_items(
    arena: Arena, said: list[str | list[int]], settings: RunSettings
) -> None:
    response = play(arena, said, settings)
    ids = [line.id for line in response.recommendations]
    assert len(set(ids)) == len(ids) == settings.k
    assert set(ids) <= arena.ids - set(HISTORY)
    assert response.failure is None  # nothing failed but the policy
    if settings.decoding == "guided":
        assert None not in response.answer
        assert "duplicate_line" not in response.violations


@given(scripts, settings_of("train"))
def test_a_training_run_gives_its_own_list_or_a_reason(
    arena: Arena, said: list[str | list[int]], settings: RunSettings
) -> None:
    response = play(arena, said, settings)
    own = [item for item in dict.fromkeys(response.answer) if item is not None]
    if response.failure is None:
        assert response.stop_reason == "answered"
        assert [line.id for line in response.recommendations] == own[: settings.k]
        assert {line.source for line in response.recommendations} <= {"policy"}
    else:
        assert response.failure.reason == response.stop_reason != "answered"
        assert response.failure.detail
        assert response.recommendations == []
        assert response.violations  # counted, and never rewarded
    retrieved = {item.id for turn in response.turns for item in turn.retrieved}
    assert set(own) <= retrieved <= arena.ids - set(HISTORY)
    if not response.violations:
        assert len(own) == settings.k
