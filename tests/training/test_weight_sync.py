"""New weights in the real vLLM: its logprobs are those of the weights that were handed over."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from deeprec.graph.engine.base import GenerationRequest
from deeprec.graph.engine.vllm_inprocess import VLLMEngine

from ..graph.conftest import logprob_gap

pytestmark = pytest.mark.engine

PROMPT = "Three films, and why they are worth an evening:"


@pytest.fixture(params=["real_engine", "tiny_engine"], ids=["tied", "untied"])
def model_and_engine(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[PreTrainedModel, VLLMEngine]]:
    """The demo's model, whose head is tied to its embeddings, and a small one with its own head."""
    engine: VLLMEngine = request.getfixturevalue(request.param)
    model = AutoModelForCausalLM.from_pretrained(engine.name, dtype=torch.float32).eval()
    own = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    engine.load_weights(own)
    yield model, engine
    engine.load_weights(own)


def gap(model: PreTrainedModel, engine: VLLMEngine) -> float:
    """Largest difference between the engine's logprobs of what it samples and the model's."""
    prompt = engine.tokenizer.encode(PROMPT)
    requests = [GenerationRequest(prompt, 24, temperature=1.0, seed=seed) for seed in range(3)]
    futures = [engine.submit(request) for request in requests]
    return max(logprob_gap(model, prompt, future.result()) for future in futures)


def test_engine_and_model_agree_before_and_after_new_weights(
    model_and_engine: tuple[PreTrainedModel, VLLMEngine],
) -> None:
    model, engine = model_and_engine
    before = set(Path("/dev/shm").glob("deeprec-weights-*"))  # of other runs on this machine
    assert gap(model, engine) < 1e-3
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * 0.05)
    assert gap(model, engine) > 0.05  # the engine still has the old ones
    engine.load_weights(dict(model.named_parameters()))
    assert gap(model, engine) < 1e-3
    assert set(Path("/dev/shm").glob("deeprec-weights-*")) <= before
