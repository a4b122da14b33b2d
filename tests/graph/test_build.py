"""How the graph is put together: what is done on an async caller's loop, and what in a thread."""

import asyncio
import threading
from typing import Any

import pytest
from langgraph.store.memory import InMemoryStore

from deeprec.graph import nodes
from deeprec.graph.build import build_graph
from deeprec.tools.retriever import Retriever

from .conftest import ScriptedEngine

IDS = {"history": ["id:0", "id:1"]}


@pytest.mark.parametrize(
    ("request_", "store", "on_loop"),
    [
        (IDS, False, True),
        ({"user_id": "u"}, False, True),
        ({"history": ["id:0", "Film 1"]}, False, False),
        ({**IDS, "wishes": ["no Horror"]}, False, False),
        ({**IDS, "filters": {"genres": ["Comedy"]}}, False, False),
        ({"user_id": "u"}, True, False),
    ],
)
def test_only_a_request_of_ids_is_read_on_the_callers_loop(
    retriever: Retriever,
    monkeypatch: pytest.MonkeyPatch,
    request_: dict[str, Any],
    store: bool,
    on_loop: bool,
) -> None:
    readers: list[int] = []
    read = nodes.read_request

    def watched(*given: Any) -> dict[str, Any]:
        readers.append(threading.get_ident())
        return read(*given)

    monkeypatch.setattr(nodes, "read_request", watched)
    graph: Any = build_graph(
        ScriptedEngine([], 8192),
        retriever,
        histories={"u": ["0", "1"]},
        store=InMemoryStore() if store else None,
    )
    answer = asyncio.run(graph.ainvoke({**request_, "k": 2}))
    assert len(answer["recommendations"]) == 2
    assert readers
    assert (readers[0] == threading.get_ident()) == on_loop
    assert len(graph.invoke({**request_, "k": 2})["recommendations"]) == 2
