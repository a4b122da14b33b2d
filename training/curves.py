"""Curves of a training run, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PANELS = {
    "reward": ("reward/total",),
    "parts of the reward": ("reward/format", "reward/invocation", "reward/diversity", "reward/hit"),
    "share of runs": ("format/strict", "stop/answered", "run/masked_share"),
    "searches of a run": ("run/retrievals",),
    "seconds of a step": ("seconds/generate", "seconds/update_before", "seconds/sync"),
    "gap to the engine (nats)": ("engine_gap/mean", "engine_gap/max"),
}


def draw(history: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Write a PNG of what the trainer logged (`trainer.state.log_history`), whole or not at all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    for axes, (name, keys) in zip(figure.subplots(2, 3).flat, _PANELS.items(), strict=True):
        for key in keys:
            points = [(row["step"], row[key]) for row in history if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=key, linewidth=1.2)
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    figure.savefig(beside, format="png", dpi=120)
    beside.replace(path)
