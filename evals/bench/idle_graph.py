"""The agent's graph with nodes that do nothing: what a run costs LangGraph itself.

Its state, steps and paths are the agent's, and so is what a caller gives and gets; nothing is read
or generated, and of the state's fields only those are written that say where a run goes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from langgraph.graph import END, START
from langgraph.types import Overwrite

from ...graph.build import Node, Route, opened, sealed
from ...graph.state import Routing, RunSettings, State

Idle = Callable[[None, State], Awaitable[dict[str, Any]]]


def idle_graph() -> Any:
    """Compile it. A run's `k` is the number of its thoughts; all but the last lead to a search."""
    graph = opened(RunSettings())
    nodes: dict[str, Idle] = {
        "read_request": _read_request,
        "think": _think,
        "call_trm": _call_trm,
        "rank": _rank,
    }
    for name, node in nodes.items():
        graph.add_node(name, Node(node, None))
    graph.add_edge(START, "read_request")
    graph.add_edge("read_request", "think")
    graph.add_conditional_edges("think", Route(_after_thinking), ["call_trm", "rank"])
    graph.add_conditional_edges("call_trm", Route(_after_retrieval), ["think", "rank"])
    graph.add_conditional_edges("rank", Route(_after_ranking), ["think", END])
    return sealed(graph, "idle")


async def _read_request(_: None, state: State) -> dict[str, Any]:
    return {"turns": Overwrite([]), "round_began": {"turns": state["k"] or 1}}


async def _think(_: None, state: State) -> dict[str, Any]:
    last = len(state["turns"]) + 1 >= state["round_began"]["turns"]
    return {"next_node": "rank" if last else "call_trm"}


async def _call_trm(_: None, state: State) -> dict[str, Any]:
    return {"turns": [{}]}


async def _rank(_: None, state: State) -> dict[str, Any]:
    return {"recommendations": []}


def _after_thinking(state: Routing) -> str:
    return state["next_node"]


def _after_retrieval(state: Routing) -> str:
    return "rank" if state.get("stop_reason") else "think"


def _after_ranking(state: Routing) -> str:
    return "think" if state.get("stop_reason") else END
