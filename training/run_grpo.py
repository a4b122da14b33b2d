"""Two-stage GRPO: the LLM learns by reward, first to interact, then to recommend.

    python training/run_grpo.py --config training/configs/grpo_ml100k.yaml

Rollouts are runs of the compiled graph over vLLM (training/rollout.py), on the training part only.
A killed run goes on where its last checkpoint stands, with the same examples in the same order.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.console import Console

from deeprec.configuration import RunArguments, keep_config, write_json
from deeprec.errors import SettingsError
from deeprec.graph.app import local_engine
from deeprec.graph.build import build_graph
from deeprec.graph.engine.limits import check_model_folder
from deeprec.graph.engine.tokenizer import load_tokenizer
from deeprec.graph.state import RunSettings
from deeprec.settings import load_settings
from deeprec.terminal import tells_errors
from deeprec.tools.loading import keep_loaded
from deeprec.tools.workspace import Workspace
from deeprec.training.card import FIGURES, leave_results, quarters
from deeprec.training.configuration import LoRA, add_learning_options, check_options
from deeprec.training.ground import TARGETS_PER_USER, open_ground, select_users
from deeprec.training.policy import keep_made_of
from deeprec.training.rewards import RewardConfig, Rewarder, Rules, Stage
from deeprec.training.selection import Selection, SelectionConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deeprec.graph.engine.transformers_engine import TransformersEngine
    from deeprec.graph.engine.vllm_inprocess import VLLMEngine
    from deeprec.settings import EngineSettings

_OURS = frozenset(
    {
        "output_dir",
        "seed",
        "max_steps",
        "num_generations",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "steps_per_generation",
        "generation_batch_size",
        "shuffle_dataset",
        "temperature",
        "top_p",
        "reward_weights",
        "num_train_epochs",
    }
)


class StageRun(BaseModel):
    """One stage: what is rewarded, for how long, and with which options of TRL."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: Stage
    steps: int = Field(ge=1)
    rules: Rules = "strict"
    weights: dict[str, float] = {}  # factors of the stage's rewards
    trainer: dict[str, Any] = {}  # options of TRL's GRPOConfig, over the run's own

    @model_validator(mode="after")
    def _rewards_exist(self) -> StageRun:
        _ = self.rewards
        return self

    @property
    def rewards(self) -> RewardConfig:
        """What the stage's runs are rewarded for."""
        return RewardConfig(stage=self.stage, rules=self.rules, weights=self.weights)


class GRPORun(BaseModel):
    """The configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: Path  # trajectories, checkpoints and the final models
    workspace: str = "ml-100k"  # a prepared one (`make demo` prepares this)
    model: str | None = None  # hub name or folder of the LLM; none: the settings' model
    start: Path | None = None  # what an earlier run left in `final`: an adapter or a model
    seed: int = 0
    stages: tuple[StageRun, ...] = Field(min_length=1)
    selection: SelectionConfig = SelectionConfig(
        targets_per_user=TARGETS_PER_USER,
        shares={"warm_start": 0.5, "cold_start": 0.1, "recommendation": 0.4},
    )
    prompts_per_step: int = Field(8, ge=1)
    group_size: int = Field(4, ge=2)  # runs of each prompt
    # Of a group, the runs that are trained on: those whose rewards vary most. None: all.
    kept_per_group: int | None = Field(None, ge=2)
    rows_per_pass: int = Field(4, ge=1)  # runs in one forward and backward pass
    # What a token's reward is compared with. group: the mean of its prompt's runs, as the paper
    # does. progress: also that of all runs of the step that had come as far (training/progress.py).
    baseline: Literal["group", "progress"] = "group"
    run: RunSettings = RunSettings(
        answer_form="numbers", retrieve_n=10, history_length=10, temperature=1.0
    )
    max_length: int = Field(4096, ge=512)  # tokens of one run
    lora: LoRA | None = LoRA()  # none: train all weights
    trainer: dict[str, Any] = {}  # options of TRL's GRPOConfig
    shuffle_rewards: bool = False  # the control run, which must not learn

    @model_validator(mode="after")
    def _fits_together(self) -> GRPORun:
        if self.kept > self.group_size:
            raise ValueError(
                f"kept_per_group {self.kept} is more than the group_size {self.group_size}"
            )
        rows = self.prompts_per_step * self.kept
        if rows % self.rows_per_pass:
            raise ValueError(
                f"rows_per_pass {self.rows_per_pass} does not divide the {rows} runs that a step "
                "trains on (prompts_per_step times kept_per_group, or group_size)"
            )
        names = [stage.stage for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages {names} name one twice")
        if names[0] == "recommendation" and self.start is None:
            raise ValueError(
                "stage 'recommendation' goes on from stage 'cold_start': set `start` to the "
                "folder that stage left in `final`, or put 'cold_start' before it"
            )
        missing = [name for name in names if name not in self.selection.shares]
        if missing:
            raise ValueError(f"selection.shares deals no users out to {', '.join(missing)}")
        if self.run.rank == "head":
            raise ValueError(
                "run.rank is head: the list is then no policy's doing, and has no token to learn; "
                "run_recpo.py with agent: deeprec trains both heads"
            )
        if self.run.temperature == 0:
            raise ValueError("run.temperature is 0: a group of greedy runs has nothing to compare")
        return self

    @property
    def kept(self) -> int:
        """Runs of a group that are trained on."""
        return self.group_size if self.kept_per_group is None else self.kept_per_group


def run(config: GRPORun, console: Console) -> Path:
    """Train every stage that is not finished; gives the folder of the last one's model."""
    from trl import GRPOConfig

    check_options(config.trainer, GRPOConfig, _OURS)
    for stage in config.stages:
        check_options(stage.trainer, GRPOConfig, _OURS)
    settings = load_settings(workspace=config.workspace)
    model = config.model or settings.model_name
    check_model_folder(model)
    if config.start is not None and not config.start.is_dir():
        raise SettingsError(f"start {config.start} does not exist: train that run first")
    keep_config(config, config.output)
    base = Workspace(settings)
    keep_made_of(base.data.fingerprint, model, config.start, config.output)
    start = config.start
    left = []
    for stage in config.stages:
        final = config.output / stage.stage / "final"
        if (final / "finished.json").exists():
            console.print(f"{stage.stage}: trained already")
            start = final
        else:
            left.append(stage)
    if not left:
        return config.output / config.stages[-1].stage / "final"
    tokenizer = load_tokenizer(model)
    base.ensure_assets(lambda message: console.print(f"  {message}", style="dim"))
    ground = open_ground(base, config.output, console)
    selection = select_users(base, ground, config.selection)
    selection.save(config.output / "selection.json")
    with console.status("Loading the LLM"):
        engine = local_engine(model, _exact(settings.engine), max_model_len=config.max_length)
    try:
        for stage in left:
            console.rule(f"Stage {stage.stage}: {stage.steps} steps", align="left")
            start = train_stage(config, stage, start, engine, tokenizer, base, ground, selection)
            console.print(f"Trained: {start}", soft_wrap=True)
            history = json.loads((start.parent / "log.json").read_text("utf-8"))
            for figure in FIGURES:
                if found := quarters(history, figure):
                    first, last = found
                    console.print(
                        f"  {figure:<16} first quarter {first:7.3f}, last quarter {last:7.3f}"
                    )
    finally:
        engine.close()
        ground.retriever.close()
    return config.output / config.stages[-1].stage / "final"


def _exact(engine: EngineSettings) -> EngineSettings:
    """The engine in the trainer's arithmetic, which without a GPU is float32."""
    import torch

    same = engine.dtype != "auto" or torch.cuda.is_available()
    return engine if same else engine.model_copy(update={"dtype": "float32"})


def train_stage(
    config: GRPORun,
    stage: StageRun,
    start: Path | None,
    engine: VLLMEngine | TransformersEngine,
    tokenizer: PreTrainedTokenizerBase,
    base: Workspace,
    ground: Workspace,
    selection: Selection,
) -> Path:
    """Train one stage from `start`, or from its own newest checkpoint; gives its `final`."""
    from datasets import Dataset

    from deeprec.training.checkpoints import Sealer, newest_whole
    from deeprec.training.policy import load_policy
    from deeprec.training.rollout import Plan, Rollouts
    from deeprec.training.trainer import Trainer

    keep_loaded()  # before there is a trainer: a stage's must go with it
    plan = Plan(
        stage.stage,
        selection.examples(stage.stage, base.data),
        stage.steps * config.prompts_per_step,
        config.seed,
    )
    folder = config.output / stage.stage
    rollouts = Rollouts(
        graph=build_graph(engine, ground.retriever),
        load_weights=engine.load_weights,
        tokenizer=tokenizer,
        rewarder=Rewarder(stage.rewards, ground.encoder, ground.catalog),
        plan=plan,
        settings=config.run,
        folder=config.output,
        model=engine.name,
        group_size=config.group_size,
        at_once=base.settings.engine.max_num_seqs,
        seed=config.seed,
        shuffle_rewards=config.shuffle_rewards,
        by_progress=config.baseline == "progress",
    )
    trainer = Trainer(
        model=load_policy(engine.name, start, config.lora),
        reward_funcs=[rollouts.reward],
        args=_arguments(config, stage, folder),
        train_dataset=Dataset.from_dict({"prompt": plan.prompts}),
        processing_class=tokenizer,
        rollout_func=rollouts,
        callbacks=[Sealer()],
        token_baselines=lambda: rollouts.token_baselines,
    )
    checkpoint = newest_whole(folder)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    rollouts.close()
    final = leave_results(
        trainer,
        folder,
        config,
        run=config.run,
        base=engine.name,
        stage=stage.stage,
        data=base.data.name,
        adapter=config.lora is not None,
        title=f"{stage.stage}, {stage.steps} steps",
    )
    write_json(final / "finished.json", {"stage": stage.stage, "steps": stage.steps})
    return final


def _arguments(config: GRPORun, stage: StageRun, folder: Path) -> Any:
    import torch
    from trl import GRPOConfig

    gpu = torch.cuda.is_available()
    rows = config.prompts_per_step * config.kept
    # arXiv 2505.16810: a group's mean is the baseline, undivided; no KL term.
    defaults: dict[str, Any] = {
        "beta": 0.0,
        "scale_rewards": "none",
        "learning_rate": 1e-5,
        "logging_steps": 1,
        "save_steps": 10,
        "save_total_limit": 2,
        "report_to": "tensorboard",
        "bf16": gpu,
        "gradient_checkpointing": gpu,
    }
    return GRPOConfig(
        output_dir=str(folder),
        seed=config.seed,
        max_steps=stage.steps,
        num_generations=config.kept,
        per_device_train_batch_size=config.rows_per_pass,
        gradient_accumulation_steps=rows // config.rows_per_pass,
        # The plan has its own order, and is one epoch: only so does a resumed run see the same.
        shuffle_dataset=False,
        temperature=config.run.temperature,
        use_cpu=not gpu,
        **(defaults | config.trainer | stage.trainer),
    )


@tells_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = RunArguments(__doc__, GRPORun)
    parser.replaces("start", type=Path)
    add_learning_options(parser)
    config = parser.configuration(arguments)
    console = Console()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    final = run(config, console)
    console.print(f"Trained: {final}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
