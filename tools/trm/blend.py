"""The default list: how what the preference asks for and what the history alone says share it.

A preference may be wrong. A list that followed it blindly would lose what the history knows, so
the last places of a list are kept for the history's own best items.
"""

import torch
from torch import Tensor

SHARE_WITHOUT = 0.4  # of a list, kept for the list that ignores the preference


def blend(
    scores_with: Tensor, scores_without: Tensor, k: int, *, share: float = SHARE_WITHOUT
) -> Tensor:
    """Indices `[B, k]` of the list to show, best first.

    `scores_with` and `scores_without` `[B, n]` are scores of the same n candidates with and
    without the preference, -inf for what must not appear. The first `k - round(share * k)` places
    go to the best by `scores_with`, the rest to the best remaining by `scores_without`.
    """
    n = scores_with.shape[1]
    k = min(k, n)
    tail = min(round(share * k), k)
    head = k - tail
    first = scores_with.topk(head, dim=1).indices
    if not tail:
        return first
    left = scores_without.scatter(1, first, float("-inf"))
    return torch.cat([first, left.topk(tail, dim=1).indices], dim=1)
