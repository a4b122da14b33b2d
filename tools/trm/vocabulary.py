"""The words of a catalog: which attribute values describe its items, and which item has which.

Nothing here knows a data set. Attributes are read by their shape: years become decades, values
that nearly every item or only one item has are left out.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..interactions import Item

_MAX_TERMS = 400  # attribute values that are used, most frequent first
_DECADE = re.compile(r"\d{3}0s")
_HISTORY, _HISTORY_TERMS = 20, 3  # items that a preference from the history reads; values named
_YEAR = re.compile(r"(1[5-9]|20)\d\d")


@dataclass(frozen=True)
class Vocabulary:
    """Attribute values that say something, and which item has which.

    `primary` is the attribute that describes items best (a genre or category); its values come
    first in `terms`. `items[i]` and `extras[i]` are indices into `terms`: the item's primary
    values, and the others (decade, brand …).
    """

    primary: str
    terms: tuple[tuple[str, str], ...]  # (attribute name, phrase)
    items: tuple[tuple[int, ...], ...]
    extras: tuple[tuple[int, ...], ...]

    @classmethod
    def build(cls, items: Sequence[Item]) -> "Vocabulary":
        """The words of these items; empty where no attribute describes several of them."""
        phrases = [
            {name: _phrases(values) for name, values in item.attributes.items() if values}
            for item in items
        ]
        counts: dict[str, Counter[str]] = {}
        for row in phrases:
            for name, values in row.items():
                counts.setdefault(name, Counter()).update(values)
        kept: dict[str, dict[str, int]] = {}
        for name, counter in counts.items():
            useful = {v: c for v, c in counter.items() if 2 <= c <= 0.9 * len(items)}
            # A value per item is an identifier or a number, not a description.
            if len(useful) >= 2 and sum(useful.values()) >= 5 * len(useful):
                kept[name] = useful
        if not kept:
            empty = tuple(() for _ in items)
            return cls("", (), empty, empty)
        # Many values per item and wide coverage make a description; a year is never the first.
        primary = max(
            kept,
            key=lambda name: (not _dated(kept[name]), _richness(phrases, name, kept[name]), name),
        )
        order = [
            (name, value)
            for name in sorted(kept, key=lambda name: (name != primary, name))
            for value, _ in sorted(kept[name].items(), key=lambda pair: (-pair[1], pair[0]))
        ][:_MAX_TERMS]
        index = {term: n for n, term in enumerate(order)}

        def rows(wanted: Callable[[str], bool]) -> tuple[tuple[int, ...], ...]:
            return tuple(
                tuple(
                    index[name, value]
                    for name, values in row.items()
                    if wanted(name)
                    for value in values
                    if (name, value) in index
                )
                for row in phrases
            )

        return cls(
            primary,
            tuple(order),
            rows(lambda name: name == primary),
            rows(lambda name: name != primary),
        )

    def phrases(self, terms: Sequence[int]) -> list[str]:
        """The terms in words."""
        return [self.terms[term][1] for term in terms]

    def history_terms(self, history: Sequence[int], count: int) -> tuple[int, ...]:
        """The most frequent primary values among the items of a history, most frequent first."""
        seen = Counter(term for item in history for term in self.items[item])
        return tuple(sorted(seen, key=lambda term: (-seen[term], term))[:count])


def render(
    vocabulary: Vocabulary, terms: Sequence[int], template: str, *, joint: str = "; "
) -> str:
    """A preference text: `render(v, terms, "{name}: {}")` gives e.g. "genres: Comedy; Drama"."""
    return template.format(joint.join(vocabulary.phrases(terms)), name=vocabulary.primary)


def history_preference(vocabulary: Vocabulary, history: Sequence[int]) -> str | None:
    """The commonest primary values among the latest items of a history, e.g. "genres: Comedy;
    Drama"; None where nothing describes them.
    """
    terms = vocabulary.history_terms(history[-_HISTORY:], _HISTORY_TERMS)
    return render(vocabulary, terms, "{name}: {}") if terms else None


def _phrases(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{v[:3]}0s" if _YEAR.fullmatch(v) else v for v in values if v.strip())


def _dated(values: Iterable[str]) -> bool:
    return all(_DECADE.fullmatch(value) for value in values)


def _richness(
    phrases: Sequence[dict[str, tuple[str, ...]]], name: str, useful: dict[str, int]
) -> float:
    several = sum(len(row.get(name, ())) > 1 for row in phrases)
    covered = sum(any(v in useful for v in row.get(name, ())) for row in phrases)
    return (covered + 2 * several) / max(len(phrases), 1)
