"""A catalog at one moment, held in memory: what searches and lookups are answered from."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CatalogError
from .chroma_store import Rows
from .filters import AttributeIndex, Filters
from .interactions import Item
from .search import Allowed
from .titles import TitleIndex, display_titles, sanitise_attributes

NO_FILTERS = Filters()
_LISTED_IDS = 5
_SHOWN_ITEMS = 65_536  # whose sanitised attributes are kept
_FILTERS = 256  # whose masks are kept
_EXCLUSIONS = 1024  # sets of ids whose positions are kept: a run asks for its own at each search


class Snapshot:
    """The catalog at one moment; position = row in `ids`, `items`, `vectors`, `text_embeddings`.

    The arrays are read-only.
    """

    def __init__(self, rows: Rows):
        self.rows = rows
        self.items: tuple[Item, ...] = tuple(rows.items)
        self.ids: tuple[str, ...] = tuple(item.id for item in self.items)
        self.index: dict[str, int] = {id_: at for at, id_ in enumerate(self.ids)}
        self.vectors = np.ascontiguousarray(rows.vectors, dtype=np.float32)
        self.text_embeddings = np.ascontiguousarray(rows.text_embeddings, dtype=np.float32)
        self.matrix: Tensor = torch.from_numpy(self.vectors)  # [n, dim], shares memory
        for array in (self.vectors, self.text_embeddings):
            array.flags.writeable = False
        # Of its parts, not of itself: in a cycle an old snapshot would outlive the catalog's next.
        self._excluded = lru_cache(maxsize=_EXCLUSIONS)(partial(_held, self.index))
        self.shown_attributes = lru_cache(maxsize=_SHOWN_ITEMS)(partial(_shown, self.items))

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def titles(self) -> tuple[str, ...]:
        """Unique, sanitised titles by position."""
        return tuple(display_titles(self.items))

    @cached_property
    def title_index(self) -> TitleIndex:
        """Finds items by typed titles."""
        return TitleIndex(self.items, self.titles)

    @cached_property
    def attributes(self) -> AttributeIndex:
        """Finds items by attributes."""
        return AttributeIndex(self.items)

    @cached_property
    def _mask(self) -> Callable[[Filters], NDArray[np.bool_]]:
        return lru_cache(maxsize=_FILTERS)(self.attributes.mask)

    def position(self, id_: str) -> int:
        """Position of an id. Raises CatalogError where the catalog does not hold it."""
        at = self.index.get(id_)
        if at is None:
            raise self._unknown([id_])
        return at

    def positions(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Positions of ids. Raises CatalogError naming those that the catalog does not hold."""
        try:
            return np.array([self.index[id_] for id_ in ids], dtype=np.int64)
        except KeyError:
            raise self._unknown([id_ for id_ in ids if id_ not in self.index]) from None

    def _unknown(self, ids: Sequence[str]) -> CatalogError:
        return CatalogError(
            f"no item with id {some(ids)} in the catalog of {len(self)} items. "
            "Check the id, or add the item."
        )

    def allowed(self, exclude: Collection[str] = (), filters: Filters = NO_FILTERS) -> Allowed:
        """What may be shown. Ids that the catalog does not hold are excluded as it is.

        Raises RequestError for a filter that names what no item has.
        """
        mask = self._mask(filters) if filters else None
        return Allowed(len(self), mask, self._excluded(frozenset(exclude)))


def _held(index: Mapping[str, int], ids: frozenset[str]) -> NDArray[np.int64]:
    """Positions of those of the ids that the catalog holds, rising."""
    return np.array(sorted(index[id_] for id_ in ids if id_ in index), dtype=np.int64)


def _shown(items: Sequence[Item], position: int) -> Mapping[str, tuple[str, ...]]:
    """An item's attributes as they may be shown."""
    return MappingProxyType(sanitise_attributes(items[position].attributes))


def some(ids: Sequence[str]) -> str:
    """The first few ids, for an error text."""
    more = f" and {len(ids) - _LISTED_IDS} more" if len(ids) > _LISTED_IDS else ""
    return ", ".join(repr(id_) for id_ in ids[:_LISTED_IDS]) + more


def take(rows: Rows, positions: Sequence[int]) -> Rows:
    """The rows at these positions."""
    at = np.array(positions, dtype=np.int64)
    return Rows(
        [rows.items[p] for p in positions],
        rows.text_embeddings[at],
        rows.vectors[at],
        [rows.text_keys[p] for p in positions],
        [rows.order[p] for p in positions],
    )


def merge(old: Rows, new: Rows) -> Rows:
    """`old` with the rows of `new` in the places that their `order` gives them."""
    position = {order: at for at, order in enumerate(old.order)}
    where = [position.get(order, -1) for order in new.order]
    added = [at for at, place in enumerate(where) if place < 0]
    fresh = take(new, added)
    merged = Rows(
        old.items + fresh.items,
        np.concatenate([old.text_embeddings, fresh.text_embeddings]),
        np.concatenate([old.vectors, fresh.vectors]),
        old.text_keys + fresh.text_keys,
        old.order + fresh.order,
    )
    for at, place in enumerate(where):
        if place >= 0:
            merged.items[place] = new.items[at]
            merged.text_embeddings[place] = new.text_embeddings[at]
            merged.vectors[place] = new.vectors[at]
            merged.text_keys[place] = new.text_keys[at]
    return merged
