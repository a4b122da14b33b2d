"""RecPO: rewards, advantages and losses of a model that reasons and ranks (arXiv 2505.16994).

Pure functions, with the authors' constants (†, of their public code) as defaults. Three slips of
that code are not taken over: its ratio is exp(lp - lp), always 1, so that clipping never binds (the
old logprobs here are the engine's, or the first pass's); what it calls leave-one-out is none (it
isn't offered); and where memory runs out it goes on with a loss of zero (here that is an error).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

if TYPE_CHECKING:
    from ..tools.snapshot import Snapshot

_EPSILON = 1e-8  # †, beside a group's standard deviation


class RecPO(BaseModel):
    """Constants of the objective."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    alpha: float = Field(0.05, ge=0, le=1)  # †, share of the softmax probability in the reward
    ndcg_k: int = Field(1000, ge=1)  # †, places that NDCG looks at
    epsilon_low: float = Field(0.2, gt=0, lt=1)  # †
    epsilon_high: float = Field(0.28, gt=0)  # †
    item_weight: float = Field(1.0, ge=0)  # factor of the item loss; 0: the token loss alone
    # Items beside the batch's targets that the item loss compares with, drawn at random, by their
    # kept states; the source has in-batch targets alone, of far larger batches.
    negatives: int = Field(256, ge=0)


def ndcg(rank: int | None, k: int) -> float:
    """1 / log2(rank + 2) for a target at zero-based `rank` below k, else 0; None: not ranked."""
    if rank is None or rank >= k:
        return 0.0
    return float(1 / torch.tensor(rank + 2.0).log2())


def outcome(
    scores: Tensor, target: int, *, gone: Collection[int] = (), among: Collection[int] | None = None
) -> tuple[int | None, float]:
    """Zero-based rank and softmax probability of an item among those that may be shown.

    Args:
        scores: of the whole catalog [items].
        target: position of the item.
        gone: positions that are never shown, such as the history's.
        among: the only candidates; None: the catalog.

    A target that may not be shown has no rank, and probability 0. Ties rank before the target.

    """
    may = torch.ones(len(scores), dtype=torch.bool)
    if among is not None:
        may[:] = False
        may[list(among)] = True
    may[list(gone)] = False
    if not may[target]:
        return None, 0.0
    kept = scores.masked_fill(~may, float("-inf"))
    probability = float(kept.softmax(dim=0)[target])
    return int((kept >= kept[target]).sum()) - 1, probability


def reward(rank: int | None, probability: float, config: RecPO) -> float:
    """(1 - α)·NDCG@k + α·softmax probability of the target (arXiv 2505.16994, reward)."""
    return (1 - config.alpha) * ndcg(rank, config.ndcg_k) + config.alpha * probability


def advantages(rewards: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-8) over each group; `rewards` [users, G], G of at least 2.

    std is the sample's, as in the authors' code; a group of equal rewards has advantage 0.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + _EPSILON)


def best_of_group(rewards: Tensor) -> Tensor:
    """Place of the best chain of each group [users], the first where several are."""
    return rewards.argmax(dim=1)


def clipped_loss(logprobs: Tensor, old: Tensor, advantage: Tensor, config: RecPO) -> Tensor:
    """-min(ρ·A, clip(ρ, 1 - ε_low, 1 + ε_high)·A) with ρ = exp(logprob - old), elementwise.

    The same for a chain's tokens and for a target's softmax probability.
    """
    ratio = (logprobs - old.detach()).exp()
    bounded = ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
    return -torch.minimum(ratio * advantage, bounded * advantage)


def share_clipped(logprobs: Tensor, old: Tensor, advantage: Tensor, config: RecPO) -> float:
    """Share of the elements where clipping binds, so that they give no gradient."""
    ratio = (logprobs - old).exp()
    high = (ratio > 1 + config.epsilon_high) & (advantage > 0)
    low = (ratio < 1 - config.epsilon_low) & (advantage < 0)
    return float((high | low).float().mean()) if ratio.numel() else 0.0


def dealt_out(count: int, rng: np.random.Generator) -> list[int]:
    """For each of `count` places another one, each once: a random cycle through them all."""
    order = rng.permutation(count)
    given = np.empty(count, dtype=np.int64)
    given[order] = np.roll(order, 1)
    return [int(place) for place in given]


def positions_of(now: Snapshot, ids: Sequence[str]) -> list[int]:
    """Positions of item ids; those that the catalog doesn't hold are left out."""
    return [now.index[id_] for id_ in ids if id_ in now.index]
