"""The head over a catalog: what ranks items for a reading, in one forward pass.

Readings that wait are one batch (tools/batching.py).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import HeadError
from ...tools import search
from ...tools.batching import Batcher
from ...tools.filters import Filters
from ...tools.lru import Lru
from ...tools.retriever import ScoredItem
from ...tools.snapshot import NO_FILTERS
from ..app import tuned_model
from .backbone import Backbone
from .head import RecommendationHead, check_dataset, load_head, model_of_head, read_card
from .items import ItemStates, catalog_readings, content_key

if TYPE_CHECKING:
    from ...settings import Settings
    from ...tools.catalog import Catalog
    from ...tools.snapshot import Snapshot

_MAX_BATCH = 64
_CACHED_USERS = 1024

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ItemTable:
    """Item vectors [n, dim] of one moment of the catalog, the token ids of the items' readings, and
    which items are new to the head.
    """

    snapshot: Snapshot
    readings: list[list[int]]
    vectors: Tensor
    untrained: frozenset[str]


class HeadRanker:
    """Ranks a catalog's items for token ids. Close it; the catalog stays the caller's.

    Args:
        backbone: of the LLM.
        head: over its states.
        catalog: whose items are ranked.
        states: item states that are known already.
        trained: hashes of the readings that the head was trained with; none: nobody asks.
        history_length: items of a history that the head was trained to read.

    Raises HeadError for a head of another width than the model's.

    """

    def __init__(
        self,
        backbone: Backbone,
        head: RecommendationHead,
        catalog: Catalog,
        states: ItemStates,
        *,
        trained: Collection[str] = (),
        history_length: int = 10,
    ) -> None:
        if head.dim != backbone.dim:
            raise HeadError(
                f"the head is {head.dim} wide and the model {backbone.dim}: give the model that "
                "the head was trained on"
            )
        self.backbone = backbone
        self.head = head
        self.catalog = catalog
        self.states = states
        self.history_length = history_length
        self._trained = frozenset(trained)
        self._table: ItemTable | None = None
        self._readings: tuple[Snapshot, list[list[int]]] | None = None
        self._users = Lru[str, Tensor](_CACHED_USERS)
        self._reading = threading.Lock()  # held while the LLM reads
        self._batches = Batcher[Sequence[int], Tensor](self._serve, name="ranker", limit=_MAX_BATCH)

    @classmethod
    def load(cls, settings: Settings, folder: Path, catalog: Catalog) -> HeadRanker:
        """Load a trained head with its own LLM; new item states are kept in its folder.

        `settings` name the base model, and its adapter where the head's folder has none. Raises
        HeadError: no head, one of another model or data set, stale item embeddings, an empty
        catalog; EngineError where the model can't be loaded.
        """
        card = read_card(folder)
        own = model_of_head(settings, folder)
        check_dataset(card, catalog.fingerprint.dataset, folder)
        states = ItemStates.read(folder, card.weights)
        head = load_head(folder, card)
        backbone = Backbone.load(tuned_model(own), dtype=settings.engine.dtype)
        ranker = cls(
            backbone,
            head,
            catalog,
            states,
            trained=card.trained_items,
            history_length=card.history_length,
        )
        known = len(states)
        try:
            ranker.table()
            if len(states) > known:
                states.save(folder)
        except BaseException:
            ranker.close()
            raise
        return ranker

    def table(self) -> ItemTable:
        """Item vectors of the catalog as it is now; only what is new or changed is read.

        What is known it gives at once; else it waits for the LLM, so call it from a thread and not
        on an event loop. Raises HeadError: an empty catalog.
        """
        table = self._table
        if table is not None and table.snapshot is self.catalog.snapshot:
            return table  # without the lock: a list doesn't wait for the readings of other users
        with self._reading:
            now = self.catalog.snapshot
            if self._table is None or self._table.snapshot is not now:
                self._table = self._table_of(now)
            return self._table

    def _table_of(self, now: Snapshot) -> ItemTable:
        if self._readings is None or self._readings[0] is not now:
            self._readings = now, catalog_readings(now, self.backbone)
        readings = self._readings[1]
        keys = [content_key(reading) for reading in readings]
        states = self.states.of(readings, self.backbone)
        self.states.keep_only({*keys, *self._trained})
        new = frozenset(
            id_
            for id_, key in zip(now.ids, keys, strict=True)
            if self._trained and key not in self._trained
        )
        if new:
            logger.warning(
                "%d items of the catalog are new to the recommendation head, %s among them: it "
                "scores them by their text alone",
                len(new),
                min(new),
            )
        with torch.inference_mode():
            return ItemTable(now, readings, self.head.items(states), new)

    def refresh(self, fingerprint: str) -> None:
        """Forget what was computed: the model or the head has other weights now."""
        with self._reading:
            self.states.replace_all(fingerprint)
            self._table = None
            self._users.clear()

    def project_anew(self) -> None:
        """Forget vectors and users: the head has other weights now.

        Item states are kept. Where the LLM was trained too, they are those of the last refresh.
        """
        with self._reading:
            self._table = None
            self._users.clear()

    def submit(self, ids: Sequence[int]) -> Future[Tensor]:
        """Queue a reading; its future gives the user's state [dim]. From any thread or loop."""
        return self._batches.submit(tuple(ids))

    def user_states(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """States [n, dim] of readings; those that were asked for last are remembered."""
        futures = [self.submit(sequence) for sequence in sequences]
        return torch.stack([future.result() for future in futures])

    def scores(self, states: Tensor) -> Tensor:
        """Scores [n, items] of the whole catalog, in its order, for users' states [n, dim]."""
        table = self.table()
        with torch.inference_mode():
            return self.head.users(states) @ table.vectors.T

    def best(
        self,
        state: Tensor,
        k: int,
        *,
        among: Collection[str] | None = None,
        exclude: Collection[str] = (),
        filters: Filters = NO_FILTERS,
    ) -> list[ScoredItem]:
        """The `k` best items for a user's state [dim], fewer where fewer may be shown.

        `among` names the only candidates; ids that the catalog does not hold are left out. Call it
        from a thread, as `table`.
        """
        table = self.table()
        now = table.snapshot
        with torch.inference_mode():
            user = self.head.users(state[None])
            allowed = now.allowed(exclude, filters)
            scores = search.scores(user, table.vectors, [allowed])[0]
            if among is not None:
                held = torch.zeros(len(now), dtype=torch.bool)
                held[[now.index[id_] for id_ in among if id_ in now.index]] = True
                scores = scores.masked_fill(~held, float("-inf"))
            count = min(k, int((scores > float("-inf")).sum()))
            values, places = scores.topk(count)
        return [
            ScoredItem(now.ids[place], value)
            for place, value in zip(places.tolist(), values.tolist(), strict=True)
        ]

    def close(self) -> None:
        """End the worker; what waits is cancelled."""
        self._batches.close()

    def _serve(self, batch: Sequence[tuple[Sequence[int], Future[Tensor]]]) -> None:
        try:
            with self._reading:
                wanted = {content_key(ids): ids for ids, _ in batch}
                found, missing = self._users.take(wanted)
                if missing:
                    made = self.backbone.states([wanted[key] for key in missing])
                    self._users.put(zip(missing, made, strict=True))
                    found.update(zip(missing, made, strict=True))
        except Exception as error:  # the worker lives on; whoever asked is told
            for _, future in batch:
                future.set_exception(error)
        else:
            for ids, future in batch:
                future.set_result(found[content_key(ids)])
