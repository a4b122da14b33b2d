"""The recommendation head: what makes states of users and of items comparable, and its file.

Score of an item = inner product of two vectors of the model's width: the user's state, projected,
of length exp(log_scale); the item's, projected, of length 1. An untrained head changes nothing but
lengths. Its folder holds head.json, head.safetensors, items.safetensors (items.py) and the adapter
or model whose states it reads.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from ...configuration import replacing, write_json
from ...errors import HeadError
from ..engine.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, weights_digest
from . import readings

if TYPE_CHECKING:
    from ...settings import Settings

HEAD, WEIGHTS = "head.json", "head.safetensors"
_SCALE = 20.0  # of an untrained head: softmax temperature 0.05 of cosines


class RecommendationHead(nn.Module):
    """Two projections and a scale, of states `dim` wide."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.user = nn.Linear(dim, dim)
        self.item = nn.Linear(dim, dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_SCALE)))
        with torch.no_grad():
            for layer in (self.user, self.item):
                layer.weight.copy_(torch.eye(dim))
                layer.bias.zero_()

    @property
    def dim(self) -> int:
        """Width of a state."""
        return self.user.in_features

    def users(self, states: Tensor) -> Tensor:
        """Vectors [n, dim] of users' states [n, dim]."""
        vectors = functional.normalize(self.user(states.float()), dim=-1)
        return vectors * self.log_scale.exp()

    def items(self, states: Tensor) -> Tensor:
        """Unit vectors [n, dim] of items' states [n, dim]."""
        return functional.normalize(self.item(states.float()), dim=-1)


class HeadCard(BaseModel):
    """What head.json says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["deeprec.head"] = "deeprec.head"
    schema_version: Literal[2] = 2
    base: str  # hub name or last part of the folder of the LLM, without an adapter
    dim: int = Field(ge=1)
    readings: int  # version of graph/r2ec/readings.py
    dataset: str  # fingerprint of the data set that it was trained on
    weights: str  # fingerprint of the LLM whose states it reads
    history_length: int = Field(ge=1)  # items of a history that it was trained to read
    thought_tokens: int = Field(48, ge=1)  # of the longest thoughts that it was trained to read
    trained_items: tuple[str, ...] = ()  # hashes of the items' readings that it was trained with


def save_head(folder: Path, head: RecommendationHead, card: HeadCard) -> None:
    """Write both files, each whole or not at all. Raises SettingsError."""
    weights = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    with replacing(folder / WEIGHTS) as beside:
        save_file(weights, beside)
    write_json(folder / HEAD, card.model_dump(mode="json"))


def read_card(folder: Path) -> HeadCard:
    """Read head.json. Raises HeadError: none, damaged, or of another version."""
    path = Path(folder) / HEAD
    try:
        card = HeadCard.model_validate_json(path.read_bytes())
    except OSError as error:
        raise HeadError(
            f"{folder} holds no recommendation head: {error}. Train one with training/run_head.py "
            "or training/run_recpo.py, and give the `final` folder of that run."
        ) from error
    except ValidationError as error:
        raise HeadError(
            f"{path} is damaged or of another version of deeprec: {error.errors()[0]['msg']}. "
            "Train the head again."
        ) from error
    if card.readings != readings.VERSION:
        raise HeadError(
            f"the head in {folder} was trained on readings of version {card.readings}, and this "
            f"deeprec writes version {readings.VERSION}: train it again"
        )
    return card


def load_head(folder: Path, card: HeadCard) -> RecommendationHead:
    """Read the head's weights. Raises HeadError where they are missing or of another shape."""
    head = RecommendationHead(card.dim)
    try:
        head.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise HeadError(
            f"the weights in {folder / WEIGHTS} can't be read: {error}. Train the head again."
        ) from error
    return head.eval()


def weights_fingerprint(base: str, folder: Path | None) -> str:
    """Which LLM: SHA-256 (hex) of the base's digest and of the adapter's files.

    `base` is a hub name (taken by its name) or a folder, `folder` may hold an adapter or a whole
    model in the base's place. Raises HeadError where a file can't be read.
    """
    adapter = folder is not None and (folder / ADAPTER_CONFIG).is_file()
    whole = folder is not None and not adapter and (folder / "config.json").is_file()
    try:
        digest = hashlib.sha256(weights_digest(str(folder) if whole else base).encode())
        if adapter and folder is not None:
            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                digest.update((folder / name).read_bytes())
    except OSError as error:
        raise HeadError(f"the LLM can't be read: {error}. Copy its folder anew.") from error
    return digest.hexdigest()


def model_of_head(settings: Settings, folder: Path) -> Settings:
    """Settings whose LLM is the one that the head in `folder` reads.

    That is the folder's own adapter or model where it holds one, else the settings' LLM as it is.
    Raises HeadError.
    """
    card = read_card(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        own = settings.model_copy(update={"adapter": folder})
    elif (folder / "config.json").is_file():
        own = settings.model_copy(update={"model": str(folder), "adapter": None})
    else:
        own = settings
    check_llm(card, settings.model_name, settings.adapter if own is settings else folder, folder)
    return own


def check_llm(card: HeadCard, base: str, tuned: Path | None, folder: Path) -> None:
    """Raise HeadError where the head in `folder` reads another LLM than `base` with what is in
    `tuned`, an adapter or a model.
    """
    found = weights_fingerprint(base, tuned)
    if found != card.weights:
        given = base if tuned is None else f"{base} with {tuned}"
        raise HeadError(
            f"the head in {folder} reads another model: it was trained on {card.base} with weights "
            f"{card.weights[:16]}…, and these are {found[:16]}… ({given}). Give the model "
            "that it was trained on (DEEPREC_MODEL), or train a head for this one."
        )


def check_dataset(card: HeadCard, dataset: str, folder: Path) -> None:
    """Raise HeadError where the head in `folder` was trained for another data set."""
    if card.dataset != dataset:
        raise HeadError(
            f"the head in {folder} was trained for data set {card.dataset[:16]}…, and this is "
            f"{dataset[:16]}…: train a head for this one, or open the workspace it had"
        )


def head_digest(folder: Path) -> str:
    """SHA-256 (hex) of a head's weights and of what its card says of the LLM. Raises HeadError."""
    card = read_card(folder)
    try:
        weights = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise HeadError(
            f"{folder / WEIGHTS} can't be read: {error}. Copy the head anew."
        ) from error
    return hashlib.sha256(card.weights.encode() + weights).hexdigest()
