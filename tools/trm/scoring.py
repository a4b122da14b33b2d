"""Scores of a whole catalog and where targets stand in them, the user's past excluded."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .model import TRM
from .preferences import pad

_SCORES = 20_000_000  # held at once


def users_at_once(n_items: int) -> int:
    """For how many users all scores of `n_items` items may be held at the same time."""
    return max(1, min(256, _SCORES // max(1, n_items)))


@torch.no_grad()
def catalog_vectors(
    model: TRM, text: np.ndarray, index: np.ndarray | None = None, *, batch: int = 8192
) -> Tensor:
    """Item vectors `[n, dim]` for passage embeddings `text` `[n, text_dim]`. `index` `[n]` names
    the trained rows (-1: none); without it item i is row i.
    """
    rows = np.arange(len(text)) if index is None else index
    model.eval()
    device = next(model.parameters()).device
    parts = [
        model.item_vectors(
            torch.as_tensor(rows[start : start + batch], dtype=torch.long, device=device),
            torch.as_tensor(text[start : start + batch], device=device),
        )
        for start in range(0, len(rows), batch)
    ]
    return torch.cat(parts)


@torch.no_grad()
def history_vectors(
    model: TRM,
    histories: Sequence[np.ndarray],
    text: np.ndarray,
    preference: np.ndarray | None = None,
    has_preference: np.ndarray | None = None,
    *,
    known: np.ndarray | None = None,
    batch: int = 512,
) -> Tensor:
    """User vectors `[B, dim]` for histories of rows of `text`; `known` maps such a row to the
    trained row (-1: none), by default to itself.
    """
    model.eval()
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(histories), batch):
        stop = start + batch
        rows, lengths = pad(histories[start:stop], model.config.history_length)
        trained = rows if known is None else np.where(rows >= 0, known[rows], -1)
        given = None if preference is None else torch.as_tensor(preference[start:stop])
        has = None if has_preference is None else torch.as_tensor(has_preference[start:stop])
        parts.append(
            model.user_vectors(
                torch.as_tensor(trained, device=device),
                torch.as_tensor(text[np.maximum(rows, 0)], device=device),
                torch.as_tensor(lengths, device=device),
                None if given is None else given.to(device),
                None if has is None else has.to(device),
            )
        )
    return torch.cat(parts)


def exclude(scores: Tensor, histories: Sequence[np.ndarray], targets: np.ndarray) -> Tensor:
    """A copy of `scores` `[B, n]` with each row's history at -inf, its target apart."""
    scores = scores.clone()
    for row, (history, target) in enumerate(zip(histories, targets, strict=True)):
        keep = scores[row, int(target)].item()
        scores[row, torch.tensor(np.asarray(history), dtype=torch.long)] = float("-inf")
        scores[row, int(target)] = keep
    return scores


def target_ranks(scores: Tensor, targets: np.ndarray) -> np.ndarray:
    """Zero-based rank of each row's target in `scores` `[B, n]`; a tie counts against it, and so
    does a score that is no number.
    """
    wanted = torch.as_tensor(np.asarray(targets), dtype=torch.long, device=scores.device)
    own = scores.gather(1, wanted[:, None])
    return ((~(scores < own)).sum(1) - 1).cpu().numpy()


def ndcg(ranks: np.ndarray, k: int) -> float:
    """Mean NDCG@k of one relevant item at zero-based `ranks`."""
    return float(np.where(ranks < k, 1 / np.log2(ranks + 2.0), 0.0).mean()) if len(ranks) else 0.0


def recall(ranks: np.ndarray, k: int) -> float:
    """Share of `ranks` below k."""
    return float((ranks < k).mean()) if len(ranks) else 0.0
