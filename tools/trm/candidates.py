"""Which items a training step scores: all of them, or a sample with its correction."""

import math

import torch
from torch import Tensor
from torch.nn import functional


class Candidates:
    """All items, or (`sample` > 0) the batch's own targets plus `sample` uniform negatives.

    A sampled step costs the same for any catalog. `counts` `[items]` says how often each item is
    a target in training.
    """

    def __init__(self, counts: Tensor, sample: int):
        self.n = len(counts)
        self.sample = sample
        self.share = counts.double() / counts.sum()

    def draw(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """For targets `[n]`: candidate items `[m]`, each target's place among them `[n]`, and the
        log of each candidate's chance of being drawn `[m]` (None: all items are candidates).
        """
        if not self.sample:
            return torch.arange(self.n, device=targets.device), targets, None
        drawn = torch.randint(self.n, (self.sample,), device=targets.device)
        items = torch.unique(torch.cat([targets, drawn]))
        # Chance of being missed by every target of the batch and by every uniform draw.
        missed = len(targets) * torch.log1p(-self.share[items].clamp(max=1 - 1e-9))
        missed = missed + self.sample * math.log1p(-1 / self.n)
        chance = torch.log(-torch.expm1(missed)).float()
        return items, torch.searchsorted(items, targets), chance


def cross_entropy(logits: Tensor, place: Tensor, chance: Tensor | None) -> Tensor:
    """Mean cross-entropy of the items at `place` `[n]` in `logits` `[n, m]`.

    With `chance` the partition sum is the Horvitz-Thompson estimate: every candidate counts one
    over its chance of being drawn, and the target, which is always drawn, counts once.
    """
    if chance is not None:
        own = functional.one_hot(place, logits.shape[1]).bool()
        logits = logits - chance.expand_as(logits).masked_fill(own, 0.0)
    return functional.cross_entropy(logits, place)
