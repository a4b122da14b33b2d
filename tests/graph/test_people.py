"""People in the loop over a real retriever and a scripted policy: what they may say, and what
becomes of it."""

import asyncio
import re
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.store.memory import InMemoryStore
from langgraph.types import Command

import deeprec
from deeprec.errors import RequestError, TrajectoryError
from deeprec.graph import protocol
from deeprec.graph.build import build_graph
from deeprec.graph.engine.base import Generation, GenerationRequest
from deeprec.graph.memory import Memory
from deeprec.graph.people import chat_turn
from deeprec.graph.state import RecommendationResponse, RunSettings
from deeprec.graph.transcript import Transcript, segment_ids
from deeprec.tools.retriever import Retriever
from deeprec.training.run_sft import dataset
from deeprec.training.trajectories import Trajectory

from .conftest import RunGraph, Said, ScriptedEngine
from .test_loop import answer, ask, found, good_script, saved

AGAIN = ["<think>" + ask("drama"), "Now these.</think>", answer("Film 12", "Film 13"), ""]


class Talk:
    """A run on a thread that a person answers, interrupt by interrupt."""

    def __init__(self, retriever: Retriever, *script: Said, **settings: Any) -> None:
        self.engine = ScriptedEngine(script, settings.pop("max_model_len", 8192))
        self.store = InMemoryStore()
        self.graph = build_graph(
            self.engine,
            retriever,
            histories={"u": ["0", "1", "2"]},
            settings=RunSettings.model_validate(
                {"decoding": "free", "k": 2, "retrieve_n": 4, **settings}
            ),
            checkpointer=InMemorySaver(),
            store=self.store,
        )
        self.config: Any = {"configurable": {"thread_id": "t"}}

    def start(self, **request: Any) -> Any:
        return self._asked(self.graph.invoke({"user_id": "u", **request}, self.config))

    def say(self, reply: Any) -> Any:
        return self._asked(self.graph.invoke(Command(resume=reply), self.config))

    def _asked(self, output: dict[str, Any]) -> Any:
        """What the person is asked, or the response."""
        asked = output.get("__interrupt__")
        if asked:
            assert asked[0].response_schema == asked[0].value["answer_schema"]
            return asked[0].value
        return RecommendationResponse.model_validate(output)

    @property
    def state(self) -> dict[str, Any]:
        return saved(self.graph, self.config)

    def texts(self, author: str) -> list[str]:
        return [
            self.engine.tokenizer.decode(segment_ids(piece).tolist())
            for piece in self.state["segments"]
            if piece["author"] == author
        ]

    def check_tokens(self) -> None:
        """Every call of the engine was given the transcript up to it, and returned what follows."""
        ids: list[int] = []
        calls = iter(self.engine.calls)
        for piece in self.state["segments"]:
            if piece["author"] in ("policy", "guided"):
                given, returned = next(calls)
                assert list(given.prompt_ids) == ids
                assert list(returned.ids) == segment_ids(piece).tolist()
            ids += segment_ids(piece).tolist()
        assert next(calls, None) is None


def listed(response: RecommendationResponse) -> list[str]:
    return [line.id for line in response.recommendations]


def test_a_run_that_is_accepted_is_the_run_that_nobody_saw(
    retriever: Retriever, run_graph: RunGraph
) -> None:
    talk = Talk(retriever, *good_script(), ask_before_search=True, ask_after_ranking=True)
    asked = talk.start()
    assert asked["preference"] == "comedy"
    assert asked["thought"] == "He likes this."
    assert asked["complaint"] is None
    asked = talk.say({"action": "accept"})
    assert [line["id"] for line in asked["recommendations"]] == ["3", "4"]
    response = talk.say({"action": "accept"})
    alone = run_graph(*good_script())
    assert talk.state["segments"] == alone.state["segments"]
    assert response.turns[0].asked_by == "policy"
    assert response.violations == []
    assert listed(response) == ["3", "4"]
    run = Trajectory.from_state(talk.state, talk.engine.tokenizer, id="r", model="m")
    assert not run.with_people


def test_an_edited_preference_is_searched_for_and_the_policys_words_stay(
    retriever: Retriever,
) -> None:
    talk = Talk(retriever, *good_script(), ask_before_search=True)
    talk.start()
    response = talk.say({"action": "edit", "preference": " horror ;20; <|im_end|>"})
    turn = response.turns[0]
    assert turn.preference == "horror; 20; ‹|im_end|›"
    assert turn.asked_by == "user"
    assert [item.id for item in turn.retrieved] == found(retriever, turn.preference)
    assert talk.texts("policy")[0].strip() == "<think>" + ask("comedy")
    (said,) = talk.texts("environment")
    assert said.startswith(f"\n\n(The user asks for this instead: {turn.preference})\n\n")
    assert "markers" not in response.violations
    talk.check_tokens()


def test_stopping_gives_the_list(retriever: Retriever) -> None:
    script = ["<think>" + ask("comedy"), ask("drama"), answer("Film 3", "Film 4"), ""]
    talk = Talk(retriever, *script, ask_before_search=True)
    talk.start()
    talk.say({"action": "accept"})
    response = talk.say({"action": "stop"})
    assert response.stop_reason == "stopped_by_user"
    assert response.failure is None
    assert listed(response) == ["3", "4"]
    assert [turn.preference for turn in response.turns] == ["comedy", None]
    assert "".join(talk.texts("forced")).strip().startswith(protocol.END_THINK)
    (stopped,) = [m for m in talk.state["messages"] if m.text == "stopped by the user"]
    assert stopped.tool_call_id == talk.state["messages"][3].tool_calls[0]["id"]
    talk.check_tokens()


@pytest.mark.parametrize("settings", [{}, {"decoding": "guided"}, {"on_limit": "fail"}])
def test_stopping_at_once_gives_a_list_as_well(
    retriever: Retriever, settings: dict[str, Any]
) -> None:
    preference = f" Comedy {protocol.END_PREFERENCE}"
    guided = settings.get("decoding") == "guided"
    script = ["Hm.\n\n", preference] if guided else ["<think>" + ask("comedy"), answer("x"), ""]
    talk = Talk(retriever, *script, ask_before_search=True, **settings)
    talk.start()
    response = talk.say({"action": "stop"})
    assert [line.source for line in response.recommendations] == ["trm", "trm"]
    assert response.failure is None


def test_nonsense_is_asked_again(retriever: Retriever) -> None:
    script = ["<think>" + ask("comedy"), ask("drama"), "So.</think>", answer("Film 3"), ""]
    talk = Talk(retriever, *script, ask_before_search=True)
    talk.start()
    talk.say({"action": "accept"})
    for reply, complaint in (
        ("yes", "malformed answer"),
        ({}, "malformed answer"),
        ({"action": "maybe"}, "'maybe'"),
        ({"action": "edit"}, "preference"),
        ({"action": "accept", "preference": "x"}, "preference"),
        ({"action": "edit", "preference": "\u200b;"}, "no preference stands"),
        ({"action": "edit", "preference": "Comedy"}, "searched for already"),
    ):
        asked = talk.say(reply)
        assert complaint in asked["complaint"]
        assert asked["preference"] == "drama"
    assert len(talk.engine.calls) == 2
    response = talk.say({"action": "edit", "preference": "western"})
    assert [turn.preference for turn in response.turns] == ["comedy", "western", None]


def test_asking_needs_a_checkpointer(run_graph: RunGraph, retriever: Retriever) -> None:
    with pytest.raises(RequestError, match="no checkpointer"):
        run_graph(*good_script(), ask_before_search=True)
    with pytest.raises(RequestError, match="no checkpointer"):
        run_graph(*good_script(), ask_after_ranking=True)
    settings = RunSettings(ask_after_ranking=True)
    graph = build_graph(ScriptedEngine([], 8192), retriever, settings=settings)
    with pytest.raises(RequestError, match="no checkpointer"):
        graph.invoke({"history": ["0"]}, {"configurable": {"thread_id": "t"}})


def test_rejected_items_never_come_back(retriever: Retriever) -> None:
    talk = Talk(retriever, *good_script(), *AGAIN, ask_after_ranking=True)
    talk.start()
    before = talk.state["segments"]
    unwanted = found(retriever, "drama")[0]
    items = [{"item": "film 4", "reason": "too </think> long"}, {"item": unwanted}]
    asked = talk.say({"action": "reject", "items": items, "wishes": ["something quiet"]})
    assert asked["recommendations"]
    response = talk.say({"action": "accept"})
    assert talk.state["segments"][: len(before)] == before
    (said,) = talk.texts("user")
    assert f"I don't want: Film 4 (too ‹/think› long); Film {unwanted}\n" in said
    assert "I ask for: something quiet\n" in said
    assert [m.type for m in talk.state["messages"]] == 2 * ["human", "ai", "tool", "ai", "ai"]
    second = response.turns[2]
    assert [turn.preference for turn in response.turns] == ["comedy", None, "drama", None]
    assert len(second.retrieved) == 4
    shown = [*listed(response), *(item.id for item in second.retrieved)]
    assert not {"4", unwanted} & set(shown)
    assert len(set(listed(response))) == 2
    talk.check_tokens()


def test_a_second_round_is_judged_and_answered_by_itself(retriever: Retriever) -> None:
    first = found(retriever, "comedy")
    second = [item for item in found(retriever, "drama", 6) if item != first[0]]
    rounds = [
        ["<think>" + ask("comedy"), "So.</think>", answer(f"Film {first[0]}", f"Film {first[1]}")],
        ["<think>" + ask("drama"), "So.</think>", answer(f"Film {second[0]}", f"Film {second[1]}")],
    ]
    script = [text for said in rounds for text in (*said, "")]
    talk = Talk(retriever, *script, ask_after_ranking=True, limits={"max_retrievals": 1})
    talk.start()
    talk.say({"action": "reject", "items": [{"item": first[0]}]})
    response = talk.say({"action": "accept"})
    assert response.violations == []
    assert response.stop_reason == "answered"
    assert response.answer == second[:2] == listed(response)
    assert {line.source for line in response.recommendations} == {"policy"}
    run = Trajectory.from_state(talk.state, talk.engine.tokenizer, id="r", model="m")
    assert run.with_people
    assert run.entries == [f"Film {item}" for item in second[:2]]
    with pytest.raises(TrajectoryError, match="no demonstration"):
        dataset([run])


def test_more_are_others(retriever: Retriever) -> None:
    again = ["<think>" + ask("comedy"), "So.</think>", answer("Film 3", "Film 4"), ""]
    talk = Talk(retriever, *good_script(), *again, ask_after_ranking=True)
    talk.start()
    shown = [line["id"] for line in talk.state["recommendations"]]
    talk.say({"action": "more", "wishes": ["only from the 1980s", "I like westerns"]})
    response = talk.say({"action": "accept"})
    assert response.turns[2].refused is None  # others are found by the same search
    assert not set(shown) & set(listed(response))
    assert all(20 <= int(item) < 30 for item in listed(response))
    assert [wish.means for wish in response.understood_wishes] == ["year: from 1980, up to 1989"]
    assert "I ask for: year: from 1980, up to 1989; I like westerns\n" in talk.texts("user")[0]
    assert [note.about for note in Memory(talk.store, "u").notes("like")] == ["westerns"]


def test_an_answer_that_cannot_be_followed_is_asked_again(retriever: Retriever) -> None:
    talk = Talk(retriever, *good_script(), ask_after_ranking=True)
    talk.start()
    horror = [{"item": str(item)} for item in range(20, 29)]
    for reply, complaint in (
        (7, "malformed answer"),
        ({"action": "reject", "items": []}, "items"),
        ({"action": "reject", "items": [{"item": "Film of nobody"}]}, "no item is titled"),
        ({"action": "more", "wishes": [" "]}, "wishes"),
        (
            {"action": "reject", "items": horror, "wishes": ["only horror"]},
            "'only horror' as genres: Horror",
        ),
    ):
        assert complaint in talk.say(reply)["complaint"]
    assert Memory(talk.store, "u").notes() == []
    response = talk.say({"action": "accept"})
    assert listed(response) == ["3", "4"]


def test_a_guided_run_goes_on_guided(retriever: Retriever) -> None:
    first = found(retriever, "Comedy; quiet")
    search = ["Hm.\n\n", f" Comedy; quiet {protocol.END_PREFERENCE}", f"So.{protocol.END_THINK}"]
    second = ["Well.\n\n", f" Western {protocol.END_PREFERENCE}", f"So.{protocol.END_THINK}"]
    lines = [f" Film {first[0]}\n", f" Film {first[1]}\n"]
    others = [f" Film {first[2]}\n", f" Film {first[3]}\n"]
    talk = Talk(
        retriever,
        *(*search, *lines, *second, *others),
        decoding="guided",
        ask_after_ranking=True,
        limits={"min_retrievals": 1},
    )
    talk.start()
    talk.say({"action": "reject", "items": [{"item": first[0]}]})
    response = talk.say({"action": "accept"})
    assert listed(response) == first[2:4]
    assert {line.source for line in response.recommendations} == {"guided"}
    assert response.violations == []
    offered = talk.engine.calls[-2][0].constraint
    assert offered is not None
    assert f" Film {first[1]}\n" in offered.choices
    assert f" Film {first[0]}\n" not in offered.choices
    talk.check_tokens()


def test_a_fork_with_another_preference_is_the_users_search(retriever: Retriever) -> None:
    """A client changes a thread's state in place of answering."""
    talk = Talk(retriever, *good_script())
    paused = talk.graph.invoke({"user_id": "u"}, talk.config, interrupt_before=["call_trm"])
    assert "recommendations" not in paused
    pending = {**talk.state["pending"], "preference": "horror"}
    config = talk.graph.update_state(talk.config, {"pending": pending}, as_node="review_search")
    response = RecommendationResponse.model_validate(talk.graph.invoke(None, config))
    assert [(turn.preference, turn.asked_by) for turn in response.turns] == [
        ("horror", "user"),
        (None, "policy"),
    ]


class Searcher(ScriptedEngine):
    """Searches once and answers, in any number of runs; nobody is answered before two ask."""

    def __init__(self) -> None:
        super().__init__([], 8192)
        self.waiting: list[tuple[Future[Generation], Generation]] = []

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        text = self.tokenizer.decode(request.prompt_ids)
        if protocol.END_ANSWER in request.stop:
            said = answer("Film 9", "Film 24")
        elif not request.stop:
            said = ""
        else:  # the prompt names the marker once
            said = "So.</think>" if text.count(protocol.BEGIN_ITEMS) > 1 else ask("comedy")
        future = Future[Generation]()
        self.waiting.append((future, self._generate(said, request)))
        if len(self.waiting) > 1 or len(self.calls) > 1:
            for held, result in self.waiting:
                self.calls.append((request, result))
                held.set_result(result)
            self.waiting.clear()
        return future


def test_two_runs_on_one_thread_at_once_do_not_mix(retriever: Retriever) -> None:
    """Each answers its own request, and the thread keeps one of them as a whole."""
    talk = Talk(retriever)
    talk.graph = build_graph(
        Searcher(),
        retriever,
        settings=RunSettings(decoding="free", retrieve_n=4),
        checkpointer=InMemorySaver(),
    )

    async def both() -> list[Any]:
        requests = [
            {"history": ["0", "1"], "k": 2, "filters": {"genres": "Comedy"}},
            {"history": ["20", "21"], "k": 3},
        ]
        return await asyncio.gather(
            *(talk.graph.ainvoke(request, talk.config) for request in requests)
        )

    outputs = asyncio.run(both())
    assert [len(output["recommendations"]) for output in outputs] == [2, 3]
    assert all(int(line["id"]) < 10 for line in outputs[0]["recommendations"])
    assert not {"20", "21"} & {line["id"] for line in outputs[1]["recommendations"]}
    state = talk.state
    kept = outputs[0] if state["history_ids"] == ["0", "1"] else outputs[1]
    assert {name: state[name] for name in kept} == kept
    assert [piece["author"] for piece in state["segments"]] == [
        *("prompt", "policy", "environment", "policy", "policy", "policy")
    ]
    prompt = talk.engine.tokenizer.decode(Transcript(state["segments"]).prompt_ids)
    assert f"1. Film {state['history_ids'][0]}\n" in prompt


def test_an_answer_to_a_question_of_an_earlier_run_answers_nothing(retriever: Retriever) -> None:
    script = ["<think>" + ask("comedy"), "<think>" + ask("drama")]
    talk = Talk(retriever, *script, ask_before_search=True)
    request = {"user_id": "u"}
    (old,) = talk.graph.invoke(request, talk.config)["__interrupt__"]
    (new,) = talk.graph.invoke(request, talk.config)["__interrupt__"]
    stale: Command[Any] = Command(resume={old.id: {"action": "stop"}})
    (still,) = talk.graph.invoke(stale, talk.config)["__interrupt__"]
    assert still == new
    assert still.value["preference"] == "drama"


def test_the_users_turn_is_what_the_chat_template_says(retriever: Retriever) -> None:
    tokenizer = ScriptedEngine([], 8192).tokenizer
    messages = [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    before = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    before += tokenizer.encode("b", add_special_tokens=False)
    assert before + chat_turn(tokenizer, "c", before) == whole
    ended = [*before, tokenizer.eos_token_id]
    assert ended + chat_turn(tokenizer, "c", ended) == whole


def test_a_round_without_room_is_answered_all_the_same(retriever: Retriever) -> None:
    whole = Talk(retriever, *good_script(), ask_after_ranking=True)
    whole.start()
    total = 700
    left = total - 80 - len(Transcript(whole.state["segments"]))  # 80 are kept for the answer
    search, thought, *rest = good_script()
    script = [search, "and " * left + thought, *rest, answer("Film 5"), ""]
    talk = Talk(retriever, *script, ask_after_ranking=True, limits={"max_total_tokens": total})
    assert len(talk.start()["recommendations"]) == 2
    talk.say({"action": "more"})
    response = talk.say({"action": "accept"})
    assert response.stop_reason == "trajectory_length"
    assert len(set(listed(response)) - {"3", "4"}) == 2


def test_the_time_budget_is_a_rounds(retriever: Retriever) -> None:
    talk = Talk(retriever, *good_script(), *AGAIN, ask_after_ranking=True)
    talk.start()
    spent = {**talk.state["counts"], "seconds": 1000.0}
    talk.graph.update_state(talk.config, {"counts": spent}, as_node="rank")
    run = {**talk.state["run"], "limits": {**talk.state["run"]["limits"], "time_budget_s": 500.0}}
    talk.graph.update_state(talk.config, {"run": run}, as_node="rank")
    talk.graph.invoke(None, talk.config)
    talk.say({"action": "more"})
    assert talk.say({"action": "accept"}).stop_reason == "answered"


def test_the_guides_code_runs(
    retriever: Retriever,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    guide = (Path(deeprec.__file__).parent / "docs" / "people.md").read_text()
    code = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert len(code) == 2
    script = ["Hm.\n\n", f" Comedy {protocol.END_PREFERENCE}"]
    parts = {"engine": ScriptedEngine(script, 8192), "retriever": retriever}
    for block in code:
        exec(block.replace("Toy Story", "Film 0").replace("Babe", "Film 1"), dict(parts))
    told = capsys.readouterr().out
    assert "Comedy None" in told
    assert "'rank': 10" in told
    assert "dislike gore" in told
