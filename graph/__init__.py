"""The agent: a LangGraph loop of think, call_trm and rank over an LLM engine and a retriever."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .as_node import recommendation_node
    from .as_tool import recommendation_tool
    from .build import build_graph
    from .state import RecommendationRequest, RecommendationResponse, RunSettings

__all__ = [
    "RecommendationRequest",
    "RecommendationResponse",
    "RunSettings",
    "build_graph",
    "recommendation_node",
    "recommendation_tool",
]

_HOMES = {
    "build_graph": "build",
    "RecommendationRequest": "state",
    "RecommendationResponse": "state",
    "RunSettings": "state",
    "recommendation_node": "as_node",
    "recommendation_tool": "as_tool",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for, so that importing the package is cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
