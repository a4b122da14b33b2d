"""Which items may be retrieved, said in attributes: parsed once, then matched or turned to masks.

A filter is a mapping that must hold in all its entries:
{"genres": "Comedy"}, {"genres": ["Comedy", "Drama"]} (any of them), {"year": {"gte": 1990,
"lte": 1999}}, {"genres": {"not": ["Horror"]}}. Values compare without regard to case.
"""

import math
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray
from rapidfuzz import fuzz, process

from ..errors import RequestError, shown
from .interactions import Item
from .titles import YEAR_NAME, sanitise

MAX_CONDITIONS = 32  # attributes that one filter may name
MAX_VALUES = 100  # values that one attribute may list
MAX_VALUE_CHARS = 200  # of a value, and of an attribute's name
_MAX_INTEGER = 2**63 - 1
_LISTED = 8  # known names or values that an error text lists
_OPERATORS = ("any", "not", "gte", "lte")
_HOW = 'Write {"attribute": "value"}, a list of values, {"gte": 1990, "lte": 1999} or {"not": [..]}'


def value_key(text: str) -> str:
    """The form in which values and attribute names are compared."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@dataclass(frozen=True, slots=True)
class Condition:
    """What one attribute must fulfil; an item fulfils it by any of its values.

    `any_of` empty means that no value is asked for. An item without the attribute fulfils
    `none_of` and nothing else. Bounds are inclusive.
    """

    attribute: str
    any_of: tuple[str, ...] = ()
    none_of: tuple[str, ...] = ()
    gte: float | None = None
    lte: float | None = None

    @property
    def ranged(self) -> bool:
        """Whether it bounds a number."""
        return self.gte is not None or self.lte is not None

    def inside(self, value: float) -> bool:
        """Whether a number lies within the bounds."""
        above = self.gte is None or value >= self.gte
        return above and (self.lte is None or value <= self.lte)


@dataclass(frozen=True, slots=True)
class Filters:
    """Conditions that must all hold; none by default. Hashable, so masks can be cached."""

    conditions: tuple[Condition, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.conditions)

    @classmethod
    def parse(cls, raw: Mapping[str, object] | None) -> "Filters":
        """Filters from their JSON form (see the module). Raises RequestError on another form."""
        if raw is None:
            return cls()
        if not isinstance(raw, Mapping):
            raise RequestError(f"filters {shown(raw)} are not a mapping. {_HOW}.")
        if len(raw) > MAX_CONDITIONS:
            raise RequestError(
                f"filters name {len(raw)} attributes; at most {MAX_CONDITIONS} are allowed."
            )
        return cls(tuple(_condition(name, wanted) for name, wanted in raw.items()))

    @classmethod
    def all_of(cls, raws: Iterable[Mapping[str, object]]) -> "Filters":
        """Several filters in their JSON form, which must all hold. Raises RequestError."""
        return cls(tuple(part for raw in raws for part in cls.parse(raw).conditions))


class AttributeIndex:
    """The attributes of a sequence of items, laid out so that a filter becomes a mask quickly."""

    def __init__(self, items: Sequence[Item]):
        self._size = len(items)
        postings: dict[str, dict[str, list[int]]] = {}
        self._names: dict[str, str] = {}  # key → name as first written
        self._spelled: dict[str, dict[str, str]] = {}
        for position, item in enumerate(items):
            for name, values in item.attributes.items():
                key = value_key(name)
                self._names.setdefault(key, name)
                spelled = self._spelled.setdefault(key, {})
                of_name = postings.setdefault(key, {})
                for value in values:
                    value_ = value_key(value)
                    spelled.setdefault(value_, value)
                    of_name.setdefault(value_, []).append(position)
        self._postings = {
            name: {value: np.array(at, dtype=np.int64) for value, at in values.items()}
            for name, values in postings.items()
        }

    def mask(self, filters: Filters) -> NDArray[np.bool_]:
        """`[items]`, True where every condition holds.

        Raises RequestError for an attribute or value that no item has, or a range over an
        attribute without numbers; the text lists what is known, closest first.
        """
        allowed = np.ones(self._size, dtype=bool)
        for condition in filters.conditions:
            name = value_key(condition.attribute)
            if name not in self._postings:
                known = _listed(condition.attribute, self._names)
                raise RequestError(
                    f"unknown attribute {shown(condition.attribute)}. Known attributes: {known}."
                )
            allowed &= self._holds(name, condition)
        return allowed

    def spelled(self, value: str) -> list[tuple[str, str]]:
        """Attributes that have this value for some item, and the value, as first written."""
        key = value_key(value)
        return [
            (self._names[name], spelled[key])
            for name, spelled in self._spelled.items()
            if key in spelled
        ]

    def years(self) -> list[str]:
        """Names of the attributes that hold years."""
        return [
            self._names[name]
            for name, spelled in self._spelled.items()
            if YEAR_NAME.fullmatch(name) and any(number(value) is not None for value in spelled)
        ]

    def _holds(self, name: str, condition: Condition) -> NDArray[np.bool_]:
        if condition.any_of:
            held = self._having(name, condition.any_of)
        else:
            held = np.ones(self._size, dtype=bool)
        if condition.none_of:
            held &= ~self._having(name, condition.none_of)
        if condition.ranged:
            inside = np.zeros(self._size, dtype=bool)
            numbers = {text: number(text) for text in self._postings[name]}
            for text, value in numbers.items():
                if value is not None and condition.inside(value):
                    inside[self._postings[name][text]] = True
            if all(value is None for value in numbers.values()):
                raise RequestError(
                    f"attribute {shown(condition.attribute)} holds no numbers, so it has no range. "
                    f"Known values: {_listed('', self._spelled[name])}."
                )
            held &= inside
        return held

    def _having(self, name: str, values: Sequence[str]) -> NDArray[np.bool_]:
        having = np.zeros(self._size, dtype=bool)
        for value in values:
            positions = self._postings[name].get(value_key(value))
            if positions is None:
                raise RequestError(
                    f"no item has {shown(value)} as {self._names[name]}. "
                    f"Known values: {_listed(value, self._spelled[name])}."
                )
            having[positions] = True
        return having


def number(text: str) -> float | None:
    """The finite number that an attribute's value spells, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _condition(name: object, wanted: object) -> Condition:
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_VALUE_CHARS:
        raise RequestError(
            f"{shown(name)} is not an attribute's name of 1 to {MAX_VALUE_CHARS} characters. "
            f"{_HOW}."
        )
    if not isinstance(wanted, Mapping):
        return Condition(name, any_of=_values(name, wanted))
    unknown = [key for key in wanted if key not in _OPERATORS]
    if unknown or not wanted:
        raise RequestError(
            f"filter on {shown(name)} has {shown(unknown or dict(wanted))}, which is none of "
            f"{', '.join(_OPERATORS)}. {_HOW}."
        )
    bounds = {side: _bound(name, wanted[side]) for side in ("gte", "lte") if side in wanted}
    if len(bounds) == 2 and bounds["gte"] > bounds["lte"]:
        raise RequestError(
            f"filter on {shown(name)}: gte {bounds['gte']:g} is above lte {bounds['lte']:g}, so "
            "nothing fits. Swap them."
        )
    return Condition(
        name,
        any_of=_values(name, wanted["any"]) if "any" in wanted else (),
        none_of=_values(name, wanted["not"]) if "not" in wanted else (),
        gte=bounds.get("gte"),
        lte=bounds.get("lte"),
    )


def _values(name: str, wanted: object) -> tuple[str, ...]:
    listed = list(wanted) if isinstance(wanted, list | tuple | set | frozenset) else [wanted]
    if not listed:
        raise RequestError(f"filter on {shown(name)} lists no value. Name one, or leave it out.")
    if len(listed) > MAX_VALUES:
        raise RequestError(
            f"filter on {shown(name)} lists {len(listed)} values; at most {MAX_VALUES} are allowed."
        )
    return tuple(_value(name, value) for value in listed)


def _value(name: str, value: object) -> str:
    if isinstance(value, str):
        if len(value) <= MAX_VALUE_CHARS and value.strip():
            return value
    elif _is_finite(value):
        return f"{value:.0f}" if float(value).is_integer() else repr(value)
    raise RequestError(
        f"filter on {shown(name)}: {shown(value)} is no value. Give a text of 1 to "
        f"{MAX_VALUE_CHARS} characters or a number."
    )


def _bound(name: str, value: object) -> float:
    if isinstance(value, str):
        value = number(value)
    if _is_finite(value):
        return float(value)
    raise RequestError(
        f"filter on {shown(name)}: {shown(value)} is no bound. gte and lte must be finite numbers."
    )


def _is_finite(value: object) -> TypeGuard[int | float]:
    # Comparing holds for NaN and infinities; whole numbers must fit where state is stored.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= (sys.float_info.max if isinstance(value, float) else _MAX_INTEGER)


def _listed(text: str, known: Mapping[str, str]) -> str:
    """The known spellings, those closest to `text` first."""
    if not known:
        return "none"
    if text:
        near = process.extract(value_key(text), list(known), scorer=fuzz.WRatio, limit=_LISTED)
        keys = [key for key, _, _ in near]
    else:
        keys = sorted(known)[:_LISTED]
    more = len(known) - len(keys)
    spelled = ", ".join(sanitise(known[key], limit=MAX_VALUE_CHARS) for key in keys)
    return spelled + (f" and {more} more" if more else "")
