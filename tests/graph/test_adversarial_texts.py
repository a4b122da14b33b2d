"""Whatever the policy writes, reading it never fails, takes no time, and says what is wrong."""

import time
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deeprec.graph import protocol
from deeprec.graph.format_rules import check_format, scripts_of
from deeprec.graph.protocol import AnswerForm, ListedItem
from deeprec.graph.transcript import Author
from deeprec.tools.interactions import Item
from deeprec.tools.titles import display_titles, sanitise

from . import policies

ITEMS = (ListedItem("a", "Alien"), ListedItem("b", "Film 3"))
NUMBERS = {"a": 1, "b": 2}
AUTHORS: tuple[Author, ...] = ("policy", "guided", "forced", "environment")
FORMS: tuple[AnswerForm, ...] = ("titles", "numbers")


@given(policies.texts)
@example("a </th<think>ink> b")
def test_a_turn_is_read_without_markers(text: str) -> None:
    parsed = protocol.parse_turn(text)
    assert not any(marker in parsed.thought for marker in policies.MARKERS)
    assert parsed.thought == parsed.thought.strip()
    assert parsed.thought in text
    if parsed.preference is not None:
        assert protocol.BEGIN_PREFERENCE in text
        assert protocol.END_PREFERENCE in text
        assert protocol.normalise_preference(parsed.preference) == parsed.preference != ""
        assert len(parsed.preference.splitlines()) == 1


@given(policies.texts, st.data())
def test_what_streams_is_the_beginning_of_what_is_read(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    told = ""
    for cut in [*cuts, len(text)]:
        so_far = protocol.thought_so_far(text[:cut])
        assert so_far.startswith(told)
        told = so_far
    assert protocol.parse_turn(text).thought.startswith(told)
    assert protocol.END_ANSWER not in protocol.answer_so_far(text)


@given(st.one_of(policies.texts, st.lists(policies.short).map("; ".join)))
def test_a_preference_is_normal_once_normalised(text: str) -> None:
    once = protocol.normalise_preference(text)
    assert protocol.normalise_preference(once) == once
    assert protocol.preference_key(once) == {part.casefold() for part in once.split("; ")}


@given(st.lists(st.tuples(st.sampled_from(AUTHORS), policies.texts), max_size=6), st.data())
def test_rules_judge_any_run(pieces: list[tuple[Author, str]], data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(FORMS))
    entries = protocol.parse_answer("".join(text for _, text in pieces)) or []
    resolved = protocol.resolve_entries(entries, ITEMS, NUMBERS, form)
    assert len(resolved) == len(entries)
    assert set(resolved) <= {"a", "b", None}
    broken = check_format(
        pieces, k=2, retrievals=1, entries=entries, resolved=resolved, scripts=frozenset()
    )
    own = "".join(text for author, text in pieces if author != "environment")
    assert ("own_item_list" in broken) == (protocol.BEGIN_ITEMS in own or protocol.END_ITEMS in own)
    if not broken:
        assert sorted(filter(None, resolved)) == ["a", "b"]


titles = st.one_of(
    policies.short,
    st.sampled_from(policies.MARKERS),
    st.builds(lambda text: text * 400, policies.fragments),
)


@given(st.lists(st.tuples(titles, titles), min_size=1, max_size=5), st.sampled_from(FORMS))
def test_any_catalog_is_read_back_as_it_was_rendered(
    rows: list[tuple[str, str]], form: AnswerForm
) -> None:
    """A policy that copies what it was shown names the items, and breaks no rule by it."""
    named = [Item(str(at), _whole(title) or "-") for at, (title, _) in enumerate(rows)]
    shown = display_titles(named)
    about = [sanitise(value) for _, value in rows]
    items = [
        ListedItem(item.id, title, (f"about: {value}",) if value else ())
        for item, title, value in zip(named, shown, about, strict=True)
    ]
    numbers = {item.id: at * 1000 for at, item in enumerate(items, 1)}
    listed = protocol.render_retrieved(items, numbers, form)
    assert [listed.count(marker) for marker in policies.MARKERS] == [0, 0, 0, 0, 1, 1, 0, 0]
    heads = [line for line in listed.splitlines()[3:-2] if not line.startswith("  - ")]
    copied = [line.partition(" ")[2 * (form == "titles")] for line in heads]
    lines = "\n".join(f"{rank}. {entry}" for rank, entry in enumerate(copied, 1))
    answer = f"So.</think>{protocol.BEGIN_ANSWER}\n{lines}\n{protocol.END_ANSWER}"
    entries = protocol.parse_answer(answer)
    assert entries == copied
    resolved = protocol.resolve_entries(entries, items, numbers, form)
    assert resolved == [item.id for item in items]
    asked = f"<think>{protocol.BEGIN_PREFERENCE} x {protocol.END_PREFERENCE}"
    broken = check_format(
        [("policy", asked), ("environment", listed), ("policy", answer)],
        k=len(items),
        retrievals=1,
        entries=entries,
        resolved=resolved,
        scripts=scripts_of(shown),
    )
    assert broken in ([], ["placeholder"])  # a title can be the prompt's own example


def _whole(text: str) -> str:
    """No item holds half of a surrogate pair (tools/items.py)."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check(text: str) -> None:
    pieces: list[tuple[Author, str]] = [("policy", text)]
    entries = protocol.parse_answer(text) or []
    resolved = protocol.resolve_entries(entries, ITEMS, NUMBERS, "titles")
    check_format(pieces, k=2, retrievals=1, entries=entries, resolved=resolved, scripts=frozenset())


READERS: tuple[Callable[[str], object], ...] = (
    *(protocol.parse_turn, protocol.thought_so_far, protocol.answer_so_far, check),
    *(protocol.parse_answer, protocol.normalise_preference, protocol.preference_key, sanitise),
)
N = policies.LONG
PUMPED = (
    *(marker * (N // len(marker)) for marker in policies.MARKERS),
    *(f"{protocol.BEGIN_ANSWER}\n1. a{blank * N}b\x00" for blank in (" ", "\t", "\u3000")),
    *(f"{protocol.BEGIN_ANSWER}\n{line * (N // len(line))}" for line in ("1. a\n", "1.", "1. ")),
    *(f"{protocol.BEGIN_PREFERENCE}{phrase * (N // 2)}{protocol.END_PREFERENCE}"
      for phrase in ("a;", "; ", " ;")),
    "; ".join(map(str, range(N // 8))),
    *(char * N for char in ("<", "[", "\x1b", "\x9b", " ", "\n", "\u0301", "\u202e", "9", "(")),
    *(opened + char * N for opened in ("\x1b]", "\x1b[", "\x9b", "[", "1. ") for char in " 0a;["),
)  # fmt: skip


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_a_hundred_thousand_characters_are_read_at_once(read: Callable[[str], object]) -> None:
    for text in PUMPED:
        _in_time(read, text)


@settings(max_examples=settings().max_examples // 10)
@given(policies.long)
def test_pumped_fragments_are_read_at_once(text: str) -> None:
    for read in READERS:
        _in_time(read, text)


def _in_time(read: Callable[[str], object], text: str) -> None:
    began = time.thread_time()
    read(text)
    assert time.thread_time() - began < 1, f"{read.__name__} of {text[:40]!r}…"
