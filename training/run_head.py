"""A recommendation head and its LLM learn what comes next, before RecPO rewards them.

    python training/run_head.py --config training/configs/head_ml100k.yaml

The head is fitted in closed form (training/head_start.py), then both are trained by
cross-entropy on the training part (training/head_training.py). `final` is what is served, and what
RecPO starts from (`start` and `head` of its configuration). A killed run goes on where its last
checkpoint stands.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from deeprec.configuration import RunArguments, keep_config, keep_origin, write_json, write_text
from deeprec.graph.engine.adapter import weights_digest
from deeprec.graph.engine.limits import check_model_folder
from deeprec.graph.r2ec.head import load_head, read_card
from deeprec.graph.r2ec.items import catalog_readings
from deeprec.graph.state import RunSettings
from deeprec.settings import load_settings
from deeprec.terminal import tells_errors
from deeprec.tools.workspace import Workspace
from deeprec.training.configuration import LoRA
from deeprec.training.head_folder import leave_head, live_backbone, reader_of, start_head
from deeprec.training.head_start import HeadStart
from deeprec.training.head_training import HeadLearning, HeadTrainer
from deeprec.training.policy import check_start, load_policy

_TOLD_EVERY = 10  # steps


class HeadRun(BaseModel):
    """The configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: Path  # checkpoint, `head` as it was fitted, and `final` as both were trained
    workspace: str = "ml-100k"  # a prepared one (`make demo` prepares this)
    model: str | None = None  # hub name or folder of the LLM; none: the settings' model
    start: Path | None = None  # adapter or model that an earlier run left
    seed: int = 0
    head_start: HeadStart = HeadStart(readings=500)
    learning: HeadLearning
    # No run is played: history_length counts, and what is kept for serving.
    run: RunSettings = RunSettings(decoding="free", history_length=20, thought_tokens=32)
    lora: LoRA | None = None  # none: train all weights
    precision: Literal["bfloat16", "float32"] = "bfloat16"  # of products; weights that are trained
    # are float32
    # Compile each layer: 1.5 times as many tokens a second on a CPU, after two minutes; needs a C++
    # compiler.
    compile: bool = False


def run(config: HeadRun, console: Console) -> Path:
    """Fit the head, then train it and the LLM; gives the folder of both."""
    import torch

    own = {} if config.model is None else {"model": config.model}
    settings = load_settings(workspace=config.workspace, adapter=None, **own)
    base = settings.model_name
    check_model_folder(base)
    if config.start is not None:
        check_start(config.start, config.lora)
    keep_config(config, config.output)
    workspace = Workspace(settings)
    origin = {"data set": workspace.data.fingerprint, "LLM": weights_digest(base)}
    if config.start is not None:
        origin["start"] = weights_digest(str(config.start))
    keep_origin(origin, config.output)
    final = config.output / "final"
    if (final / "finished.json").exists():
        console.print("trained already")
        return final
    workspace.ensure_assets(lambda message: console.print(f"  {message}", style="dim"))
    fitted = config.output / "head"
    if not (fitted / "head.json").exists():
        start_head(
            workspace,
            config.start,
            config.head_start,
            config.run,
            fitted,
            console,
            seed=config.seed,
        )
    torch.manual_seed(config.seed)  # an adapter's first weights are drawn
    llm = load_policy(
        base,
        config.start,
        config.lora,
        dtype="auto" if config.lora and config.precision == "bfloat16" else "float32",
    )
    llm.to("cuda" if torch.cuda.is_available() else "cpu").eval()
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
            for name in ("loss/line", "loss/end", "loss/thought")
        ),
    )
    write_json(final / "finished.json", {"steps": config.learning.steps})
    return final


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
