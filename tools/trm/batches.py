"""Training sequences cut into windows of histories and targets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import TRMError


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded windows: after `history[b, t]` came `targets[b, t]`."""

    history: np.ndarray  # int64 [B, L], -1 = padding
    lengths: np.ndarray  # int64 [B]
    targets: np.ndarray  # int64 [B, L], -1 = nothing to learn at this position


class Windows:
    """All users' training sequences, and how an epoch walks through them.

    Raises TRMError if no sequence has a transition.
    """

    def __init__(self, sequences: Sequence[np.ndarray], length: int, batch_size: int):
        kept = [np.asarray(s, dtype=np.int64) for s in sequences if len(s) > 1]
        if not kept:
            raise TRMError(
                "no user has two or more training interactions, so there is no transition to "
                "learn. Use more data or a lower k-core."
            )
        self.flat = np.concatenate(kept)
        self.ends = np.cumsum([len(s) for s in kept])
        self.begins = self.ends - [len(s) for s in kept]
        self.length, self.batch_size = length, batch_size

    def counts(self, n_items: int) -> np.ndarray:
        """How often each item is there, int64 `[n_items]`."""
        return np.bincount(self.flat, minlength=n_items)

    def epoch(self, rng: np.random.Generator, *, causal: bool) -> Iterator[Batch]:
        """Batches that learn each transition once, in random order.

        A causal model learns at every position of a window, and windows are cut at other places
        in each epoch; else each target has a window of its own.
        """
        if causal:
            start, stop = self._cut(rng)
            rows = max(1, self.batch_size // self.length)
        else:
            stop = np.concatenate(
                [np.arange(b + 1, e) for b, e in zip(self.begins, self.ends, strict=True)]
            )
            start = np.maximum(
                np.repeat(self.begins, self.ends - self.begins - 1), stop - self.length
            )
            rows = self.batch_size
        order = rng.permutation(len(start))
        offsets = np.arange(self.length)
        for at in range(0, len(order), rows):
            chosen = order[at : at + rows]
            lengths = stop[chosen] - start[chosen]
            inside = offsets < lengths[:, None]
            place = np.minimum(start[chosen][:, None] + offsets, len(self.flat) - 2)
            learn = inside if causal else offsets == lengths[:, None] - 1
            yield Batch(
                np.where(inside, self.flat[place], -1),
                lengths,
                np.where(learn, self.flat[place + 1], -1),
            )

    def _cut(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Where windows start and stop: history `flat[start:stop]`, last target `flat[stop]`."""
        starts, stops = [], []
        for begin, end in zip(self.begins, self.ends, strict=True):
            long = end - begin > self.length + 1
            first = begin - rng.integers(self.length) if long else begin
            for at in range(first, end - 1, self.length):
                starts.append(max(at, begin))
                stops.append(min(at + self.length, end - 1))
        start, stop = np.array(starts), np.array(stops)
        return start[stop > start], stop[stop > start]
