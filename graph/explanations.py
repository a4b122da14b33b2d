"""Why an item is recommended: the search that brought it in, and one sentence of facts.

The sentence is put together from the catalog (the history item that is most alike, the attributes
that they share), never generated: a small model would invent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..tools.titles import sanitise
from . import protocol
from .likeness import likeness

if TYPE_CHECKING:
    from ..tools.catalog import Catalog

_MAX_PREFERENCE = 120
_MAX_SHARED = 3


def explanations(
    items: Sequence[str],
    turns: Sequence[Mapping[str, Any]],
    history: Sequence[str],
    catalog: Catalog,
) -> dict[str, dict[str, Any]]:
    """`turn`, `preference` and `reason` of each item, as Recommendation names them.

    Args:
        items: ids of the recommended items.
        turns: of the run, dumped.
        history: item ids of the user; those that the catalog does not hold are left out.
        catalog: where items are described.

    """
    brought = first_searches(turns)
    known = [item for item in dict.fromkeys(history) if item in catalog.snapshot.index]
    explained: dict[str, dict[str, Any]] = {}
    for item in items:
        number, preference = brought.get(item, (None, None))
        reason = f"{_origin(preference)}{_kinship(item, known, catalog)}."
        explained[item] = {"turn": number, "preference": preference, "reason": reason}
    return explained


def first_searches(turns: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, str]]:
    """Turn (from 1) and preference of the search that first brought each item in, by item id."""
    brought: dict[str, tuple[int, str]] = {}
    for at, turn in enumerate(turns, 1):
        for found in turn["retrieved"]:
            brought.setdefault(found["id"], (at, turn["preference"]))
    return brought


def _origin(preference: str | None) -> str:
    if preference is None:
        return "No search brought it in; the history as a whole suggests it"
    if protocol.searched_preference(preference) is None:
        return "The history as a whole suggests it"
    return f"It came up in the search for “{sanitise(preference, limit=_MAX_PREFERENCE)}”"


def _kinship(item: str, history: Sequence[str], catalog: Catalog) -> str:
    """Tie an item to the one of the history that is most like it."""
    if not history:
        return ""
    nearest = history[int(np.argmax(likeness(catalog.snapshot, history, item)))]
    theirs = catalog.display_attributes(nearest)
    shared = [
        f"{name}: {', '.join(common[:_MAX_SHARED])}"
        for name, values in catalog.display_attributes(item).items()
        if (common := [value for value in values if value in theirs.get(name, ())])
    ]
    both = f" (both {'; '.join(shared)})" if shared else ""
    return f", and of the history it is most like {catalog.display_title(nearest)}{both}"
