"""A catalog's rows in Chroma, embedded or on a server: opened with suspicion, written in order.

Two collections: one row an item (id, text, attributes, TRM vector, searched by HNSW), and one row
a text embedding. An item's row names its text row by content, and the text row is written first
and the old one removed last, so a process killed in between leaves the old item or the new one.

HNSW's graph is sound for distances, and inner products are none: of TRM vectors, which share a
large mean, it found half. So each is stored with one more coordinate, sqrt(radius² - |v|²), which
makes all equally long; distance to (user, 0) then orders them as the inner product does.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar
from uuid import uuid4

import numpy as np
from chromadb.api.client import Client
from chromadb.errors import NotFoundError
from numpy.typing import NDArray

from ..errors import CatalogError, DataError
from .chroma_client import (
    DATABASE,
    REBUILD,
    CatalogSettings,
    call,
    check_lock,
    connect,
    embedded,
    explained,
)
from .interactions import Item, item_text
from .titles import sanitise, sanitise_attributes

SCHEMA = 2
_PAGE = 4000  # rows read at a time
_DOCUMENT_CHARS = 10_000
_PROBES, _PROBE_HITS = 8, 10
_ROUNDING = 1e-5  # of squared lengths, by which float32 may blur the order of products
_HEADROOM = 1.25  # radius over the longest vector: items added later may be longer
_INDEX_NAME = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_INDEX_FILES = (".bin", ".pickle")  # of numbers; the pickle is Chroma's list of ids
_T = TypeVar("_T")
_P = ParamSpec("_P")
Progress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True)
class Fingerprint:
    """What a catalog's vectors were made of; another of any of them is another catalog."""

    dataset: str
    trm: str
    encoder: str


@dataclass(frozen=True)
class Rows:
    """Items with their vectors, row by row."""

    items: list[Item]
    text_embeddings: NDArray[np.float32]  # [n, text_dim]
    vectors: NDArray[np.float32]  # [n, dim]
    text_keys: list[str] = field(default_factory=list)  # names of the text rows, once stored
    order: list[int] = field(default_factory=list)  # strictly increasing

    def __len__(self) -> int:
        return len(self.items)


_open_folders: Counter[str] = Counter()


class ChromaStore:
    """The two collections of one catalog. Not thread-safe for writing."""

    def __init__(self, settings: CatalogSettings, client: Client, name: str):
        """Raises CatalogError if there is no such catalog or it has another schema."""
        self.settings = settings
        self._client = client
        self._closed = False
        with explained(settings):
            try:
                self._vectors = client.get_collection(name, embedding_function=None)
            except NotFoundError as error:
                raise CatalogError(f"no catalog at {settings.where}. {REBUILD}.") from error
            self.about = dict(self._vectors.metadata or {})
            schema = self.about.get("schema")
            if schema != SCHEMA:
                raise CatalogError(
                    f"the catalog at {settings.where} has schema {schema}; this version reads "
                    f"schema {SCHEMA}. {REBUILD}."
                )
            self._radius = float(str(self.about["radius"]))
            self._texts = client.get_collection(str(self.about["texts"]), embedding_function=None)
            self._batch = client.get_max_batch_size()

    @property
    def fingerprint(self) -> Fingerprint:
        """What the stored vectors were made of."""
        return Fingerprint(*(str(self.about[name.name]) for name in fields(Fingerprint)))

    @classmethod
    def open(cls, settings: CatalogSettings) -> "ChromaStore":
        """Open what `build` wrote. Raises CatalogError: missing, locked, damaged, no server."""
        if settings.folder is not None and not (settings.folder / DATABASE).is_file():
            raise CatalogError(f"no catalog at {settings.where}. {REBUILD}.")
        client = connect(settings)
        try:
            store = cls(settings, client, settings.collection)
        except BaseException:
            client.close()
            raise
        if settings.folder is not None:
            _open_folders[_real(settings.folder)] += 1
        return store

    @classmethod
    def build(
        cls, settings: CatalogSettings, rows: Rows, fingerprint: Fingerprint, progress: Progress
    ) -> None:
        """Write a catalog that appears whole or not at all; an older one there is replaced."""
        if settings.folder is None:
            client = connect(settings)
            try:
                cls._fill(settings, client, rows, fingerprint, progress)
            finally:
                client.close()
            return
        target = settings.folder.resolve()
        if _open_folders[_real(target)]:
            raise CatalogError(f"the catalog at {target} is open in this process. Close it first.")
        if target.exists() and not _replaceable(target):
            raise CatalogError(f"{target} holds something else. Give a new or empty folder.")
        beside = target.with_name(f".{target.name}.{uuid4().hex}")
        retired = beside.with_suffix(".old")
        try:
            beside.mkdir(parents=True)
            with explained(settings):
                client = embedded(beside)
            try:
                cls._fill(settings, client, rows, fingerprint, progress)
            finally:
                client.close()
            if target.exists():
                os.replace(target, retired)
            os.replace(beside, target)
        except OSError as error:
            raise CatalogError(f"can't write the catalog to {target}: {error}.") from error
        finally:
            if retired.exists() and not target.exists():
                os.replace(retired, target)
            shutil.rmtree(retired, ignore_errors=True)
            shutil.rmtree(beside, ignore_errors=True)

    @classmethod
    def _fill(
        cls,
        settings: CatalogSettings,
        client: Client,
        rows: Rows,
        fingerprint: Fingerprint,
        progress: Progress,
    ) -> None:
        """Write new collections under other names, then let them take the catalog's name."""
        name, mark = settings.collection, uuid4().hex
        fresh, texts = f"{name}-building-{mark}", f"{name}-text-{mark}"
        hnsw = {
            "max_neighbors": settings.max_neighbors,
            "ef_construction": settings.ef_construction,
            "ef_search": settings.ef_search,
        }
        create = partial(client.create_collection, embedding_function=None)
        with explained(settings):
            try:
                # The text embeddings are never searched, only read back.
                plain = {"hnsw": {"space": "l2", "max_neighbors": 4}}
                call(settings, partial(create, texts, configuration=plain))
                radius = _HEADROOM * float(np.linalg.norm(rows.vectors, axis=1).max())
                about = {"schema": SCHEMA, "texts": texts, "radius": radius, **asdict(fingerprint)}
                tuned = {"hnsw": {"space": "l2", **hnsw}}
                call(settings, partial(create, fresh, metadata=about, configuration=tuned))
                cls(settings, client, fresh).write(rows, progress=progress)
                if name in _names(client):
                    client.delete_collection(name)
                client.get_collection(fresh, embedding_function=None).modify(name=name)
            finally:
                _sweep(client, name)

    def close(self) -> None:
        """Let go of the database; the object can't be used afterwards, but closed again."""
        if self._closed:
            return
        self._closed = True
        if self.settings.folder is not None:
            _open_folders[_real(self.settings.folder)] -= 1
        self._client.close()

    def read(self) -> Rows:
        """All rows. Raises CatalogError if rows are missing, unreadable or not found again."""
        with explained(self.settings):
            count = self._call(self._vectors.count)
            found = [row for page in self._pages(count) for row in page]
            texts = self._read_texts()
        if len(found) != count or not count:
            raise self._damaged(f"it counts {count} items and holds {len(found)}")
        found.sort(key=lambda row: row[0])
        for _, key, item, _ in found:
            if key not in texts or _text_key(item.id, texts[key]) != key:
                raise self._damaged(f"the text embedding of item {item.id!r} is missing or changed")
        rows = Rows(
            items=[item for _, _, item, _ in found],
            text_embeddings=np.stack([texts[key] for _, key, _, _ in found]),
            vectors=np.stack([vector for _, _, _, vector in found]),
            text_keys=[key for _, key, _, _ in found],
            order=[order for order, _, _, _ in found],
        )
        self._probe(rows)
        return rows

    def _pages(self, count: int) -> Iterator[list[tuple[int, str, Item, NDArray[np.float32]]]]:
        for offset in range(0, count, _PAGE):
            page = self._call(
                self._vectors.get, limit=_PAGE, offset=offset, include=["embeddings", "metadatas"]
            )
            lifted = np.asarray(page["embeddings"], dtype=np.float32)
            rows = []
            for id_, row, vector in zip(page["ids"], page["metadatas"] or (), lifted, strict=True):
                try:
                    item, intact = _decode(str(row["item"])), row["vector"] == _digest(vector)
                    rows.append((int(str(row["order"])), str(row["text"]), item, vector[:-1]))
                except (KeyError, ValueError, TypeError, DataError) as error:
                    raise self._damaged(f"the row of item {id_!r} can't be read") from error
                if not intact or item.id != id_:
                    raise self._damaged(f"the vector of item {id_!r} is not what was stored")
            yield rows

    def _read_texts(self) -> dict[str, NDArray[np.float32]]:
        texts: dict[str, NDArray[np.float32]] = {}
        for offset in range(0, self._call(self._texts.count), _PAGE):
            page = self._call(self._texts.get, limit=_PAGE, offset=offset, include=["embeddings"])
            vectors = np.asarray(page["embeddings"], dtype=np.float32)
            texts.update(zip(page["ids"], vectors, strict=True))
        return texts

    def _probe(self, rows: Rows) -> None:
        """Search for some stored vectors: an index that lost its files still answers, badly."""
        probes = rows.vectors[:: max(1, len(rows) // _PROBES)][:_PROBES]
        hits = min(_PROBE_HITS, len(rows))
        scores = probes @ rows.vectors.T
        # By score, not by id: where vectors are equal, any of their items is a right answer.
        lengths = (probes**2).sum(axis=1) + self._radius**2
        least = np.partition(scores, -hits, axis=1)[:, -hits] - _ROUNDING * lengths
        position = {item.id: at for at, item in enumerate(rows.items)}
        found = self.query(probes, hits)
        right = [
            ids.count(id_) == 1 and id_ in position and scores[row, position[id_]] >= least[row]
            for row, ids in enumerate(found)
            for id_ in ids
        ]
        if any(len(ids) != hits for ids in found) or sum(right) < 0.5 * len(right):
            raise self._damaged("its search index does not find the vectors that it holds")

    def query(self, vectors: NDArray[np.float32], n: int) -> list[list[str]]:
        """The ids of about the n largest inner products of each row, best first (HNSW)."""
        flat = np.pad(vectors, ((0, 0), (0, 1)))
        with explained(self.settings):
            answer = self._call(self._vectors.query, query_embeddings=flat, n_results=n, include=[])
        return list(answer["ids"])

    def write(self, rows: Rows, *, old: Rows | None = None, progress: Progress) -> Rows:
        """Insert or replace rows; `old` holds what is replaced. Returns them as stored."""
        keys = [
            _text_key(item.id, row)
            for item, row in zip(rows.items, rows.text_embeddings, strict=True)
        ]
        order = rows.order or list(range(len(rows)))
        rest = self._radius**2 - (rows.vectors**2).sum(axis=1, keepdims=True)
        lifted = np.hstack([rows.vectors, np.sqrt(rest.clip(min=0))]).astype(np.float32)
        stale = {item.id: _metadata(item, 0, "", "") for item in old.items} if old else {}
        with explained(self.settings):
            for at in self._batches(len(rows)):
                self._call(self._texts.upsert, ids=keys[at], embeddings=rows.text_embeddings[at])
                items = rows.items[at]
                metadata = [
                    # Chroma merges: what is gone must be said to be gone.
                    dict.fromkeys(stale.get(item.id, ()))
                    | _metadata(item, position, key, _digest(vector))
                    for item, position, key, vector in zip(
                        items, order[at], keys[at], lifted[at], strict=True
                    )
                ]
                self._call(
                    self._vectors.upsert,
                    ids=[item.id for item in items],
                    embeddings=lifted[at],
                    documents=[sanitise(item_text(item), limit=_DOCUMENT_CHARS) for item in items],
                    metadatas=metadata,
                )
                progress(at.stop, len(rows))
            if old:
                self._delete_texts(sorted(set(old.text_keys) - set(keys)))
        return Rows(rows.items, rows.text_embeddings, rows.vectors, keys, order)

    def delete(self, rows: Rows) -> None:
        """Remove rows."""
        with explained(self.settings):
            for at in self._batches(len(rows)):
                ids = [item.id for item in rows.items[at]]
                self._call(self._vectors.delete, ids=ids)
            self._delete_texts(rows.text_keys)

    def _delete_texts(self, keys: Sequence[str]) -> None:
        for at in self._batches(len(keys)):
            self._call(self._texts.delete, ids=list(keys[at]))

    def _call(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return call(self.settings, partial(function, *args, **kwargs))

    def _batches(self, rows: int) -> list[slice]:
        return [slice(s, min(s + self._batch, rows)) for s in range(0, rows, self._batch)]

    def check_lock(self) -> None:
        """Raise CatalogError if another process keeps the database locked; to do before writing."""
        if self.settings.folder is not None:
            check_lock(self.settings, self.settings.folder)

    def _damaged(self, how: str) -> CatalogError:
        return CatalogError(f"the catalog at {self.settings.where} is damaged: {how}. {REBUILD}.")


def _names(client: Client) -> list[str]:
    return [collection.name for collection in client.list_collections()]


def _sweep(client: Client, name: str) -> None:
    """Delete what builds of this catalog left, a killed one's too, but not what it lives on."""
    kept: set[object] = set()
    names = _names(client)
    if name in names:
        kept.add((client.get_collection(name, embedding_function=None).metadata or {})["texts"])
    for other in names:
        made_by_us = re.fullmatch(rf"{re.escape(name)}-(building|text)-[0-9a-f]{{32}}", other)
        if made_by_us and other not in kept:
            client.delete_collection(other)


def _real(folder: Path) -> str:
    return str(folder.resolve())


def _replaceable(folder: Path) -> bool:
    """Whether a catalog may take this place: of one, of what is left of one, or of nothing."""
    if not folder.is_dir():
        return False
    return (folder / DATABASE).is_file() or all(map(_is_index, folder.iterdir()))


def _is_index(path: Path) -> bool:
    """Whether a path is a folder in which Chroma keeps an index."""
    return (
        path.is_dir()
        and _INDEX_NAME.fullmatch(path.name) is not None
        and all(file.suffix in _INDEX_FILES for file in path.iterdir())
    )


def _digest(vector: NDArray[np.float32]) -> str:
    return hashlib.sha256(vector.tobytes()).hexdigest()[:16]


def _text_key(id_: str, embedding: NDArray[np.float32]) -> str:
    return f"{id_}/{_digest(embedding)}"


def _metadata(item: Item, order: int, text_key: str, digest: str) -> dict[str, str | int]:
    """What stands beside an item's vector. `item` is the item itself, pure ASCII; the rest is
    for people and tools that look into Chroma.
    """
    coded = {
        "id": item.id,
        "title": item.title,
        "attributes": dict(item.attributes),
        "description": item.description,
    }
    shown = sanitise_attributes(item.attributes)
    return {
        **{f"attribute:{name}": "; ".join(values) for name, values in shown.items()},
        "title": sanitise(item.title),
        "item": json.dumps(coded),
        "order": order,
        "text": text_key,
        "vector": digest,
    }


def _decode(coded: str) -> Item:
    raw = json.loads(coded)
    attributes = {name: tuple(values) for name, values in raw["attributes"].items()}
    return Item(raw["id"], raw["title"], attributes, raw["description"])
