"""Baselines without a learned parameter: popularity and decayed item-to-item transitions."""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

_DECAY = 0.8  # weight of one more step, between items in training and back into the history
_WINDOW = 10  # steps that count as a transition


def popularity(sequences: Sequence[np.ndarray], n_items: int) -> np.ndarray:
    """How often each item occurs: float64 `[n_items]`."""
    flat = np.concatenate(sequences) if sequences else np.zeros(0, dtype=np.int64)
    return np.bincount(flat, minlength=n_items).astype(np.float64)


class Markov:
    """score(v) = sum over the history of decay^age * P(v | item), where P counts pairs at most
    ten steps apart, each step weighing 0.8 of the one before.
    """

    def __init__(self, sequences: Sequence[np.ndarray], n_items: int):
        rows, columns, weights = [], [], []
        for gap in range(1, _WINDOW + 1):
            for sequence in sequences:
                if len(sequence) > gap:
                    rows.append(sequence[:-gap])
                    columns.append(sequence[gap:])
                    weights.append(np.full(len(sequence) - gap, _DECAY ** (gap - 1)))
        empty = np.zeros(0)
        counts = csr_array(
            (
                np.concatenate(weights or [empty]),
                (
                    np.concatenate(rows or [empty]).astype(np.int64),
                    np.concatenate(columns or [empty]).astype(np.int64),
                ),
            ),
            shape=(n_items, n_items),
        )
        counts.sum_duplicates()
        totals = np.asarray(counts.sum(axis=1)).ravel()
        scale = np.repeat(1 / np.maximum(totals, 1e-12), np.diff(counts.indptr))
        self.table = csr_array((counts.data * scale, counts.indices, counts.indptr), counts.shape)
        self._popularity = popular = popularity(sequences, n_items)
        # Breaks ties among items that never followed.
        self._rest = 1e-9 * popular / max(popular.max(initial=0), 1)

    def lift(self) -> csr_array:
        """log(P(v | item) / P(v)) of the counted pairs where it is positive, `[items, items]`:
        how much likelier than by popularity one item follows the other.
        """
        share = np.maximum(self._popularity / max(self._popularity.sum(), 1), 1e-12)
        table = self.table
        values = np.log(np.maximum(table.data / share[table.indices], 1.0))
        return csr_array((values, table.indices, table.indptr), table.shape)

    def scores(self, histories: Sequence[np.ndarray], length: int = 20) -> np.ndarray:
        """float32 `[B, n_items]` from the last `length` items of each history."""
        rows, columns, weights = [], [], []
        for row, history in enumerate(histories):
            recent = np.asarray(history[-length:])
            rows.append(np.full(len(recent), row))
            columns.append(recent)
            weights.append(_DECAY ** np.arange(len(recent))[::-1])
        seen = csr_array(
            (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))),
            shape=(len(histories), self.table.shape[0]),
        )
        scores: np.ndarray = (seen @ self.table).toarray() + self._rest
        return scores.astype(np.float32)
