"""The model that is trained: loaded with or without an adapter, and its weights as the engine
knows them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configuration import keep_origin, write_json
from ..errors import SettingsError
from ..graph.engine.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    RUN_SETTINGS,
    weights_digest,
)
from .configuration import LoRA

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ..graph.state import RunSettings

_TRAINED_WITH = {"answer_form", "retrieve_n", "history_length", "list_attributes"}


def load_policy(
    base: str, start: Path | None, lora: LoRA | None, *, dtype: str = "float32"
) -> PreTrainedModel:
    """Load the model, in float32 unless told, with a trainable adapter if `lora` asks for one.

    `dtype` is that of the weights under an adapter; the adapter itself is float32.

    `start` is a folder that an earlier run left: an adapter of `base`, or a whole model in its
    place. Raises SettingsError where it is neither, or an adapter is to be trained on as a whole
    model.
    """
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    adapter = start is not None and (start / ADAPTER_CONFIG).is_file()
    if start is not None and not adapter and not (start / "config.json").is_file():
        raise SettingsError(
            f"{start} holds neither an adapter nor a model: give the `final` folder of a run"
        )
    if adapter and lora is None:
        raise SettingsError(
            f"{start} is an adapter and lora is none: name the adapter's lora, or start from a "
            "whole model"
        )
    if adapter and start is not None and not (start / ADAPTER_WEIGHTS).is_file():
        raise SettingsError(f"{start} lacks {ADAPTER_WEIGHTS}: weights are read from safetensors")
    name = str(start) if start is not None and not adapter else base
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except OSError as error:
        raise SettingsError(f"{name} can't be read as a model: {error}") from error
    if adapter:
        return PeftModel.from_pretrained(model, str(start), is_trainable=True)
    return model if lora is None else get_peft_model(model, lora.config())


def keep_made_of(data: str, model: str, start: Path | None, folder: Path) -> None:
    """Keep in a run's folder which data set (its fingerprint), LLM and start it is made of.

    Raises SettingsError where the run in the folder was made of others.
    """
    origin = {"data set": data, "LLM": weights_digest(model)}
    if start is not None:
        origin["start"] = weights_digest(str(start))
    keep_origin(origin, folder)


def check_start(start: Path, lora: LoRA | None) -> None:
    """Refuse a start that is missing, or a whole model under an adapter that would be served over
    another. Raises SettingsError.
    """
    if not start.is_dir():
        raise SettingsError(f"start {start} does not exist: train that run first")
    whole = (start / "config.json").is_file() and not (start / ADAPTER_CONFIG).is_file()
    if whole and lora is not None:
        raise SettingsError(
            f"start {start} is a whole model and lora is set: the adapter would be served over the "
            "settings' model, which is another. Name that folder as `model`, or set lora to null"
        )


def keep_run_settings(run: RunSettings, folder: Path) -> None:
    """Write beside the weights what of a run's settings the policy was trained with."""
    fields = run.model_dump(include=_TRAINED_WITH)
    write_json(folder / RUN_SETTINGS, {"decoding": "free", "temperature": 0.0, **fields})


def plain_weights(model: Any) -> dict[str, Tensor]:
    """Parameters under their names in the plain model, adapters added in; nothing is changed.

    Merging and unmerging the live model would leave a residue in its weights at every step.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if not isinstance(model, PeftModel):
        return dict(model.named_parameters())
    inner = model.get_base_model()
    weights = {
        name.replace(".base_layer.", "."): weight
        for name, weight in inner.named_parameters()
        if ".lora_" not in name
    }
    for name, module in inner.named_modules():
        if isinstance(module, LoraLayer):
            own = module.get_base_layer().weight.detach()
            weights[f"{name}.weight"] = own + module.get_delta_weight("default").detach()
    return weights
