"""DeepRec as a node of a LangGraph graph that has a state of its own.

    python examples/subgraph.py "Toy Story" "Babe" "Aladdin"

Two functions stand between the two states: one asks, one lays out the answer.
"""

from __future__ import annotations

import argparse
from typing import TypedDict

from langgraph.graph import END, START, StateGraph

from deeprec.graph import RecommendationRequest, RecommendationResponse, recommendation_node
from deeprec.graph.app import graph


class Newsletter(TypedDict, total=False):
    """The parent's state; it shares no key with DeepRec's."""

    liked: list[str]
    items: int
    body: str


def ask(state: Newsletter) -> RecommendationRequest:
    """Read the request off the parent's state."""
    return RecommendationRequest(history=state["liked"], k=state["items"])


def lay_out(answer: RecommendationResponse) -> Newsletter:
    """Write the answer into the parent's state."""
    lines = [f"{line.rank}. {line.title} [{line.id}]" for line in answer.recommendations]
    return {"body": "\n".join(lines)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("titles", nargs="*", default=["Toy Story", "Babe", "Aladdin"])
    parser.add_argument("-k", type=int, default=5)
    given = parser.parse_args()

    parent = StateGraph(Newsletter)
    parent.add_node("recommend", recommendation_node(graph(), read=ask, write=lay_out))
    parent.add_edge(START, "recommend")
    parent.add_edge("recommend", END)
    print(parent.compile().invoke({"liked": given.titles, "items": given.k})["body"])
