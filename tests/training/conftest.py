"""Finished runs of the real graph over a scripted policy, as trajectories."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from deeprec.graph.engine.vllm_inprocess import VLLMEngine
from deeprec.tools.retriever import RetrievalRequest, Retriever
from deeprec.training.trajectories import Trajectory

from ..graph.conftest import RunGraph, Said, retriever, run_graph

__all__ = ["retriever", "run_graph"]

MakeRun = Callable[..., Trajectory]


@pytest.fixture
def make_run(run_graph: RunGraph) -> MakeRun:
    """Play a script in the graph; keywords: id, target, and settings of the run."""

    def make(
        *script: Said, id: str = "run", target: str | None = None, **settings: Any
    ) -> Trajectory:
        run = run_graph(*script, **settings)
        return Trajectory.from_state(
            run.state, run.engine.tokenizer, id=id, model="scripted", target=target
        )

    return make


@pytest.fixture(scope="session")
def tiny_engine(tiny_llm: str) -> Iterator[VLLMEngine]:
    """The small LM in the real vLLM; tests leave it with any weights."""
    engine = VLLMEngine(tiny_llm, max_model_len=1024, dtype="float32", kv_cache_gib=1)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def found(retriever: Retriever) -> Callable[..., list[str]]:
    """What the TRM returns for a preference, to the user of the scripted runs."""

    def find(preference: str, n: int = 4) -> list[str]:
        seen = ("0", "1", "2")
        request = RetrievalRequest(seen, preference=preference, k=n, exclude=frozenset(seen))
        return [item.id for item in retriever.retrieve([request])[0]]

    return find
