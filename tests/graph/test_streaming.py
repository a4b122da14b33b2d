"""What people see of a run: its words as they come, its messages, a state without token ids."""

import asyncio
from concurrent.futures import Future
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.outputs import LLMResult
from langgraph.checkpoint.memory import InMemorySaver

from deeprec.graph import protocol, streaming
from deeprec.graph.build import build_graph
from deeprec.graph.engine.base import Generation, GenerationRequest
from deeprec.graph.state import RunSettings
from deeprec.tools.retriever import Retriever

from .conftest import RunGraph, ScriptedEngine

ASKED = f"{protocol.BEGIN_PREFERENCE} comedy {protocol.END_PREFERENCE}"
SCRIPT = [
    f"<think>\nFunny <3 “ones”. {ASKED}",
    f"Enough of it.{protocol.END_THINK}",
    f"{protocol.BEGIN_ANSWER}\n1. Film 3\n2. Film 4\n{protocol.END_ANSWER}",
    "",
]
GUIDED = [
    "funny ones.\n",
    f" Comedy; quiet {protocol.END_PREFERENCE}",
    f"Enough.{protocol.END_THINK}",
    " Film 3\n",
    " Film 4\n",
]


class SpeakingEngine(ScriptedEngine):
    """Says its script in pieces of three characters, where somebody listens."""

    heard = 0

    def _generate(self, said: str, request: GenerationRequest) -> Generation:
        generation = super()._generate(said, request)
        if request.on_text is not None:
            self.heard += 1
            text = str(self.tokenizer.decode(generation.ids))
            for at in range(0, len(text), 3):
                request.on_text(text[at : at + 3])
        return generation


def speaking(retriever: Retriever, script: list[str], **settings: Any) -> tuple[Any, Any]:
    engine = SpeakingEngine(script, 8192)
    chosen = RunSettings.model_validate(
        {"decoding": "free", "k": 2, "retrieve_n": 4, "limits": {"min_retrievals": 1}, **settings}
    )
    graph = build_graph(
        engine,
        retriever,
        histories={"u": ["0", "1"]},
        settings=chosen,
        checkpointer=InMemorySaver(),
    )
    return graph, engine


THREAD: Any = {"configurable": {"thread_id": "t"}}


@pytest.mark.parametrize("decoding", ["free", "guided"])
@pytest.mark.parametrize("way", ["sync", "async"])
def test_thoughts_searches_and_the_answer_stream(
    retriever: Retriever, decoding: str, way: str
) -> None:
    script = GUIDED if decoding == "guided" else SCRIPT
    graph, engine = speaking(retriever, list(script), decoding=decoding)

    async def watch() -> list[Any]:
        stream = graph.astream({"user_id": "u"}, THREAD, stream_mode=["custom", "messages"])
        return [part async for part in stream]

    parts = (
        asyncio.run(watch())
        if way == "async"
        else list(graph.stream({"user_id": "u"}, THREAD, stream_mode=["custom", "messages"]))
    )
    assert engine.heard == len(engine.calls)
    turns = graph.get_state(THREAD).values["turns"]
    custom = [data for mode, data in parts if mode == "custom"]
    pieces = [data["thought"] for data in custom if "thought" in data]
    assert len(pieces) > 4
    assert "".join(pieces) == "".join(turn["thought"] for turn in turns)
    (preference,) = [data["preference"] for data in custom if "preference" in data]
    (retrieved,) = [data["retrieved"] for data in custom if "retrieved" in data]
    assert preference == turns[0]["preference"]
    assert retrieved == [item["title"] for item in turns[0]["retrieved"]]
    answer = "".join(data["answer"] for data in custom if "answer" in data)
    assert [line.split(". ")[1] for line in answer.splitlines()] == ["Film 3", "Film 4"]

    told = [message for mode, (message, _) in _only(parts, "messages")]
    nodes = [meta["langgraph_node"] for mode, (_, meta) in _only(parts, "messages")]
    assert list(dict.fromkeys(nodes)) == ["think", "call_trm", "rank"]
    first = [m for m in told if isinstance(m, AIMessageChunk) and m.id == told[0].id]
    whole = first[0]
    for chunk in first[1:]:
        whole += chunk
    assert whole.content == turns[0]["thought"]
    assert [call["args"] for call in whole.tool_calls] == [{"preference": preference}]
    ids = [message.id for message in graph.get_state(THREAD).values["messages"]]
    assert {message.id for message in told} == set(ids[1:])  # all but the request, each once
    assert [m.id for m in told if not isinstance(m, AIMessageChunk)] == [ids[2], ids[4]]


def _only(parts: list[Any], mode: str) -> list[Any]:
    return [part for part in parts if part[0] == mode]


def test_who_listens_changes_nothing(retriever: Retriever) -> None:
    transcripts = []
    heard = {"values": 0, "custom": 4, "messages": 2}  # the list is a message once it is whole
    for mode, generations in heard.items():
        graph, engine = speaking(retriever, list(SCRIPT))
        list(graph.stream({"user_id": "u"}, THREAD, stream_mode=mode))
        kept = graph.checkpointer.get_tuple(THREAD).checkpoint["channel_values"]
        transcripts.append((kept["segments"], kept["turns"], kept["recommendations"]))
        assert engine.heard == generations
    assert transcripts[0] == transcripts[1] == transcripts[2]


def test_an_engine_that_does_not_stream_is_told_by_the_generation(retriever: Retriever) -> None:
    graph = build_graph(
        ScriptedEngine(list(SCRIPT), 8192), retriever, settings=RunSettings(decoding="free", k=2)
    )
    custom = list(graph.stream({"history": ["0"]}, stream_mode="custom"))
    thoughts = [data["thought"] for data in custom if "thought" in data]
    assert thoughts == ["Funny <3 “ones”.", "Enough of it."]


def test_tracers_see_thoughts_as_a_model_s(retriever: Retriever) -> None:
    class Tracer(BaseCallbackHandler):
        def on_llm_end(self, response: LLMResult, **_: Any) -> None:
            said.append(response.generations[0][0].text)

    said: list[str] = []
    graph, _ = speaking(retriever, list(SCRIPT))
    graph.invoke({"user_id": "u"}, {**THREAD, "callbacks": [Tracer()]})
    turns = graph.get_state(THREAD).values["turns"]
    assert said == [turn["thought"] for turn in turns]


def test_a_failing_node_ends_its_stream(
    retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, engine = speaking(retriever, list(SCRIPT))

    def broken(request: GenerationRequest) -> Future[Generation]:
        raise AssertionError("a mistake in the program")

    monkeypatch.setattr(engine, "submit", broken)
    with pytest.raises(AssertionError, match="a mistake in the program"):
        list(graph.stream({"user_id": "u"}, THREAD, stream_mode="messages"))


def test_the_state_reads_well_to_a_person(retriever: Retriever) -> None:
    graph, _ = speaking(retriever, list(SCRIPT))
    graph.invoke({"user_id": "u", "wishes": ["no sequels"]}, THREAD)
    state = graph.get_state(THREAD).values
    assert "segments" not in state
    assert not _holds_bytes(state)
    request, thought, found, last, answer = state["messages"]
    assert isinstance(request, HumanMessage)
    assert request.content == (
        "Recommend 2 items to a user who liked Film 0, Film 1. They ask for: no sequels."
    )
    assert isinstance(thought, AIMessage)
    assert thought.tool_calls[0]["args"] == {"preference": "comedy"}
    assert isinstance(found, ToolMessage)
    assert found.tool_call_id == thought.tool_calls[0]["id"]
    assert len(str(found.content).splitlines()) == 4
    assert last.content == "Enough of it."
    assert [line.split(". ")[0] for line in str(answer.content).splitlines()] == ["1", "2"]
    for step in graph.get_state_history(THREAD):
        assert not _holds_bytes(step.values)
    modes = ["values", "updates", "tasks"]
    fresh = {"configurable": {"thread_id": "other"}}
    graph, _ = speaking(retriever, list(SCRIPT))
    for mode, part in graph.stream({"user_id": "u"}, fresh, stream_mode=modes):
        if mode != "tasks" or "result" in part:
            assert not _holds_bytes(part), mode


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_bytes, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_bytes, value))
    return isinstance(value, bytes)


def test_a_fork_searches_for_the_edited_preference(retriever: Retriever) -> None:
    graph, engine = speaking(retriever, list(SCRIPT))
    graph.invoke({"user_id": "u"}, THREAD)
    before = next(s for s in graph.get_state_history(THREAD) if s.next == ("call_trm",))
    pending = {**before.values["pending"], "preference": "western"}
    engine.script = SCRIPT[1:]
    fork = graph.update_state(before.config, {"pending": pending}, as_node="think")
    forked = graph.invoke(None, fork)
    assert [turn["preference"] for turn in forked["turns"]] == ["western", None]
    assert len(forked["recommendations"]) == 2
    _, thought, found, *_ = graph.get_state(THREAD).values["messages"]
    assert thought.tool_calls[0]["args"] == {"preference": "western"}
    titles = [item["title"] for item in forked["turns"][0]["retrieved"]]
    assert [line.split(". ")[1] for line in str(found.content).splitlines()] == titles


def test_a_second_run_starts_new_messages(run_graph: RunGraph, retriever: Retriever) -> None:
    graph, engine = speaking(retriever, list(SCRIPT))
    graph.invoke({"user_id": "u"}, THREAD)
    engine.script = list(SCRIPT)
    graph.invoke({"user_id": "u"}, THREAD)
    assert len(graph.get_state(THREAD).values["messages"]) == 5


@pytest.mark.parametrize(
    ("text", "thought"),
    [
        ("<thi", ""),
        ("<think>\nI see", "I see"),
        ("I see ", "I see"),
        ("a < b", "a < b"),
        ("a <", "a"),
        ("so <|begin_of_pref", "so"),
        ("so <|begin_of_preference|> comedy", "so"),
        ("so </think>\n<rec", "so"),
    ],
)
def test_half_a_marker_is_no_thought(text: str, thought: str) -> None:
    assert protocol.thought_so_far(text) == thought


def test_the_answer_so_far() -> None:
    text = f"so {protocol.END_THINK}\n{protocol.BEGIN_ANSWER}\n1. A\n2. B"
    assert protocol.answer_so_far("so") == ""
    assert protocol.answer_so_far(text + "\n</recomm") == "1. A\n2. B"
    assert protocol.answer_so_far(text + "\n" + protocol.END_ANSWER + "x") == "1. A\n2. B"


def test_the_context_names_what_it_changes(retriever: Retriever) -> None:
    graph, _ = speaking(retriever, list(SCRIPT), limits={"max_retrievals": 3})
    schema = graph.get_context_jsonschema()
    assert schema["properties"]["k"] == {
        "default": 2,
        "description": "Recommendations wanted.",
        "maximum": 100,
        "minimum": 1,
        "title": "K",
        "type": "integer",
    }
    assert schema["$defs"]["Limits"]["properties"]["max_retrievals"]["default"] == 3
    graph.invoke({"user_id": "u"}, THREAD, context={"retrieve_n": 3})
    run = graph.get_state(THREAD).values["run"]
    assert (run["decoding"], run["k"], run["retrieve_n"]) == ("free", 2, 3)
    assert run["limits"]["max_retrievals"] == 3


def test_listening_is_asked_of_langgraph(retriever: Retriever) -> None:
    """The one place that looks into what LangGraph hands out."""
    seen = []

    def look(state: Any) -> dict[str, Any]:
        seen.append((streaming._writer() is not None, streaming._has_callbacks()))
        return {}

    from langgraph.graph import START, StateGraph

    graph = StateGraph(dict).add_node("look", look).add_edge(START, "look").compile()
    for modes in ("values", "updates", "custom", "messages"):
        list(graph.stream({"a": 1}, stream_mode=modes))
    assert seen == [(False, False), (False, False), (True, False), (False, True)]
