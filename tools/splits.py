"""What is learned from and what is tested on, and what a data set's table says."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .interactions import InteractionData


@dataclass(frozen=True, eq=False)
class Split:
    """Leave-one-out by time: a user's last item is for the test, the one before for validation.

    Users with fewer than three interactions are for training only.
    """

    train: tuple[NDArray[np.int32], ...]  # per user, item indices oldest to newest
    valid: NDArray[np.int32]  # [users] item index, -1 = none
    test: NDArray[np.int32]  # [users] item index, -1 = none

    def valid_history(self, user_index: int) -> NDArray[np.int32]:
        """What is known of a user when the validation target is to be predicted."""
        return self.train[user_index]

    def test_history(self, user_index: int) -> NDArray[np.int32]:
        """What is known of a user when the test target is to be predicted."""
        if self.valid[user_index] < 0:
            return self.train[user_index]
        return np.append(self.train[user_index], self.valid[user_index])


def leave_one_out(data: InteractionData) -> Split:
    """Split each user's sequence: all but the last two, the last but one, the last."""
    sequences = [data.sequence(user) for user in range(len(data.user_ids))]
    return Split(
        train=tuple(s[:-2] if len(s) >= 3 else s for s in sequences),
        valid=np.array([s[-2] if len(s) >= 3 else -1 for s in sequences], dtype=np.int32),
        test=np.array([s[-1] if len(s) >= 3 else -1 for s in sequences], dtype=np.int32),
    )


def statistics(data: InteractionData) -> dict[str, int | float | str]:
    """What a README's table says about a data set.

    `density` is distinct (user, item) pairs over all pairs. An interaction is repeated if the
    user had the same item before; `repeated_test_items` counts the users whose test item is
    such a repeat (a recommender that excludes what was seen can't hit it).
    """
    lengths = np.bincount(data.users)
    pairs = data.users.astype(np.int64) * len(data.items) + data.item_indices
    first = np.unique(pairs, return_index=True)[1]
    repeated = np.ones(len(pairs), dtype=bool)
    repeated[first] = False
    last_rows = np.cumsum(lengths) - 1
    return {
        "users": len(data.user_ids),
        "items": len(data.items),
        "interactions": len(pairs),
        "density": len(first) / (len(data.user_ids) * len(data.items)),
        "mean_length": float(lengths.mean()),
        "median_length": float(np.median(lengths)),
        "min_length": int(lengths.min()),
        "max_length": int(lengths.max()),
        "repeated_interactions": int(repeated.sum()),
        "repeated_test_items": int(repeated[last_rows[lengths >= 3]].sum()),
        "untitled_items": sum(item.title == item.id for item in data.items),
        "first_day": datetime.fromtimestamp(int(data.times.min()), UTC).date().isoformat(),
        "last_day": datetime.fromtimestamp(int(data.times.max()), UTC).date().isoformat(),
    }
