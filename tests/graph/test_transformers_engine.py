"""The engine without vLLM, on a small model: exact ids and logprobs, stops, limits, new weights."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

from deeprec.errors import EngineError
from deeprec.graph.engine import transformers_engine
from deeprec.graph.engine.base import Constraint, Generation, GenerationRequest
from deeprec.graph.engine.transformers_engine import TransformersEngine

from .conftest import logprob_gap


@pytest.fixture(scope="module")
def engine(tiny_llm: str) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(
        tiny_llm, max_model_len=512, dtype="float32", kv_cache_gib=1, max_num_seqs=8, seed=0
    )
    yield engine
    engine.close()


def gap(prompt: list[int], said: Generation, weights: str) -> float:
    """Largest difference between the engine's logprobs and those of the weights in a folder."""
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
    return logprob_gap(model, prompt, said)


def test_many_at_once_and_their_continuations_are_exact(
    engine: TransformersEngine, tiny_llm: str
) -> None:
    prompts = [engine.tokenizer.encode("Once upon a time " * n) for n in (1, 5, 9, 13)]
    first = [engine.submit(GenerationRequest(p, 20, temperature=1.0)) for p in prompts]
    said = [future.result(60) for future in first]
    again = [
        engine.submit(GenerationRequest([*p, *s.ids], 20, temperature=1.0))
        for p, s in zip(prompts, said, strict=True)
    ]
    for prompt, before, future in zip(prompts, said, again, strict=True):
        assert before.finish == "length"
        assert len(before.ids) == 20
        assert gap(prompt, before, tiny_llm) < 1e-3
        after = future.result(60)
        assert gap([*prompt, *before.ids], after, tiny_llm) < 1e-3


def test_greedy_takes_the_likeliest(engine: TransformersEngine, tiny_llm: str) -> None:
    prompt = engine.tokenizer.encode("Films that")
    said = engine.submit(GenerationRequest(prompt, 8)).result(60)
    model = AutoModelForCausalLM.from_pretrained(tiny_llm, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *said.ids]])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == list(said.ids)


def test_the_first_stop_string_ends_it(engine: TransformersEngine) -> None:
    prompt = engine.tokenizer.encode("Films that")
    free = engine.submit(GenerationRequest(prompt, 12)).result(60)
    text = [engine.tokenizer.decode(free.ids[:n]) for n in range(13)]
    stop = text[6][len(text[4]) :]  # what the fifth and sixth token spell
    said = engine.submit(GenerationRequest(prompt, 12, stop=("nowhere", stop))).result(60)
    assert (said.finish, said.stop_string) == ("stop", stop)
    shortest = next(n for n in range(13) if stop in text[n])
    assert said.ids == free.ids[:shortest]
    assert len(said.logprobs) == shortest


def test_end_of_sequence_is_part_of_the_ids(engine: TransformersEngine, tiny_llm: str) -> None:
    end = engine.tokenizer.eos_token_id
    weights = AutoModelForCausalLM.from_pretrained(tiny_llm, dtype=torch.float32)
    own = {name: weight.detach().clone() for name, weight in weights.named_parameters()}
    head = own["lm_head.weight"]
    try:
        # All tokens alike but the end, which is far likelier along the mean state.
        prompt = engine.tokenizer.encode("Films that")
        with torch.no_grad():
            state = weights.model(torch.tensor([prompt])).last_hidden_state[0, -1]
        tilted = torch.zeros_like(head)
        tilted[end] = state
        engine.load_weights({**own, "lm_head.weight": tilted})
        said = engine.submit(GenerationRequest(prompt, 5)).result(60)
        assert (said.finish, said.ids) == ("eos", (end,))
    finally:
        engine.load_weights(own)


def test_new_weights_are_used_and_old_keys_forgotten(
    engine: TransformersEngine, tiny_llm: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    prompt = engine.tokenizer.encode("Once upon a time " * 20)
    request = GenerationRequest(prompt, 10, temperature=1.0)
    engine.submit(request).result(60)  # its keys and values are cached
    model = AutoModelForCausalLM.from_pretrained(tiny_llm, dtype=torch.float32)
    own = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * weight.std() * 0.2)
    folder = str(tmp_path_factory.mktemp("moved"))
    model.save_pretrained(folder)
    try:
        engine.load_weights(dict(model.named_parameters()))
        said = engine.submit(request).result(60)
        assert gap(prompt, said, folder) < 1e-3
        assert gap(prompt, said, tiny_llm) > 0.05
        with pytest.raises(EngineError, match="no weights named wrong"):
            engine.load_weights({"wrong": torch.zeros(1)})
    finally:
        engine.load_weights(own)


def test_cancelling_frees_the_engine(engine: TransformersEngine) -> None:
    prompt = engine.tokenizer.encode("Films that")
    engine.submit(GenerationRequest(prompt, 1)).result(60)  # it has started
    endless = engine.submit(GenerationRequest(prompt, 480, temperature=1.0))
    time.sleep(0.2)
    endless.cancel()
    deadline = time.monotonic() + 20
    while engine._manager.batch_processor.has_pending_requests() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not engine._manager.batch_processor.has_pending_requests()
    assert engine._manager.output_router.result_handlers == {}


def test_what_it_can_not_do_is_told(engine: TransformersEngine) -> None:
    guided = GenerationRequest([1], 4, constraint=Constraint(choices=("a",)))
    with pytest.raises(EngineError, match="decoding free"):
        engine.submit(guided).result(60)
    with pytest.raises(EngineError, match="512"):
        engine.submit(GenerationRequest([1] * 512, 4)).result(60)


def test_an_engine_that_is_not_closed_does_not_hold_up_the_interpreter(tiny_llm: str) -> None:
    code = (
        "import sys\n"
        "from deeprec.graph.engine.transformers_engine import TransformersEngine\n"
        "TransformersEngine(sys.argv[1], max_model_len=64, kv_cache_gib=1, max_num_seqs=2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tiny_llm], timeout=120, check=False)
    assert done.returncode == 0


def test_more_at_once_than_the_cache_holds(tiny_llm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take turns: each is finished, and its logprobs are those of the model."""
    blocks = 18  # of 32 tokens: 576, where one run alone may hold 512
    monkeypatch.setattr(transformers_engine, "kv_token_bytes", lambda *_: 2**30 // 32 // blocks)
    engine = TransformersEngine(
        tiny_llm, max_model_len=512, dtype="float32", kv_cache_gib=1, max_num_seqs=8, seed=0
    )
    try:
        prompts = [engine.tokenizer.encode(f"Film {n} " * 20) for n in range(5)]
        futures = [engine.submit(GenerationRequest(p, 100, temperature=1.0)) for p in prompts]
        said = [future.result(240) for future in futures]
    finally:
        engine.close()
    held = sum(len(p) + len(s.ids) for p, s in zip(prompts, said, strict=True))
    assert held > 32 * blocks
    for prompt, generation in zip(prompts, said, strict=True):
        assert generation.finish in ("length", "eos")
        assert gap(prompt, generation, tiny_llm) < 1e-3
