"""(history, preference, k, filters) → scored items, for many callers at once.

Requests that wait are one batch (tools/batching.py): preferences are encoded once, the TRM runs
once, the catalog is searched once.
"""

import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CatalogError, RequestError
from .batching import Batcher
from .catalog import Catalog
from .filters import Filters
from .interactions import Item, item_text
from .lru import Lru
from .search import Allowed, chunks
from .snapshot import Snapshot, some
from .text_encoder import TextEncoder
from .titles import sanitise
from .trm.blend import blend
from .trm.model import TRM
from .trm.preferences import embed_preferences, pad

MAX_PREFERENCE_CHARS = 2000  # a longer preference is cut; sentence encoders read less
_MAX_BATCH = 256
_CACHED_PREFERENCES = 4096
_CACHED_USERS = 16_384
_CHECKED_ITEMS = 8


@dataclass(frozen=True)
class RetrievalRequest:
    """What is asked for. `history` and `exclude` hold item ids, the history oldest first.

    Ids that the catalog does not hold, such as those of items removed since, are left out.
    """

    history: tuple[str, ...]
    preference: str | None = None  # None or blank: the history alone decides
    k: int = 20
    exclude: frozenset[str] = frozenset()
    filters: Filters = field(default_factory=Filters)


@dataclass(frozen=True, slots=True)
class ScoredItem:
    """A retrieved item. `score` is <user vector, item vector> with the preference where one was
    given; the list's order is the blend's (tools/trm/blend.py), so scores need not fall.
    """

    id: str
    score: float


_Answer = list[ScoredItem]
_User = tuple[tuple[str, ...], str | None]  # (history as the TRM reads it, preference)


@dataclass(frozen=True)
class _Job:
    """A validated request."""

    history: tuple[str, ...]
    preference: str | None
    k: int
    allowed: Allowed


class Retriever:
    """The TRM, its encoder and the catalog as one thread-safe service.

    Raises CatalogError if the catalog's vectors are not this TRM's. Close it, or use it in a
    `with` block; catalog, TRM and encoder stay the caller's.
    """

    def __init__(self, trm: TRM, encoder: TextEncoder, catalog: Catalog):
        self._trm = trm.eval()
        self._device = next(trm.parameters()).device
        self._encoder = encoder
        self._encoding = threading.Lock()  # tokenizers are not made for two threads
        self._catalog = catalog
        self._trained = {id_: row for row, id_ in enumerate(trm.item_ids)}
        self._preferences = Lru[str, NDArray[np.float32]](_CACHED_PREFERENCES)
        self._users = Lru[_User, Tensor](_CACHED_USERS)
        self._seen: Snapshot | None = None  # the snapshot that the caches are of
        self._rows = np.zeros(0, dtype=np.int64)  # its positions' rows in the TRM
        self._check_vectors()
        self._batches = Batcher[RetrievalRequest, _Answer](
            self._serve, name="retriever", limit=_MAX_BATCH
        )

    @property
    def catalog(self) -> Catalog:
        """The catalog that is searched."""
        return self._catalog

    def submit(self, request: RetrievalRequest) -> "Future[list[ScoredItem]]":
        """Queue a request; its future gives the items, best first.

        The future raises RequestError for a history without any item of the catalog, unknown
        filters, and a k below 1 or above the number of eligible items. Cancelling it before it
        runs frees its place. Callable from any thread or event loop (`asyncio.wrap_future`).
        """
        return self._batches.submit(request)

    def retrieve(self, requests: Sequence[RetrievalRequest]) -> list[list[ScoredItem]]:
        """Answer several requests; raises what the first failing one raises."""
        return [future.result() for future in [self.submit(request) for request in requests]]

    def upsert(self, items: Sequence[Item]) -> None:
        """Add items to the catalog or replace them; they can be retrieved at once.

        Items that the TRM was not trained on are represented by their text alone. Raises
        CatalogError, among others for an id given twice.
        """
        with self._encoding:
            texts = self._encoder.encode_passages([item_text(item) for item in items])
        rows = np.array([self._trained.get(item.id, -1) for item in items], dtype=np.int64)
        self._catalog.upsert(items, texts, self._item_vectors(rows, texts))

    def remove(self, ids: Sequence[str]) -> None:
        """Remove items from the catalog. Raises CatalogError for unknown ids."""
        self._catalog.remove(ids)

    def close(self) -> None:
        """Cancel what waits, finish what runs, and end the worker."""
        self._batches.close()

    def __enter__(self) -> "Retriever":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _serve(self, batch: Sequence[tuple[RetrievalRequest, "Future[_Answer]"]]) -> None:
        """Answer a batch. What fails in company is tried alone, so that it fails only itself."""
        try:
            now = self._snapshot()
            jobs: list[tuple[_Job, Future[_Answer]]] = []
            for request, future in batch:
                try:
                    jobs.append((self._validated(request, now), future))
                except RequestError as error:
                    future.set_exception(error)
            for (_, future), answer in zip(
                jobs, self._answers([job for job, _ in jobs], now), strict=True
            ):
                future.set_result(answer)
        except BaseException as error:  # a panic of Chroma's is no Exception
            left = [pair for pair in batch if not pair[1].done()]
            if len(batch) > 1:
                for pair in left:
                    self._serve([pair])
            else:
                for _, future in left:
                    future.set_exception(error)

    def _snapshot(self) -> Snapshot:
        """The catalog now; what was cached of an older one is dropped."""
        now = self._catalog.snapshot
        if now is not self._seen:
            self._users.clear()
            self._rows = np.array([self._trained.get(id_, -1) for id_ in now.ids], dtype=np.int64)
            self._seen = now
        return now

    def _validated(self, request: RetrievalRequest, now: Snapshot) -> _Job:
        if not request.history:
            raise RequestError("the history is empty. Give at least one item that the user liked.")
        # Items may have been removed since the user had them.
        history = tuple(id_ for id_ in request.history if id_ in now.index)
        if not history:
            raise RequestError(
                f"the history names {some(request.history)}, and the catalog of {len(now)} items "
                "holds none of them. Check the ids."
            )
        allowed = now.allowed(request.exclude, request.filters)
        if not 1 <= request.k <= allowed.count:
            raise RequestError(
                f"k is {request.k}, and {allowed.count} of {len(now)} items are eligible. "
                f"Ask for 1 to {allowed.count}, or loosen filters and exclusions."
            )
        return _Job(
            history=history[-self._trm.config.history_length :],
            preference=sanitise(request.preference or "", limit=MAX_PREFERENCE_CHARS) or None,
            k=request.k,
            allowed=allowed,
        )

    def _answers(self, jobs: Sequence[_Job], now: Snapshot) -> list[_Answer]:
        users = self._user_vectors(jobs, now)
        groups: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for at, job in enumerate(jobs):
            groups[job.k, job.preference is not None].append(at)
        answers: list[_Answer] = [[] for _ in jobs]
        for (k, asked), members in groups.items():
            for part in chunks(len(members), len(now)):
                chosen = [jobs[at] for at in members[part]]
                vectors = [torch.stack([users[job.history, None] for job in chosen])]
                if asked:
                    vectors.insert(
                        0, torch.stack([users[job.history, job.preference] for job in chosen])
                    )
                allowed = [job.allowed for job in chosen]
                among = self._catalog.candidates(now, vectors, k, allowed)
                positions, scores = among
                if asked:
                    sums = self._catalog.log_z(now, vectors, among, allowed)
                    log_z = (sums[0], sums[1]) if sums else None
                    order = blend(scores[0], scores[1], k, log_z=log_z)
                else:
                    order = scores[0].topk(k, dim=1).indices
                values = scores[0].gather(1, order).tolist()
                found = (order if positions is None else positions.gather(1, order)).tolist()
                for at, row, of in zip(members[part], found, values, strict=True):
                    answers[at] = [ScoredItem(now.ids[p], s) for p, s in zip(row, of, strict=True)]
        return answers

    def _user_vectors(self, jobs: Sequence[_Job], now: Snapshot) -> dict[_User, Tensor]:
        """For each job's history the vector without a preference, and that with the job's."""
        wanted = dict.fromkeys(
            (job.history, preference) for job in jobs for preference in {None, job.preference}
        )
        vectors, missing = self._users.take(wanted)
        if missing:
            made = self._compute_users(missing, now)
            self._users.put(zip(missing, made, strict=True))
            vectors.update(zip(missing, made, strict=True))
        return vectors

    def _compute_users(self, users: Sequence[_User], now: Snapshot) -> Tensor:
        positions, lengths = pad(
            [now.positions(history) for history, _ in users], max(len(h) for h, _ in users)
        )
        real = positions.clip(min=0)
        rows = np.where(positions >= 0, self._rows[real], -1)
        texts = torch.from_numpy(now.text_embeddings[real])
        asked = [preference for _, preference in users]
        preferences = has = None
        if any(asked):
            known = self._embeddings([text for text in asked if text])
            nothing = np.zeros(self._encoder.dim, dtype=np.float32)
            stacked = np.stack([known[text] if text else nothing for text in asked])
            preferences = torch.from_numpy(stacked).to(self._device)
            has = torch.tensor([text is not None for text in asked], device=self._device)
        with torch.inference_mode():
            vectors: Tensor = self._trm.user_vectors(
                torch.from_numpy(rows).to(self._device),
                texts.to(self._device),
                torch.from_numpy(lengths).to(self._device),
                preferences,
                has,
            ).cpu()
        return vectors

    def _embeddings(self, texts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        found, missing = self._preferences.take(dict.fromkeys(texts))
        if missing:
            with self._encoding:
                made = embed_preferences(self._encoder, missing)
            self._preferences.put(zip(missing, made, strict=True))
            found.update(zip(missing, made, strict=True))
        return found

    def _item_vectors(
        self, rows: NDArray[np.int64], texts: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        with torch.inference_mode():
            vectors = self._trm.item_vectors(
                torch.from_numpy(rows).to(self._device),
                torch.from_numpy(np.array(texts, dtype=np.float32)).to(self._device),
            )
        return np.asarray(vectors.cpu(), dtype=np.float32)

    def _check_vectors(self) -> None:
        """Refuse a catalog whose vectors this TRM would not make."""
        now = self._snapshot()
        at = np.unique(np.linspace(0, len(now) - 1, _CHECKED_ITEMS).astype(np.int64))
        config, where = self._trm.config, self._catalog.settings.where
        held = (now.vectors.shape[1], now.text_embeddings.shape[1], self._encoder.dim)
        wanted = (self._trm.dim, config.text_dim, config.text_dim)
        if held == wanted:
            made = self._item_vectors(self._rows[at], now.text_embeddings[at])
            if np.allclose(made, now.vectors[at], rtol=1e-3, atol=1e-3):
                return
        raise CatalogError(
            f"the vectors of the catalog at {where} were not made by this TRM (vectors, text "
            f"embeddings and encoder are {held} wide, the TRM's {wanted}). Build it again with "
            "`deeprec index`."
        )
