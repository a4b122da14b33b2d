"""Item embeddings of a catalog: states of the items' readings, kept by content.

A state is that of the LLM, before the head's projection. It is keyed by the SHA-256 of the
reading's token ids: what is added or changed is read, what is removed is dropped, all else stays.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...configuration import replacing
from ...errors import HeadError
from ..resources import listed_at
from .readings import item_ids

if TYPE_CHECKING:
    from ...tools.snapshot import Snapshot
    from .backbone import Backbone

ITEMS = "items.safetensors"


class ItemStates:
    """States by content; `fingerprint` says whose they are."""

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self._states: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self._states)

    @classmethod
    def read(cls, folder: Path, fingerprint: str) -> ItemStates:
        """Read the file in `folder`; without one nothing is known yet.

        Raises HeadError: damaged, or stale, that is made by other weights than `fingerprint`.
        """
        found = cls(fingerprint)
        path = folder / ITEMS
        if not path.is_file():
            return found
        try:
            with safe_open(path, framework="pt") as file:
                said = file.metadata() or {}
                states, keys = file.get_tensor("states"), json.loads(said["keys"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise HeadError(
                f"{path} is damaged: {error}. Remove it; item embeddings are then made anew."
            ) from error
        if said["weights"] != fingerprint:
            raise HeadError(
                f"the item embeddings in {path} are stale: they were made by weights "
                f"{said['weights'][:16]}…, and the model's are {fingerprint[:16]}…. Remove the "
                "file; they are then made anew."
            )
        found._states = dict(zip(keys, states, strict=True))
        return found

    def save(self, folder: Path) -> None:
        """Write the file, whole or not at all. Raises SettingsError."""
        keys = sorted(self._states)
        states = torch.stack([self._states[key] for key in keys]).contiguous()
        said = {"weights": self.fingerprint, "keys": json.dumps(keys)}
        with replacing(folder / ITEMS) as beside:
            save_file({"states": states}, beside, metadata=said)

    def of(self, sequences: Sequence[Sequence[int]], backbone: Backbone) -> Tensor:
        """States [n, dim] of these readings in order; only those that are not known are read."""
        keys = [content_key(sequence) for sequence in sequences]
        missing = {key: at for at, key in enumerate(keys) if key not in self._states}
        if missing:
            made = backbone.states([sequences[at] for at in missing.values()])
            self._states.update(zip(missing, made, strict=True))
        if not keys:
            return torch.zeros(0, backbone.dim)
        return torch.stack([self._states[key] for key in keys])

    def keep_only(self, keys: Iterable[str]) -> None:
        """Drop all others."""
        wanted = set(keys)
        self._states = {key: state for key, state in self._states.items() if key in wanted}

    def replace_all(self, fingerprint: str) -> None:
        """Forget every state: the weights are others now."""
        self.fingerprint = fingerprint
        self._states = {}


def content_key(sequence: Sequence[int]) -> str:
    """SHA-256 (hex) of token ids."""
    return hashlib.sha256(np.asarray(sequence, dtype="<i4").tobytes()).hexdigest()


def catalog_readings(now: Snapshot, backbone: Backbone) -> list[list[int]]:
    """Token ids of every item's reading, in the catalog's order. Raises HeadError for no item."""
    if not now.ids:
        raise HeadError("the catalog is empty, so there is nothing to rank: run `deeprec index`")
    return [item_ids(listed_at(now, at), backbone.tokenizer) for at in range(len(now.ids))]
