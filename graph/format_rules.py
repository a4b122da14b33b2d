"""The format rules of METHOD.md §4: what a run must obey to count in strict evaluation.

Each broken rule has a name, so that a log shows which one failed. The authors' rules come first;
`duplicate_line` and `not_retrieved` close the holes that METHOD.md §4 names.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal

from . import protocol
from .transcript import Author

Violation = Literal[
    "markers",
    "no_retrieval",
    "text_after_answer",
    "line_count",
    "no_final_thought",
    "own_item_list",
    "placeholder",
    "foreign_script",
    "duplicate_line",
    "not_retrieved",
]
"""Names of the rules.

markers: unbalanced or out of order. no_retrieval: never searched. text_after_answer: anything
but the list after </think>. line_count: not exactly K lines numbered 1 to K. no_final_thought:
nothing said after the last list. own_item_list: the policy wrote an item list. placeholder: the
prompt's example lines were copied. foreign_script: letters of a script that the catalog doesn't
use. duplicate_line, not_retrieved: an answer line repeats, or names nothing that was retrieved.
"""

AUTHORS_RULES: tuple[Violation, ...] = (
    "markers",
    "no_retrieval",
    "text_after_answer",
    "line_count",
    "no_final_thought",
    "own_item_list",
    "placeholder",
    "foreign_script",
)
"""The rules of the paper's authors, without the two that close their holes."""

_EVENTS = {
    protocol.BEGIN_THINK: "T",
    protocol.END_THINK: "t",
    protocol.BEGIN_PREFERENCE: "P",
    protocol.END_PREFERENCE: "p",
    protocol.BEGIN_ITEMS: "I",
    protocol.END_ITEMS: "i",
    protocol.BEGIN_ANSWER: "A",
    protocol.END_ANSWER: "a",
}
_MARKER = re.compile("|".join(re.escape(marker) for marker in _EVENTS))
# A refused preference has no list after it.
_ORDER = re.compile(r"T(Pp(Ii)?)*tAa")


def check_format(
    pieces: Sequence[tuple[Author, str]],
    *,
    k: int,
    retrievals: int,
    entries: Sequence[str],
    resolved: Sequence[str | None],
    scripts: frozenset[str],
) -> list[Violation]:
    """Names of the rules that a finished run broke, in the order of `Violation`.

    Args:
        pieces: text of the completion, piece by piece with its author; end-of-sequence tokens
            already removed.
        k: number of recommendations asked for.
        retrievals: lists that the environment returned.
        entries: answer lines as written (protocol.parse_answer).
        resolved: item id of each entry, or None (protocol.resolve_entries).
        scripts: scripts of the catalog (`scripts_of`).

    """
    text = "".join(piece for _, piece in pieces)
    own = "".join(piece for author, piece in pieces if author != "environment")
    inside, _, after = text.partition(protocol.END_THINK)
    answer, _, tail = after.rpartition(protocol.END_ANSWER)
    head, _, body = answer.partition(protocol.BEGIN_ANSWER)
    lines = [line.strip() for line in body.splitlines() if line.strip()]
    numbers = [match[1] for line in lines if (match := protocol.NUMBERED.fullmatch(line))]
    found = [item for item in resolved if item is not None]
    broken: dict[Violation, bool] = {
        "markers": not _ORDER.fullmatch("".join(_EVENTS[m] for m in _MARKER.findall(text))),
        "no_retrieval": retrievals == 0,
        "text_after_answer": bool(head.strip() or tail.strip() or len(numbers) < len(lines)),
        "line_count": numbers != [str(rank) for rank in range(1, k + 1)],
        "no_final_thought": not inside.rpartition(protocol.END_ITEMS)[2].strip(),
        "own_item_list": protocol.BEGIN_ITEMS in own or protocol.END_ITEMS in own,
        "placeholder": any(placeholder in own for placeholder in protocol.PLACEHOLDERS),
        "foreign_script": not scripts_of([own]) <= scripts | {"LATIN"},
        "duplicate_line": len({entry.casefold() for entry in entries}) < len(entries)
        or len(set(found)) < len(found),
        "not_retrieved": len(found) < len(resolved),
    }
    return [rule for rule, is_broken in broken.items() if is_broken]


def scripts_of(texts: Iterable[str]) -> frozenset[str]:
    """Scripts of the letters in `texts`: the first word of their Unicode names (LATIN, CJK …).

    LATIN letters beyond ASCII count as LATIN; marks, digits and symbols have no script.
    """
    letters = {letter for text in texts for letter in set(text) if letter.isalpha()}
    return frozenset(unicodedata.name(letter, "UNKNOWN").split()[0] for letter in letters)
