"""The default list: how what the preference asks for and what the history alone says share it.

A preference may be wrong, and a list that followed it blindly would lose what the history knows.
Scores are logits, so the honest blend is a mixture of the two distributions.
"""

import torch
from torch import Tensor

DOUBT = 0.45  # chance that a preference has nothing to do with what comes next
SHARE_WITHOUT = 0.2  # of the list's places, its last, kept for the history's own best


def blend(
    scores_with: Tensor,
    scores_without: Tensor,
    k: int,
    *,
    log_z: tuple[Tensor, Tensor] | None = None,
    doubt: float = DOUBT,
    share: float = SHARE_WITHOUT,
) -> Tensor:
    """Indices `[B, k]` of the list to show, best first.

    `scores_with` and `scores_without` `[B, n]` are scores of the same n candidates (best: the
    whole catalog) with and without the preference, -inf for what must not appear. The first
    places go to the best by `(1 - doubt) softmax(with) + doubt softmax(without)`, the last
    `round(share * k)` to the best of the rest by `scores_without`. Where the candidates are not
    all that may appear, `log_z` gives the logs of the sums that the two softmaxes divide by,
    `[B]` each: of exp(score) over everything that may, with and without the preference.
    """
    k = min(k, scores_with.shape[1])
    tail = round(share * k)
    if log_z is None:
        wanted, usual = scores_with.softmax(1), scores_without.softmax(1)
    else:
        wanted = (scores_with - log_z[0][:, None]).exp()
        usual = (scores_without - log_z[1][:, None]).exp()
    mixed = (1 - doubt) * wanted + doubt * usual
    # Underflow must not tie what is excluded with what is merely unlikely.
    mixed = mixed.masked_fill(scores_without == float("-inf"), -1.0)
    first = mixed.topk(k - tail, dim=1).indices
    if not tail:
        return first
    left = scores_without.scatter(1, first, float("-inf"))
    return torch.cat([first, left.topk(tail, dim=1).indices], dim=1)
