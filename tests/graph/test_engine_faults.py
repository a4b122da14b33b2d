"""vLLM in process: more at once than its KV cache holds, and its engine core killed under runs."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from deeprec.errors import EngineError
from deeprec.graph.engine import vllm_inprocess
from deeprec.graph.engine.base import GenerationRequest
from deeprec.graph.engine.limits import cpu_options
from deeprec.graph.engine.vllm_inprocess import VLLMEngine
from deeprec.tools.retriever import Retriever

from .conftest import logprob_gap
from .test_server_faults import check_whole, play, wait_for

pytestmark = [pytest.mark.engine, pytest.mark.slow]

_BLOCKS = 40  # of 32 tokens: 1,280, where one run alone may hold 1,024


@dataclass
class Machine:
    engine: VLLMEngine
    core: psutil.Process


@pytest.fixture(scope="module")
def machine(tiny_llm: str) -> Iterator[Machine]:
    """A small model with a KV cache that holds hardly more than one run."""
    before = set(psutil.Process().children(recursive=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            vllm_inprocess,
            "cpu_options",
            lambda length: {**cpu_options(length), "num_gpu_blocks_override": _BLOCKS},
        )
        engine = VLLMEngine(tiny_llm, max_model_len=1024, dtype="float32", kv_cache_gib=1)
    started = set(psutil.Process().children(recursive=True)) - before
    core = next(one for one in started if "EngineCore" in " ".join(one.cmdline()))
    yield Machine(engine, core)
    engine.close()


def test_more_at_once_than_the_kv_cache_holds(machine: Machine, tiny_llm: str) -> None:
    """They take turns: each is finished, and its logprobs are those of the model."""
    engine = machine.engine
    model = AutoModelForCausalLM.from_pretrained(tiny_llm, dtype=torch.float32).eval()
    prompts = [engine.tokenizer.encode(f"Film {n} was made " * 8) for n in range(12)]
    futures = [
        engine.submit(GenerationRequest(prompt, 250, temperature=float(n % 2), seed=n))
        for n, prompt in enumerate(prompts)
    ]
    said = [future.result(timeout=300) for future in futures]
    held = sum(len(p) + len(s.ids) for p, s in zip(prompts, said, strict=True))
    assert held > 2 * 32 * _BLOCKS
    for prompt, generation in zip(prompts, said, strict=True):
        assert generation.finish in ("length", "eos")
        if generation.finish == "length":
            assert len(generation.ids) == 250
        assert logprob_gap(model, prompt, generation) < 1e-2
    assert engine.unfinished() == 0


def test_more_runs_than_the_kv_cache_holds(machine: Machine, retriever: Retriever) -> None:
    limits = {"max_retrievals": 1, "min_retrievals": 1, "max_total_tokens": 1024}
    with ThreadPoolExecutor(6) as pool:
        runs = pool.map(
            lambda seed: play(machine.engine, retriever, seed, thought_tokens=150, limits=limits),
            range(6),
        )
        check_whole(list(runs))


def test_a_killed_engine_core_ends_runs_with_a_reason(
    machine: Machine, retriever: Retriever
) -> None:
    """The last test of this module: vLLM's engine in process does not come back."""
    engine = machine.engine
    with ThreadPoolExecutor(4) as pool:
        runs = [
            pool.submit(play, engine, retriever, seed, thought_tokens=600, history_length=1)
            for seed in range(4)
        ]
        wait_for(lambda: engine.unfinished() or any(run.done() for run in runs))
        machine.core.kill()
        responses = [run.result(timeout=120) for run in runs]
    responses.append(play(engine, retriever, 7))  # one that starts afterwards
    for response in responses:
        assert response.stop_reason == "engine_failure"
        assert response.failure is not None
        assert "vLLM refused or lost a generation" in response.failure.detail
        assert {line.source for line in response.recommendations} <= {"fused", "trm"}
        assert len(response.recommendations) == 3
    with pytest.raises(EngineError):
        engine.submit(GenerationRequest([1, 2, 3], 4)).result(timeout=60)
