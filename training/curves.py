"""Curves of training runs, as pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..configuration import replacing
from ..errors import SettingsError

History = Sequence[Mapping[str, Any]]
"""What a trainer logged (`trainer.state.log_history`)."""

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
_COMPARED = {
    "reward": "reward/total",
    "share of runs in strict format": "format/strict",
    "searches of a run": "run/retrievals",
}


def draw(history: History, path: Path, *, title: str) -> None:
    """Write a PNG of what a run logged, whole or not at all.

    Raises SettingsError where nothing was logged.
    """
    panels = {name: {key: (history, key) for key in keys} for name, keys in _PANELS.items()}
    _write(panels, path, title)


def compare(runs: Mapping[str, History], path: Path) -> None:
    """Write a PNG with a line for each run, by their names, whole or not at all.

    Raises SettingsError where nothing was logged.
    """
    panels = {
        name: {run: (history, key) for run, history in runs.items()}
        for name, key in _COMPARED.items()
    }
    _write(panels, path, None)


def _write(
    asked: Mapping[str, Mapping[str, tuple[History, str]]], path: Path, title: str | None
) -> None:
    from matplotlib.figure import Figure

    logged = {
        name: {
            label: points
            for label, (history, key) in lines.items()
            if (points := [(row["step"], row[key]) for row in history if key in row])
        }
        for name, lines in asked.items()
    }
    panels = {name: lines for name, lines in logged.items() if lines}
    if not panels:
        raise SettingsError("nothing was logged that could be drawn: lower trainer.logging_steps")
    rows = math.ceil(len(panels) / _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 3.5 * rows), layout="constrained")
    places = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for (name, lines), axes in zip(panels.items(), places, strict=False):
        for label, points in lines.items():
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    for axes in places:
        axes.set_axis_off()
    if title is not None:
        figure.suptitle(title)
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=120)
