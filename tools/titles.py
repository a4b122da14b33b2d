"""Titles as they are shown and as they are typed: neutralised, unique, and found again.

The catalog's text is untrusted: what is shown here can neither end a list, forge a marker or a
chat-template token, colour a terminal nor turn the reading direction. Titles that a person types
are resolved to items by exact, then normalised, then fuzzy comparison.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from rapidfuzz import fuzz, process

from ..errors import AmbiguousTitleError, RequestError
from .interactions import Item

MAX_TITLE_CHARS = 740  # a list's line holds 750 (the paper's limit), its label included
FUZZY_CUTOFF = 85.0  # least similarity (0 to 100, rapidfuzz.fuzz.ratio) that counts as meant
FUZZY_MARGIN = 3.0  # items this close to the most similar one make a typed title ambiguous
_CANDIDATES = 10  # items that an ambiguity lists
_SUGGESTIONS = 5  # titles that an unknown title is answered with
_SUFFIX_CHARS = 80  # what tells two equal titles apart is cut here

# CSI sequences, then OSC and the other strings with their terminator, then two-byte escapes.
_TERMINAL = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[ -/]*[0-~]"
)
_BRACKETED = re.compile(r"\[(/?[^\[\]/]{1,40})\]")
_TEMPLATE_WORD = re.compile(
    r"/?\s*(?:inst|sys(?:tem(?:_prompt)?)?|user|assistant|cls|sep|mask|[gs]mask|pad|unk|[be]os|"
    r"eo[dpt]|think|args|call_id|prefix|middle|suffix|img\w*|audio|tool_\w+|available_tools|"
    r"model_settings|unused\w*|control_\d+|ref)\s*",
    re.IGNORECASE,
)
# Everything that is or decomposes (NFKC, NFKD) to a character that markers are made of.
_LOOKALIKES = {
    **dict.fromkeys("<\ufe64\uff1c\u226e", "\u2039"),
    **dict.fromkeys(">\ufe65\uff1e\u226f", "\u203a"),
    "\uff5c": "|",
    **dict.fromkeys("\ufe47\uff3b", "("),
    **dict.fromkeys("\ufe48\uff3d", ")"),
    "\u2581": "_",  # stands for a space in tokenizers' vocabularies
}
# Invisible although they count as letters or marks.
_INVISIBLE = frozenset(
    code
    for first, last in (
        (0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F),
        (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFFA0, 0xFFA0), (0xE0100, 0xE01EF),
    )
    for code in range(first, last + 1)
)  # fmt: skip


class _Neutral(dict[int, str]):
    """What each character becomes; filled as characters are met."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        category = unicodedata.category(char)
        if char in _LOOKALIKES:
            neutral = _LOOKALIKES[char]
        elif char.isspace() or category in ("Zs", "Zl", "Zp"):
            neutral = " "
        elif category == "Cs":
            neutral = "\ufffd"
        elif category in ("Cc", "Cf", "Co", "Cn") or code in _INVISIBLE:
            neutral = ""
        else:
            neutral = char
        self[code] = neutral
        return neutral


_NEUTRAL = _Neutral()


def sanitise(text: str, *, limit: int = MAX_TITLE_CHARS) -> str:
    """`text` as one harmless line of at most `limit` characters; "" if nothing visible is left.

    Angle brackets become ‹ and ›, bracketed chat-template words such as [INST] get round
    brackets, terminal escapes and invisible characters go, white space collapses. Applying it
    twice changes nothing more.
    """
    line = " ".join(_TERMINAL.sub("", text).translate(_NEUTRAL).split())
    if "[" in line:
        line = _BRACKETED.sub(_round_brackets, line)
    return line[:limit].rstrip()


def _round_brackets(match: re.Match[str]) -> str:
    word = unicodedata.normalize("NFKC", match[1])
    return f"({match[1]})" if _TEMPLATE_WORD.fullmatch(word) else match[0]


def sanitise_attributes(attributes: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Attributes with names and values neutralised; what is empty then is left out."""
    clean: dict[str, tuple[str, ...]] = {}
    for name, values in attributes.items():
        name_ = sanitise(name)
        kept = tuple(value for value in map(sanitise, values) if value)
        if name_ and kept:
            clean[name_] = clean.get(name_, ()) + kept
    return clean


def display_titles(items: Sequence[Item]) -> list[str]:
    """A sanitised title for each item; no two are equal, whatever their case or width.

    Items that share a title get " (year)" if that tells them apart, else " [value]" of the first
    attribute that differs among them, else " [id …]".
    """
    titles = [sanitise(item.title) or _append("", f"[id {sanitise(item.id)}]") for item in items]
    groups: dict[str, list[int]] = defaultdict(list)
    for position, title in enumerate(titles):
        groups[_exact_key(title)].append(position)
    taken = {key for key, group in groups.items() if len(group) == 1}
    for group in groups.values():
        if len(group) > 1:
            _tell_apart(group, items, titles, taken)
    return titles


def _tell_apart(
    group: list[int], items: Sequence[Item], titles: list[str], taken: set[str]
) -> None:
    """Give each of `group` another title, in place, and add its key to `taken`."""
    base = {position: titles[position] for position in group}
    left = group
    for name in ["year", *sorted({name for at in group for name in items[at].attributes})]:
        shown = {at: _shown_value(items[at], name) for at in left}
        if name != "year" and len(set(shown.values())) == 1:
            continue
        suffixed = {
            at: _append(base[at], f" ({value})" if name == "year" else f" [{value}]")
            for at, value in shown.items()
            if value
        }
        counts: dict[str, int] = defaultdict(int)
        for title in suffixed.values():
            counts[_exact_key(title)] += 1
        rest = []
        for at in left:
            key = _exact_key(suffixed[at]) if at in suffixed else ""
            if at in suffixed and counts[key] == 1 and key not in taken:
                titles[at] = suffixed[at]
                taken.add(key)
            else:
                rest.append(at)
        left = rest
        if not left:
            return
    for at in left:
        number = 1
        while True:
            again = f" ({number})" if number > 1 else ""  # ids that look alike when sanitised
            titles[at] = _append(base[at], f" [id {sanitise(items[at].id)}]", again)
            if _exact_key(titles[at]) not in taken:
                break
            number += 1
        taken.add(_exact_key(titles[at]))


def _append(title: str, suffix: str, more: str = "") -> str:
    if len(suffix) > _SUFFIX_CHARS:
        suffix = suffix[: _SUFFIX_CHARS - 1].rstrip() + suffix[-1]
    suffix += more
    # Once more as a whole: a value such as INST is harmless by itself, but not in brackets.
    return sanitise(title[: MAX_TITLE_CHARS - len(suffix)].rstrip() + suffix)


def _shown_value(item: Item, name: str) -> str:
    if name == "year":
        return item_year(item) or ""
    return ", ".join(value for value in map(sanitise, item.attributes.get(name, ())) if value)


def item_year(item: Item) -> str | None:
    """The four digits in the first value of the item's `year` (or `…_year`) attribute."""
    for name, values in item.attributes.items():
        if name == "year" or YEAR_NAME.fullmatch(name):
            for value in values:
                found = _YEAR.search(value)
                if found:
                    return found[0]
    return None


YEAR_NAME = re.compile(r"(?:.*[\W_])?year", re.IGNORECASE | re.DOTALL)
"""Names of attributes that hold years."""
_YEAR = re.compile(r"(?<!\d)\d{4}(?!\d)", re.ASCII)
_ARTICLES = "the|a|an|le|la|les|l|un|une|der|die|das|el|los|las|il|lo|gli|i"
_TRAILING_ARTICLE = re.compile(
    rf"^(.*\S),\s*({_ARTICLES})['\u2019]?(\s*\([^()]*\))?$", re.IGNORECASE
)
_LEADING_ARTICLE = re.compile(rf"^(?:{_ARTICLES}) (?=.)")
_TRAILING_YEAR = re.compile(r"\s*\(\d{4}\)$", re.ASCII)
_NO_APOSTROPHES = str.maketrans("", "", "'\u2019`")
_WORD = re.compile(r"[^\W_]+")
_NUMERAL = re.compile(r"\d+|ii|iii|iv|v|vi|vii|viii|ix|x")


def _exact_key(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _key(text: str) -> str:
    """Letters and digits alone: no case, accents or punctuation, a moved article put back."""
    if "," in text:
        text = _TRAILING_ARTICLE.sub(r"\2 \1\3", text)
    if not text.isascii():
        text = unicodedata.normalize("NFKD", text)
        text = "".join(char for char in text if not unicodedata.combining(char))
    text = text.casefold().replace("&", " and ").translate(_NO_APOSTROPHES)
    return " ".join(_WORD.findall(text)) or text.strip()


class TitleIndex:
    """Finds the item that a typed title means. Built at the first question, kept afterwards."""

    def __init__(self, items: Sequence[Item], shown: Sequence[str]):
        """`shown` holds the display titles of `items`."""
        self._items = items
        self._shown = shown

    @cached_property
    def _exact(self) -> dict[str, list[int]]:
        """Display titles and titles as they are, both by case and width only."""
        table: dict[str, list[int]] = defaultdict(list)
        for position, (item, shown) in enumerate(zip(self._items, self._shown, strict=True)):
            title = sanitise(item.title)
            for key in {_exact_key(text) for text in {shown, title} if text}:
                table[key].append(position)
        return dict(table)

    @cached_property
    def _normalised(self) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """By `_key`, first with the article, then without; each with and without the year."""
        full: dict[str, list[int]] = defaultdict(list)
        core: dict[str, list[int]] = defaultdict(list)
        for position, item in enumerate(self._items):
            title = sanitise(item.title)
            if not title:
                continue
            bare = _TRAILING_YEAR.sub("", title)
            whole = _key(title)
            keys = {whole}
            if bare and bare != title:
                keys.add(_key(bare))
            else:
                year = item_year(item)
                if year:
                    keys.add(f"{whole} {year}")
            for key in keys:
                full[key].append(position)
            for key in {_LEADING_ARTICLE.sub("", key) for key in keys}:
                core[key].append(position)
        return dict(full), dict(core)

    def titled(self, text: str) -> list[int]:
        """Positions of the items with this very title, by case, width and white space aside."""
        return self._exact.get(_exact_key(sanitise(text)), [])

    def resolve(self, text: str) -> int:
        """Position of the item whose title was typed.

        Raises AmbiguousTitleError with the candidates if several fit equally well, RequestError
        with the most similar titles if none does.
        """
        typed = sanitise(text)
        if not typed:
            raise RequestError(f"title {text[:80]!r} holds nothing to look for. Type a title.")
        key = _key(typed)
        full, core = self._normalised
        for table, wanted in (
            (self._exact, _exact_key(typed)),
            (full, key),
            (core, _LEADING_ARTICLE.sub("", key)),
        ):
            if wanted in table:
                return self._only(typed, table[wanted])
        return self._only(typed, self._fuzzy(typed, _LEADING_ARTICLE.sub("", key)))

    def _only(self, typed: str, positions: Iterable[int]) -> int:
        found = list(dict.fromkeys(positions))
        if len(found) == 1:
            return found[0]
        raise AmbiguousTitleError(
            typed, [(self._items[at].id, self._shown[at]) for at in found[:_CANDIDATES]]
        )

    def _fuzzy(self, typed: str, key: str) -> list[int]:
        core = self._normalised[1]
        similar = process.extract(
            key, self._core_keys, scorer=fuzz.ratio, score_cutoff=FUZZY_CUTOFF, limit=50
        )
        # "Toy Story 4" is not a misspelt "Toy Story 2".
        numerals = _numerals(key)
        similar = [match for match in similar if _numerals(match[0]) == numerals]
        if similar:
            least = similar[0][1] - FUZZY_MARGIN
            return [at for name, score, _ in similar if score >= least for at in core[name]]
        near = process.extract(key, self._core_keys, scorer=fuzz.WRatio, limit=20)
        shown = dict.fromkeys(self._shown[at] for name, _, _ in near for at in core[name])
        raise RequestError(
            f"no item is titled {typed!r}. Most similar: "
            + "; ".join(list(shown)[:_SUGGESTIONS])
            + ". Type one of these, or give the item's id."
        )

    @cached_property
    def _core_keys(self) -> list[str]:
        return list(self._normalised[1])


def _numerals(key: str) -> list[str]:
    return sorted(word for word in key.split() if _NUMERAL.fullmatch(word))
