"""The agent as one object, loaded once from the settings; what langgraph.json points at."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import EngineError
from ..settings import Settings, load_settings
from ..tools.loading import keep_loaded, uncollected
from ..tools.workspace import Workspace

if TYPE_CHECKING:
    from langgraph.graph.state import CompiledStateGraph

    from ..settings import EngineSettings
    from .engine.base import Engine
    from .engine.transformers_engine import TransformersEngine
    from .engine.vllm_inprocess import VLLMEngine
    from .state import RunSettings


_loading = threading.Lock()


@uncollected()
def load_engine(settings: Settings) -> Engine:
    """Start or reach the engine that the settings name. Raises EngineError."""
    engine = settings.engine
    if engine.kind == "server":
        from .engine.vllm_server import VLLMServerEngine

        return VLLMServerEngine(
            engine.url, tokenizer=settings.model, api_key=engine.api_key or None
        )
    if engine.kind == "chat":
        from .engine.chat_model import ChatModelEngine, load_chat_model

        return ChatModelEngine(
            load_chat_model(engine.chat_model),
            tokenizer=settings.model_name,
            max_model_len=engine.max_model_len,
        )
    return local_engine(tuned_model(settings), engine)


def local_engine(
    model: str, settings: EngineSettings, *, max_model_len: int | None = None
) -> VLLMEngine | TransformersEngine:
    """Load a model in vLLM, or in transformers where the settings say so. Raises EngineError.

    `max_model_len` takes the place of the settings'.
    """
    length = max_model_len or settings.max_model_len
    if settings.kind == "chat":
        raise EngineError(
            "a chat model gives text, not the tokens that it sampled, so it can't be trained on: "
            "set DEEPREC_ENGINE__KIND to vllm or transformers"
        )
    if settings.kind == "transformers":
        from .engine.transformers_engine import TransformersEngine

        return TransformersEngine(
            model,
            max_model_len=length,
            dtype=settings.dtype,
            kv_cache_gib=settings.kv_cache_gib,
            max_num_seqs=settings.max_num_seqs,
        )
    from .engine.vllm_inprocess import VLLMEngine

    return VLLMEngine(
        model,
        max_model_len=length,
        dtype=settings.dtype,
        kv_cache_gib=settings.kv_cache_gib,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        max_num_seqs=settings.max_num_seqs,
    )


def tuned_model(settings: Settings) -> str:
    """Hub name or folder of the LLM, with the settings' adapter merged in. Raises EngineError."""
    if settings.adapter is None:
        return settings.model_name
    import torch

    from .engine.adapter import merged_model
    from .engine.limits import cpu_dtype

    dtype = settings.engine.dtype
    return merged_model(
        settings.model_name,
        settings.adapter,
        settings.merged_dir,
        dtype=dtype if torch.cuda.is_available() else cpu_dtype(dtype),
    )


def run_settings(
    settings: Settings, defaults: Mapping[str, object] | None = None, **given: object
) -> RunSettings:
    """Settings of runs: what is given and not None, else what the adapter was trained with, else
    `defaults`, else free decoding for a chat model, else those of RunSettings.

    Raises RequestError where a field is malformed, EngineError where the adapter's can't be read.
    """
    from .engine.adapter import trained_settings
    from .requests import parse_settings

    trained = trained_settings(settings.adapter) if settings.adapter else {}
    chosen = {name: value for name, value in given.items() if value is not None}
    # A chat model needs no grammar to be understood, and guided it is asked line by line.
    own = {"decoding": "free"} if settings.engine.kind == "chat" else {}
    return parse_settings(**{**own, **(defaults or {}), **trained, **chosen})


def load_graph(
    workspace: Workspace,
    settings: RunSettings | None = None,
    *,
    hold_out: bool = False,
    engine: Engine | None = None,
) -> CompiledStateGraph[Any, Any, Any, Any]:
    """Load TRM, catalog and engine, and compile the agent over them.

    `settings` are the defaults of its runs; none: `run_settings` of the workspace's. With
    `hold_out` the last item of each user's history is left out, as a test needs it. `engine` is one
    that is loaded already.
    Raises DeepRecError where a part is missing.
    """
    from .build import build_graph

    retriever = workspace.retriever  # first: a missing workspace is told before the LLM loads
    histories = workspace.histories(hold_out=hold_out)
    settings = settings or run_settings(workspace.settings)
    ranker = None
    if workspace.settings.head is not None:
        from .r2ec.ranker import HeadRanker

        ranker = HeadRanker.load(workspace.settings, workspace.settings.head, workspace.catalog)
    try:
        engine = engine or load_engine(workspace.settings)
    except BaseException:
        if ranker is not None:
            ranker.close()
        raise
    return build_graph(engine, retriever, histories=histories, settings=settings, ranker=ranker)


@lru_cache(maxsize=1)
def _loaded() -> tuple[Workspace, CompiledStateGraph[Any, Any, Any, Any]]:
    workspace = Workspace(load_settings())
    agent = load_graph(workspace)
    keep_loaded()
    return workspace, agent


def _load() -> tuple[Workspace, CompiledStateGraph[Any, Any, Any, Any]]:
    with _loading:  # the cache alone would let two first callers load two engines
        return _loaded()


def graph() -> CompiledStateGraph[Any, Any, Any, Any]:
    """Return the compiled agent of the settings in the environment, loading it at the first call.

    Engine, TRM and catalog are loaded once a process. Raises DeepRecError where a part is missing.
    """
    return _load()[1]


def warm() -> None:
    """Load the agent, and have it answer once: the first answer of an engine is a slow one."""
    workspace, agent = _load()
    item = workspace.data.items[0].id
    agent.invoke({"history": [f"id:{item}"], "k": 1, "limits": {"max_retrievals": 1}})


def check_filters(filters: Mapping[str, object]) -> None:
    """Raise RequestError where filters are malformed, or name what no item of the catalog has."""
    from ..tools.filters import Filters

    _load()[0].catalog.snapshot.allowed((), Filters.parse(filters))


async def served() -> CompiledStateGraph[Any, Any, Any, Any]:
    """Give LangGraph's server the same agent, without holding up its event loop.

    It calls this at every access.
    """
    if _loaded.cache_info().currsize:
        return _loaded()[1]
    return await asyncio.to_thread(graph)
