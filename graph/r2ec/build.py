"""build_r2ec_graph: think, then rank by the head, compiled; it takes and answers what DeepRec does.

`served` is what langgraph.json points at.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langgraph.graph import END, START

from ...errors import HeadError, RequestError
from ...settings import Settings, load_settings
from ...tools.loading import keep_loaded
from ...tools.workspace import Workspace
from ..app import load_engine, run_settings
from ..build import Node, Reading, opened, reading, sealed
from ..engine.base import Engine
from ..state import RunSettings, State
from ..streaming import tell_answer, tell_thoughts
from . import nodes
from .head import model_of_head, read_card
from .nodes import HeadShelf, check_asks_nobody
from .ranker import HeadRanker
from .readings import build_messages

if TYPE_CHECKING:
    from langgraph.checkpoint.base import BaseCheckpointSaver
    from langgraph.graph.state import CompiledStateGraph
    from langgraph.store.base import BaseStore

    from ..build import Compiled

_loading = threading.Lock()
_NO_HEAD = (
    "no recommendation head is named: set DEEPREC_HEAD to the `final` folder of a run of "
    "training/run_head.py"
)


def build_r2ec_graph(
    engine: Engine,
    ranker: HeadRanker,
    *,
    histories: Mapping[str, Sequence[str]] | None = None,
    settings: RunSettings | None = None,
    checkpointer: BaseCheckpointSaver[Any] | None = None,
    store: BaseStore | None = None,
) -> Compiled:
    """Compile R2ec over an engine and a head that reads the same LLM's states.

    Arguments, input, output and errors are those of graph.build.build_graph; the catalog is the
    ranker's. Of RunSettings it reads k, history_length, reasoning, thought_tokens, explain,
    sampling and limits.
    """
    defaults = settings or RunSettings()
    shelf = HeadShelf(engine, ranker.catalog, histories or {}, ranker=ranker)
    graph = opened(defaults)

    def read_request(state: State) -> dict[str, Any]:
        return reading(
            shelf, state, defaults, check_asks_nobody, write=build_messages, needs=nodes.needs
        )

    graph.add_node("read_request", Reading(read_request))
    graph.add_node("think", Node(tell_thoughts(nodes.think), shelf))
    graph.add_node("rank", Node(tell_answer(nodes.rank), shelf))
    graph.add_edge(START, "read_request")
    graph.add_edge("read_request", "think")
    graph.add_edge("think", "rank")
    graph.add_edge("rank", END)
    return sealed(graph, "r2ec", checkpointer=checkpointer, store=store)


def load_r2ec_graph(
    workspace: Workspace,
    settings: RunSettings | None = None,
    *,
    hold_out: bool = False,
    engine: Engine | None = None,
) -> CompiledStateGraph[Any, Any, Any, Any]:
    """Load catalog, head and engine; see graph.app.load_graph. The head is the settings' `head`.

    Raises HeadError where the settings name none, or one of another model or catalog.
    """
    own = workspace.settings
    settings = settings or r2ec_settings(own)
    histories = workspace.histories(hold_out=hold_out)
    folder = _head_of(own)
    ranker = HeadRanker.load(own, folder, workspace.catalog)
    try:
        engine = engine or load_engine(model_of_head(own, folder))
    except BaseException:
        ranker.close()
        raise
    return build_r2ec_graph(engine, ranker, histories=histories, settings=settings)


def r2ec_settings(settings: Settings, **given: object) -> RunSettings:
    """Settings of R2ec's runs: what is given, else as the head was trained. Raises HeadError."""
    folder = _head_of(settings)
    card = read_card(folder)
    defaults = {
        "decoding": "free",
        "history_length": card.history_length,
        "thought_tokens": card.thought_tokens,
    }
    return run_settings(settings.model_copy(update={"adapter": folder}), defaults, **given)


def _head_of(settings: Settings) -> Path:
    if settings.head is None:
        raise HeadError(_NO_HEAD)
    return settings.head


@lru_cache(maxsize=1)
def _loaded() -> CompiledStateGraph[Any, Any, Any, Any]:
    settings = load_settings()
    if settings.head is None:
        return _refusing()
    agent = load_r2ec_graph(Workspace(settings))
    keep_loaded()
    return agent


def _refusing() -> CompiledStateGraph[Any, Any, Any, Any]:
    """A graph of the same schemas whose runs say that no head is named: whoever lists the server's
    graphs asks for this one too.
    """
    graph = opened(RunSettings())

    def read_request(state: State) -> dict[str, Any]:
        raise RequestError(_NO_HEAD)

    graph.add_node("read_request", read_request)
    graph.add_edge(START, "read_request")
    return sealed(graph, "r2ec")


def r2ec_graph() -> CompiledStateGraph[Any, Any, Any, Any]:
    """Return R2ec by the settings in the environment, loading it at the first call.

    Where they name no head, its runs raise RequestError.
    """
    with _loading:
        return _loaded()


async def served() -> CompiledStateGraph[Any, Any, Any, Any]:
    """Give LangGraph's server the same graph, without holding up its event loop."""
    if _loaded.cache_info().currsize:
        return _loaded()
    return await asyncio.to_thread(r2ec_graph)
