"""RecPO's loop: play a step's users in the graph, reward, update; checkpoints that no kill tears.

One file holds the trained weights and the optimiser's moments, written beside its place and then
moved, every `save_every` steps; a run that was cut off goes on after it with the same examples.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..configuration import write_json
from ..errors import SettingsError
from ..graph.engine.base import LoopThread
from ..graph.r2ec.readings import user_ids
from ..graph.resources import listed_item
from ..graph.state import OUTAGES
from .head_start import follow
from .optimiser import checked_step, load_trained, optimizer_of, save_trained, trained_of
from .policy import plain_weights
from .recpo import (
    RecPO,
    advantages,
    best_of_group,
    dealt_out,
    ndcg,
    outcome,
    positions_of,
    reward,
)
from .recpo_update import Chain, Group, accumulate
from .rollout import Plan, play_step
from .trajectories import Rewards, Trajectory
from .trajectory_file import write_part

if TYPE_CHECKING:
    from ..graph.r2ec.ranker import HeadRanker
    from ..graph.state import RunSettings

CHECKPOINT, LOG = "checkpoint.safetensors", "log.json"
_SHOWN_AT = 10  # places of the NDCG that is logged beside the reward


class RecPOTrainer:
    """Trains an LLM and its recommendation head by their runs of a graph.

    Args:
        graph: compiled, over the engine and the ranker.
        load_weights: hands weights to the engine, by their plain names.
        llm: the causal LM that is trained, with or without an adapter.
        ranker: over the same LLM's body and the head that is trained.
        plan: who is asked when.
        settings: of the runs.
        objective: RecPO's constants.
        folder: of the run; trajectories, checkpoint and log.
        model: name of the policy.
        users_per_step, group_size: users of a step, chains of each.
        at_once: chains under way at the same time.
        updates: optimiser steps that a step's runs are used for; from the second on clipping binds.
        refresh_every: steps after which all item states are computed anew.
        learning_rates: of the LLM and of the head.
        max_grad_norm: of the LLM's gradient, and of the head's.
        seed: of sampling, negatives and shuffling.
        shuffle_rewards: deal a step's targets out to the other users: the control, which can learn
            what is popular and nothing else. The log still tells rewards by the true targets.

    """

    def __init__(
        self,
        *,
        graph: Any,
        load_weights: Callable[[Mapping[str, Tensor]], None],
        llm: nn.Module,
        ranker: HeadRanker,
        plan: Plan,
        settings: RunSettings,
        objective: RecPO,
        folder: Path,
        model: str,
        users_per_step: int,
        group_size: int,
        at_once: int,
        updates: int,
        refresh_every: int,
        learning_rates: tuple[float, float],
        max_grad_norm: float,
        save_every: int,
        seed: int,
        shuffle_rewards: bool = False,
    ) -> None:
        self._graph = graph
        self._load_weights = load_weights
        self._llm = llm
        self._ranker = ranker
        self._plan = plan
        self._settings = settings
        self._objective = objective
        self._folder = folder
        self._model = model
        self._users = users_per_step
        self._group = group_size
        self._at_once = at_once
        self._updates = updates
        self._refresh_every = refresh_every
        self._max_grad_norm = max_grad_norm
        self._save_every = save_every
        self._seed = seed
        self._shuffle = shuffle_rewards
        self._trained = trained_of(llm, ranker.head)
        self._optimizer = optimizer_of(self._trained, learning_rates, weight_decay=0.0)
        self._loop = LoopThread("deeprec-recpo")
        self.log: list[dict[str, float]] = []

    def train(self, steps: int, report: Callable[[dict[str, float]], None]) -> None:
        """Train up to `steps`, from the checkpoint where there is one; `report` gets each row."""
        done = self._resume()
        try:
            for step in range(done, steps):
                saves = (step + 1) % self._save_every == 0 or step + 1 == steps
                row = self._step(step, first=step == done)
                # Before each save too, so that a run that goes on there has the same states.
                if saves or (step + 1) % self._refresh_every == 0:
                    row["items/kept"] = self._refresh(f"step {step + 1}")
                self.log.append(row)
                report(row)
                if saves:
                    self._save(step + 1)
        finally:
            self._loop.close()

    def _step(self, step: int, *, first: bool) -> dict[str, float]:
        began = time.perf_counter()
        self._load_weights(plain_weights(self._llm))
        self._ranker.project_anew()
        if first and step == 0 and len(self._ranker.states) > 0:
            # What came with the head are states as they are served, which are computed otherwise.
            self._refresh("start")
        elif first:
            self._ranker.refresh("start")
        self._ranker.table()
        synced = time.perf_counter()
        prompts = self._plan.prompts[step * self._users : (step + 1) * self._users]
        runs = self._loop.submit(
            play_step(
                self._graph,
                self._plan,
                prompts,
                self._settings,
                self._ranker.backbone.tokenizer,
                group_size=self._group,
                at_once=self._at_once,
                seed=self._seed,
                step=step,
                model=self._model,
                fingerprint=f"recpo@{step}",
            )
        ).result()
        played = time.perf_counter()
        targets = [self._plan.example(prompt).target for prompt in prompts]
        told, figures = self._judge(runs, targets)
        write_part(self._folder, f"recpo-{step:06d}", told)
        learnt = targets
        if self._shuffle:
            dealt = dealt_out(len(targets), np.random.default_rng([self._seed, step]))
            learnt = [targets[at] for at in dealt]
            told, _ = self._judge(runs, learnt)
        groups, fresh, kept = self._groups(told, learnt, step)
        for _ in range(self._updates):
            found = self._update(groups, fresh, kept)
        ended = time.perf_counter()
        return {
            "step": step,
            **figures,
            **found,
            "seconds/sync": synced - began,
            "seconds/generate": played - synced,
            "seconds/update": ended - played,
        }

    def _judge(
        self, runs: Sequence[Trajectory], targets: Sequence[str]
    ) -> tuple[list[Trajectory], dict[str, float]]:
        """Reward each run by its user's target. One that an outage ended has no reward; one that a
        limit ended before the head could rank has earned nothing.
        """
        now = self._ranker.table().snapshot
        states = self._ranker.user_states([reading_of(run, self._ranker) for run in runs])
        scores = self._ranker.scores(states)
        told, rows = [], []
        for nth, run in enumerate(runs):
            if run.stop_reason in OUTAGES:
                told.append(run.model_copy(update={"rewards": Rewards()}))
                continue
            rank, probability = None, 0.0
            if any(line.source == "head" for line in run.recommendations):
                target = now.index[targets[nth // self._group]]
                among = None
                if run.settings.rank == "head":
                    found = [item.id for turn in run.turns for item in turn.retrieved]
                    among = positions_of(now, found)
                gone = [at for at in positions_of(now, run.history_ids) if at != target]
                rank, probability = outcome(scores[nth], target, gone=gone, among=among)
            total = reward(rank, probability, self._objective)
            told.append(run.model_copy(update={"rewards": Rewards(total=total)}))
            rows.append((
                total, ndcg(rank, self._objective.ndcg_k), ndcg(rank, _SHOWN_AT), probability,
            ))  # fmt: skip
        if not rows:
            raise SettingsError(
                "every run of a step was ended by an outage of the engine: see its messages above"
            )
        total, dense, top, probability = (mean(column) for column in zip(*rows, strict=True))
        return told, {
            "reward/total": total,
            "reward/ndcg": dense,
            f"reward/ndcg@{_SHOWN_AT}": top,
            "reward/probability": probability,
            "run/policy_tokens": mean(sum(run.env_mask) for run in runs),
            "run/closed": mean(run.stop_reason == "answered" for run in runs),
        }

    def _groups(
        self, runs: Sequence[Trajectory], targets: Sequence[str], step: int
    ) -> tuple[list[Group], list[list[int]], Tensor]:
        """Groups of whole rewards, readings of their items, and states of the drawn negatives."""
        table = self._ranker.table()
        now, readings = table.snapshot, table.readings
        items = list(dict.fromkeys(targets))
        groups = []
        for nth, target in enumerate(targets):
            group = runs[nth * self._group : (nth + 1) * self._group]
            totals = [run.rewards.total for run in group]
            values = [total for total in totals if total is not None]
            if len(values) < len(totals):
                continue  # of an outage there is nothing to learn
            found = torch.tensor([values])
            given = advantages(found)[0]
            best = int(best_of_group(found))
            chains = [
                Chain(
                    run.completion_ids,
                    run.env_mask,
                    run.logprobs,
                    float(advantage),
                    None if run.settings.rank != "head" else reading_of(run, self._ranker),
                )
                for run, advantage in zip(group, given, strict=True)
            ]
            prompt = group[0].prompt_ids
            groups.append(Group(prompt, chains, best, items.index(target), float(given[best])))
        taken = {now.index[item] for item in items}
        others = [at for at in range(len(now)) if at not in taken]
        rng = np.random.default_rng([self._seed, step, 1])
        drawn = rng.permutation(others)[: self._objective.negatives].tolist()
        states = self._ranker.states.of([readings[at] for at in drawn], self._ranker.backbone)
        return groups, [readings[now.index[item]] for item in items], states

    def _update(
        self, groups: Sequence[Group], fresh: Sequence[Sequence[int]], kept: Tensor
    ) -> dict[str, float]:
        self._optimizer.zero_grad()
        self._llm.train()
        found = accumulate(
            self._llm,
            self._ranker.backbone,
            self._ranker.head,
            groups,
            fresh,
            kept,
            self._objective,
        )
        norms = checked_step(self._optimizer, self._max_grad_norm)
        self._llm.eval()
        return {
            "loss/token": found.token_loss,
            "loss/item": found.item_loss,
            "grad_norm/llm": norms[0],
            "grad_norm/head": norms[1],
            "clipped_tokens": mean(found.clipped_tokens or [0.0]),
            "engine_gap/mean": mean(found.gap or [0.0]),
        }

    def _refresh(self, fingerprint: str) -> float:
        """Read all items anew; gives how much of their vectors is left (head_start.follow)."""
        ranker = self._ranker
        readings = ranker.table().readings
        before = ranker.states.of(readings, ranker.backbone)
        ranker.refresh(fingerprint)
        return follow(ranker.head, before, ranker.states.of(readings, ranker.backbone))

    def _save(self, step: int) -> None:
        said = {"step": str(step), "log": json.dumps(self.log)}
        save_trained(self._folder / CHECKPOINT, self._trained, self._optimizer, said)
        write_json(self._folder / LOG, self.log)

    def _resume(self) -> int:
        said = load_trained(self._folder / CHECKPOINT, self._trained, self._optimizer)
        if said is None:
            return 0
        self.log = json.loads(said["log"])
        return int(said["step"])


def reading_of(run: Trajectory, ranker: HeadRanker) -> list[int]:
    """Token ids that the head read: R2ec's transcript, or what `rank: head` makes of a run."""
    if run.settings.rank != "head":
        return [*run.prompt_ids, *run.completion_ids]
    last = run.turns[-1] if run.turns else None
    # A turn that asked for a search, also for one that was refused, isn't the last thought.
    own = last is not None and last.preference is None and last.refused is None
    thought = last.thought if last is not None and own else ""
    history = run.history_ids[-ranker.history_length :]
    listed = [listed_item(ranker.catalog, item) for item in history]
    return user_ids(listed, thought, ranker.backbone.tokenizer)
