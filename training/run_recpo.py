"""RecPO: one LLM learns to reason and to rank by reward, with both of its heads at once.

    python training/run_recpo.py --config training/configs/recpo_ml100k.yaml

First the recommendation head is fitted in closed form (training/head_start.py), then the LLM and
the head are trained by their runs of a graph (training/recpo_trainer.py): R2ec's, or DeepRec's with
`rank: head`. Rollouts are played on the training part only. A killed run goes on
where its last checkpoint stands.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator
from rich.console import Console

from deeprec.configuration import RunArguments, write_json, write_text
from deeprec.graph.app import local_engine
from deeprec.graph.build import build_graph
from deeprec.graph.r2ec.build import build_r2ec_graph
from deeprec.graph.r2ec.head import (
    check_dataset,
    check_llm,
    load_head,
    read_card,
)
from deeprec.graph.r2ec.items import ItemStates
from deeprec.graph.r2ec.ranker import HeadRanker
from deeprec.graph.state import RunSettings
from deeprec.terminal import tells_errors
from deeprec.tools.loading import keep_loaded
from deeprec.tools.workspace import Workspace
from deeprec.training.card import quarters
from deeprec.training.configuration import LoRA, add_learning_options
from deeprec.training.ground import TARGETS_PER_USER, open_ground, select_users
from deeprec.training.head_folder import (
    HeadedRun,
    leave_head,
    live_backbone,
    load_llm,
    open_run,
    start_head,
)
from deeprec.training.recpo import RecPO
from deeprec.training.recpo_trainer import RecPOTrainer
from deeprec.training.rollout import Plan
from deeprec.training.selection import Example, SelectionConfig, candidates, share_out

if TYPE_CHECKING:
    from deeprec.tools.catalog import Catalog
    from deeprec.tools.retriever import Retriever

STAGE: Literal["recommendation"] = "recommendation"
FIGURES = ("reward/total", "reward/ndcg", "reward/ndcg@10", "reward/probability", "engine_gap/mean")


class RecPORun(HeadedRun):
    """The configuration file."""

    output: Path  # trajectories, checkpoint, and the heads: `head` before RecPO, `final` after it
    # Folder of a head to start from; none: one is fitted by head_start into `head`.
    head: Path | None = None
    agent: Literal["r2ec", "deeprec"] = "r2ec"  # whose graph is played; deeprec with rank: head
    steps: int = Field(ge=0)  # of all; more of them go on with a run. 0: fit the head alone
    users_per_step: int = Field(8, ge=2)  # in-batch negatives are the others' targets
    group_size: int = Field(4, ge=2)  # †, chains of each user
    updates: int = Field(1, ge=1)  # optimiser steps for each step's runs
    examples: int | None = Field(None, ge=1)  # of the selection, the first; none: all
    selection: SelectionConfig = SelectionConfig(
        targets_per_user=TARGETS_PER_USER, shares={STAGE: 1.0}
    )
    objective: RecPO = RecPO()
    run: RunSettings = RunSettings(
        decoding="free", history_length=8, thought_tokens=32, temperature=1.0, on_limit="fail"
    )
    max_length: int = Field(2048, ge=512)  # tokens of one run
    lora: LoRA | None = LoRA()  # none: train all weights
    learning_rate: float = Field(1e-5, gt=0)
    head_learning_rate: float = Field(1e-4, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    # Steps after which all items are read anew. Negatives are of the latest reading, and the steps'
    # targets of the weights as they are: what lies between tells them apart.
    refresh_every: int = Field(1, ge=1)
    save_every: int = Field(2, ge=1)
    # The control run: targets go to other users, so that it learns what is popular, not for whom.
    shuffle_rewards: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> RecPORun:
        if self.run.temperature != 1:
            raise ValueError(
                f"run.temperature is {self.run.temperature}: logprobs are taken at temperature 1, "
                "and a group that was sampled at another one is not the policy's: set 1"
            )
        if (self.run.rank == "head") != (self.agent == "deeprec"):
            raise ValueError("run.rank: head belongs to agent: deeprec, and to no other: set both")
        if STAGE not in self.selection.shares:
            raise ValueError(f"selection.shares deals no users out to {STAGE}")
        if self.agent == "r2ec" and not self.run.reasoning:
            raise ValueError("run.reasoning is false: without a thought there is no chain to train")
        return self


def run(config: RecPORun, console: Console) -> Path:
    """Fit the head, then train by reward; gives the folder of the head."""
    workspace = open_run(config, free=frozenset({"steps"}))
    settings = workspace.settings
    base = settings.model_name
    workspace.ensure_assets(lambda message: console.print(f"  {message}", style="dim"))
    head_folder = config.head or config.output / "head"
    if config.head is None:
        start_head(config, workspace, head_folder, console)
    card = read_card(head_folder)
    check_dataset(card, workspace.data.fingerprint, head_folder)
    check_llm(card, base, config.start, head_folder)
    if config.steps == 0:
        return head_folder
    final = config.output / "final"
    finished = final / "finished.json"
    if finished.exists() and json.loads(finished.read_text("utf-8"))["steps"] >= config.steps:
        console.print("trained already")
        return final
    catalog, retriever, examples = _ground(config, workspace, console)
    with console.status("Loading the LLM"):
        engine = local_engine(base, settings.engine, max_model_len=config.max_length)
    ranker: HeadRanker | None = None
    try:
        llm = load_llm(config, workspace)
        ranker = _live_ranker(config, llm, base, head_folder, catalog)
        graph = (
            build_r2ec_graph(engine, ranker)
            if retriever is None
            else build_graph(engine, retriever, ranker=ranker)
        )
        keep_loaded()
        trainer = RecPOTrainer(
            graph=graph,
            load_weights=engine.load_weights,
            llm=llm,
            ranker=ranker,
            plan=Plan(STAGE, examples, config.steps * config.users_per_step, config.seed),
            settings=config.run,
            objective=config.objective,
            folder=config.output,
            model=engine.name,
            users_per_step=config.users_per_step,
            group_size=config.group_size,
            at_once=settings.engine.max_num_seqs,
            updates=config.updates,
            refresh_every=config.refresh_every,
            learning_rates=(config.learning_rate, config.head_learning_rate),
            max_grad_norm=config.max_grad_norm,
            save_every=config.save_every,
            seed=config.seed,
            shuffle_rewards=config.shuffle_rewards,
        )
        trainer.train(config.steps, lambda row: _tell(row, console))
        _leave(config, workspace, llm, ranker, trainer.log, final, console)
    finally:
        if ranker is not None:
            ranker.close()
        engine.close()
        if retriever is not None:
            retriever.close()
    return final


def _ground(
    config: RecPORun, workspace: Workspace, console: Console
) -> tuple[Catalog, Retriever | None, list[Example]]:
    """Catalog, retriever (DeepRec's alone) and examples, of the training part."""
    data = workspace.data
    if config.agent == "deeprec":
        ground = open_ground(workspace, config.output, console)
        selection = select_users(workspace, ground, config.selection)
        selection.save(config.output / "selection.json")
        examples = selection.examples(STAGE, data)
        return ground.catalog, ground.retriever, examples[: config.examples]
    import numpy as np

    # R2ec has no TRM whose reach would bound what it can learn: everybody is within reach.
    given = candidates(workspace.split, config.selection)
    chosen = share_out(given, np.zeros(len(given), dtype=np.int64), config.selection)[STAGE]
    examples = [
        Example(
            data.user_ids[given[at].user],
            tuple(data.items[item].id for item in given[at].history.tolist()),
            data.items[given[at].target].id,
        )
        for at in chosen
    ]
    return workspace.catalog, None, examples[: config.examples]


def _live_ranker(
    config: RecPORun, llm: Any, base: str, folder: Path, catalog: Catalog
) -> HeadRanker:
    """Make a ranker over the LLM that is trained; its head is trained as well."""
    card = read_card(folder)
    backbone = live_backbone(llm, base, autocast=config.precision == "bfloat16")
    return HeadRanker(
        backbone,
        load_head(folder, card),
        catalog,
        ItemStates.read(folder, card.weights),
        history_length=config.run.history_length,
    )


def _leave(
    config: RecPORun,
    workspace: Workspace,
    llm: Any,
    ranker: HeadRanker,
    log: Sequence[dict[str, float]],
    final: Path,
    console: Console,
) -> None:
    """Write the LLM, its head, its settings and a card."""
    card = leave_head(workspace, config.run, llm, ranker.backbone, ranker.head, final)
    rows = [(name, found) for name in FIGURES if (found := quarters(log, name))]
    for name, (first, last) in rows:
        console.print(f"  {name:<20} first quarter {first:.4f}, last quarter {last:.4f}")
    table = "\n".join(f"| {name} | {first:.4f} | {last:.4f} |" for name, (first, last) in rows)
    write_text(
        final / "README.md",
        f"# {card.base}, taught to reason and rank ({workspace.data.name})\n\n"
        f"A recommendation head and the LLM that it reads, for DeepRec's graph `{config.agent}`: "
        f"{_served_by(config)}. {config.steps} steps of RecPO"
        f"{', rewards shuffled: a control' if config.shuffle_rewards else ''}; no user's "
        "validation or test item was a target or in a prompt.\n\n"
        f"| figure | first quarter | last quarter |\n| --- | --- | --- |\n{table}\n",
    )
    write_json(final / "finished.json", {"steps": config.steps})


def _served_by(config: RecPORun) -> str:
    if config.agent == "r2ec":
        return "set DEEPREC_HEAD to this folder"
    policy = "DEEPREC_MODEL" if config.lora is None else "DEEPREC_ADAPTER"
    return f"set DEEPREC_HEAD and {policy} to this folder, and `rank: head` in a run's settings"


def _tell(row: dict[str, float], console: Console) -> None:
    console.print(
        f"  step {row['step']:>3}  reward {row['reward/total']:.4f}  "
        f"NDCG@10 {row['reward/ndcg@10']:.4f}  tokens {row['run/policy_tokens']:.0f}  "
        f"{row['seconds/generate']:.0f} s played, {row['seconds/update']:.0f} s learnt"
    )


@tells_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = RunArguments(__doc__, RecPORun)
    parser.replaces("head", type=Path)
    add_learning_options(parser)
    config = parser.configuration(arguments)
    console = Console()
    final = run(config, console)
    console.print(f"Trained: {final}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
