"""Warm start: teach an LLM the protocol by demonstrations, before it learns by reward.

    python training/run_sft.py --config training/configs/sft_ml100k.yaml

Demonstrations are runs of the real graph on the training part (training/demonstrations.py); what
the environment wrote is masked. The model, or its LoRA adapter, is left in the output folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import Progress

from deeprec.configuration import RunArguments, keep_config
from deeprec.errors import SettingsError, TrajectoryError
from deeprec.graph.engine.limits import check_model_folder
from deeprec.graph.engine.tokenizer import load_tokenizer
from deeprec.graph.state import RunSettings
from deeprec.settings import load_settings
from deeprec.terminal import tells_errors
from deeprec.tools.progress import trm_progress
from deeprec.tools.workspace import Workspace
from deeprec.training.card import leave_results
from deeprec.training.configuration import LoRA, check_options
from deeprec.training.demonstrations import DemonstrationConfig, Demonstrator, demonstrate
from deeprec.training.ground import TARGETS_PER_USER, select_users, training_ground
from deeprec.training.head import score_labelled_positions_only
from deeprec.training.policy import keep_made_of, load_policy
from deeprec.training.selection import SelectionConfig
from deeprec.training.trajectory_file import iter_trajectories, write_part

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from deeprec.training.trajectories import Trajectory

STAGE = "warm_start"
_OURS = frozenset({"output_dir", "seed", "max_length", "packing", "dataset_kwargs"})


class SFTRun(BaseModel):
    """The configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: Path  # demonstrations, checkpoints and the final model
    workspace: str = "ml-100k"  # a prepared one (`make demo` prepares this)
    model: str | None = None  # hub name or folder of the LLM; none: the settings' model
    seed: int = 0
    demonstrations: int = Field(800, ge=1)  # how many to train on
    demonstrator: DemonstrationConfig = DemonstrationConfig()
    selection: SelectionConfig = SelectionConfig(
        targets_per_user=TARGETS_PER_USER,
        shares={STAGE: 0.5, "cold_start": 0.1, "recommendation": 0.4},
    )
    run: RunSettings = RunSettings(answer_form="numbers", retrieve_n=10, history_length=10)
    max_length: int = Field(4096, ge=512)  # tokens of one run
    lora: LoRA | None = LoRA()  # none: train all weights
    trainer: dict[str, Any] = {}  # options of TRL's SFTConfig


def run(config: SFTRun, console: Console) -> Path:
    """Make the demonstrations and train; gives the folder of the model or adapter."""
    from trl import SFTConfig

    from deeprec.training.checkpoints import Sealer, newest_whole
    from deeprec.training.trainer import WarmStart

    check_options(config.trainer, SFTConfig, _OURS)
    if STAGE not in config.selection.shares:
        raise SettingsError(f"selection.shares must deal users out to {STAGE!r}")
    settings = load_settings(workspace=config.workspace)
    model = config.model or settings.model_name
    check_model_folder(model)
    keep_config(config, config.output)
    base = Workspace(settings)
    keep_made_of(base.data.fingerprint, model, None, config.output)
    tokenizer = load_tokenizer(model)
    shown = _demonstrations(config, base, tokenizer, console)
    data = dataset(shown)
    console.print(
        f"{len(shown)} demonstrations, {sum(map(len, data['input_ids'])) / len(shown):.0f} tokens "
        f"each on average, {sum(sum(run.env_mask) for run in shown) / len(shown):.0f} of them the "
        "policy's"
    )
    score_labelled_positions_only()
    trainer = WarmStart(
        model=load_policy(model, None, config.lora),
        args=_arguments(SFTConfig, config),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[Sealer()],
    )
    checkpoint = newest_whole(config.output / "checkpoints")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return leave_results(
        trainer,
        config.output,
        config,
        run=config.run,
        base=model,
        stage=STAGE,
        data=base.data.name,
        adapter=config.lora is not None,
        title=f"warm start, {len(shown)} demonstrations",
    )


def dataset(runs: Sequence[Trajectory]) -> Dataset:
    """Runs as TRL reads them: tokens as they are, and labels of -100 where another wrote, or where
    the policy asked for what was refused.

    Raises TrajectoryError for a run whose course a user changed: it shows no policy's doing.
    """
    from datasets import Dataset

    for run in runs:
        if run.with_people:
            raise TrajectoryError(
                f"run {run.id!r} is no demonstration: a user edited a preference, stopped the "
                "searching or sent the answer back. Leave it out."
            )
    return Dataset.from_list(
        [
            {
                "input_ids": [*run.prompt_ids, *run.completion_ids],
                "labels": [-100] * len(run.prompt_ids) + _labels(run),
            }
            for run in runs
        ]
    )


def _labels(run: Trajectory) -> list[int]:
    labels = []
    # A turn of the policy ends where the environment answers.
    pieces = groupby(zip(run.authors, run.completion_ids, strict=True), lambda at: at[0])
    turns = iter(run.turns)
    for author, tokens in pieces:
        learnt = author == "policy" and next(turns).refused is None
        labels += [token if learnt else -100 for _, token in tokens]
    return labels


def _demonstrations(
    config: SFTRun, base: Workspace, tokenizer: PreTrainedTokenizerBase, console: Console
) -> list[Trajectory]:
    """Those of an earlier start of this run, or new ones."""
    folder = config.output
    if (folder / "trajectories").exists():
        return list(iter_trajectories(folder))
    base.ensure_assets(lambda message: console.print(f"  {message}", style="dim"))
    with trm_progress(console) as progress:
        ground = training_ground(base, progress=progress)
    selection = select_users(base, ground, config.selection)
    selection.save(folder / "selection.json")
    examples = selection.examples(STAGE, base.data)
    demonstrator = Demonstrator(ground.retriever, ground.encoder, config.run, config.demonstrator)
    with Progress(console=console) as bars:
        task = bars.add_task("  demonstrations", total=config.demonstrations)
        made = demonstrate(
            examples,
            demonstrator,
            ground.retriever,
            tokenizer,
            wanted=config.demonstrations,
            max_model_len=config.max_length,
            seed=config.seed,
            progress=lambda done: bars.update(task, completed=done),
        )
    ground.retriever.close()
    if not made:
        raise SettingsError(
            f"none of {len(examples)} examples gave a demonstration: raise retrieve_n, "
            "demonstrator.candidates or demonstrator.keep_misses"
        )
    if len(made) < config.demonstrations:
        console.print(f"  {len(examples)} examples gave {len(made)} demonstrations")
    write_part(folder, STAGE, made)
    return made


def _arguments(arguments: type, config: SFTRun) -> Any:
    import torch

    gpu = torch.cuda.is_available()
    defaults: dict[str, Any] = {
        "bf16": gpu,
        "gradient_checkpointing": gpu,
        "report_to": "tensorboard",
        "logging_steps": 5,
        "save_total_limit": 2,
    }
    return arguments(
        output_dir=str(config.output / "checkpoints"),
        seed=config.seed,
        max_length=config.max_length,
        use_cpu=not gpu,
        **(defaults | config.trainer),
    )


@tells_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = RunArguments(__doc__, SFTRun)
    parser.replaces("workspace")
    config = parser.configuration(arguments)
    console = Console()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    final = run(config, console)
    console.print(f"Trained: {final}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
