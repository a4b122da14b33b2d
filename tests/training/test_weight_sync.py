"""New weights in the real vLLM: its logprobs are those of the weights that were handed over."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from deeprec.graph.engine.base import Generation, GenerationRequest
from deeprec.graph.engine.vllm_inprocess import VLLMEngine
from deeprec.settings import load_settings

pytestmark = pytest.mark.engine

PROMPT = "Three films, and why they are worth an evening:"


@pytest.fixture(scope="module", params=["tied", "untied"])
def model_and_engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PreTrainedModel, VLLMEngine]]:
    """The demo's model, whose head is tied to its embeddings, and a small one with its own head."""
    name = load_settings().model_name
    if request.param == "untied":
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(name)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.2,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        name = str(tmp_path_factory.mktemp("untied"))
        LlamaForCausalLM(config).save_pretrained(name)
        tokenizer.save_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    engine = VLLMEngine(name, max_model_len=512, dtype="float32", kv_cache_gib=1)
    yield model, engine
    engine.close()


def gap(model: PreTrainedModel, engine: VLLMEngine) -> float:
    """Largest difference between the engine's logprobs of what it samples and the model's."""
    prompt = engine.tokenizer.encode(PROMPT)
    requests = [GenerationRequest(prompt, 24, temperature=1.0, seed=seed) for seed in range(3)]
    futures = [engine.submit(request) for request in requests]
    return max(_gap(model, prompt, future.result()) for future in futures)


def _gap(model: PreTrainedModel, prompt: list[int], said: Generation) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *said.ids]])).logits[0, len(prompt) - 1 : -1]
    own = logits.log_softmax(-1).gather(1, torch.tensor(said.ids)[:, None])[:, 0]
    return float((own - torch.tensor(said.logprobs)).abs().max())


def test_engine_and_model_agree_before_and_after_new_weights(
    model_and_engine: tuple[PreTrainedModel, VLLMEngine],
) -> None:
    model, engine = model_and_engine
    assert gap(model, engine) < 1e-3
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * 0.05)
    assert gap(model, engine) > 0.05  # the engine still has the old ones
    engine.load_weights(dict(model.named_parameters()))
    assert gap(model, engine) < 1e-3


def test_nothing_is_left_behind(model_and_engine: tuple[PreTrainedModel, VLLMEngine]) -> None:
    model, engine = model_and_engine
    engine.load_weights(dict(model.named_parameters()))
    assert not list(Path("/dev/shm").glob("deeprec-weights-*"))
