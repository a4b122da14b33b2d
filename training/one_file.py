"""A run's state in one file: trained weights, the optimiser's moments, and words of the trainer's.

It is written beside its place and then moved, so that a kill leaves the last one whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..configuration import replacing

_KINDS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter


def save_trained(
    path: Path,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    said: Mapping[str, str],
) -> None:
    """Write parameters under their names, what AdamW keeps of them, and `said`.

    Raises SettingsError where the file can't be written.
    """
    tensors = {name: p.detach().cpu().contiguous() for name, p in trained.items()}
    for name, p in trained.items():
        for kind, value in optimizer.state[p].items():
            tensors[f"optimizer.{kind}.{name}"] = value.detach().cpu().clone()
    with replacing(path) as beside:
        save_file(tensors, beside, metadata=dict(said))


def load_trained(
    path: Path, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, str] | None:
    """Read such a file into parameters and optimiser; gives what was said, None for no file."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file, torch.no_grad():
        known = set(file.keys())
        for name, p in trained.items():
            p.copy_(file.get_tensor(name))
            found = {
                kind: file.get_tensor(f"optimizer.{kind}.{name}")
                for kind in _KINDS
                if f"optimizer.{kind}.{name}" in known
            }
            optimizer.state[p] = {
                kind: value if kind == "step" else value.to(p.device)
                for kind, value in found.items()
            }
        return dict(file.metadata())
