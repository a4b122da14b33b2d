"""The TRM as a teacher of the recommendation head: what it expects after each part of a history."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..tools.trm.cold import known_rows
from ..tools.trm.scoring import catalog_vectors, history_vectors

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from torch import Tensor

    from ..tools.interactions import InteractionData
    from ..tools.trm.model import TRM


class Teacher:
    """A TRM without a preference, over the items of `data`.

    `text` float32 [items, text_dim] are the passage embeddings of `data.items`.
    """

    def __init__(self, model: TRM, data: InteractionData, text: NDArray[np.float32]) -> None:
        self._model = model
        self._text = text
        self._known = known_rows(model, data)
        self._items = catalog_vectors(model, text, self._known)

    def log_probs(self, sequence: NDArray[np.int32], places: Iterable[int]) -> Tensor:
        """Log-probabilities [places, items] of what stands at each place of a user's sequence.

        The TRM reads as many of the items before a place as it was made for, of which there is at
        least one.
        """
        length = self._model.config.history_length
        histories = [sequence[max(0, at - length) : at].astype(np.int64) for at in places]
        vectors = history_vectors(self._model, histories, self._text, known=self._known)
        return (vectors @ self._items.T).log_softmax(dim=-1).cpu()
