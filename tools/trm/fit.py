"""Fitting a TRM: cross-entropy with and without a preference, early stopping on validation.

Each target is learned twice in a step, from the history alone and from history and preference
(METHOD.md section 3 leaves the recipe open; docs/experiments.md tells why this one).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.linalg import svds
from torch import Tensor
from torch.nn import functional as F

from ...errors import TRMError
from ..interactions import InteractionData, Split
from ..text_encoder import TextEncoder
from .baselines import Markov
from .config import DeepRecConfig, FitConfig, PaperConfig
from .fusion import DeepRecNet
from .model import TRM
from .preferences import PreferencePool
from .scoring import catalog_vectors, exclude, history_vectors, ndcg, target_ranks


@dataclass(frozen=True, slots=True)
class FitProgress:
    """`stage` is "preferences" (texts being embedded) or "fit"; `step` of `total` in that stage.
    `valid_ndcg` is NDCG@10 on the validation targets: absent, with preference; None before the
    first epoch's end. `examples` counts targets learned so far.
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
    Gives the model in evaluation mode on the CPU. Raises TRMError if there is nothing to learn.
    """
    training = training or FitConfig()
    if item_text_embeddings.shape != (len(data.items), encoder.dim):
        raise TRMError(
            f"text embeddings of shape {item_text_embeddings.shape} for {len(data.items)} items "
            f"and an encoder of width {encoder.dim}. Make them with item_embeddings()."
        )
    report = progress or (lambda _: None)
    if training.preferences and pool is None:
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
    trainer = _Trainer(model, split, item_text_embeddings, training, pool, seed, device)
    return trainer.run(report)


@dataclass(slots=True)
class _Batch:
    history: np.ndarray  # [B, L] right-padded with -1
    lengths: np.ndarray  # [B]
    targets: np.ndarray  # [B, L], -1 = nothing to learn at this position


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
        self.pool = pool if training.preferences and pool is not None and pool.texts else None
        self.split = split
        self.rng = np.random.default_rng(seed)
        self.text = torch.as_tensor(text, device=device)
        self.text_array = text
        sequences = [np.asarray(s, dtype=np.int64) for s in split.train if len(s) > 1]
        if not sequences:
            raise TRMError(
                "no user has two or more training interactions, so there is no transition to "
                "learn. Use more data or a lower k-core."
            )
        self.flat = np.concatenate(sequences)
        self.ends = np.cumsum([len(s) for s in sequences])
        self.begins = self.ends - [len(s) for s in sequences]
        counts = np.bincount(self.flat, minlength=len(text)).astype(np.float64)
        self.popularity = torch.as_tensor(counts / counts.sum(), device=device)
        self.sampled = len(text) > training.full_softmax_items
        self.scale = 1 / training.temperature if isinstance(model.config, PaperConfig) else 1.0
        self.vectors = torch.as_tensor(self.pool.vectors, device=device) if self.pool else None
        valid = np.flatnonzero(split.valid >= 0)
        valid = np.array([u for u in valid if len(split.valid_history(int(u)))], dtype=np.int64)
        if len(valid) > training.valid_users:
            valid = np.sort(np.random.default_rng(0).permutation(valid)[: training.valid_users])
        self.valid_users = valid

    def batches(self) -> Iterator[_Batch]:
        length = self.model.config.history_length
        causal = self.model.net.causal
        if causal:
            # Windows that learn each target once, cut at new places in each epoch.
            stride = min(self.training.stride or length, length)
            starts, learns, stops = [], [], []
            for begin, end in zip(self.begins, self.ends, strict=True):
                first = begin - self.rng.integers(stride) if end - begin > stride + 1 else begin
                for at in range(first, end - 1, stride):
                    stop_at = min(at + stride, end - 1)
                    starts.append(max(begin, stop_at - length))
                    learns.append(max(at, begin))
                    stops.append(stop_at)
            start, learn_from, stop = np.array(starts), np.array(learns), np.array(stops)
            keep = stop > learn_from
            start, learn_from, stop = start[keep], learn_from[keep], stop[keep]
            rows = max(1, self.training.batch_size // stride)
        else:
            # Every prefix, its last `length` items.
            stop = np.concatenate(
                [np.arange(b + 1, e) for b, e in zip(self.begins, self.ends, strict=True)]
            )
            begin = np.repeat(self.begins, self.ends - self.begins - 1)
            start, learn_from = np.maximum(begin, stop - length), stop - 1
            rows = self.training.batch_size
        order = self.rng.permutation(len(start))
        offsets = np.arange(length)
        for at in range(0, len(order), rows):
            chosen = order[at : at + rows]
            s, lengths = start[chosen], stop[chosen] - start[chosen]
            inside = offsets < lengths[:, None]
            place = np.minimum(s[:, None] + offsets, len(self.flat) - 2)
            history = np.where(inside, self.flat[place], -1)
            learn = inside & (s[:, None] + offsets >= learn_from[chosen][:, None])
            yield _Batch(history, lengths, np.where(learn, self.flat[place + 1], -1))

    def preference_rows(self, batch: _Batch, where: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """A pool row for each learned position; -1 = none fits."""
        assert self.pool is not None
        mix, rng = self.training.mix, self.rng
        kind = rng.random(len(targets))
        rows = self.pool.for_targets(targets, rng)
        history = self.pool.for_histories(batch.history, batch.lengths, rng)[where]
        titles = self.pool.for_titles(targets, rng)
        # Someone else's wish: what would describe another target of the batch.
        other = self.pool.for_targets(targets[rng.permutation(len(targets))], rng)
        edge = np.cumsum([mix.history, mix.unrelated, mix.title])
        for low, high, drawn in zip((0.0, *edge[:2]), edge, (history, other, titles), strict=True):
            rows = np.where((kind >= low) & (kind < high), drawn, rows)
        return rows

    def loss(self, batch: _Batch) -> tuple[Tensor, int]:
        model, device = self.model, self.device
        where = batch.targets >= 0
        targets = batch.targets[where]
        history = torch.as_tensor(batch.history, device=device)
        used, place = torch.unique(history.clamp_min(0), return_inverse=True)
        features = model.net.text_features(self.text[used])[place]
        lengths = torch.as_tensor(batch.lengths, device=device)
        states = model.net.states(history, features, lengths)[torch.as_tensor(where, device=device)]
        wanted = torch.as_tensor(targets, device=device)
        candidates, label, correction = self.candidates(wanted)
        items = model.item_vectors(candidates, self.text[candidates])
        loss = self.entropy(model.net.fuse(states, None, None), items, label, correction)
        if self.pool is not None and self.vectors is not None:
            rows = torch.as_tensor(self.preference_rows(batch, where, targets), device=device)
            has = rows >= 0
            if bool(has.any()):
                told, known = model.net.apart(states[has], items)
                asked = self.vectors[rows[has]]
                asked = asked + self.training.noise * torch.randn_like(asked)
                users = model.net.fuse(told, asked, None)
                loss = loss + self.entropy(users, known, label[has], correction)
        return loss, len(targets)

    def entropy(self, users: Tensor, items: Tensor, label: Tensor, correction: Tensor) -> Tensor:
        logits = self.scale * (users @ items.T)
        if self.sampled:
            # Horvitz-Thompson estimate of the partition sum; the target itself is always in it.
            own = F.one_hot(label, len(items)).bool()
            logits = logits - correction.masked_fill(own, 0.0)
        return F.cross_entropy(logits, label, label_smoothing=self.training.label_smoothing)

    def candidates(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Items to score, the targets' places among them, and each one's log inclusion
        probability: all items, or the batch's targets plus uniform negatives.
        """
        if not self.sampled:
            n = len(self.text)
            zeros = torch.zeros(n, device=self.device)
            return torch.arange(n, device=self.device), targets, zeros
        drawn = torch.randint(
            len(self.text), (self.training.negatives,), device=self.device
        )
        pool = torch.unique(torch.cat([targets, drawn]))
        label = torch.searchsorted(pool, targets)
        missed = torch.log1p(-self.popularity[pool].clamp(max=1 - 1e-9)) * len(targets)
        missed = missed + math.log1p(-1 / len(self.text)) * self.training.negatives
        return pool, label, torch.log(-torch.expm1(missed)).float()

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """NDCG@10 on validation targets: absent, and with a preference made from the target."""
        users = self.valid_users
        targets = self.split.valid[users].astype(np.int64)
        histories = [np.asarray(self.split.valid_history(int(u))) for u in users]
        items = catalog_vectors(self.model, self.text_array)
        rows = np.full(len(users), -1)
        if self.pool is not None:
            rows = self.pool.for_targets(targets, np.random.default_rng(0))
        results = []
        for with_preference in (False, True):
            ranks = []
            for at in range(0, len(users), 256):
                part = slice(at, at + 256)
                given = None
                if with_preference:
                    if self.pool is None or not bool((rows >= 0).any()):
                        break
                    given = self.pool.vectors[np.maximum(rows[part], 0)]
                vectors = history_vectors(
                    self.model, histories[part], self.text_array, given,
                    None if given is None else rows[part] >= 0,
                )
                scores = exclude(vectors @ items.T, histories[part], targets[part])
                ranks.append(target_ranks(scores, targets[part]))
            results.append(ndcg(np.concatenate(ranks), 10) if ranks else 0.0)
        return results[0], results[1]

    def _start_from_counts(self, net: DeepRecNet, scale: float) -> None:
        table = Markov(self.split.train, len(self.text)).table
        popular = np.maximum(self.popularity.cpu().numpy(), 1e-9)
        lifted = np.log(np.maximum(table.data / popular[table.indices], 1.0))
        lifted = csr_array((lifted, table.indices, table.indptr), table.shape)
        _, t, _ = net.blocks
        left, strength, right = svds(lifted, k=t, random_state=0)
        root = np.sqrt(strength)
        d = net.blocks[0]
        with torch.no_grad():
            net.source.weight.copy_(torch.as_tensor((left * root).copy()))
            net.target.weight[:, d : d + t].copy_(torch.as_tensor((right.T * root).copy()))
            net.lag.add_(math.log(scale))

    def run(self, report: Callable[[FitProgress], None]) -> TRM:
        training = self.training
        if training.svd and isinstance(self.model.net, DeepRecNet):
            self._start_from_counts(self.model.net, training.svd)
        steps = sum(1 for _ in self.batches())
        total = steps * training.epochs
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
        )
        warm = max(1, int(training.warmup * total))

        def rate(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm))) + 1e-3

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        best, best_weights, stale = -1.0, None, 0
        average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        step, examples, valid = 0, 0, None
        for epoch in range(1, training.epochs + 1):
            self.model.train()
            for batch in self.batches():
                loss, count = self.loss(batch)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
                optimizer.step()
                schedule.step()
                # The average forgets its start quickly: the decay grows with the steps made.
                decay = min(training.ema, step / (step + 10))
                for name, value in self.model.state_dict().items():
                    average[name].lerp_(value, 1 - decay)
                step, examples = step + 1, examples + count
                report(FitProgress("fit", step, total, epoch, loss.item(), valid, examples))
            raw = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
            self.model.load_state_dict(average)
            valid = self.validate() if len(self.valid_users) else (0.0, 0.0)
            # The geometric mean weighs a relative gain in either alike.
            score = math.sqrt(valid[0] * valid[1]) if self.pool is not None else valid[0]
            report(FitProgress("fit", step, total, epoch, loss.item(), valid, examples))
            if score > best or not len(self.valid_users):
                best, stale = score, 0
                best_weights = {k: v.clone() for k, v in average.items()}
            else:
                stale += 1
                if stale >= training.patience:
                    break
            self.model.load_state_dict(raw)
        assert best_weights is not None
        self.model.load_state_dict(best_weights)
        return self.model.to("cpu").eval()
