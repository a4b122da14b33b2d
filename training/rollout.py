"""Rollouts: what TRL calls to have prompts completed, as runs of the compiled graph.

Each step hands the policy's new weights to the engine, plays every example of the step in the
graph, as many runs at once as the engine decodes, rewards the runs, keeps them as a part of the
run's folder, and returns tokens, logprobs and masks exactly as the engine and the environment wrote
them.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from ..errors import TrajectoryError
from ..graph.engine.base import LoopThread
from ..graph.state import OUTAGES, RUN_KEYS, StopReason
from .policy import plain_weights
from .progress import baselines, places
from .rewards import STAGES, Rewarder, Stage
from .selection import Example
from .trajectories import Rewards, Trajectory
from .trajectory_file import write_part

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..graph.state import RunSettings


class Plan:
    """Which example is played when: fixed by the seed before the run, so that it can go on.

    Examples are dealt out in passes, each in an order of its own. A prompt names its place in the
    plan; it is never tokenised.
    """

    def __init__(self, stage: Stage, examples: Sequence[Example], rows: int, seed: int) -> None:
        self.stage = stage
        self._examples = examples
        rng = np.random.default_rng([seed, list(STAGES).index(stage)])
        order: list[int] = []
        while len(order) < rows:
            order += rng.permutation(len(examples)).tolist()
        self._order = order[:rows]

    @property
    def prompts(self) -> list[str]:
        """One prompt per row of the plan."""
        return [f"{self.stage}/{row}" for row in range(len(self._order))]

    def row(self, prompt: str) -> int:
        """Place of a prompt in the plan."""
        return int(prompt.rpartition("/")[2])

    def example(self, prompt: str) -> Example:
        """Example that a prompt stands for."""
        return self._examples[self._order[self.row(prompt)]]


@dataclass
class Clock:
    """Seconds that the parts of a step took; the update is what lies between two rollouts."""

    generate: float = 0.0
    reward: float = 0.0
    sync: float = 0.0
    update: float = 0.0
    left_at: float | None = None


class Rollouts:
    """TRL's rollout_func and the reward function that goes with it.

    Args:
        graph: the compiled graph over the engine.
        load_weights: hands weights to the engine, by their plain names.
        tokenizer: the policy's.
        rewarder: of the stage.
        plan: of the stage.
        settings: of a run; sampled freely, a limit ends it without a list.
        folder: of the run; trajectories go there.
        model: name of the policy.
        group_size: runs of a prompt. Where TRL asks for fewer rows of it, those go back whose
            rewards vary most.
        at_once: runs under way at the same time.
        seed: of sampling.
        shuffle_rewards: deal a step's rewards out at random: the control that must not learn.
        by_progress: also give each token a baseline of its own (training/progress.py).

    """

    def __init__(
        self,
        *,
        graph: Any,
        load_weights: Callable[[Mapping[str, Tensor]], None],
        tokenizer: PreTrainedTokenizerBase,
        rewarder: Rewarder,
        plan: Plan,
        settings: RunSettings,
        folder: Path,
        model: str,
        group_size: int,
        at_once: int,
        seed: int,
        shuffle_rewards: bool = False,
        by_progress: bool = False,
    ) -> None:
        self._graph = graph
        self._load_weights = load_weights
        self._tokenizer = tokenizer
        self._rewarder = rewarder
        self._plan = plan
        self._settings = settings.model_copy(
            update={"decoding": "free", "on_limit": "fail", "fill": False}
        )
        self._folder = folder
        self._model = model
        self._group_size = group_size
        self._at_once = at_once
        self._seed = seed
        self._shuffle = shuffle_rewards
        self._by_progress = by_progress
        self.token_baselines: list[list[float]] | None = None
        """Of the rows that were returned last, token by token; None where there are none."""
        self._loop = LoopThread("deeprec-rollouts")
        self._synced: int | None = None
        self._clock = Clock()
        self._figures: dict[str, float] = {}

    def __call__(self, prompts: Sequence[str], trainer: Any) -> dict[str, list[Any]]:
        """Play the prompts; one row each, in order. Called by TRL, each group in one piece."""
        clock = self._clock
        began = time.perf_counter()
        clock.update = began - clock.left_at if clock.left_at is not None else 0.0
        step = int(trainer.state.global_step)
        if self._synced != step:
            self._load_weights(plain_weights(trainer.accelerator.unwrap_model(trainer.model)))
            self._synced = step
        synced = time.perf_counter()
        groups = Counter(prompts)
        runs = self._loop.submit(
            play_step(
                self._graph,
                self._plan,
                list(groups),
                self._settings,
                self._tokenizer,
                group_size=self._group_size,
                at_once=self._at_once,
                seed=self._seed,
                step=step,
                model=self._model,
                fingerprint=f"{self._plan.stage}@{step}",
            )
        ).result()
        finished = time.perf_counter()
        rewards = self._rewarder(runs)
        runs = [
            run.model_copy(update={"rewards": reward})
            for run, reward in zip(runs, rewards, strict=True)
        ]
        write_part(self._folder, f"{self._plan.stage}-{step:06d}", runs)
        clock.left_at = time.perf_counter()
        clock.sync, clock.generate = synced - began, finished - synced
        clock.reward = clock.left_at - finished
        self._figures = describe(runs, self._rewarder)
        totals = [reward.total for reward in rewards]
        if self._shuffle:
            dealt = np.random.default_rng([self._seed, step]).permutation(len(totals))
            totals = [totals[at] for at in dealt]
        kept: list[int] = []
        for nth, rows_wanted in enumerate(groups.values()):
            first = nth * self._group_size
            group = totals[first : first + self._group_size]
            kept += [first + at for at in widest(group, rows_wanted)]
        if self._by_progress:
            reached = [places(run, self._tokenizer) for run in runs]
            own = baselines(totals, self._group_size, reached)
            self.token_baselines = [own[at] or [0.0] for at in kept]
        eos = int(self._tokenizer.eos_token_id)
        return rows([runs[at] for at in kept], eos) | {"total": [totals[at] for at in kept]}

    def reward(
        self,
        *,
        total: Sequence[float | None],
        log_metric: Callable[[str, float], None],
        **_: object,
    ) -> list[float | None]:
        """TRL's reward function: the totals of its rows. What it logs is of all the step's runs,
        also of those that are not trained on.
        """
        for name, value in (self._figures | self._times()).items():
            log_metric(name, value)
        return list(total)

    def _times(self) -> dict[str, float]:
        clock = self._clock
        return {
            "seconds/generate": clock.generate,
            "seconds/reward": clock.reward,
            "seconds/sync": clock.sync,
            "seconds/update_before": clock.update,
        }

    def close(self) -> None:
        """End the loop's thread."""
        self._loop.close()


async def play_step(
    graph: Any,
    plan: Plan,
    prompts: Sequence[str],
    settings: RunSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    group_size: int,
    at_once: int,
    seed: int,
    step: int,
    model: str,
    fingerprint: str,
) -> list[Trajectory]:
    """Play a step's prompts, each `group_size` times; a group's runs stand together.

    They begin in order, `at_once` of them under way: more than the engine decodes would wait for
    each other at every turn, and push each other's transcripts out of its prefix cache. Each run
    has a seed of its own, by `seed`, `step` and its place.
    """
    free = asyncio.Semaphore(at_once)

    async def play(nth: int, prompt: str) -> Trajectory:
        own = np.random.SeedSequence([seed, step, nth]).generate_state(1)[0]
        example = plan.example(prompt)
        async with free:
            state = await graph.ainvoke(
                {"history": [f"id:{item}" for item in example.history]},
                context=settings.model_copy(update={"seed": int(own) % 2**31}),
                output_keys=list(RUN_KEYS),
            )
        return Trajectory.from_state(
            state,
            tokenizer,
            id=f"{prompt}/{nth % group_size}",
            model=model,
            model_fingerprint=fingerprint,
            target=example.target,
        )

    asked = [prompt for prompt in prompts for _ in range(group_size)]
    return list(await asyncio.gather(*(play(nth, prompt) for nth, prompt in enumerate(asked))))


def widest(totals: Sequence[float | None], count: int) -> list[int]:
    """Places of the `count` runs of a group whose rewards have the greatest variance, in order.

    They are some of the lowest and some of the highest: max-variance down-sampling (arXiv
    2504.13818, §3.2). A run without a reward is taken only where there are too few others.
    """
    rewarded = sorted((total, at) for at, total in enumerate(totals) if total is not None)
    lacking = [at for at, total in enumerate(totals) if total is None]
    order = [at for _, at in rewarded]
    values = np.array([total for total, _ in rewarded])
    if len(order) <= count:
        return sorted(order + lacking[: count - len(order)])

    def variance(low: int) -> float:
        return float(np.concatenate([values[:low], values[len(values) - count + low :]]).var())

    # Of equal splits the most even one.
    low = max(range(count + 1), key=lambda low: (round(variance(low), 9), -abs(2 * low - count)))
    return sorted(order[:low] + order[len(order) - count + low :])


def rows(runs: Sequence[Trajectory], eos: int) -> dict[str, list[Any]]:
    """Tokens of runs as TRL takes them; a run that failed before its first token is one masked
    end-of-sequence, since an empty completion can't be trained on.

    Raises TrajectoryError for a run of an engine that can't be trained on.
    """
    if any("chat" in run.authors for run in runs):
        raise TrajectoryError(
            "these runs hold text of a chat model, not the tokens that it sampled, and can't be "
            "trained on: play them over vLLM or transformers (DEEPREC_ENGINE__KIND)"
        )
    filled = [bool(run.completion_ids) for run in runs]
    return {
        "prompt_ids": [run.prompt_ids for run in runs],
        "completion_ids": [
            run.completion_ids if has else [eos] for run, has in zip(runs, filled, strict=True)
        ],
        "logprobs": [run.logprobs if has else [0.0] for run, has in zip(runs, filled, strict=True)],
        "env_mask": [run.env_mask if has else [0] for run, has in zip(runs, filled, strict=True)],
    }


def describe(runs: Sequence[Trajectory], rewarder: Rewarder) -> dict[str, float]:
    """Figures of a step for its log: each reward, broken rules, searches, tokens, ends."""
    figures: dict[str, float] = {}
    for name in Rewards.model_fields:
        values = [value for run in runs if (value := getattr(run.rewards, name)) is not None]
        if values:
            figures[f"reward/{name}"] = mean(values)
    judged = [run for run in runs if run.stop_reason not in OUTAGES]
    if judged:
        scores = [rewarder.format_scores(run) for run in judged]
        for rule in scores[0]:
            figures[f"broken/{rule}"] = mean(score[rule] < 0 for score in scores)
        figures["format/strict"] = mean(min(score.values()) == 0 for score in scores)
    ends = Counter(run.stop_reason for run in runs)
    for reason in get_args(StopReason):
        figures[f"stop/{reason}"] = ends[reason] / len(runs)
    tokens = sum(len(run.completion_ids) for run in runs)
    own = sum(sum(run.env_mask) for run in runs)
    figures["run/retrievals"] = mean(run.usage.retrievals for run in runs)
    figures["run/policy_tokens"] = own / len(runs)
    figures["run/masked_share"] = 1 - own / max(1, tokens)
    return figures
