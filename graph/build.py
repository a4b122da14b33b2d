"""build_graph: think, call_trm and rank over an engine and a retriever, compiled."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.runnables.config import run_in_executor
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import get_runtime
from langgraph.types import Overwrite

from ..tools.catalog import ID_MARK
from . import nodes, people, ranking
from .engine.base import Engine, LoopThread
from .identity import check_user
from .memory import Memory
from .messages import request_message
from .requests import defaulting_to, parse_request
from .resources import Resources, Shelf
from .state import (
    MAX_RETRIEVALS,
    RecommendationRequest,
    RecommendationResponse,
    Routing,
    RunSettings,
    State,
)
from .streaming import tell_answer, tell_lists, tell_thoughts

if TYPE_CHECKING:
    from langgraph.checkpoint.base import BaseCheckpointSaver
    from langgraph.graph.state import CompiledStateGraph
    from langgraph.store.base import BaseStore

    from ..tools.retriever import Retriever
    from .r2ec.ranker import HeadRanker

    Opened = StateGraph[State, RunSettings, RecommendationRequest, RecommendationResponse]
    Compiled = CompiledStateGraph[State, RunSettings, RecommendationRequest, RecommendationResponse]

R = TypeVar("R")

# LangGraph draws its forms from the input schema, and leaves the checking to us.
_REQUEST_FIELDS = tuple(RecommendationRequest.model_fields)

logger = logging.getLogger(__name__)


def build_graph(
    engine: Engine,
    retriever: Retriever,
    *,
    histories: Mapping[str, Sequence[str]] | None = None,
    settings: RunSettings | None = None,
    checkpointer: BaseCheckpointSaver[Any] | None = None,
    store: BaseStore | None = None,
    ranker: HeadRanker | None = None,
) -> Compiled:
    """Compile the agent. It serves `invoke` and `ainvoke` alike, from any thread or loop.

    Args:
        engine: the policy.
        retriever: the preference-aware TRM over its catalog.
        histories: item ids of known users, oldest first, for requests by user id.
        settings: defaults of a run. A run's `context` replaces them whole as RunSettings; as a
            dict it changes the fields that it names.
        checkpointer: where LangGraph keeps threads; none for rollouts. Runs that ask people need
            one (RunSettings.ask_before_search, ask_after_ranking; graph/people.py).
        store: where known users' memory is kept (graph/memory.py); none: nothing is remembered.
        ranker: the recommendation head that runs with `rank="head"` need.

    The input is a RecommendationRequest (or a dict of its fields), the output a dict of
    RecommendationResponse's fields. Raises RequestError where a request can't be answered, and
    pydantic's ValidationError for a context that is a malformed dict; a run that goes wrong ends
    with a response that says so.

    """
    defaults = settings or RunSettings()
    resources = Resources(
        engine, retriever.catalog, histories or {}, retriever=retriever, ranker=ranker
    )
    graph = opened(defaults)

    def read_request(state: State) -> dict[str, Any]:
        def check(chosen: RunSettings) -> None:
            people.check_can_ask(chosen)
            ranking.check_ranker(resources, chosen)

        return reading(resources, state, defaults, check)

    def review_answer(state: State) -> dict[str, Any]:
        runtime = get_runtime()
        check_user(runtime.server_info, state["user"])
        return people.review_answer(resources, state, runtime.store)

    def after_thinking(state: Routing) -> str:
        asks = state["next_node"] == "call_trm" and state["run"]["ask_before_search"]
        return "review_search" if asks else state["next_node"]

    def after_search_review(state: Routing) -> str:
        return "rank" if state.get("stop_reason") else "call_trm"

    def after_retrieval(state: Routing) -> str:
        return "rank" if state.get("stop_reason") else "think"

    def after_ranking(state: Routing) -> str:
        return "review_answer" if state["run"]["ask_after_ranking"] else END

    def after_answer_review(state: Routing) -> str:
        return END if state.get("stop_reason") else "think"

    graph.add_node("read_request", Reading(read_request))
    graph.add_node("think", Node(tell_thoughts(nodes.think), resources))
    graph.add_node("review_search", people.review_search)
    graph.add_node("call_trm", Node(tell_lists(nodes.call_trm), resources))
    graph.add_node("rank", Node(tell_answer(ranking.rank), resources))
    graph.add_node("review_answer", review_answer)
    graph.add_edge(START, "read_request")
    graph.add_edge("read_request", "think")
    graph.add_conditional_edges(
        "think", Route(after_thinking), ["review_search", "call_trm", "rank"]
    )
    graph.add_conditional_edges("review_search", Route(after_search_review), ["call_trm", "rank"])
    graph.add_conditional_edges("call_trm", Route(after_retrieval), ["think", "rank"])
    graph.add_conditional_edges("rank", Route(after_ranking), ["review_answer", END])
    graph.add_conditional_edges("review_answer", Route(after_answer_review), ["think", END])
    compiled = sealed(graph, "deeprec", checkpointer=checkpointer, store=store)
    # A turn takes up to three steps; LangGraph's default of 25 would cut a run of many turns.
    return compiled.with_config(recursion_limit=3 * MAX_RETRIEVALS + 8)


def opened(defaults: RunSettings) -> Opened:
    """Give a graph without nodes that takes and answers what every recommender here does."""
    return StateGraph(
        State,
        context_schema=defaulting_to(defaults),
        input_schema=RecommendationRequest,
        output_schema=RecommendationResponse,
    )


def sealed(
    graph: Opened,
    name: str,
    *,
    checkpointer: BaseCheckpointSaver[Any] | None = None,
    store: BaseStore | None = None,
) -> Compiled:
    """Compile a graph. Token ids are for machines: kept, and left out of what people are shown."""
    compiled = graph.compile(checkpointer=checkpointer, store=store, name=name)
    compiled.stream_channels = [
        channel for channel in compiled.stream_channels_list if channel != "segments"
    ]
    return compiled


def reading(
    resources: Shelf,
    state: State,
    defaults: RunSettings,
    check: Callable[[RunSettings], None],
    **prompting: Any,
) -> dict[str, Any]:
    """Read the request off a state and its runtime; see nodes.read_request.

    `check` refuses settings that the graph can't run with; `prompting` is what nodes.read_request
    takes beside a request.
    """
    runtime = get_runtime(RunSettings)
    context: object = runtime.context
    chosen = context if isinstance(context, RunSettings) else defaults
    if context is not None and chosen is defaults:  # a parent graph's own
        logger.warning("ignoring a context that is no RunSettings: %s", type(context).__name__)
    values: Mapping[str, Any] = state
    given = {name: values[name] for name in _REQUEST_FIELDS if name in values}
    request = parse_request(**given)
    check_user(runtime.server_info, request.user_id)
    check(chosen)
    memory = Memory.of(runtime.store, request.user_id)
    update = nodes.read_request(resources, request, chosen, memory, **prompting)
    asked = request_message(
        request,
        run=update["run"],
        history=update["history_ids"],
        title=resources.catalog.display_title,
    )
    return {**update, "messages": Overwrite([asked])}


class Node(Runnable[State, dict[str, Any]], Generic[R]):
    """An async node for LangGraph's sync and async callers.

    Sync callers may sit inside a running loop (a notebook), so their node runs on a loop of ours.
    LangGraph traces the node; a RunnableLambda would trace it once more.
    """

    def __init__(self, node: Callable[[R, State], Awaitable[dict[str, Any]]], resources: R) -> None:
        self._node = node
        self._resources = resources

    def invoke(
        self, input: State, config: RunnableConfig | None = None, **_: Any
    ) -> dict[str, Any]:
        """See Runnable."""
        future = _loop().submit(_await(self._node, self._resources, input))
        try:
            return future.result()
        except BaseException:  # an interrupted caller must not leave the engine at work
            future.cancel()
            raise

    async def ainvoke(
        self, input: State, config: RunnableConfig | None = None, **_: Any
    ) -> dict[str, Any]:
        """See Runnable."""
        return await self._node(self._resources, input)


class Reading(RunnableLambda[State, dict[str, Any]]):
    """read_request; async callers have it done in a thread where it may take long.

    Titles and filters are matched against the whole catalog, and a store may block.
    """

    async def ainvoke(
        self, input: State, config: RunnableConfig | None = None, **_: Any
    ) -> dict[str, Any]:
        """See Runnable."""
        history = input.get("history") or ()
        named = all(isinstance(item, str) and item.startswith(ID_MARK) for item in history)
        asks = input.get("wishes") or input.get("filters")
        if named and not asks and get_runtime().store is None:
            return self.func(input)
        return await run_in_executor(config, self.func, input)

    def invoke(
        self, input: State, config: RunnableConfig | None = None, **_: Any
    ) -> dict[str, Any]:
        """See Runnable."""
        return self.func(input)


class Route(RunnableLambda[Routing, str]):
    """Where a run goes after a node; decided on the spot, where a plain function would be given to
    a thread and traced.
    """

    def invoke(self, input: Routing, config: RunnableConfig | None = None, **_: Any) -> str:
        """See Runnable."""
        return str(self.func(input))

    async def ainvoke(self, input: Routing, config: RunnableConfig | None = None, **_: Any) -> str:
        """See Runnable."""
        return str(self.func(input))


async def _await(
    node: Callable[[R, State], Awaitable[dict[str, Any]]],
    resources: R,
    state: State,
) -> dict[str, Any]:
    return await node(resources, state)


@cache
def _loop() -> LoopThread:
    return LoopThread("deeprec-graph")
