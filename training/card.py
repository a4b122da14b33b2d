"""Model cards of trained LLMs: README.md beside the weights, headed by the hub's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

FIGURES = ("loss", "reward/total", "format/strict", "run/retrievals", "reward/hit")
"""What the card tells of a run's log: each figure's mean over the first and the last quarter."""

_TOLD = ("answer_form", "retrieve_n", "history_length")


def quarters(history: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float] | None:
    """Mean of a logged figure over the first and the last quarter of the rows that hold it.

    `history` is the trainer's log (`trainer.state.log_history`). None where fewer than four rows
    hold the figure.
    """
    values = [float(row[key]) for row in history if key in row]
    quarter = len(values) // 4
    return (mean(values[:quarter]), mean(values[-quarter:])) if quarter else None


def policy_card(
    *,
    base: str,
    stage: str,
    data: str,
    adapter: bool,
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
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
that by itself, without a grammar. It was trained with {told},
and is served so unless told otherwise.

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
