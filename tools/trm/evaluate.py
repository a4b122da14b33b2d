"""The TRM's table: how well it follows preferences of every kind, and does without one.

Full ranking over the catalog, the user's past excluded. Rows with a preference are measured on
the list that the retriever returns by default (`blend`), so that no row flatters another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..interactions import InteractionData, Split
from ..text_encoder import TextEncoder
from .baselines import Markov, popularity
from .blend import blend
from .model import TRM
from .preferences import HELD_OUT_TEMPLATES, HELD_OUT_TITLE_TEMPLATES, embed_preferences
from .scoring import catalog_vectors, exclude, history_vectors, ndcg, recall, users_at_once
from .vocabulary import Vocabulary, history_preference, render

LIST = 20  # items in the default list (the paper's N)
_TEMPLATE = "{name}: {}"


@dataclass(frozen=True)
class Row:
    """Metrics of one kind of preference over `users` test users."""

    users: int
    ndcg10: float
    recall10: float
    recall20: float


@dataclass(frozen=True)
class Cases:
    """Users to judge on: `histories` and `targets` are rows of the evaluated catalog."""

    users: np.ndarray
    histories: list[np.ndarray]
    targets: np.ndarray


def cases(split: Split, which: str = "test", limit: int | None = None) -> Cases:
    """All users that have a target (or a fixed random `limit` of them)."""
    wanted = split.test if which == "test" else split.valid
    history = split.test_history if which == "test" else split.valid_history
    users = np.array(
        [u for u in np.flatnonzero(wanted >= 0) if len(history(int(u)))], dtype=np.int64
    )
    if limit is not None and len(users) > limit:
        users = np.sort(np.random.default_rng(0).permutation(users)[:limit])
    return Cases(
        users,
        [np.asarray(history(int(u)), dtype=np.int64) for u in users],
        wanted[users].astype(np.int64),
    )


def preference_texts(
    data: InteractionData, given: Cases, embeddings: np.ndarray
) -> dict[str, list[str | None]]:
    """For each kind of preference the text of each user; None where the data has no words for it
    (an item without attributes).
    """
    vocabulary = Vocabulary.build(data.items)
    rng = np.random.default_rng(0)
    texts: dict[str, list[str | None]] = {}

    def add(kind: str, terms: Sequence[int], template: str) -> None:
        text = render(vocabulary, terms, template) if len(terms) else None
        texts.setdefault(kind, []).append(text)

    nearest = _nearest(embeddings, given.targets)
    for history, target, similar in zip(given.histories, given.targets, nearest, strict=True):
        own = vocabulary.items[target]
        wording = HELD_OUT_TEMPLATES[rng.integers(len(HELD_OUT_TEMPLATES))]
        one = own[rng.integers(len(own)) :][:1] if own else ()
        usual = history_preference(vocabulary, history.tolist())
        texts.setdefault("from history", []).append(usual)
        add("one target value", one, _TEMPLATE)
        add("all target values", own, _TEMPLATE)
        add("one, unseen wording", one, wording)
        add("all, unseen wording", own, wording)
        other: tuple[int, ...] = ()
        for _ in range(50):
            drawn = vocabulary.items[rng.integers(len(data.items))]
            if drawn and own and not set(drawn) & set(own):
                other = drawn
                break
        add("unrelated", other, _TEMPLATE)
        near = data.items[similar].title if similar != target else None
        wording = HELD_OUT_TITLE_TEMPLATES[rng.integers(len(HELD_OUT_TITLE_TEMPLATES))]
        texts.setdefault("its title", []).append(data.items[target].title)
        texts.setdefault("similar title", []).append(near and f"similar to {near}")
        texts.setdefault("similar, unseen wording", []).append(near and wording.format(near))
    return texts


def _nearest(embeddings: np.ndarray, targets: np.ndarray) -> list[int]:
    """The item most like each target by text, other than itself (where there is another)."""
    found: list[int] = []
    size = users_at_once(len(embeddings))
    for start in range(0, len(targets), size):
        at = targets[start : start + size]
        likeness = embeddings[at] @ embeddings.T
        likeness[np.arange(len(at)), at] = -np.inf
        found += likeness.argmax(axis=1).tolist()
    return found


class Judge:
    """Everything that does not depend on the model, made once for several of them."""

    def __init__(
        self,
        data: InteractionData,
        split: Split,
        embeddings: np.ndarray,
        encoder: TextEncoder,
        *,
        which: str = "test",
        users: int | None = None,
    ):
        self.data, self.split, self.embeddings = data, split, embeddings
        self.encoder_fingerprint = encoder.fingerprint
        self.cases = cases(split, which, users)
        self.preferences: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for kind, texts in preference_texts(data, self.cases, embeddings).items():
            has = np.array([text is not None for text in texts], dtype=bool)
            if has.any():
                vectors = embed_preferences(encoder, [text or "" for text in texts])
                self.preferences[kind] = (vectors, has)

    def baselines(self) -> dict[str, Row]:
        """Popularity and decayed transitions."""
        n = len(self.data.items)
        popular = torch.as_tensor(popularity(self.split.train, n))
        markov = Markov(self.split.train, n)
        length = LIST
        return {
            "popularity": self._row(lambda at: popular.expand(_size(at, self.cases), n)),
            "Markov": self._row(
                lambda at: torch.as_tensor(markov.scores(self.cases.histories[at], length))
            ),
        }

    def rows(self, model: TRM) -> dict[str, Row]:
        """One row without a preference and one for each kind of it."""
        table = {"absent": self.row(model, None)}
        for kind in self.preferences:
            table[kind] = self.row(model, kind)
        return table

    def row(
        self,
        model: TRM,
        kind: str | None,
        *,
        known: np.ndarray | None = None,
        only: np.ndarray | None = None,
    ) -> Row:
        """Users who have a preference of this kind (None: all, without one), on the default list.

        `known` `[items]` maps catalog rows to the model's (-1: not in training); `only` (bool
        `[users]`) narrows the users.
        """
        items = catalog_vectors(model, self.embeddings, known)

        def scores(at: slice, kind: str | None) -> Tensor:
            vectors = None if kind is None else self.preferences[kind][0][at]
            users = history_vectors(
                model, self.cases.histories[at], self.embeddings, vectors, known=known
            )
            return users @ items.T

        if kind is None:
            return self._row(lambda at: scores(at, None), only=only)
        has = self.preferences[kind][1]
        return self._row(
            lambda at: scores(at, kind),
            lambda at: scores(at, None),
            has if only is None else has & only,
        )

    def _row(
        self,
        scores: Callable[[slice], Tensor],
        without: Callable[[slice], Tensor] | None = None,
        only: np.ndarray | None = None,
    ) -> Row:
        ranks = []
        size = users_at_once(len(self.data.items))
        for start in range(0, len(self.cases.targets), size):
            at = slice(start, start + size)
            ranks.append(self._list_ranks(scores(at), without(at) if without else None, at))
        flat = np.concatenate(ranks) if ranks else np.zeros(0, dtype=np.int64)
        if only is not None:
            flat = flat[only]
        return Row(len(flat), ndcg(flat, 10), recall(flat, 10), recall(flat, LIST))

    def _list_ranks(self, scores: Tensor, without: Tensor | None, at: slice) -> np.ndarray:
        """Where the target stands in the list of LIST items; LIST if it is not there."""
        histories, targets = self.cases.histories[at], self.cases.targets[at]
        scores = exclude(scores, histories, targets)
        if without is None:
            listed = scores.topk(min(LIST, scores.shape[1]), dim=1).indices
        else:
            listed = blend(scores, exclude(without, histories, targets), LIST)
        found = listed.cpu() == torch.as_tensor(targets)[:, None]
        place = found.int().argmax(1)
        return torch.where(found.any(1), place, LIST).numpy()


def _size(at: slice, given: Cases) -> int:
    return len(given.targets[at])
