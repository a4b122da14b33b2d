"""The items that can be recommended: kept in Chroma, searched exactly or by HNSW.

A `Catalog` reads its rows once into a `Snapshot` (ids, items, contiguous float32 matrices) and
answers from it; an update writes to Chroma first and then replaces the snapshot as a whole, so
readers in other threads see the old catalog or the new one. One process at a time may update.
"""

import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import AmbiguousTitleError, CatalogError, RequestError
from . import search
from .chroma_client import CatalogSettings
from .chroma_store import ChromaStore, Fingerprint, Progress, Rows
from .interactions import Item
from .search import Allowed
from .snapshot import Snapshot, merge, some, take

__all__ = ["ID_MARK", "Candidates", "Catalog", "CatalogSettings", "Fingerprint", "Snapshot"]

ID_MARK = "id:"
"""Stands before an id that is not to be read as a title."""

_WIDENED = 4  # HNSW asks for so many times more whenever a filter left too few
_POOL = 100  # candidates of one vector, at least


def _silent(done: int, total: int) -> None:
    pass


class Candidates(NamedTuple):
    """What lists are chosen from, for B users."""

    positions: Tensor | None  # [B, c]; None: all items in order
    scores: list[Tensor]  # [B, c] for each of the vectors asked for, -inf where not allowed


class Catalog:
    """Items, their text embeddings and TRM vectors. Close it, or use it in a `with` block.

    Reading and searching are safe from any thread.
    """

    def __init__(self, store: ChromaStore):
        """Use `build` or `open`."""
        self._store = store
        self._updating = threading.Lock()
        self._half_written = False
        self._snapshot = Snapshot(store.read())

    @classmethod
    def build(
        cls,
        settings: CatalogSettings,
        items: Sequence[Item],
        text_embeddings: NDArray[np.float32],
        vectors: NDArray[np.float32],
        *,
        fingerprint: Fingerprint,
        progress: Progress = _silent,
    ) -> "Catalog":
        """Write a new catalog, in the place of an older one, and open it.

        `text_embeddings` `[n, text_dim]`, `vectors` `[n, dim]`: the TRM's item vectors.
        `progress` is called with (done, total). Raises CatalogError; then an older catalog
        stands as it was.
        """
        rows = _checked(items, text_embeddings, vectors)
        ChromaStore.build(settings, rows, fingerprint, progress)
        return cls.open(settings, fingerprint=fingerprint)

    @classmethod
    def open(
        cls, settings: CatalogSettings, *, fingerprint: Fingerprint | None = None
    ) -> "Catalog":
        """Open a catalog and probe it.

        Raises CatalogError if it is missing, locked, damaged, or was made of another data set,
        TRM or encoder than `fingerprint` says.
        """
        store = ChromaStore.open(settings)
        try:
            if fingerprint is not None:
                _check_fingerprint(settings, store.fingerprint, fingerprint)
            return cls(store)
        except BaseException:
            store.close()
            raise

    def close(self) -> None:
        """Let go of the database."""
        self._store.close()

    def __enter__(self) -> "Catalog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._snapshot)

    @property
    def settings(self) -> CatalogSettings:
        """Where it is and how it is searched."""
        return self._store.settings

    @property
    def fingerprint(self) -> Fingerprint:
        """What its vectors were made of."""
        return self._store.fingerprint

    @property
    def snapshot(self) -> Snapshot:
        """The catalog as it is now; take it once for answers that must fit together."""
        return self._snapshot

    @property
    def ids(self) -> tuple[str, ...]:
        """Item ids by position."""
        return self._snapshot.ids

    @property
    def vectors(self) -> NDArray[np.float32]:
        """TRM item vectors `[n, dim]`, read-only."""
        return self._snapshot.vectors

    @property
    def text_embeddings(self) -> NDArray[np.float32]:
        """Text embeddings `[n, text_dim]`, read-only."""
        return self._snapshot.text_embeddings

    def item(self, id_: str) -> Item:
        """The item as it was stored. Raises CatalogError if there is none."""
        now = self._snapshot
        return now.items[now.position(id_)]

    def display_title(self, id_: str) -> str:
        """Its unique, sanitised title. Raises CatalogError if there is no such item."""
        now = self._snapshot
        return now.titles[now.position(id_)]

    def display_attributes(self, id_: str) -> Mapping[str, tuple[str, ...]]:
        """Its sanitised attributes. Raises CatalogError if there is no such item."""
        now = self._snapshot
        return now.shown_attributes(now.position(id_))

    def resolve_title(self, text: str) -> str:
        """The id of the item whose title a person typed.

        Raises AmbiguousTitleError with the candidates, or RequestError with similar titles.
        """
        now = self._snapshot
        return now.ids[now.title_index.resolve(text)]

    def resolve(self, text: str) -> str:
        """The id of the item that a text names by id or by title.

        After ID_MARK stands an id and nothing else. Raises AmbiguousTitleError with the
        candidates where the text fits several items, also where it is the id of one and the
        title of another; RequestError with what is similar where it fits none.
        """
        now = self._snapshot
        marked = text.removeprefix(ID_MARK).strip()
        id_ = text if text in now.index else text.strip()
        if text.startswith(ID_MARK) and marked in now.index:
            return marked
        if id_ in now.index:
            at = now.index[id_]
            others = [other for other in now.title_index.titled(id_) if other != at]
            if others:
                raise AmbiguousTitleError(
                    text, [(now.ids[fits], now.titles[fits]) for fits in (at, *others)]
                )
            return id_
        if text.startswith(ID_MARK):
            raise RequestError(
                f"no item has the id {marked!r}. Check the id, or type a title without {ID_MARK!r}."
            )
        return self.resolve_title(text)

    def candidates(
        self, now: Snapshot, users: Sequence[Tensor], k: int, allowed: Sequence[Allowed]
    ) -> Candidates:
        """What lists of k are chosen from, for several vectors `[B, dim]` of the same B users.

        With HNSW they are the best of each vector: k or more of each, where so many are allowed.
        """
        if self.settings.search == "exact":
            scores = [search.scores(vectors, now.matrix, allowed) for vectors in users]
            return Candidates(None, scores)
        pools = self._pools(now, users, k, allowed)
        width = max((len(pool) for pool in pools), default=0)
        positions = torch.zeros((len(pools), width), dtype=torch.long)
        scores = [torch.full((len(pools), width), float("-inf")) for _ in users]
        for row, pool in enumerate(pools):
            positions[row, : len(pool)] = torch.from_numpy(pool)
            near = now.matrix[positions[row, : len(pool)]]
            for vectors, of in zip(users, scores, strict=True):
                of[row, : len(pool)] = near @ vectors[row]
        return Candidates(positions, scores)

    def log_z(
        self,
        now: Snapshot,
        users: Sequence[Tensor],
        found: Candidates,
        allowed: Sequence[Allowed],
    ) -> list[Tensor] | None:
        """For each of `users` log sum exp `[B]` of the scores of all allowed items.

        None where `found` holds them all. Otherwise what HNSW did not find is estimated by a
        uniform sample of it, always the same.
        """
        if found.positions is None:
            return None
        sums = [torch.empty(len(allowed)) for _ in users]
        for row, may in enumerate(allowed):
            held = found.positions[row][found.scores[0][row] > float("-inf")]
            sample, each = search.sample_rest(may, held.numpy())
            near = now.matrix[torch.from_numpy(sample)]
            for vectors, scores, of in zip(users, found.scores, sums, strict=True):
                rest = near @ vectors[row] + math.log(each)
                of[row] = torch.cat([scores[row], rest]).logsumexp(0)
        return sums

    def _pools(
        self, now: Snapshot, users: Sequence[Tensor], k: int, allowed: Sequence[Allowed]
    ) -> list[NDArray[np.int64]]:
        """For each row the positions of allowed items that HNSW finds for its vectors."""
        k = max(k, _POOL)
        # Without a filter as many more are asked for as may be excluded, all rows in one query.
        plain = [row for row, may in enumerate(allowed) if may.mask is None]
        asked = k + max((len(allowed[row].excluded) for row in plain), default=0)
        first: dict[tuple[int, int], NDArray[np.int64]] = {}
        if plain and asked * _WIDENED <= len(now):
            for which, vectors in enumerate(users):
                found = self._near(now, vectors[plain], asked)
                first.update(((row, which), near) for row, near in zip(plain, found, strict=True))
        pools = []
        for row, may in enumerate(allowed):
            parts = [
                self._widened(now, vectors[row], min(k, may.count), may, first.get((row, which)))
                for which, vectors in enumerate(users)
            ]
            pools.append(np.unique(np.concatenate(parts)))
        return pools

    def _widened(
        self,
        now: Snapshot,
        vector: Tensor,
        wanted: int,
        may: Allowed,
        near: NDArray[np.int64] | None,
    ) -> NDArray[np.int64]:
        """The best allowed items: of `near` if that holds enough, else of more and more of the
        index, and of the whole matrix where that would be most of it.
        """
        n = int((wanted + len(may.excluded)) * len(now) / max(1, may.count))
        while True:
            if near is not None:
                found = near[may.of(near)]
                if len(found) >= wanted:
                    return found[:wanted]
                n *= _WIDENED
            if n * _WIDENED > len(now):
                exact = search.scores(vector[None], now.matrix, [may])[0].topk(wanted).indices
                return np.asarray(exact, dtype=np.int64)
            near = self._near(now, vector[None], n)[0]

    def _near(self, now: Snapshot, vectors: Tensor, n: int) -> list[NDArray[np.int64]]:
        """About the n nearest positions of each row, best first, as HNSW finds them."""
        return [
            np.array([now.index[id_] for id_ in ids if id_ in now.index], dtype=np.int64)
            for ids in self._store.query(vectors.numpy(), n)
        ]

    def upsert(
        self,
        items: Sequence[Item],
        text_embeddings: NDArray[np.float32],
        vectors: NDArray[np.float32],
        *,
        progress: Progress = _silent,
    ) -> None:
        """Add items, or replace those whose ids are there; replaced ones keep their position.

        Raises CatalogError, among others for an id given twice or another width of the vectors.
        """
        rows = _checked(items, text_embeddings, vectors)
        with self._update():
            now = self._snapshot
            for what, given, held in (
                ("vectors", rows.vectors, now.vectors),
                ("text embeddings", rows.text_embeddings, now.text_embeddings),
            ):
                if given.shape[1] != held.shape[1]:
                    raise CatalogError(
                        f"{what} of width {given.shape[1]} for a catalog of width {held.shape[1]}. "
                        "Make them with the TRM and the encoder that the catalog was made with."
                    )
            new = max(now.rows.order) + 1
            rows.order.extend(
                now.rows.order[now.index[item.id]] if item.id in now.index else new + at
                for at, item in enumerate(rows.items)
            )
            old = take(now.rows, [now.index[i.id] for i in rows.items if i.id in now.index])
            self._store.check_lock()
            self._half_written = True
            stored = self._store.write(rows, old=old, progress=progress)
            self._snapshot = Snapshot(merge(now.rows, stored))
            self._half_written = False

    def remove(self, ids: Sequence[str]) -> None:
        """Remove items. Raises CatalogError for unknown ids, ids given twice, and for all."""
        _refuse_duplicates(ids)
        with self._update():
            now = self._snapshot
            gone = now.positions(ids)
            if len(gone) == len(now):
                raise CatalogError("this would leave an empty catalog. Keep at least one item.")
            left = take(now.rows, np.setdiff1d(np.arange(len(now)), gone).tolist())
            self._store.check_lock()
            self._half_written = True
            self._store.delete(take(now.rows, gone.tolist()))
            self._snapshot = Snapshot(left)
            self._half_written = False

    @contextmanager
    def _update(self) -> Iterator[None]:
        """One update at a time. After one that failed while writing there is no other."""
        with self._updating:
            if self._half_written:
                raise CatalogError(
                    f"an update of the catalog at {self.settings.where} failed half-way. "
                    "Searches answer from before it; open the catalog again to update it."
                )
            yield


def _check_fingerprint(settings: CatalogSettings, stored: Fingerprint, wanted: Fingerprint) -> None:
    for what, name in (("data set", "dataset"), ("TRM", "trm"), ("sentence encoder", "encoder")):
        held, asked = getattr(stored, name), getattr(wanted, name)
        if held != asked:
            raise CatalogError(
                f"the catalog at {settings.where} belongs to another {what}: it was made with "
                f"{held}, this one is {asked}. Build it again with `deeprec index`, or use the "
                f"{what} it was made with."
            )


def _checked(
    items: Sequence[Item],
    text_embeddings: NDArray[np.float32],
    vectors: NDArray[np.float32],
) -> Rows:
    rows = Rows(
        list(items),
        np.ascontiguousarray(text_embeddings, dtype=np.float32),
        np.ascontiguousarray(vectors, dtype=np.float32),
    )
    if not rows.items:
        raise CatalogError("no items were given. A catalog needs at least one.")
    _refuse_duplicates([item.id for item in rows.items])
    for what, array in (("text embeddings", rows.text_embeddings), ("vectors", rows.vectors)):
        if array.ndim != 2 or len(array) != len(rows):
            raise CatalogError(
                f"{what} of shape {array.shape} for {len(rows)} items. Give one row an item."
            )
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        if len(bad):
            raise CatalogError(
                f"{what} of item {rows.items[int(bad[0])].id!r} are not finite. "
                "Train the TRM again, or leave the item out."
            )
    return rows


def _refuse_duplicates(ids: Iterable[str]) -> None:
    twice = [id_ for id_, count in Counter(ids).items() if count > 1]
    if twice:
        raise CatalogError(f"id {some(twice)} is given twice. Give each item once.")
