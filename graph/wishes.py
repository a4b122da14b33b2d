"""Wishes in a user's own words. The simple, certain ones act on every search by themselves.

A wish is understood as a whole or not at all, and only in the catalog's own terms: the values of
its attributes, its years, its titles. Every other wish stays words for the policy.

"only comedies from the 1990s", "no Horror", "nothing before 1980" become filters. "less like
Alien" and "more like Alien" become leanings, which exclude nothing but that item. "I like westerns"
and "I don't like gore" state tastes, which memory keeps (graph/memory.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import RequestError
from ..tools.filters import Condition, Filters
from ..tools.titles import sanitise
from .fusion import reciprocal_rank_fusion
from .likeness import likeness
from .state import UnderstoodWish

if TYPE_CHECKING:
    from ..tools.catalog import Catalog
    from ..tools.filters import AttributeIndex
    from ..tools.retriever import ScoredItem

Taste = Literal["like", "dislike"]

POOL = 4
"""Leanings reorder so many times more items than are wanted."""

_ONLY = re.compile(r"(?:only|just|nothing but) (.+)", re.IGNORECASE)
_NOT = re.compile(r"(?:no|not|nothing|without|never) (.+)", re.IGNORECASE)
_LIKENESS = re.compile(r"(?:\w+ )?(more|less) like (.+)", re.IGNORECASE)
_TASTES: tuple[tuple[Taste, re.Pattern[str]], ...] = (
    ("dislike", re.compile(r"i (?:dislike|hate|(?:don['’]?t|do not) like) (.+)", re.IGNORECASE)),
    ("like", re.compile(r"i (?:really )?(?:like|love) (.+)", re.IGNORECASE)),
)
_NOUN = r"(?:films?|movies?|books?|games?|songs?|albums?|products?|items?|titles?|ones|things)"
_BEFORE_YEARS = rf"(?:(.*?) ?)(?:{_NOUN} )?(?:(?:made |released |published )?(?:from|in|of) )?"
_Y = r"(\d{4})"
# Patterns of the years that are asked for, with the first and the last of them.
_ASKED: tuple[tuple[str, tuple[int | None, int | None]], ...] = (
    (r"(?:the )?(\d{3}0)['’]?s", (0, 9)),
    (r"(?:the )?['’]?([3-9]0)['’]?s", (1900, 1909)),
    (rf"(?:between |from )?{_Y} ?(?:and|to|-|–) ?{_Y}", (0, 0)),
    (rf"before {_Y}", (None, -1)),
    (rf"(?:until|up to) {_Y}", (None, 0)),
    (rf"after {_Y}", (1, None)),
    (rf"(?:since {_Y}|from {_Y} on(?:wards)?)", (0, None)),
    (_Y, (0, 0)),
)
_REFUSED: tuple[tuple[str, tuple[int | None, int | None]], ...] = (
    (rf"(?:before|older than) {_Y}", (0, None)),
    (rf"(?:after|newer than|since) {_Y}", (None, 0)),
)
_JOINED = re.compile(r"\s*(?:,|/|\bor\b|\band\b|\bno\b)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Leaning:
    """Items like this one come earlier (`more`) or later in every list."""

    item: str
    more: bool


@dataclass
class Wishes:
    """What wishes mean: filters in their JSON form, which must all hold; leanings; tastes.

    `words` is what the policy is to read of them, sanitised.
    """

    where: list[dict[str, Any]] = field(default_factory=list)
    leanings: list[Leaning] = field(default_factory=list)
    tastes: list[tuple[Taste, str]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    understood: list[UnderstoodWish] = field(default_factory=list)

    @property
    def named(self) -> list[str]:
        """Ids of items that leanings name: who compares with an item knows it."""
        return [leaning.item for leaning in self.leanings]


def read_wishes(
    wishes: Iterable[str], catalog: Catalog, *, filters: Iterable[Mapping[str, Any]] = ()
) -> Wishes:
    """Understand what is certain of `wishes`, in the terms of the catalog as it is now.

    `filters` are stated ones, in their JSON form; they come first. Raises RequestError for
    malformed ones.
    """
    read = Wishes()
    for stated in filter(None, filters):
        read.where.append(dict(stated))
        read.words += map(in_words, Filters.parse(stated).conditions)
    for wish in filter(None, map(sanitise, wishes)):
        plain = wish.rstrip(".! ")
        if meant := _filters(plain, catalog.snapshot.attributes):
            read.where.append(meant)
            means = "; ".join(map(in_words, Filters.parse(meant).conditions))
            read.understood.append(UnderstoodWish(wish=wish, means=means))
            read.words.append(means)
            continue
        read.words.append(wish)
        if leaning := _leaning(plain, catalog):
            read.leanings.append(leaning)
            place = "earlier" if leaning.more else "later"
            means = f"items like {catalog.display_title(leaning.item)} come {place}"
            read.understood.append(UnderstoodWish(wish=wish, means=means))
        for taste, pattern in _TASTES:
            if match := pattern.fullmatch(plain):
                read.tastes.append((taste, match[1]))
    return read


def in_words(condition: Condition) -> str:
    """Say one condition of a filter in words that people and the policy can read."""
    said = []
    if condition.any_of:
        said.append(" or ".join(condition.any_of))
    if condition.none_of:
        said.append("not " + " or ".join(condition.none_of))
    if condition.gte is not None:
        said.append(f"from {condition.gte:g}")
    if condition.lte is not None:
        said.append(f"up to {condition.lte:g}")
    return sanitise(f"{condition.attribute}: {', '.join(said)}")


def lean(
    found: Sequence[ScoredItem], leanings: Sequence[Leaning], catalog: Catalog
) -> list[ScoredItem]:
    """Reorder what was found: its own order fused with one by likeness to each leaning's item.

    Leanings to items that the catalog does not hold any more are left out.
    """
    now = catalog.snapshot
    by_id = {item.id: item for item in found if item.id in now.index}
    orders = [list(by_id)]
    for leaning in leanings:
        if leaning.item in now.index:
            alike = likeness(now, list(by_id), leaning.item)
            rows = (-alike if leaning.more else alike).argsort(kind="stable")
            orders.append([orders[0][row] for row in rows])
    return [by_id[id_] for id_ in reciprocal_rank_fusion(orders)]


def _filters(wish: str, index: AttributeIndex) -> dict[str, Any] | None:
    if match := _ONLY.fullmatch(wish):
        return _asked(match[1], index)
    if match := _NOT.fullmatch(wish):
        return _span(match[1], _REFUSED, index) or _values(match[1], index, "not")
    return None


def _asked(phrase: str, index: AttributeIndex) -> dict[str, Any] | None:
    return _span(phrase, _ASKED, index) or _values(phrase, index, "any")


def _span(
    phrase: str,
    patterns: Iterable[tuple[str, tuple[int | None, int | None]]],
    index: AttributeIndex,
) -> dict[str, Any] | None:
    """Years, and values where some stand before them."""
    years = index.years()
    if len(years) != 1:
        return None
    for pattern, (first, last) in patterns:
        match = re.fullmatch(_BEFORE_YEARS + pattern, phrase, re.IGNORECASE)
        if match is None:
            continue
        numbers = [int(group) for group in match.groups()[1:] if group is not None]
        bounds: dict[str, Any] = {}
        if first is not None:
            bounds["gte"] = numbers[0] + first
        if last is not None:
            bounds["lte"] = numbers[-1] + last
        values = _values(match[1], index, "any") if match[1] else {}
        if values is None or years[0] in values or bounds.get("gte", 0) > bounds.get("lte", 1e9):
            return None
        return {**values, years[0]: bounds}
    return None


def _values(
    phrase: str, index: AttributeIndex, operator: Literal["any", "not"]
) -> dict[str, Any] | None:
    """One or several values of one attribute; None unless that is certain."""
    for parts in ([phrase], [part for part in _JOINED.split(phrase) if part]):
        found = [_value(part, index) for part in parts]
        names = {pair[0] for pair in found if pair is not None}
        if None not in found and len(names) == 1:
            return {names.pop(): {operator: [pair[1] for pair in found if pair is not None]}}
    return None


def _value(text: str, index: AttributeIndex) -> tuple[str, str] | None:
    """The one attribute and value that a word names, as it is or in the plural."""
    bare = re.sub(rf"\s+{_NOUN}$", "", text.strip(), flags=re.IGNORECASE)
    for form in (bare, re.sub("ies$", "y", bare), re.sub("s$", "", bare)):
        if pairs := index.spelled(form):
            return pairs[0] if len(pairs) == 1 else None
    return None


def _leaning(wish: str, catalog: Catalog) -> Leaning | None:
    match = _LIKENESS.fullmatch(wish)
    if match is None:
        return None
    try:
        return Leaning(catalog.resolve_title(match[2]), match[1].casefold() == "more")
    except RequestError:  # of no item, or of several
        return None


def leanings_of(kept: Iterable[Mapping[str, Any]]) -> list[Leaning]:
    """Leanings as a run's state keeps them."""
    return [Leaning(**values) for values in kept]
