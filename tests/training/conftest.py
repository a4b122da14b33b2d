"""Finished runs of the real graph over a scripted policy, as trajectories."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deeprec.graph.engine.tokenizer import load_tokenizer
from deeprec.graph.engine.vllm_inprocess import VLLMEngine
from deeprec.settings import load_settings
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
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A causal LM of two layers with a head of its own, and the demo model's tokenizer."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(load_settings().model_name)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = str(tmp_path_factory.mktemp("llm"))
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
