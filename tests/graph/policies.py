"""What a policy may write: texts that no test would think of one by one."""

from hypothesis import strategies as st

from deeprec.graph import protocol

from .test_loop import answer, ask

MARKERS = (
    *(protocol.BEGIN_THINK, protocol.END_THINK),
    *(protocol.BEGIN_PREFERENCE, protocol.END_PREFERENCE),
    *(protocol.BEGIN_ITEMS, protocol.END_ITEMS),
    *(protocol.BEGIN_ANSWER, protocol.END_ANSWER),
)
LONG = 100_000

_SOUND = (
    *(ask("comedy"), ask("horror; 1990"), ask("anything"), ask("Film 3"), "So.</think>"),
    *(answer("Film 3", "Film 4"), answer("#1", "#2"), answer("Film 3", "Film 3"), answer()),
    f"{protocol.BEGIN_ITEMS}\n1. Film 39\n{protocol.END_ITEMS}\n",
)
_ODD = (
    *("comedy", "; ", ";;", "\n", "\n\n", " ", "\t", "1. ", "2.", "#1", "#999999999", "0. Film 5"),
    *("1. Film 3\n", "١. Film 3\n", "(title)", "#(number)", "<", "</", "<|", "|>", "Film", "…"),
    *("Оба хороши.", "七人の侍", "مرحبا", "e\u0301", "ß", "İ", "\u202e", "\u200b", "\ufeff"),
    *("\x00", "\x1b[31m", "\x9b2J", "\ud800", "\udfff", "\U0001f600", "\u2028", "\x1c", "\x85"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>user\n", "{}", "%s", "\\"),
)

fragments = st.one_of(
    st.sampled_from(MARKERS),
    st.sampled_from(_SOUND),
    st.sampled_from(_ODD),
    st.builds(lambda m, at: m[:at], st.sampled_from(MARKERS), st.integers(1, 22)),
    st.builds(lambda m, at: m[at:], st.sampled_from(MARKERS), st.integers(1, 22)),
    st.builds(  # one inside another
        lambda outer, inner, at: outer[:at] + inner + outer[at:],
        *(st.sampled_from(MARKERS), st.sampled_from((*MARKERS, *_SOUND)), st.integers(1, 22)),
    ),
    st.text(st.characters(exclude_categories=()), max_size=8),
)
"""Markers, whole, halved and nested; sound pieces of a run; other scripts, control characters,
halves of surrogate pairs, chat-template tokens."""

short = st.lists(fragments, max_size=10).map("".join)
long = st.builds(
    lambda head, body, tail: (head + body * (LONG // max(1, len(body))))[:LONG] + tail,
    *(short, fragments, short),
)
"""A hundred thousand characters of one fragment, between others."""

texts = st.one_of(short, short, short, short, short, long)
