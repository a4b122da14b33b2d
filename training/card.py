"""Model cards of trained LLMs: README.md beside the weights, headed by the hub's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from ..configuration import write_json, write_text
from ..graph.engine.adapter import keep_base
from .checkpoints import writing
from .curves import History, draw
from .policy import keep_run_settings

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ..graph.state import RunSettings

FIGURES = ("loss", "reward/total", "format/strict", "run/retrievals", "reward/hit")
"""What the card tells of a run's log: each figure's mean over the first and the last quarter."""

_OF_THIS_MACHINE = {"output", "start", "model"}
_TOLD = ("answer_form", "retrieve_n", "history_length")


def quarters(history: History, key: str) -> tuple[float, float] | None:
    """Mean of a logged figure over the first and the last quarter of the rows that hold it.

    None where fewer than four rows hold the figure.
    """
    values = [float(row[key]) for row in history if key in row]
    quarter = len(values) // 4
    return (mean(values[:quarter]), mean(values[-quarter:])) if quarter else None


def leave_results(
    trainer: Any,
    folder: Path,
    config: BaseModel,
    *,
    run: RunSettings,
    base: str,
    stage: str,
    data: str,
    adapter: bool,
    title: str,
) -> Path:
    """Write what a finished run leaves in its folder: log.json, curves.png, and `final` with the
    weights, their card and the run settings. Gives `final`.

    `config` is the run's configuration, the other keywords are those of `policy_card` and `draw`.
    Raises SettingsError.
    """
    final = folder / "final"
    with writing(folder):
        trainer.save_model(str(final))
    history = trainer.state.log_history
    write_json(folder / "log.json", history)
    draw(history, folder / "curves.png", title=title)
    card = policy_card(
        base=base,
        stage=stage,
        data=data,
        adapter=adapter,
        config=config.model_dump(mode="json", exclude=_OF_THIS_MACHINE),
        history=history,
    )
    write_text(final / "README.md", card)
    keep_run_settings(run, final)
    if adapter:
        keep_base(base, final)
    return final


def policy_card(
    *,
    base: str,
    stage: str,
    data: str,
    adapter: bool,
    config: Mapping[str, Any],
    history: History,
) -> str:
    """The card of what a run left in `final`.

    `base` is the hub name or folder of the LLM that it started from, `stage` what the run taught,
    `data` the data set's name, `config` the run's configuration, `history` its log.
    """
    name = base if not Path(base).is_dir() else Path(base).name
    rows = [(figure, found) for figure in FIGURES if (found := quarters(history, figure))]
    table = "\n".join(f"| {figure} | {first:.3f} | {last:.3f} |" for figure, (first, last) in rows)
    run = config.get("run", {})
    told = ", ".join(f"{key.replace('_', ' ')} {run[key]}" for key in _TOLD if key in run)
    return f"""---
base_model: {name}
library_name: {"peft" if adapter else "transformers"}
tags: [recommendation, agents, lora, deeprec]
---
# {name}, taught to search a catalog and rank ({stage}, {data})

{"A LoRA adapter" if adapter else "A model"} for DeepRec's loop: it reasons over a user's history,
searches a recommendation model by preferences in words, and ranks what it found. It writes all of
that by itself, without a grammar. Unless told otherwise it is served with {told}.

```bash
export {"DEEPREC_ADAPTER" if adapter else "DEEPREC_MODEL"}=this/folder
deeprec recommend --user 1
```

## Training

Training part of {data} alone: no user's validation or test item was a target or in a prompt.

| figure | first quarter | last quarter |
| --- | --- | --- |
{table}

```json
{json.dumps(config, indent=1)}
```

## Limits

It has seen one catalog and its attributes. What it knows of the items is what the recommendation
model returns and what a model of this size remembers, which is little.
"""
