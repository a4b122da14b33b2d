import pytest

from deeprec.graph import protocol
from deeprec.graph.format_rules import Violation, check_format, scripts_of
from deeprec.graph.transcript import Author

Pieces = list[tuple[Author, str]]
LATIN = frozenset({"LATIN"})
ASK: Pieces = [
    (
        "policy",
        f"<think>\nHe likes space. {protocol.BEGIN_PREFERENCE} space {protocol.END_PREFERENCE}",
    ),
    ("environment", f"\n\n{protocol.BEGIN_ITEMS}\n1. Alien\n2. Aliens\n{protocol.END_ITEMS}\n\n"),
]
LIST = "<recommendation_list>\n1. Alien\n2. Aliens\n</recommendation_list>"


def broken(pieces: Pieces, *, k: int = 2, retrievals: int = 1) -> list[Violation]:
    own = "".join(text for author, text in pieces if author != "environment")
    entries = protocol.parse_answer(own) or []
    known = {"Alien": "a", "Aliens": "b"}
    return check_format(
        pieces,
        k=k,
        retrievals=retrievals,
        entries=entries,
        resolved=[known.get(entry) for entry in entries],
        scripts=LATIN,
    )


def test_a_good_run_breaks_nothing() -> None:
    assert broken([*ASK, ("policy", f"Both fit.\n</think>\n{LIST}")]) == []
    assert (
        broken(
            [
                *ASK,
                *[(a, t.replace("<think>", "")) for a, t in ASK],
                ("policy", f"Yes.</think>{LIST}"),
            ]
        )
        == []
    )


def test_a_refused_preference_has_no_list_and_breaks_nothing() -> None:
    again: Pieces = [
        ("policy", ASK[0][1].replace("<think>", "")),
        ("environment", "(asked already)"),
    ]
    assert broken([*ASK, *again, ("policy", f"Fine.</think>{LIST}")]) == []


@pytest.mark.parametrize(
    ("rule", "end"),
    [
        ("markers", f"Both fit.\n{LIST}"),
        ("markers", f"Both.</think></think>{LIST}"),
        ("text_after_answer", f"Both.</think>{LIST} and more"),
        ("text_after_answer", f"Both.</think> so {LIST}"),
        (
            "text_after_answer",
            "Both.</think><recommendation_list>\n1. Alien\nhm\n2. Aliens\n</recommendation_list>",
        ),
        ("line_count", "Both.</think><recommendation_list>\n1. Alien\n</recommendation_list>"),
        (
            "line_count",
            "Both.</think><recommendation_list>\n2. Alien\n1. Aliens\n</recommendation_list>",
        ),
        ("no_final_thought", f"\n</think>{LIST}"),
        ("own_item_list", f"{protocol.BEGIN_ITEMS}1. x{protocol.END_ITEMS} Both.</think>{LIST}"),
        (
            "placeholder",
            "Both.</think><recommendation_list>\n1. (title)\n2. Alien\n</recommendation_list>",
        ),
        ("foreign_script", f"Оба.</think>{LIST}"),
        (
            "duplicate_line",
            "Both.</think><recommendation_list>\n1. Alien\n2. Alien\n</recommendation_list>",
        ),
        (
            "not_retrieved",
            "Both.</think><recommendation_list>\n1. Alien\n2. Alien 3\n</recommendation_list>",
        ),
    ],
)
def test_each_rule_is_named(rule: Violation, end: str) -> None:
    assert rule in broken([*ASK, ("policy", end)])


def test_only_the_broken_rule_is_named() -> None:
    end = "Both.</think><recommendation_list>\n1. Alien\n2. Alien 3\n</recommendation_list>"
    assert broken([*ASK, ("policy", end)]) == ["not_retrieved"]


def test_no_retrieval() -> None:
    assert broken([("policy", f"<think>Well.</think>{LIST}")], retrievals=0) == ["no_retrieval"]


def test_a_list_that_the_environment_wrote_is_not_the_policys() -> None:
    assert "own_item_list" not in broken([*ASK, ("policy", f"Both.</think>{LIST}")])


def test_scripts() -> None:
    assert scripts_of(["Amélie", "1, 2!", ""]) == {"LATIN"}
    assert scripts_of(["七人の侍"]) == {"CJK", "HIRAGANA"}
