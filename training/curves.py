"""Curves of a training run, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import SettingsError

_COLUMNS = 3
_PANELS = {
    "loss": ("loss",),
    "tokens guessed right": ("mean_token_accuracy",),
    "reward": ("reward/total",),
    "parts of the reward": ("reward/format", "reward/invocation", "reward/diversity", "reward/hit"),
    "share of runs": ("format/strict", "stop/answered", "run/masked_share"),
    "searches of a run": ("run/retrievals",),
    "seconds of a step": ("seconds/generate", "seconds/update_before", "seconds/sync"),
    "gap to the engine (nats)": ("engine_gap/mean", "engine_gap/max"),
}


def draw(history: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Write a PNG of what the trainer logged (`trainer.state.log_history`), whole or not at all.

    Raises SettingsError where nothing was logged.
    """
    from matplotlib.figure import Figure

    logged = {
        name: {
            key: points
            for key in keys
            if (points := [(row["step"], row[key]) for row in history if key in row])
        }
        for name, keys in _PANELS.items()
    }
    panels = {name: lines for name, lines in logged.items() if lines}
    if not panels:
        raise SettingsError("nothing was logged that could be drawn: lower trainer.logging_steps")
    rows = math.ceil(len(panels) / _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 3.5 * rows), layout="constrained")
    places = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for (name, lines), axes in zip(panels.items(), places, strict=False):
        for key, points in lines.items():
            axes.plot(*zip(*points, strict=True), label=key, linewidth=1.2)
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    for axes in places:
        axes.set_axis_off()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    figure.savefig(beside, format="png", dpi=120)
    beside.replace(path)
