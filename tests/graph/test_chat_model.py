"""The chat-model engine over a chat model that says what a test scripts."""

import math
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import Field

from deeprec.errors import EngineError, TrajectoryError
from deeprec.evals.agents import policy_digest
from deeprec.evals.config import AgentEntry
from deeprec.graph import protocol
from deeprec.graph.app import load_engine, local_engine, run_settings
from deeprec.graph.build import build_graph
from deeprec.graph.engine.base import Constraint, Generation, GenerationRequest
from deeprec.graph.engine.chat_model import _CHOOSE, _MATCH, ChatModelEngine, load_chat_model
from deeprec.graph.people import chat_turn
from deeprec.graph.state import RUN_KEYS, RecommendationResponse, RunSettings, State
from deeprec.graph.transcript import Transcript
from deeprec.settings import load_settings
from deeprec.tools.retriever import Retriever
from deeprec.training.rollout import rows
from deeprec.training.trajectories import Trajectory

MESSAGES = [{"role": "system", "content": "Do it."}, {"role": "user", "content": "1. Ça\n\n2. b"}]
VALID = {"k": 3, "retrieve_n": 4, "limits": {"max_retrievals": 2, "min_retrievals": 1}}


class Whole(BaseChatModel):
    """Gives the next reply in one piece; the last one again when no other is left."""

    replies: list[Any]
    heard: list[tuple[list[BaseMessage], dict[str, Any]]] = Field(default_factory=list)
    read: list[str] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def next(self, messages: list[BaseMessage], options: dict[str, Any]) -> str:
        self.heard.append((messages, options))
        said = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(said, Exception):
            raise said
        return said

    def _generate(self, messages: Any, stop: Any = None, *_: Any, **options: Any) -> ChatResult:
        said = self.next(messages, options)
        return ChatResult(generations=[ChatGeneration(message=AIMessage(said))])


class Streaming(Whole):
    """Gives it letter by letter, and keeps what was taken."""

    async def _astream(
        self, messages: Any, stop: Any = None, *_: Any, **options: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        for letter in self.next(messages, options) or [""]:
            self.read.append(letter)
            yield ChatGenerationChunk(message=AIMessageChunk(letter))


@pytest.fixture(params=[Whole, Streaming])
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    made: list[ChatModelEngine] = []

    def make(*replies: Any, **options: Any) -> ChatModelEngine:
        model = request.param(replies=list(replies))
        made.append(ChatModelEngine(model, tokenizer=load_settings().model_name, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def ask(engine: ChatModelEngine, written: str = "", **options: Any) -> Generation:
    prompt = engine.tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    prompt = [*prompt, *engine.tokenizer.encode(written, add_special_tokens=False)]
    request = GenerationRequest(prompt_ids=prompt, **{"max_tokens": 64, **options})
    return engine.submit(request).result(timeout=20)


def text(engine: ChatModelEngine, said: Generation) -> str:
    return str(engine.tokenizer.decode(said.ids))


def heard(engine: ChatModelEngine, at: int = -1) -> list[tuple[str, str]]:
    return [(message.type, message.text) for message in engine._model.heard[at][0]]


def test_a_reply_ends_at_the_first_stop_string(engine: Any) -> None:
    model = engine("A thought.</think> more <stop> of it")
    said = ask(model, stop=("<stop>", "</think>"))
    assert (said.finish, said.stop_string) == ("stop", "</think>")
    assert text(model, said) == "A thought.</think>"
    assert len(said.logprobs) == len(said.ids)
    assert all(math.isnan(value) for value in said.logprobs)
    assert heard(model) == [("system", "Do it."), ("human", "1. Ça\n\n2. b")]


def test_a_stream_is_given_up_at_the_stop_and_at_the_bound(engine: Any) -> None:
    model = engine("one.</think>" + "x" * 1000, "word " * 1000)
    ask(model, stop=("</think>",))
    taken = len(model._model.read)
    assert taken in (0, len("one.</think>"))
    said = ask(model, max_tokens=10)
    assert said.finish == "length"
    assert len(said.ids) == 10
    assert len(model._model.read) in (0, taken + 81)


def test_the_end_of_a_reply_is_no_token(engine: Any) -> None:
    model = engine("All said.")
    said = ask(model, stop=("</think>",))
    assert (said.finish, said.stop_string) == ("eos", None)
    assert text(model, said) == "All said."


def test_what_was_written_goes_on_in_words_or_by_prefill(engine: Any) -> None:
    written = "<think>\nThis user seems to like"
    model = engine("films.")
    assert text(model, ask(model, written)) == " films."
    *before, (role, asked) = heard(model)
    assert before[-1] == ("ai", written)
    assert role == "human"
    assert "Go on exactly" in asked
    model = engine(" films.", prefill={"extra": 1})
    assert text(model, ask(model, written)) == " films."
    assert heard(model)[-1] == ("ai", written)
    assert model._model.heard[-1][1]["extra"] == 1
    assert text(model, ask(model)) == "films."
    assert "extra" not in model._model.heard[-1][1]  # nothing of its own to go on with


def test_what_a_user_says_to_an_answer_is_a_message_of_theirs(engine: Any) -> None:
    model = engine("So.")
    said = model.tokenizer.decode(chat_turn(model.tokenizer, "No sequels.", []))
    ask(model, f"<think>One.</think>{said}")
    assert heard(model)[1:] == [
        ("human", "1. Ça\n\n2. b"),
        ("ai", "<think>One.</think>"),
        ("human", "No sequels."),
    ]


def test_no_text_turns_into_a_special_token(engine: Any) -> None:
    model = engine("ok <|im_end|>\n<|im_start|>user")
    said = ask(model)
    assert text(model, said) == "ok <|im_end|>\n<|im_start|>user"
    assert model.tokenizer.eos_token_id not in said.ids


CHOICES = Constraint(choices=(" Alien (1979)\n", " Aliens\n"))


@pytest.mark.parametrize("replies", [["alien (1979)"], ["- Aliens?", "\n* Alien (1979)\nSince …"]])
def test_a_choice_is_checked_and_asked_for_again(engine: Any, replies: list[str]) -> None:
    model = engine(*replies)
    said = ask(model, "1.", stop=("\n",), constraint=CHOICES)
    assert text(model, said) == " Alien (1979)\n"
    assert (said.finish, said.stop_string) == ("stop", "\n")
    assert heard(model, 0)[-1][1].endswith("\nAlien (1979)\nAliens")
    assert len(model._model.heard) == len(replies)


def test_what_fits_no_constraint_is_empty(engine: Any) -> None:
    model = engine("neither", "nor", " Aliens")
    assert ask(model, constraint=CHOICES) == Generation((), (), "length")
    assert len(model._model.heard) == 2
    model = engine("UPPER")
    assert ask(model, constraint=Constraint(regex=" [a-z]+ end")) == Generation((), (), "length")


def test_a_regex_is_checked(engine: Any) -> None:
    model = engine("dark")
    said = ask(model, stop=("end",), constraint=Constraint(regex=" [a-z]+ end"))
    assert (text(model, said), said.finish, said.stop_string) == (" dark end", "stop", "end")


def test_a_provider_that_fails_is_an_engine_error(engine: Any) -> None:
    with pytest.raises(EngineError, match=r"Whole|Streaming.*gave no reply.*quota"):
        ask(engine(RuntimeError("quota")))


def run(engine: ChatModelEngine, retriever: Retriever, **settings: Any) -> dict[str, Any]:
    chosen = RunSettings.model_validate({**VALID, **settings})
    graph = build_graph(engine, retriever, settings=chosen)
    everything = list(State.__annotations__)
    state: dict[str, Any] = graph.invoke({"history": ["0", "1", "2"]}, output_keys=everything)
    return state


def test_a_free_run_is_the_models_own(engine: Any, retriever: Retriever) -> None:
    begin, end = protocol.BEGIN_PREFERENCE, protocol.END_PREFERENCE
    model = engine(
        f"<think>\nMore of it. {begin} comedy {end} and an invented list",
        "Enough.</think>",
        "1. Film 3\n2. Film 4\n3. Film 5\n</recommendation_list> Enjoy!",
    )
    model._model.replies[2] = "<recommendation_list>\n" + model._model.replies[2]
    state = run(model, retriever, decoding="free", retrieve_n=37)
    response = RecommendationResponse.model_validate(
        {name: state[name] for name in RecommendationResponse.model_fields}
    )
    assert [line.title for line in response.recommendations] == ["Film 3", "Film 4", "Film 5"]
    assert {line.source for line in response.recommendations} == {"policy"}
    assert response.violations == []
    assert response.stop_reason == "answered"
    assert response.usage.chat_tokens == response.usage.written_tokens > 0
    assert response.usage.generations == 3
    assert set(Transcript(state["segments"]).env_mask) == {0}


@pytest.mark.parametrize("said", ["I'd rather not.", "", "</think>", "<|begin_of_preference|>"])
@pytest.mark.parametrize("decoding", ["free", "guided"])
def test_a_model_that_talks_nonsense_still_gives_a_valid_list(
    engine: Any, retriever: Retriever, said: str, decoding: str
) -> None:
    state = run(engine(said), retriever, decoding=decoding)
    ids = {line["id"] for line in state["recommendations"]}
    assert len(ids) == 3
    assert not ids & {"0", "1", "2"}
    assert {line["source"] for line in state["recommendations"]} <= {"fused", "trm"}
    assert state["failure"] is None
    if decoding == "guided":
        assert state["usage"]["retrievals"] >= 1  # of preferences that were written for it
        assert "forced" in Transcript(state["segments"]).authors


class Obedient(Whole):
    """Takes the last of the choices that it is given, and the first word of a regex."""

    def next(self, messages: list[BaseMessage], options: dict[str, Any]) -> str:
        asked = messages[-1].text
        if asked.startswith(_MATCH):
            return re.findall(r"[A-Z]\w+", asked)[1]
        return asked.splitlines()[-1] if asked.startswith(_CHOOSE) else "films."


def test_guided_lines_are_the_models_choice(retriever: Retriever) -> None:
    model = ChatModelEngine(Obedient(replies=[]), tokenizer=load_settings().model_name)
    state = run(model, retriever, decoding="guided", limits={"max_retrievals": 1})
    assert state["turns"][0]["preference"] == "Comedy"  # the history's
    found = [item["title"] for item in state["turns"][0]["retrieved"]]
    assert [line["title"] for line in state["recommendations"]] == found[:0:-1]
    assert {line["source"] for line in state["recommendations"]} == {"guided"}
    model.close()


def test_no_run_over_a_chat_model_is_trained_on(engine: Any, retriever: Retriever) -> None:
    model = engine("Comedy")
    graph = build_graph(model, retriever, settings=RunSettings.model_validate(VALID))
    state = graph.invoke({"history": ["0", "1"]}, output_keys=list(RUN_KEYS))
    kept = Trajectory.from_state(state, model.tokenizer, id="1", model=model.name)
    assert not any(kept.env_mask)
    assert not any(math.isnan(value) for value in kept.logprobs)
    with pytest.raises(TrajectoryError, match="can't be trained on"):
        rows([kept], 0)


def test_a_tokenizer_that_loses_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChatModelEngine, "_text", lambda *_: "A b.")
    with pytest.raises(EngineError, match="does not give text back"):
        ChatModelEngine(Whole(replies=[""]), tokenizer=load_settings().model_name)


def test_a_chat_model_by_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    settings = load_settings(engine={"kind": "chat", "chat_model": "openai:some-model"})
    engine = load_engine(settings)
    assert isinstance(engine, ChatModelEngine)
    assert engine.name == policy_digest(settings, AgentEntry(kind="agent")).partition(":")[2]
    assert run_settings(settings).decoding == "free"
    assert run_settings(settings, decoding="guided").decoding == "guided"
    engine.close()


def test_training_refuses_a_chat_model() -> None:
    chat = load_settings(engine={"kind": "chat"}).engine
    with pytest.raises(EngineError, match="can't be trained on"):
        local_engine("some-model", chat)


@pytest.mark.parametrize("name", ["", "nobody:some-model"])
def test_a_chat_model_that_cannot_be_made_is_an_engine_error(name: str) -> None:
    with pytest.raises(EngineError, match="DEEPREC_ENGINE__CHAT_MODEL"):
        load_chat_model(name)
