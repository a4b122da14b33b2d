"""The graph as a tool and as a node, over an engine that says what a test scripts."""

import asyncio
import json
import logging
from typing import Any, TypedDict

import pytest
from langchain_core.messages import ToolCall, ToolMessage
from langgraph.graph import END, START, StateGraph

from deeprec.errors import RequestError
from deeprec.graph import recommendation_node, recommendation_tool
from deeprec.graph.build import build_graph
from deeprec.graph.state import (
    RecommendationRequest,
    RecommendationResponse,
    RunSettings,
)
from deeprec.tools.retriever import Retriever

from .conftest import ScriptedEngine

SEARCH = "<think>\nOn. <|begin_of_preference|> comedy <|end_of_preference|>"
SETTINGS = RunSettings(decoding="free", k=2, retrieve_n=4)


def script(searches: int = 1) -> list[str]:
    """A run that never names an item: its list is filled."""
    more = [SEARCH.replace("comedy", f"comedy {n}") for n in range(1, searches)]
    return [SEARCH, *more, "Enough.</think>", "<recommendation_list>\n</recommendation_list>", ""]


def graph(retriever: Retriever, *said: str) -> Any:
    engine = ScriptedEngine(said or script(), 8192)
    return build_graph(engine, retriever, histories={"u": ["0", "1", "2"]}, settings=SETTINGS)


def call(tool: Any, *, use_async: bool = False, **arguments: Any) -> ToolMessage:
    asked = ToolCall(name=tool.name, args=arguments, id="1", type="tool_call")
    message = asyncio.run(tool.ainvoke(asked)) if use_async else tool.invoke(asked)
    assert isinstance(message, ToolMessage)
    return message


@pytest.mark.parametrize("use_async", [False, True])
def test_the_tool_answers_with_the_list_and_keeps_the_response(
    retriever: Retriever, use_async: bool
) -> None:
    said = call(recommendation_tool(graph(retriever)), use_async=use_async, user_id="u", k=3)
    response = RecommendationResponse.model_validate(said.artifact)
    lines = json.loads(said.content)["recommendations"]
    assert [line["id"] for line in lines] == [line.id for line in response.recommendations]
    assert [line["rank"] for line in lines] == [1, 2, 3]
    assert {line["source"] for line in lines} == {"fused"}
    assert {line["preference"] for line in lines} == {"comedy"}
    assert said.status == "success"


def test_settings_of_the_tool_win(retriever: Retriever) -> None:
    settings = SETTINGS.model_copy(update={"k": 4})
    tool = recommendation_tool(graph(retriever), settings=settings)
    assert len(json.loads(call(tool, user_id="u").content)["recommendations"]) == 4


def test_a_list_that_is_not_the_recommenders_own_says_so(retriever: Retriever) -> None:
    engine = ScriptedEngine([], 8192)
    said = call(recommendation_tool(build_graph(engine, retriever)), history=["0"], k=2)
    told = json.loads(said.content)
    assert len(told["recommendations"]) == 2
    assert "the script is over" in told["note"]


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"history": ["No such film"]}, "'No such film'"),
        ({"user_id": "v"}, "user 'v' is unknown"),
        ({"user_id": "u", "filters": {"mood": "dark"}}, "unknown attribute 'mood'"),
        ({"user_id": "u", "k": 99}, "k = 99"),
        ({"user_id": "u", "k": 0}, "k: Input should be greater"),
        ({"user_id": "u", "limits": {}}, "limits"),
        ({}, "either a history"),
    ],
)
def test_what_cannot_be_answered_is_a_tool_error(
    retriever: Retriever, arguments: dict[str, Any], named: str, use_async: bool
) -> None:
    said = call(recommendation_tool(graph(retriever)), use_async=use_async, **arguments)
    assert said.status == "error"
    assert named in said.content


def test_agents_read_the_requests_own_descriptions(retriever: Retriever) -> None:
    schema = recommendation_tool(graph(retriever)).tool_call_schema.model_json_schema()
    assert set(schema["properties"]) == set(RecommendationRequest.model_fields) - {"limits"}
    for name, field in schema["properties"].items():
        assert field["description"] == RecommendationRequest.model_fields[name].description


class Parent(TypedDict, total=False):
    who: str
    said: list[str]


class Foreign(TypedDict):
    language: str


def parent(compiled: Any, **options: Any) -> Any:
    outer = StateGraph(Parent, context_schema=Foreign)
    node = recommendation_node(
        compiled,
        read=lambda state: RecommendationRequest(user_id=state["who"]),
        write=lambda answer: {"said": [line.id for line in answer.recommendations]},
        **options,
    )
    outer.add_node("recommend", node)
    outer.add_edge(START, "recommend")
    outer.add_edge("recommend", END)
    return outer.compile()


@pytest.mark.parametrize("use_async", [False, True])
def test_a_node_under_another_schema(
    retriever: Retriever, caplog: pytest.LogCaptureFixture, use_async: bool
) -> None:
    outer = parent(graph(retriever))
    context = {"language": "fr"}
    with caplog.at_level(logging.WARNING):
        if use_async:
            answer = asyncio.run(outer.ainvoke({"who": "u"}, context=context))
        else:
            answer = outer.invoke({"who": "u"}, context=context)
    assert set(answer) == {"who", "said"}
    assert len(answer["said"]) == 2
    assert "ignoring a context" in caplog.text


def test_a_node_with_settings_sees_no_foreign_context(
    retriever: Retriever, caplog: pytest.LogCaptureFixture
) -> None:
    outer = parent(graph(retriever), settings=SETTINGS.model_copy(update={"k": 3}))
    assert len(outer.invoke({"who": "u"}, context={"language": "fr"})["said"]) == 3
    assert "ignoring" not in caplog.text


def test_steps_of_a_node_stream_with_the_parents_and_have_their_own_limit(
    retriever: Retriever,
) -> None:
    searches = 14  # 28 steps, where the parent is allowed 10
    settings = SETTINGS.model_copy(
        update={"limits": SETTINGS.limits.model_copy(update={"max_retrievals": 20})}
    )
    outer = parent(graph(retriever, *script(searches)), settings=settings)
    steps = [
        next(iter(update))
        for path, update in outer.stream(
            {"who": "u"}, {"recursion_limit": 10}, stream_mode="updates", subgraphs=True
        )
        if path
    ]
    assert steps[0] == "read_request"
    assert steps.count("call_trm") == searches
    assert steps[-1] == "rank"


def test_a_request_that_cannot_be_answered_leaves_the_node(retriever: Retriever) -> None:
    with pytest.raises(RequestError, match="user 'v' is unknown"):
        parent(graph(retriever)).invoke({"who": "v"})
