"""Supervised training of an LLM and its recommendation head, before either learns by reward.

Each line of a history is to predict the next one, and a reading's end the item that came after it,
by cross-entropy over the whole catalog; the thought of a reading is learnt as text. One pass over a
reading of twenty lines trains twenty predictions, where a run of RecPO has one reward. A TRM may
teach: what it expects over the whole catalog says more than the one item that came.
Items' states get no gradient: they are read anew every few steps, and the projection follows them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional

from ..configuration import write_json
from ..errors import SettingsError
from ..graph.r2ec.backbone import batches
from .head_start import HeadStart, Reader, Reading, follow
from .optimiser import checked_step, load_trained, optimizer_of, save_trained, trained_of
from .recpo import ndcg, outcome

if TYPE_CHECKING:
    from ..graph.r2ec.backbone import Backbone
    from ..graph.r2ec.head import RecommendationHead
    from .teacher import Teacher

CHECKPOINT, LOG = "checkpoint.safetensors", "log.json"
_DECAY = 0.01
_LAST_RATE = 0.1  # of the learning rates, at the last step
_SHOWN_AT = 10  # places of the NDCG that is logged


class HeadLearning(BaseModel):
    """How the LLM and the head are trained together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=1)
    readings_per_step: int = Field(16, ge=1)
    tokens_per_pass: int = Field(2560, ge=256)  # padding included
    refresh_every: int = Field(10, ge=1)  # steps after which all items are read anew
    thought_weight: float = Field(0.1, ge=0)  # of the thoughts' cross-entropy
    # Share of the TRM's distribution in what a line is to predict; the rest is the item that came.
    teacher_weight: float = Field(0.0, ge=0, le=1)
    learning_rate: float = Field(2e-4, gt=0)
    head_learning_rate: float = Field(5e-4, gt=0)  # of the users' projection and the scale
    warmup: float = Field(0.05, ge=0, lt=1)  # share of the steps in which rates rise
    max_grad_norm: float = Field(1.0, gt=0)
    valid_users: int = Field(200, ge=1)  # whose validation items are looked for
    valid_every: int = Field(100, ge=1)
    save_every: int = Field(50, ge=1)


def places_by_step(
    sequences: Sequence[NDArray[np.int32]], *, size: int, left: int, window: int, seed: int
) -> Iterator[list[tuple[int, int]]]:
    """User and position of each reading of a step, endlessly; the same for a seed.

    In a pass over the users a position is the target of one prediction at most: readings of
    `window` items follow each other, from an end that is drawn for each user; each user's latest
    `left` interactions are no targets. What fills no step of `size` at the end of a pass is left
    out. Raises SettingsError where a pass fills none.
    """
    for epoch in count():
        rng = np.random.default_rng([seed, 23, epoch])
        found = []
        for user, sequence in enumerate(sequences):
            last = len(sequence) - left - 1
            at = max(last - int(rng.integers(window)), min(1, last))
            found += [(user, place) for place in range(at, 0, -window)]
        if len(found) < size:
            raise SettingsError(
                f"the training part gives {len(found)} readings, fewer than a step's {size}: lower "
                "learning.readings_per_step or head_start.left_per_user"
            )
        order = rng.permutation(len(found))
        for start in range(0, len(found) - size + 1, size):
            yield [found[place] for place in order[start : start + size]]


class HeadTrainer:
    """Trains an LLM and its recommendation head on readings.

    Args:
        llm: the causal LM, with or without an adapter.
        backbone: of the same LLM.
        head: fitted or not; trained in place.
        items: token ids of each item's reading, in the order of the data set.
        reader: makes readings.
        start: of how the head was fitted; as many readings have thoughts, and as much is left.
        teacher: needed for a `teacher_weight` above 0.
        config: of the training.
        folder: of the run; checkpoint and log.
        seed: of what is read when.

    """

    def __init__(
        self,
        *,
        llm: Any,
        backbone: Backbone,
        head: RecommendationHead,
        items: Sequence[Sequence[int]],
        reader: Reader,
        start: HeadStart,
        teacher: Teacher | None = None,
        config: HeadLearning,
        folder: Path,
        seed: int,
    ) -> None:
        self._llm = llm
        self._backbone = backbone
        self._head = head
        self._items = items
        self._reader = reader
        self._start = start
        self._teacher = teacher
        self._config = config
        self._folder = folder
        self._seed = seed
        self._states = torch.zeros(0)
        self._trained = trained_of(llm, head)
        self._rates = (config.learning_rate, config.head_learning_rate)
        self._optimizer = optimizer_of(self._trained, self._rates, weight_decay=_DECAY)
        self.log: list[dict[str, float]] = []

    def train(self, report: Callable[[dict[str, float]], None]) -> None:
        """Train to the end, from the checkpoint where there is one; `report` gets each row."""
        config = self._config
        said = load_trained(self._folder / CHECKPOINT, self._trained, self._optimizer)
        done = 0
        if said is not None:
            self.log, done = json.loads(said["log"]), int(said["step"])
        plan = places_by_step(
            self._reader.split.train,
            size=config.readings_per_step,
            left=self._start.left_per_user,
            window=self._reader.history_length,
            seed=self._seed,
        )
        with self._reading():
            self._states = self._backbone.states(self._items)
        for step, places in enumerate(islice(plan, done, config.steps), done):
            row = self._step(step, places)
            last = step + 1 == config.steps
            saves = last or (step + 1) % config.save_every == 0
            # Before each save, so that a run that goes on there has the same states.
            if saves or (step + 1) % config.refresh_every == 0:
                row["items/kept"] = self._refresh()
            if last or (step + 1) % config.valid_every == 0:
                row |= self._validate()
            self.log.append(row)
            report(row)
            if saves:
                self._save(step + 1)

    def _step(self, step: int, places: Sequence[tuple[int, int]]) -> dict[str, float]:
        began = time.perf_counter()
        config = self._config
        rng = np.random.default_rng([self._seed, 29, step])
        readings = [
            self._reader.read(user, at, thought=rng.random() < self._start.thoughts)
            for user, at in places
        ]
        taught = []
        if self._teacher is not None:
            taught = [
                self._teacher.log_probs(
                    self._reader.split.train[user], range(at + 1 - len(reading.places), at + 1)
                )
                for (user, at), reading in zip(places, readings, strict=True)
            ]
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._factor(step)
        self._optimizer.zero_grad()
        torch.manual_seed(self._seed + step)  # an adapter's dropout, as after a kill
        self._llm.train()
        losses = [self._backward(batch, readings, taught) for batch in self._batches(readings)]
        norms = checked_step(self._optimizer, config.max_grad_norm)
        self._llm.eval()
        lines, ends, thoughts, gaps = (sum(column) for column in zip(*losses, strict=True))
        return {
            "step": step,
            "loss/line": lines,
            "loss/end": ends,
            "loss/thought": thoughts,
            **({} if self._teacher is None else {"loss/teacher": gaps}),
            "grad_norm/llm": norms[0],
            "grad_norm/head": norms[1],
            "tokens": sum(len(reading.ids) for reading in readings),
            "seconds": time.perf_counter() - began,
        }

    def _backward(
        self,
        batch: Sequence[int],
        readings: Sequence[Reading],
        taught: Sequence[Tensor],
    ) -> tuple[float, float, float, float]:
        """Add the gradient of some readings; gives their parts of the step's four losses.

        `taught` is what the teacher expects of each reading, blank without one.
        """
        lines = sum(len(reading.places) - 1 for reading in readings)
        words = sum(len(reading.spoken) for reading in readings)
        some = [readings[at] for at in batch]
        hidden = self._backbone.hidden([reading.ids for reading in some])
        rows = torch.tensor([row for row, one in enumerate(some) for _ in one.places])
        places = torch.tensor([place for one in some for place in one.places])
        targets = torch.tensor([item for one in some for item in one.targets])
        is_end = torch.tensor([at == len(one.ids) - 1 for one in some for at in one.places])
        # All states are of one moment. Were a step's targets read with gradient and the others not,
        # what they moved by since would tell them from all others: an LLM learns that at once.
        vectors = self._head.items(self._states)
        scores = self._head.users(hidden[rows, places].float().cpu()) @ vectors.T
        wrong = functional.cross_entropy(scores, targets, reduction="none")
        line = wrong[~is_end].sum() / max(1, lines)
        end = wrong[is_end].sum() / len(readings)
        thought = self._thought_loss(hidden, some) / max(1, words)
        # A list is ranked by an end, so ends count as much as the many lines do together.
        came = (line + end) / 2
        gap = torch.zeros(())
        if taught:
            expected = torch.cat([taught[at] for at in batch])
            apart = functional.kl_div(
                scores.log_softmax(dim=-1), expected, log_target=True, reduction="none"
            ).sum(dim=-1)
            gap = (apart[~is_end].sum() / max(1, lines) + apart[is_end].sum() / len(readings)) / 2
        weight = self._config.teacher_weight
        loss = (1 - weight) * came + weight * gap + self._config.thought_weight * thought
        loss.backward()  # type: ignore[no-untyped-call]
        return (
            float(line.detach()),
            float(end.detach()),
            float(thought.detach()),
            float(gap.detach()),
        )

    def _thought_loss(self, hidden: Tensor, some: Sequence[Reading]) -> Tensor:
        """Sum of the cross-entropy of the thoughts' tokens."""
        rows = [row for row, one in enumerate(some) for _ in one.spoken]
        if not rows:
            return torch.zeros(())
        before = [place - 1 for one in some for place in one.spoken]
        wanted = torch.tensor([one.ids[place] for one in some for place in one.spoken])
        weight = self._llm.get_output_embeddings().weight
        scored = functional.linear(hidden[rows, before].float(), weight.float())
        return functional.cross_entropy(scored, wanted.to(scored.device), reduction="sum").cpu()

    def _batches(self, readings: Sequence[Reading]) -> Iterator[list[int]]:
        return batches([len(reading.ids) for reading in readings], self._config.tokens_per_pass)

    def _factor(self, step: int) -> float:
        """Of the learning rates: a rise in a straight line, then a cosine down."""
        risen = self._config.warmup * self._config.steps
        if step < risen:
            return (step + 1) / (risen + 1)
        way = (step - risen) / max(1.0, self._config.steps - risen)
        return _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * way)) / 2

    def _refresh(self) -> float:
        """Read all items anew; gives how much of their vectors is left (head_start.follow)."""
        before = self._states
        with self._reading():
            self._states = self._backbone.states(self._items)
        return follow(self._head, before, self._states)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        # Compiled layers would be compiled once more for passes without gradient.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield

    def _validate(self) -> dict[str, float]:
        """NDCG@10 of validation items by readings without a thought, the past left out."""
        split, reader = self._reader.split, self._reader
        users = np.flatnonzero(split.valid >= 0)
        drawn = np.random.default_rng([self._seed, 31]).permutation(users)
        some = drawn[: self._config.valid_users].tolist()
        pasts = [split.valid_history(user).tolist() for user in some]
        with self._reading():
            states = self._backbone.states(
                [reader.ids_of(past[-reader.history_length :]) for past in pasts]
            )
            scores = self._head.users(states) @ self._head.items(self._states).T
        told = []
        for user, past, row in zip(some, pasts, scores, strict=True):
            target = int(split.valid[user])
            rank, _ = outcome(row, target, gone=set(past) - {target})
            told.append(ndcg(rank, _SHOWN_AT))
        return {f"valid/ndcg@{_SHOWN_AT}": mean(told)}

    def _save(self, step: int) -> None:
        said = {"step": str(step), "log": json.dumps(self.log)}
        save_trained(self._folder / CHECKPOINT, self._trained, self._optimizer, said)
        write_json(self._folder / LOG, self.log)
