"""Fitting a TRM: cross-entropy with and without a preference, early stopping on validation.

Each target is learned twice in a step, from the history alone and from history and preference
(the paper, arXiv 2505.16810, leaves the recipe open; docs/trm.md tells why this one).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import TRMError
from ..interactions import InteractionData, Split
from ..text_encoder import TextEncoder
from .baselines import Markov
from .batches import Batch, Windows
from .candidates import Candidates, cross_entropy
from .config import DeepRecConfig, FitConfig, PaperConfig
from .fusion import DeepRecNet
from .model import TRM
from .preferences import PreferencePool
from .scoring import (
    catalog_vectors,
    exclude,
    history_vectors,
    ndcg,
    target_ranks,
    users_at_once,
)

_STARTED_ITEMS = 200_000  # beyond, the SVD of counted transitions takes minutes and gigabytes


@dataclass(frozen=True, slots=True)
class FitProgress:
    """`step` of `total` in a `stage`: "preferences" (texts being embedded) or "fit".

    `total` is an upper bound: early stopping may end sooner. `valid_ndcg` is NDCG@10 on the
    validation targets without and with a preference; None before the first epoch's end.
    `examples` counts the targets learned so far.
    """

    stage: str
    step: int
    total: int
    epoch: int = 0
    loss: float = 0.0
    valid_ndcg: tuple[float, float] | None = None
    examples: int = 0


def fit(
    data: InteractionData,
    split: Split,
    item_text_embeddings: np.ndarray,
    encoder: TextEncoder,
    config: PaperConfig | DeepRecConfig,
    training: FitConfig | None = None,
    *,
    seed: int = 0,
    pool: PreferencePool | None = None,
    progress: Callable[[FitProgress], None] | None = None,
    device: str = "cpu",
) -> TRM:
    """Train on `split.train` and keep the weights that are best on `split.valid`.

    `item_text_embeddings` float32 `[items, encoder.dim]` are the passage embeddings of
    `data.items`. `pool` reuses embedded preference texts; without it one is made here.
    Catalogs of more than 200,000 items start without counted transitions (`transition_start`).
    Gives the model in evaluation mode on the CPU. Raises TRMError if there is nothing to learn,
    for a negative seed, and if training diverges.
    """
    training = training or FitConfig()
    if seed < 0:
        raise TRMError(f"the seed is {seed}. Give 0 or more.")
    if item_text_embeddings.shape != (len(data.items), encoder.dim):
        raise TRMError(
            f"text embeddings of shape {item_text_embeddings.shape} for {len(data.items)} items "
            f"and an encoder of width {encoder.dim}. Make them with item_embeddings()."
        )
    report = progress or (lambda _: None)
    if not training.preferences:
        pool = None
    elif pool is None:
        pool = PreferencePool(
            data.items,
            item_text_embeddings,
            split.train,
            encoder,
            size=training.pool,
            history_length=config.history_length,
            progress=lambda done, total: report(FitProgress("preferences", done, total)),
        )
    config = config.model_copy(
        update={
            "text_dim": encoder.dim,
            "encoder_fingerprint": encoder.fingerprint,
            "dataset_fingerprint": data.fingerprint,
        }
    )
    torch.manual_seed(seed)
    model = TRM(config, tuple(item.id for item in data.items)).to(device)
    net, n = model.net, len(data.items)
    if isinstance(net, DeepRecNet) and net.config.transition_start and n <= _STARTED_ITEMS:
        net.start_from_transitions(Markov(split.train, n).lift())
    return _Trainer(model, split, item_text_embeddings, training, pool, seed, device).run(report)


class _Trainer:
    def __init__(
        self,
        model: TRM,
        split: Split,
        text: np.ndarray,
        training: FitConfig,
        pool: PreferencePool | None,
        seed: int,
        device: str,
    ):
        self.model, self.training, self.device = model, training, device
        self.pool = pool if pool is not None and pool.texts else None
        self.split, self.text_array = split, text
        self.text = torch.as_tensor(text, device=device)
        self.rng = np.random.default_rng(seed)
        self.windows = Windows(split.train, model.config.history_length, training.batch_size)
        sampled = len(text) > training.full_softmax_items
        self.candidates = Candidates(
            torch.as_tensor(self.windows.counts(len(text)), device=device),
            training.negatives if sampled else 0,
        )
        if self.pool is not None:
            self.wishes = torch.as_tensor(self.pool.vectors, device=device)
        users = np.array(
            [u for u in np.flatnonzero(split.valid >= 0) if len(split.valid_history(int(u)))],
            dtype=np.int64,
        )
        if len(users) > training.valid_users:
            users = np.sort(np.random.default_rng(0).permutation(users)[: training.valid_users])
        self.valid_users = users
        self.weights = _Weights(model, training, sparse=sampled)

    def run(self, report: Callable[[FitProgress], None]) -> TRM:
        training, weights = self.training, self.weights
        causal = self.model.net.causal
        total = training.epochs * sum(1 for _ in self.windows.epoch(self.rng, causal=causal))
        step, examples, stale, best = 0, 0, 0, -1.0
        valid: tuple[float, float] | None = None
        for epoch in range(1, training.epochs + 1):
            self.model.train()
            for batch in self.windows.epoch(self.rng, causal=causal):
                loss, count = self.loss(batch)
                value = loss.item()
                if not math.isfinite(value):
                    raise self.diverged(step + 1)
                weights.step(loss, step, total)
                step, examples = step + 1, examples + count
                report(FitProgress("fit", step, total, epoch, value, valid, examples))
            with weights.averaged():
                valid = self.validate(step)
                # The geometric mean weighs a relative gain in either alike.
                score = math.sqrt(valid[0] * valid[1]) if self.pool is not None else valid[0]
                report(FitProgress("fit", step, total, epoch, value, valid, examples))
                if score > best or not len(self.valid_users):
                    best, stale = score, 0
                    weights.keep()
                else:
                    stale += 1
            if stale >= training.patience:
                break
        weights.restore()
        return self.model.to("cpu").eval()

    def diverged(self, step: int) -> TRMError:
        """What to raise where a number is none."""
        return TRMError(
            f"training diverged at step {step} with learning_rate {self.training.learning_rate:g}. "
            "Lower learning_rate."
        )

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        """The loss of a batch and how many targets it learned."""
        net, device = self.model.net, self.device
        where = batch.targets >= 0
        targets = batch.targets[where]
        history = torch.as_tensor(batch.history, device=device)
        used, place = torch.unique(history.clamp_min(0), return_inverse=True)
        features = net.text_features(self.text[used])[place]
        lengths = torch.as_tensor(batch.lengths, device=device)
        states = net.states(history, features, lengths)[torch.as_tensor(where, device=device)]
        wanted = torch.as_tensor(targets, device=device)
        shown, label, chance = self.candidates.draw(wanted)
        items = net.item_vectors(shown, self.text[shown])
        loss = cross_entropy(net.fuse(states, None, None) @ items.T, label, chance)
        if self.pool is not None:
            drawn = self.wish_rows(self.pool, batch, where, targets)
            rows = torch.as_tensor(drawn, device=device)
            has = rows >= 0
            if bool(has.any()):
                told, known = net.apart(states[has], items)
                wish = self.wishes[rows[has]]
                wish = wish + self.training.noise * torch.randn_like(wish)
                users = net.fuse(told, wish, None)
                loss = loss + cross_entropy(users @ known.T, label[has], chance)
        return loss, len(targets)

    def wish_rows(
        self, pool: PreferencePool, batch: Batch, where: np.ndarray, targets: np.ndarray
    ) -> np.ndarray:
        """A row of the pool for each learned position; -1 = no text fits."""
        mix, rng = self.training.mix, self.rng
        rows = pool.for_targets(targets, rng)
        drawn = (
            (mix.history, pool.for_histories(batch.history, batch.lengths, rng)[where]),
            # Someone else's wish: what would describe another target of the batch.
            (mix.unrelated, pool.for_targets(rng.permutation(targets), rng)),
            (mix.title, pool.for_titles(targets, rng)),
        )
        chance, low = rng.random(len(targets)), 0.0
        for share, other in drawn:
            rows = np.where((chance >= low) & (chance < low + share), other, rows)
            low += share
        return rows

    @torch.no_grad()
    def validate(self, step: int) -> tuple[float, float]:
        """NDCG@10 on validation targets: without, and with a preference made from the target."""
        users = self.valid_users
        if not len(users):
            return 0.0, 0.0
        targets = self.split.valid[users].astype(np.int64)
        histories = [np.asarray(self.split.valid_history(int(user))) for user in users]
        items = catalog_vectors(self.model, self.text_array)
        size = users_at_once(len(items))
        results = []
        for wishes in (None, self.pool):
            rows = wishes.for_targets(targets, np.random.default_rng(0)) if wishes else None
            ranks = []
            for at in (slice(n, n + size) for n in range(0, len(users), size)):
                users_at = history_vectors(
                    self.model,
                    histories[at],
                    self.text_array,
                    None if rows is None or wishes is None else wishes.vectors[rows[at]],
                    None if rows is None else rows[at] >= 0,
                )
                scores = users_at @ items.T
                if not bool(scores.isfinite().all()):
                    raise self.diverged(step)
                scores = exclude(scores, histories[at], targets[at])
                ranks.append(target_ranks(scores, targets[at]))
            results.append(ndcg(np.concatenate(ranks), 10))
        return results[0], results[1]


class _Weights:
    """The model's weights while they are learned: optimizer, schedule, running average.

    In a sampled step few rows of the item tables have a gradient: with `sparse` only those are
    touched, by a sparse optimizer, and the tables are left out of the average.
    """

    def __init__(self, model: TRM, training: FitConfig, *, sparse: bool):
        self.model, self.training = model, training
        tables: list[nn.Parameter] = []
        if sparse:
            for table in model.net.tables:
                table.sparse = True
                tables += table.parameters()
        named = {id(table) for table in tables}
        self.dense = [p for p in model.parameters() if id(p) not in named]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                self.dense, lr=training.learning_rate, weight_decay=training.weight_decay
            )
        ]
        if tables:
            self.optimizers.append(torch.optim.SparseAdam(tables, lr=training.learning_rate))
        self.average = [p.detach().clone() for p in self.dense]
        self.best: dict[str, Tensor] = {}

    def step(self, loss: Tensor, step: int, total: int) -> None:
        """One step of warm-up then cosine decay, gradients clipped."""
        training = self.training
        warm = max(1, round(training.warmup * total))
        rate = (step + 1) / warm
        if step >= warm:
            rate = 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, total - warm))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * max(rate, 1e-3)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.dense, 5.0)
        for optimizer in self.optimizers:
            optimizer.step()
        # A short memory at first: the average must forget the start.
        decay = min(training.ema, step / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [p.detach() for p in self.dense], 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has the averaged weights inside."""
        raw = [p.detach().clone() for p in self.dense]
        self._load(self.average)
        yield
        self._load(raw)

    def keep(self) -> None:
        self.best = {name: value.clone() for name, value in self.model.state_dict().items()}

    def restore(self) -> None:
        self.model.load_state_dict(self.best)

    @torch.no_grad()
    def _load(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.dense, values, strict=True):
            parameter.copy_(value)
