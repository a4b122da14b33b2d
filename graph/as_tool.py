"""The whole agent as a LangChain tool, so that another agent can ask it for recommendations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from langchain_core.tools import StructuredTool, ToolException
from pydantic import ConfigDict, ValidationError, create_model

from ..errors import RequestError
from .explanations import first_searches
from .requests import explain
from .state import RecommendationRequest, RecommendationResponse, RunSettings

if TYPE_CHECKING:
    from langgraph.graph.state import CompiledStateGraph

_DESCRIPTION = (
    "Recommend items of the catalog for a user. A recommender searches the catalog from several "
    "sides and ranks what it found; give it the user's history (or id) and what the user asks for. "
    "Returns the items best first."
)


def recommendation_tool(
    graph: CompiledStateGraph[Any, Any, Any, Any],
    *,
    settings: RunSettings | None = None,
    name: str = "recommend",
    description: str = _DESCRIPTION,
) -> StructuredTool:
    """Make a tool of the compiled graph, for `langchain.agents.create_agent` and its like.

    Arguments are those of RecommendationRequest but `limits`, which are the caller's to set, not an
    LLM's. The answer is JSON: rank, id, title, source and the preference that found it, of each
    item; the whole response (RecommendationResponse's fields) is the message's `artifact`. A
    request that can't be answered comes back as a tool error whose text names the value and the
    remedy.

    Args:
        graph: what `build_graph` returns.
        settings: of the tool's runs; none: the graph's own.
        name: of the tool.
        description: what the calling LLM reads of it.

    """

    def recommend(**request: Any) -> tuple[str, dict[str, Any]]:
        try:
            return _content(graph.invoke(request, context=settings))
        except RequestError as error:
            raise ToolException(str(error)) from error

    async def recommend_async(**request: Any) -> tuple[str, dict[str, Any]]:
        try:
            return _content(await graph.ainvoke(request, context=settings))
        except RequestError as error:
            raise ToolException(str(error)) from error

    return StructuredTool.from_function(
        func=recommend,
        coroutine=recommend_async,
        name=name,
        description=description,
        args_schema=_arguments(),
        response_format="content_and_artifact",
        handle_tool_error=True,
        handle_validation_error=_malformed,
    )


def _arguments() -> Any:
    fields: Mapping[str, Any] = {
        name: (field.annotation, field)
        for name, field in RecommendationRequest.model_fields.items()
        if name != "limits"
    }
    return create_model("RecommendationArguments", __config__=ConfigDict(extra="forbid"), **fields)


def _malformed(error: Any) -> str:
    assert isinstance(error, ValidationError)  # noqa: S101  # LangChain's type names pydantic 1 too
    return f"malformed request: {explain(error)}"


def _content(answer: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What the calling LLM reads, and the response as it was."""
    response = RecommendationResponse.model_validate(answer)
    brought = first_searches(answer["turns"])
    lines = [
        {"preference": brought[line.id][1] if line.id in brought else None}
        | line.model_dump(exclude={"score"}, exclude_none=True)
        for line in response.recommendations
    ]
    told: dict[str, Any] = {"recommendations": lines}
    if response.failure is not None:
        told["note"] = f"the list is not the recommender's own: {response.failure.detail}"
    return json.dumps(told, ensure_ascii=False, separators=(",", ":")), answer
