"""The protocol of one run: its markers, what the prompt says, how lists are written and read.

Pure functions over text. Titles and attributes arrive here already sanitised (tools/titles.py),
so nothing that the catalog holds can spell a marker.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

BEGIN_THINK, END_THINK = "<think>", "</think>"
BEGIN_PREFERENCE, END_PREFERENCE = "<|begin_of_preference|>", "<|end_of_preference|>"
BEGIN_ITEMS, END_ITEMS = "<|begin_of_item_list|>", "<|end_of_item_list|>"
BEGIN_ANSWER, END_ANSWER = "<recommendation_list>", "</recommendation_list>"

ANYTHING = "anything"
"""The preference that stands for none: the TRM searches by the history alone."""

MAX_LINE_CHARS = 750
"""Lines of a history or a list are cut here (METHOD.md §2, the authors' constant); a title with its
label is never longer (tools/titles.py)."""

AnswerForm = Literal["titles", "numbers"]
"""titles: the answer names titles. numbers: it names the numbers of retrieved items (#17)."""

_SYSTEM = (
    "You recommend items from a catalog. You don't know the catalog by heart: you search it, look "
    "at what comes back, search again from another side, and then rank what you found."
)
_SEARCH = f"""\
Between {BEGIN_THINK} and {END_THINK}, reason about what this user may want next. To search, write \
a few short phrases joined by ; between {BEGIN_PREFERENCE} and {END_PREFERENCE}. The catalog \
answers with a list between {BEGIN_ITEMS} and {END_ITEMS}; never write such a list yourself. \
The word {ANYTHING} alone searches by the history only. Search as often as it helps, each time \
with another preference."""
_ANSWER_TITLES = f"""\
Then close {END_THINK} and write the best of the listed titles, best first, each once:
{BEGIN_ANSWER}
1. (title)
2. (title)
…
{END_ANSWER}"""
_ANSWER_NUMBERS = f"""\
Then close {END_THINK} and write the numbers of the best listed items, best first, each once:
{BEGIN_ANSWER}
1. #(number)
2. #(number)
…
{END_ANSWER}"""
PLACEHOLDERS = ("(title)", "#(number)")
"""What the prompt's example lines hold; copied into an answer they are a format failure."""


@dataclass(frozen=True, slots=True)
class ListedItem:
    """An item as the policy reads it: sanitised, unique title and "name: a, b" attributes."""

    id: str
    title: str
    attributes: tuple[str, ...] = ()


def render_item(label: str, item: ListedItem) -> str:
    """One item of a list: its labelled title and a line of attributes where it has any."""
    lines = [f"{label} {item.title}"]
    if item.attributes:
        lines.append("  - " + " | ".join(item.attributes))
    return "\n".join(line[:MAX_LINE_CHARS] for line in lines)


def build_messages(
    history: Sequence[ListedItem],
    *,
    k: int,
    answer_form: AnswerForm,
    wishes: Sequence[str] = (),
    likes: Sequence[str] = (),
    dislikes: Sequence[str] = (),
) -> list[dict[str, str]]:
    """Chat messages of a request: the task and its protocol, then the history oldest first.

    What all requests of an answer form share comes first, so that an engine reads it once for all.
    `wishes` are sanitised one-line statements of what the user asked for; `likes` and `dislikes`
    of what they said in earlier runs.
    """
    parts = request_parts(history, wishes=wishes, likes=likes, dislikes=dislikes)
    parts.append(f"Recommend {k} items.")
    answer = _ANSWER_TITLES if answer_form == "titles" else _ANSWER_NUMBERS
    return [
        {"role": "system", "content": "\n\n".join([_SYSTEM, _SEARCH, answer])},
        {"role": "user", "content": "\n\n".join(parts)},
    ]


def request_parts(
    history: Sequence[ListedItem],
    *,
    wishes: Sequence[str] = (),
    likes: Sequence[str] = (),
    dislikes: Sequence[str] = (),
) -> list[str]:
    """What a prompt says of the user, paragraph by paragraph."""
    seen = "\n".join(render_item(f"{rank}.", item) for rank, item in enumerate(history, 1))
    said = {"asks for": wishes, "said they like": likes, "said they dislike": dislikes}
    told = [f"The user {verb}: {'; '.join(lines)}" for verb, lines in said.items() if lines]
    return [f"The user's history, oldest first:\n{seen}", *told]


def render_retrieved(
    items: Sequence[ListedItem], numbers: Mapping[str, int], answer_form: AnswerForm
) -> str:
    """Write the environment's answer to a preference.

    In the form `numbers` an item is labelled with its number of the whole run, which `numbers`
    maps from its id; in the form `titles` lines count from 1.
    """
    labels = (
        [f"#{numbers[item.id]}" for item in items]
        if answer_form == "numbers"
        else [f"{rank}." for rank in range(1, len(items) + 1)]
    )
    lines = [render_item(label, item) for label, item in zip(labels, items, strict=True)]
    return "\n\n" + "\n".join([BEGIN_ITEMS, *lines, END_ITEMS]) + "\n\n"


def render_refusal(reason: str) -> str:
    """Write the environment's answer to a preference that it doesn't search for."""
    return f"\n\n({reason})\n\n"


def render_edit(preference: str) -> str:
    """Say before a list that it answers the user's preference, not the one that was written."""
    return f"\n\n(The user asks for this instead: {preference})"


def render_review(rejected: Sequence[tuple[str, str]], wishes: Sequence[str], *, k: int) -> str:
    """Write the user's message about an answer, sanitised words only.

    `rejected` are titles with the reason, "" where none was given; none: the user wants others.
    """
    unwanted = "; ".join(f"{title} ({why})" if why else title for title, why in rejected)
    lines = [f"I don't want: {unwanted}" if rejected else "I want others than those."]
    if wishes:
        lines.append("I ask for: " + "; ".join(wishes))
    lines.append(f"Think again, search if it helps, and write a new list of {k} in the same form.")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class ParsedTurn:
    """What the policy wrote in one turn. `preference` is None where no marked one is there."""

    thought: str
    preference: str | None


def parse_turn(text: str) -> ParsedTurn:
    """Read thought and preference off the policy's text of one turn.

    The preference is what stands between the last begin marker and the first end marker after
    it; empty or unmarked ones are None. Phrases are normalised by `normalise_preference`.
    """
    _, begin, rest = text.rpartition(BEGIN_PREFERENCE)
    inside, end, _ = rest.partition(END_PREFERENCE)
    preference = normalise_preference(inside) if begin and end else ""
    return ParsedTurn(_clean_thought(text), preference or None)


def normalise_preference(text: str) -> str:
    """Phrases joined by "; " on one line, without empty ones or repeats (case ignored)."""
    kept: dict[str, str] = {}
    for phrase in (" ".join(part.split()) for part in text.split(";")):
        if phrase:
            kept.setdefault(phrase.casefold(), phrase)
    return "; ".join(kept.values())


def preference_key(preference: str) -> frozenset[str]:
    """Compare preferences by this: the same phrases in another order are the same preference."""
    return frozenset(phrase.strip().casefold() for phrase in preference.split(";"))


def searched_preference(preference: str | None) -> str | None:
    """What the TRM is given: the preference, or None where it says `ANYTHING` and no more."""
    if preference is not None and preference_key(preference) == {ANYTHING}:
        return None
    return preference


_MARKERS = (
    BEGIN_THINK,
    END_THINK,
    BEGIN_PREFERENCE,
    END_PREFERENCE,
    BEGIN_ITEMS,
    END_ITEMS,
    BEGIN_ANSWER,
    END_ANSWER,
)
_ANY_MARKER = re.compile("|".join(map(re.escape, _MARKERS)))
_OPENING = re.compile(rf"(?:\s*{re.escape(BEGIN_THINK)})*")


def _clean_thought(text: str) -> str:
    """Return what was said before any marker but those that open a thought."""
    return _ANY_MARKER.split(_OPENING.sub("", text, count=1), maxsplit=1)[0].strip()


def thought_so_far(text: str) -> str:
    """Read the thought off the text of a turn that is still being written.

    What may yet become a marker is left out, so that the thought of a longer text goes on from
    this one.
    """
    return _clean_thought(_without_open_marker(text))


def answer_so_far(text: str) -> str:
    """Read the lines of the answer off a text that is still being written."""
    inside = text.rpartition(BEGIN_ANSWER)[2] if BEGIN_ANSWER in text else ""
    return _without_open_marker(inside.partition(END_ANSWER)[0]).strip()


def _without_open_marker(text: str) -> str:
    before, bracket, after = text.rpartition("<")
    tail = bracket + after
    opens = bracket and any(marker != tail and marker.startswith(tail) for marker in _MARKERS)
    return before if opens else text


NUMBERED = re.compile(r"(\d{1,9})\.\s+(\S.*)")
"""A line of an answer, stripped (so that matching is linear in its length): number and entry."""
_NUMBER = re.compile(r"#?(\d{1,9})")


def parse_answer(text: str) -> list[str] | None:
    """Entries of the numbered lines between the answer's markers, in the order written.

    None where there is no opening marker; an unclosed list is read as far as it goes.
    """
    _, begin, rest = text.rpartition(BEGIN_ANSWER)
    if not begin:
        return None
    lines = rest.partition(END_ANSWER)[0].splitlines()
    return [match[2] for line in lines if (match := NUMBERED.fullmatch(line.strip()))]


def resolve_entries(
    entries: Sequence[str],
    retrieved: Sequence[ListedItem],
    numbers: Mapping[str, int],
    answer_form: AnswerForm,
) -> list[str | None]:
    """Item id of each entry, or None where it names nothing that was retrieved."""
    if answer_form == "numbers":
        by_number = {numbers[item.id]: item.id for item in retrieved}
        matches = (_NUMBER.fullmatch(entry) for entry in entries)
        return [by_number.get(int(match[1])) if match else None for match in matches]
    by_title = {_title_key(item.title): item.id for item in retrieved}
    return [by_title.get(_title_key(entry)) for entry in entries]


def _title_key(title: str) -> str:
    return " ".join(title.split()).casefold()
