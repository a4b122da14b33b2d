"""LoRA adapters: merged into their base model once, so that every engine serves them alike, and
served as they were trained.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ...errors import EngineError
from .limits import check_model_folder
from .tokenizer import load_tokenizer

RUN_SETTINGS = "run_settings.json"
"""What of RunSettings an LLM was trained with, beside its weights."""

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""What peft calls the files of an adapter."""

_ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)


def trained_settings(folder: Path) -> dict[str, Any]:
    """Fields of RunSettings that a trained LLM expects; empty where its folder holds none.

    Raises EngineError where the file can't be read.
    """
    path = folder / RUN_SETTINGS
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"can't read {path}: {error}. Remove it, or copy it anew.") from error
    if not isinstance(fields, dict):
        raise EngineError(f"{path} holds no fields. Remove it, or copy it anew.")
    return fields


def merged_model(base: str, adapter: Path, cache: Path, *, dtype: str = "auto") -> str:
    """Folder of `base` with the adapter added to its weights; made at the first call.

    Args:
        base: hub name or folder of the model that the adapter was trained on.
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        cache: where merged models are kept, by the content of the adapter and the base's name.
        dtype: what the engine computes in. "float32" keeps the sum as it was trained; "auto" and
            all others round it to the base's own type, so that it takes no more room.

    Raises EngineError: no such adapter, or one of another model.

    """
    missing = [name for name in _ADAPTER_FILES if not (adapter / name).is_file()]
    if missing:
        raise EngineError(
            f"{adapter} is no adapter: it lacks {', '.join(missing)}. Give the `final` folder of a "
            "run with lora, or correct DEEPREC_ADAPTER."
        )
    check_model_folder(base)
    exact = dtype == "float32"
    digest = hashlib.sha256(f"{base} {exact}".encode())
    for name in _ADAPTER_FILES:
        digest.update((adapter / name).read_bytes())
    folder = cache / f"{adapter.resolve().parent.name}-{digest.hexdigest()[:16]}"
    if folder.exists():
        return str(folder)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=cache, prefix=".merging-"))
    except OSError as error:
        raise EngineError(f"can't write to {cache}: {error}. Set DEEPREC_HOME.") from error
    try:
        _merge(base, adapter, beside, exact=exact)
        beside.chmod(0o755)
        os.replace(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return str(folder)


def _merge(base: str, adapter: Path, folder: Path, *, exact: bool) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    own = AutoConfig.from_pretrained(base).dtype or torch.float32
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    try:
        tuned = PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError) as error:
        raise EngineError(f"{adapter} is no adapter of {base!r}: {error}") from error
    tuned.merge_and_unload().to(torch.float32 if exact else own).save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
