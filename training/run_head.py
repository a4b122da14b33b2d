"""A recommendation head and its LLM learn what comes next, before RecPO rewards them.

    python training/run_head.py --config training/configs/head_ml100k.yaml

The head is fitted in closed form (training/head_start.py), then both are trained by
cross-entropy on the training part (training/head_training.py). Where `learning.teacher_weight` says
so, a TRM teaches: that of the training ground, which never saw what is left for RecPO. `final` is
what is served, and what RecPO starts from (`start` and `head` of its configuration). A killed run
goes on where its last checkpoint stands.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from deeprec.configuration import RunArguments, write_json, write_text
from deeprec.graph.r2ec.head import load_head, read_card
from deeprec.graph.r2ec.items import catalog_readings
from deeprec.graph.state import RunSettings
from deeprec.terminal import tells_errors
from deeprec.tools.workspace import Workspace
from deeprec.training.ground import open_ground
from deeprec.training.head_folder import (
    HeadedRun,
    leave_head,
    live_backbone,
    load_llm,
    open_run,
    reader_of,
    start_head,
)
from deeprec.training.head_start import HeadStart
from deeprec.training.head_training import HeadLearning, HeadTrainer
from deeprec.training.teacher import Teacher

_TOLD_EVERY = 10  # steps


class HeadRun(HeadedRun):
    """The configuration file."""

    head_start: HeadStart = HeadStart(readings=500)
    learning: HeadLearning
    # No run is played: history_length counts, and what is kept for serving.
    run: RunSettings = RunSettings(decoding="free", history_length=20, thought_tokens=32)
    # Compile each layer: 1.5 times as many tokens a second on a CPU, after two minutes; needs a C++
    # compiler.
    compile: bool = False


def run(config: HeadRun, console: Console) -> Path:
    """Fit the head, then train it and the LLM; gives the folder of both."""
    import torch

    workspace = open_run(config)
    final = config.output / "final"
    if (final / "finished.json").exists():
        console.print("trained already")
        return final
    workspace.ensure_assets(lambda message: console.print(f"  {message}", style="dim"))
    fitted = config.output / "head"
    start_head(config, workspace, fitted, console)
    llm = load_llm(config, workspace)
    base = workspace.settings.model_name
    backbone = live_backbone(llm, base, autocast=config.precision == "bfloat16")
    if config.compile:
        if not torch.cuda.is_available():
            # A CPU's flash attention takes a fifth of a step for its backward pass in bfloat16.
            llm.set_attn_implementation("eager")
        body: Any = backbone.body
        for layer in body.layers:
            layer.compile()
    head = load_head(fitted, read_card(fitted)).train()
    now = workspace.catalog.snapshot
    readings = catalog_readings(now, backbone)
    trainer = HeadTrainer(
        llm=llm,
        backbone=backbone,
        head=head,
        items=[readings[now.index[item.id]] for item in workspace.data.items],
        reader=reader_of(workspace, backbone, config.run),
        start=config.head_start,
        teacher=_teacher(config, workspace, console),
        config=config.learning,
        folder=config.output,
        seed=config.seed,
    )
    trainer.train(lambda row: _tell(row, console))
    card = leave_head(workspace, config.run, llm, backbone, head, final)
    first, last = trainer.log[0], trainer.log[-1]
    write_text(
        final / "README.md",
        f"# {card.base}, taught what comes next ({workspace.data.name})\n\n"
        "A recommendation head and the LLM that it reads: set DEEPREC_HEAD to this folder. "
        f"{config.learning.steps} steps of cross-entropy; no user's validation or test interaction "
        "was a target or in a prompt.\n\n| figure | first step | last step |\n| --- | --- | --- |\n"
        + "".join(
            f"| {name} | {first[name]:.3f} | {last[name]:.3f} |\n"
            for name in first
            if name.startswith("loss/")
        ),
    )
    write_json(final / "finished.json", {"steps": config.learning.steps})
    return final


def _teacher(config: HeadRun, workspace: Workspace, console: Console) -> Teacher | None:
    if not config.learning.teacher_weight:
        return None
    ground = open_ground(workspace, config.output, console)
    return Teacher(ground.trm, workspace.data, workspace.item_embeddings)


def _tell(row: dict[str, float], console: Console) -> None:
    shown = [f"{name.partition('/')[2]} {row[name]:.3f}" for name in row if "/" in name]
    if row["step"] % _TOLD_EVERY == 0 or "valid/ndcg@10" in row:
        speed = row["tokens"] / row["seconds"]
        console.print(f"  step {row['step']:>4}  {'  '.join(shown)}  {speed:.0f} tokens/s")


@tells_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = RunArguments(__doc__, HeadRun)
    parser.replaces("workspace")
    parser.replaces("seed", type=int)
    config = parser.configuration(arguments)
    console = Console()
    final = run(config, console)
    console.print(f"Trained: {final}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
