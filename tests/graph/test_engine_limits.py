"""What is refused before a model is loaded, and in which words."""

import json
import socket
from pathlib import Path

import pytest

from deeprec.errors import EngineError
from deeprec.graph.engine.base import Constraint, Generation, GenerationRequest
from deeprec.graph.engine.limits import check_kv_cache, check_model_folder, cpu_dtype
from deeprec.graph.engine.tokenizer import load_tokenizer
from deeprec.graph.engine.vllm_server import VLLMServerEngine, serve
from deeprec.settings import EngineSettings


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Everything that a model folder needs but sensible weights."""
    config = {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
        "max_position_embeddings": 32768,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


def test_a_model_folder_passes(model: Path) -> None:
    check_model_folder(str(model))
    check_kv_cache(str(model), max_model_len=1024, kv_cache_gib=1, dtype="auto")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_a_folder_without_its_files_is_no_model(model: Path, name: str) -> None:
    (model / name).unlink()
    with pytest.raises(EngineError, match="not a model folder"):
        check_model_folder(str(model))


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(EngineError, match="'/no/such/model' does not exist"):
        check_model_folder("/no/such/model")


def test_a_hub_name_is_left_to_the_hub() -> None:
    check_model_folder("Qwen/Qwen2.5-7B-Instruct")


def test_one_run_must_fit_into_the_kv_cache(model: Path) -> None:
    # 2 (K, V) · 32 layers · 8 heads · 128 · 2 bytes = 128 KiB a token; 1 GiB holds 8,192 tokens.
    check_kv_cache(str(model), max_model_len=8192, kv_cache_gib=1, dtype="bfloat16")
    with pytest.raises(EngineError, match=r"need 1\.00 GiB of KV cache and 1 GiB are set"):
        check_kv_cache(str(model), max_model_len=8193, kv_cache_gib=1, dtype="bfloat16")
    check_kv_cache(str(model), max_model_len=4096, kv_cache_gib=1, dtype="float32")
    with pytest.raises(EngineError, match="KV cache"):
        check_kv_cache(str(model), max_model_len=4097, kv_cache_gib=1, dtype="float32")


@pytest.mark.parametrize(
    ("capabilities", "asked", "chosen"),
    [
        ({"avx2": True, "avx512_bf16": False}, "auto", "float32"),
        ({"avx512_bf16": True, "amx_bf16": False}, "auto", "auto"),
        ({"avx2": True}, "bfloat16", "bfloat16"),
    ],
)
def test_float32_where_bfloat16_is_emulated(
    capabilities: dict[str, bool], asked: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    assert cpu_dtype(asked) == chosen


def test_the_kv_cache_must_fit_into_memory(model: Path) -> None:
    with pytest.raises(EngineError, match="too little memory for the KV cache: 999999 GiB"):
        check_kv_cache(str(model), max_model_len=1024, kv_cache_gib=999_999, dtype="auto")


def test_positions_bound_the_length(model: Path) -> None:
    with pytest.raises(EngineError, match="beyond the 32768 positions"):
        check_kv_cache(str(model), max_model_len=40_000, kv_cache_gib=1, dtype="auto")


def test_a_folder_without_tokenizer(model: Path) -> None:
    with pytest.raises(EngineError, match="tokenizer"):
        load_tokenizer(str(model))


def test_a_port_in_use_is_named(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = EngineSettings(max_model_len=1024, kv_cache_gib=1)
        with pytest.raises(EngineError, match=f"port {port} on 127.0.0.1 can't be used"):
            serve(str(model), settings, host="127.0.0.1", port=port)


def test_nobody_answers() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EngineError, match="deeprec serve-llm"):
        VLLMServerEngine(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("arguments", [{}, {"choices": ("a",), "regex": "a"}])
def test_a_constraint_is_one_of_two(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="either"):
        Constraint(**arguments)  # type: ignore[arg-type]


def test_a_generation_has_a_logprob_per_token() -> None:
    with pytest.raises(ValueError, match="2 token ids came with 1 logprobs"):
        Generation((1, 2), (-0.1,), "stop")


def test_a_server_takes_four_stop_strings() -> None:
    GenerationRequest((1,), 1, stop=("a", "b", "c", "d"))
    with pytest.raises(ValueError, match="5 stop strings"):
        GenerationRequest((1,), 1, stop=("a", "b", "c", "d", "e"))
