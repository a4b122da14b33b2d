"""The agent as a node of a graph that has another state schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from langchain_core.runnables import RunnableLambda

from .state import RecommendationRequest, RecommendationResponse, RunSettings

if TYPE_CHECKING:
    from langgraph.graph.state import CompiledStateGraph

ParentState = TypeVar("ParentState")


def recommendation_node(
    graph: CompiledStateGraph[Any, Any, Any, Any],
    *,
    read: Callable[[ParentState], RecommendationRequest],
    write: Callable[[RecommendationResponse], Mapping[str, Any]],
    settings: RunSettings | None = None,
) -> RunnableLambda[ParentState, Mapping[str, Any]]:
    """Make a node of the compiled graph; it runs as a subgraph, its steps stream with the parent's.

    Added to a parent as it is, the graph would find none of its keys in the parent's state.

    Args:
        graph: what `build_graph` returns.
        read: makes the request of the parent's state.
        write: makes the update of the parent's state of the response.
        settings: of the node's runs; none: the graph's own. A context of the parent's own does not
            reach the run.

    The node raises RequestError where a request can't be answered.

    """

    def recommend(state: ParentState) -> Mapping[str, Any]:
        answer = graph.invoke(read(state), context=settings)
        return write(RecommendationResponse.model_validate(answer))

    async def recommend_async(state: ParentState) -> Mapping[str, Any]:
        answer = await graph.ainvoke(read(state), context=settings)
        return write(RecommendationResponse.model_validate(answer))

    return RunnableLambda(recommend, afunc=recommend_async)
