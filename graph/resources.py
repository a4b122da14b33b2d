"""What a graph is compiled over, and what the catalog looks like to its policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from ..tools.catalog import Catalog
from ..tools.retriever import Retriever
from . import protocol
from .engine.base import Engine
from .format_rules import scripts_of

if TYPE_CHECKING:
    from ..tools.snapshot import Snapshot
    from .r2ec.ranker import HeadRanker

_VOCABULARY = 48


@dataclass(frozen=True)
class Shelf:
    """What a request is read with: the policy's engine and the catalog.

    `histories` maps a user id to item ids, oldest first; empty where users are unknown.
    """

    engine: Engine
    catalog: Catalog
    histories: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def listed(self, item_id: str) -> protocol.ListedItem:
        """Return the item as the policy reads it."""
        return listed_item(self.catalog, item_id)


@dataclass(frozen=True, kw_only=True)
class Resources(Shelf):
    """What the nodes of the loop work with: the TRM behind its retriever too, and the
    recommendation head where one is loaded.
    """

    retriever: Retriever
    ranker: HeadRanker | None = None

    @cached_property
    def scripts(self) -> frozenset[str]:
        """Scripts of the catalog's titles and attributes, for the format rules."""
        catalog = self.catalog
        titles = (catalog.display_title(item_id) for item_id in catalog.ids)
        return scripts_of(titles) | scripts_of(value for _, value in self._shown(catalog.ids))

    @cached_property
    def _values(self) -> Counter[str]:
        return self._count_values(self.catalog.ids)

    @cached_property
    def _worded(self) -> frozenset[str]:
        """Attributes whose values are words; of one that mostly holds numbers, such as a year,
        the odd word ("V" in MovieLens) is no preference.
        """
        balance = Counter[str]()
        for name, value in self._shown(self.catalog.ids):
            balance[name] += -1 if value.isnumeric() else 1
        return frozenset(name for name, count in balance.items() if count > 0)

    def _shown(self, item_ids: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Attribute names and values of items, as they may be shown."""
        for item_id in item_ids:
            for name, values in self.catalog.display_attributes(item_id).items():
                yield from ((name, value) for value in values)

    def _count_values(self, item_ids: Iterable[str]) -> Counter[str]:
        return Counter(value for name, value in self._shown(item_ids) if name in self._worded)

    def vocabulary(self, history: Iterable[str], used: Iterable[str]) -> list[str]:
        """Attribute values for guided preferences: the history's, then the catalog's commonest.

        Values that lead one of the preferences in `used` are left out, so that each guided search
        starts from another side.
        """
        own = self._count_values(history)
        led = {preference.partition(";")[0].strip().casefold() for preference in used}
        ranked = dict.fromkeys([*_by_count(own), *_by_count(self._values)])
        kept = [value for value in ranked if value.casefold() not in led and ";" not in value]
        return kept[:_VOCABULARY]


def listed_item(catalog: Catalog, item_id: str) -> protocol.ListedItem:
    """Return an item of the catalog as an LLM reads it."""
    now = catalog.snapshot
    return listed_at(now, now.position(item_id))


def listed_at(now: Snapshot, position: int) -> protocol.ListedItem:
    """Return the item at a position of one moment of the catalog as an LLM reads it."""
    attributes = now.shown_attributes(position)
    return protocol.ListedItem(
        id=now.ids[position],
        title=now.titles[position],
        attributes=tuple(f"{name}: {', '.join(vs)}" for name, vs in attributes.items() if vs),
    )


def _by_count(counts: Counter[str]) -> list[str]:
    return [value for value, _ in counts.most_common(_VOCABULARY * 2)]
