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

from ...configuration import write_json
from ...errors import EngineError
from .limits import check_model_folder
from .tokenizer import load_tokenizer

RUN_SETTINGS = "run_settings.json"
"""What of RunSettings an LLM was trained with, beside its weights."""

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""What peft calls the files of an adapter."""

BASE = "base.json"
"""What kind of model an adapter was trained on."""

_SHAPE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_SAMPLES, _SAMPLE_BYTES = 256, 4096  # of a file of weights
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
        cache: where merged models are kept, by the content of the adapter and of the base.
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
    digest = hashlib.sha256(f"{base} {weights_digest(base)} {exact}".encode())
    for name in _ADAPTER_FILES:
        digest.update((adapter / name).read_bytes())
    folder = cache / f"{adapter.resolve().parent.name}-{digest.hexdigest()[:16]}"
    if folder.exists():
        return str(folder)
    check_base(base, adapter)
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
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    try:
        tuned = PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError) as error:
        raise EngineError(f"{adapter} is no adapter of {base!r}: {error}") from error
    merged = tuned.merge_and_unload().to(torch.float32 if exact else own)
    try:
        merged.save_pretrained(folder)
        load_tokenizer(base).save_pretrained(folder)
    except Exception as error:  # the boundary: of a full disk each writer tells by another error
        raise EngineError(
            f"can't write the merged model to {folder.parent}: {error}. Free disk space, or set "
            "DEEPREC_HOME to a roomier folder."
        ) from error


def keep_base(base: str, folder: Path) -> None:
    """Write beside an adapter what kind of model it belongs to. Raises SettingsError."""
    write_json(folder / BASE, _kind(base))


def check_base(base: str, adapter: Path) -> None:
    """Refuse an adapter that was trained on a model of other shapes or tokens.

    One that does not say what it was trained on is left to peft. Raises EngineError.
    """
    path = adapter / BASE
    if not path.is_file():
        return
    try:
        kept = dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise EngineError(f"can't read {path}: {error}. Copy the adapter anew.") from error
    here = _kind(base)
    differs = [
        f"{name} {kept.get(name)}, here {here[name]}"
        for name in here
        if kept.get(name) != here[name]
    ]
    if differs:
        raise EngineError(
            f"the adapter {adapter} was trained on another model than {base!r}: "
            f"{'; '.join(differs)}. Give the model that its README names, or correct "
            "DEEPREC_ADAPTER."
        )


def _kind(model: str) -> dict[str, Any]:
    """The shapes of a model's weights, and what its tokens mean."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    vocabulary = json.dumps(sorted(load_tokenizer(model).get_vocab().items()))
    return {
        **{name: getattr(config, name, None) for name in _SHAPE},
        "tokens": hashlib.sha256(vocabulary.encode()).hexdigest(),
    }


def weights_digest(model: str) -> str:
    """Tell models apart by their weights: a hash of samples of a local model's files, which takes
    no time for large ones either; of a hub model the name.

    A recommendation head in the same folder is not the model's.
    """
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*model*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for at in range(0, size, max(1, size // _SAMPLES)):
                file.seek(at)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
