"""LoRA adapters: merged into their base model once, so that every engine serves them alike."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from ...errors import EngineError
from .limits import check_model_folder
from .tokenizer import load_tokenizer

_FILES = ("adapter_config.json", "adapter_model.safetensors")


def merged_model(base: str, adapter: Path, cache: Path) -> str:
    """Folder of `base` with the adapter added to its weights; made at the first call.

    Args:
        base: hub name or folder of the model that the adapter was trained on.
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        cache: where merged models are kept, by the content of the adapter and the base's name.

    Raises EngineError: no such adapter, or one of another model.

    """
    missing = [name for name in _FILES if not (adapter / name).is_file()]
    if missing:
        raise EngineError(
            f"{adapter} is no adapter: it lacks {', '.join(missing)}. Give the `final` folder of a "
            "run with lora, or correct DEEPREC_ADAPTER."
        )
    check_model_folder(base)
    digest = hashlib.sha256(base.encode())
    for name in _FILES:
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
        _merge(base, adapter, beside)
        beside.chmod(0o755)
        os.replace(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return str(folder)


def _merge(base: str, adapter: Path, folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    try:
        tuned = PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError) as error:
        raise EngineError(f"{adapter} is no adapter of {base!r}: {error}") from error
    tuned.merge_and_unload().save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
