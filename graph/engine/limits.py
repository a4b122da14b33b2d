"""What is settled before a model is loaded: its arithmetic on a CPU, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Spells guided text in the tokenizer's own way, in a third fewer tokens than xgrammar (docs).
GRAMMAR_BACKEND = "guidance"
# Else vLLM reads pickled weights where a model has no others.
WEIGHTS_FORMAT = "safetensors"
# vLLM's name for the kernels of cpu_worker.
CPU_KERNELS = "deeprec_cpu"
# What vLLM and its libraries read of the environment on a CPU, where the user set nothing.
CPU_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # pinned threads starve on shared cores
    # oneDNN keeps 1,024 compiled products, one for each number of rows that a batch ever had: a
    # third of a GiB after some 2,000 runs (docs/reliability.md).
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
}
_GIB = 1024**3


def check_model_folder(model: str) -> None:
    """Refuse a local folder that holds no model, before anything heavy is loaded.

    A name with no such folder is taken for a hub name. Raises EngineError.
    """
    path = Path(model)
    if not path.exists():
        looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
        if looks_local:
            raise EngineError(f"model folder {model!r} does not exist: check DEEPREC_MODEL")
        return
    missing = [
        name for name in ("config.json", "tokenizer_config.json") if not (path / name).is_file()
    ]
    if not list(path.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise EngineError(
            f"{model!r} is not a model folder: it lacks {', '.join(missing)}. Give a folder "
            "written by save_pretrained, or a hub name."
        )


def cpu_dtype(dtype: str) -> str:
    """Return the type to compute in on this CPU: "auto" is float32 where bfloat16 is emulated.

    Without bfloat16 instructions float32 decodes more than twice as fast (docs/experiments.md).
    """
    import torch

    if dtype != "auto":
        return dtype
    capabilities = torch.cpu.get_capabilities()
    native = any(bool(has) for name, has in capabilities.items() if "bf16" in name)
    return "auto" if native else "float32"


def cpu_options(max_model_len: int) -> dict[str, Any]:
    """Return what vLLM is started with on a CPU, by the names of its EngineArgs."""
    return {
        "enforce_eager": True,
        # Chunked prefill rewinds the generator of a seeded request, which a CPU's can't.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_model_len, 2048),
        # Only whole blocks are reused when a run goes on; vLLM's 128 prefill the rest anew.
        "block_size": 32,
        # vLLM's choice, a worker process, and the engine core wait for each other by spinning, on
        # the cores that compute.
        "distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
        # A quarter of a prefill, and a tenth of a step of decoding (docs/experiments.md).
        "ir_op_priority": {"rms_norm": [CPU_KERNELS], "fused_add_rms_norm": [CPU_KERNELS]},
        "worker_extension_cls": f"{__package__}.cpu_worker.CPUWorker",
    }


def kv_token_bytes(config: PreTrainedConfig, value_bytes: int) -> int:
    """Bytes of one token's keys and values, in all layers of a text model's configuration."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * config.num_hidden_layers * kv_heads * head_dim * value_bytes)


def check_kv_cache(model: str, *, max_model_len: int, kv_cache_gib: int, dtype: str) -> None:
    """Refuse on a CPU what vLLM would only refuse after loading. Raises EngineError.

    One sequence of `max_model_len` tokens must fit into the KV cache (4 bytes a value for
    float32, else 2), and the cache into the memory that is free.
    """
    import psutil
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        config = config.get_text_config()  # of a composite model too
    except (OSError, ValueError) as error:
        raise EngineError(f"the configuration of model {model!r} can't be read: {error}") from error
    limit = getattr(config, "max_position_embeddings", max_model_len)
    if max_model_len > limit:
        raise EngineError(
            f"max_model_len {max_model_len} is beyond the {limit} positions of {model!r}: "
            "lower DEEPREC_ENGINE__MAX_MODEL_LEN"
        )
    needed = kv_token_bytes(config, 4 if dtype == "float32" else 2) * max_model_len
    if needed > kv_cache_gib * _GIB:
        raise EngineError(
            f"{max_model_len} tokens need {needed / _GIB:.2f} GiB of KV cache and "
            f"{kv_cache_gib} GiB are set: raise DEEPREC_ENGINE__KV_CACHE_GIB or lower "
            "DEEPREC_ENGINE__MAX_MODEL_LEN"
        )
    free = psutil.virtual_memory().available
    if kv_cache_gib * _GIB > free:
        raise EngineError(
            f"too little memory for the KV cache: {kv_cache_gib} GiB are set and "
            f"{free / _GIB:.1f} GiB are free: lower DEEPREC_ENGINE__KV_CACHE_GIB"
        )
