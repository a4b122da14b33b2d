"""What trainers of a head share: what is trained, a checked step, and a run's state in one file.

The file holds trained weights, the optimiser's moments, and words of the trainer's. It is written
beside its place and then moved, so that a kill leaves the last one whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..configuration import replacing
from ..errors import SettingsError

if TYPE_CHECKING:
    from ..graph.r2ec.head import RecommendationHead

_KINDS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter


def trained_of(llm: nn.Module, head: RecommendationHead) -> dict[str, nn.Parameter]:
    """What is trained or follows, by names that begin with `llm.` and `head.`.

    The items' projection gets no gradient from here on: it whitens, and steps that it takes throw
    all vectors one way. It follows the states (head_start.follow), and is kept with the rest.
    """
    head.item.requires_grad_(False)
    return {
        **{f"llm.{name}": p for name, p in llm.named_parameters() if p.requires_grad},
        **{f"head.{name}": p for name, p in head.named_parameters()},
    }


def optimizer_of(
    trained: Mapping[str, nn.Parameter], rates: tuple[float, float], *, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over what gets gradients, with one group for the LLM and one for the head."""
    return torch.optim.AdamW(
        [
            {
                "params": [
                    p for name, p in trained.items() if name.startswith(part) and p.requires_grad
                ],
                "lr": rate,
            }
            for part, rate in zip(("llm.", "head."), rates, strict=True)
        ],
        weight_decay=weight_decay,
    )


def checked_step(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> list[float]:
    """Clip each group's gradient and step; gives the norms before clipping.

    Groups are clipped apart: a head's gradient can be a thousand times the LLM's, and would leave
    it none. Raises SettingsError, and takes no step, where a gradient is not finite.
    """
    norms = [
        float(nn.utils.clip_grad_norm_(group["params"], max_grad_norm))
        for group in optimizer.param_groups
    ]
    if not all(map(math.isfinite, norms)):
        raise SettingsError(
            f"the gradient of a step is {norms}: lower learning_rate, or set precision to float32"
        )
    optimizer.step()
    return norms


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
