"""Cold items: held out of training, then added to the catalog by their text alone."""

import numpy as np

from ...errors import TRMError
from ..interactions import InteractionData
from .evaluate import Judge, Row
from .model import TRM

ALL = "all target values"  # the kind of preference that cold and warm items are compared under


def without_items(data: InteractionData, share: float, seed: int) -> InteractionData:
    """`data` less a random `share` of its items; users who are left with nothing go too.

    Raises TRMError if no item or no interaction would be left.
    """
    n = len(data.items)
    kept = np.ones(n, dtype=bool)
    kept[np.random.default_rng(seed).permutation(n)[: max(1, round(share * n))]] = False
    keep = kept[data.item_indices]
    if not keep.any():
        raise TRMError(f"holding out {share:.0%} of {n} items leaves no interaction to learn from.")
    users, row = np.unique(data.users[keep], return_inverse=True)
    place = np.cumsum(kept) - 1
    return InteractionData(
        name=data.name,
        items=tuple(item for item, warm in zip(data.items, kept, strict=True) if warm),
        user_ids=tuple(data.user_ids[user] for user in users),
        users=row.astype(np.int32),
        item_indices=place[data.item_indices[keep]].astype(np.int32),
        times=data.times[keep],
    )


def known_rows(model: TRM, data: InteractionData) -> np.ndarray:
    """For each item of `data` its row in the model, int64 `[items]`; -1 = not in training."""
    row = {item_id: n for n, item_id in enumerate(model.item_ids)}
    return np.array([row.get(item.id, -1) for item in data.items], dtype=np.int64)


def cold_rows(model: TRM, judge: Judge) -> dict[str, Row]:
    """How users whose target is warm, and those whose target is cold, find it by its attributes;
    the catalog holds both. Empty if the data has no attributes.
    """
    known = known_rows(model, judge.data)
    cold = known[judge.cases.targets] < 0
    if ALL not in judge.preferences:
        return {}
    return {
        "warm items, all target values": judge.row(model, ALL, known=known, only=~cold),
        "cold items, all target values": judge.row(model, ALL, known=known, only=cold),
    }
