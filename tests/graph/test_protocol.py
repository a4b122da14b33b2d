import pytest

from deeprec.graph import protocol
from deeprec.graph.fusion import reciprocal_rank_fusion
from deeprec.graph.protocol import ListedItem, ParsedTurn

BEGIN, END = protocol.BEGIN_PREFERENCE, protocol.END_PREFERENCE
ALIEN, ALIENS = ListedItem("a", "Alien", ("genres: Horror",)), ListedItem("b", "Aliens")


@pytest.mark.parametrize(
    ("text", "thought", "preference"),
    [
        (
            f"<think>\nHe likes space. {BEGIN} horror; space {END}",
            "He likes space.",
            "horror; space",
        ),
        (f"No marker {END}", "No marker", None),
        (f"{BEGIN}  {END}", "", None),
        (f"x {BEGIN} ; ; {END}", "x", None),
        (f"x {BEGIN} never closed", "x", None),
        (f"x {BEGIN} one {BEGIN} two {END} tail", "x", "two"),
        (f"x {BEGIN} a ;b\n; A;  c  d {END}", "x", "a; b; c d"),
        ("the end</think>", "the end", None),
        ("", "", None),
    ],
)
def test_parse_turn(text: str, thought: str, preference: str | None) -> None:
    assert protocol.parse_turn(text) == ParsedTurn(thought, preference)


def test_preference_key_ignores_order_and_case() -> None:
    assert protocol.preference_key("Space; horror") == protocol.preference_key("horror; space")
    assert protocol.preference_key("space") != protocol.preference_key("horror")


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        (
            "<recommendation_list>\n1. Alien\n 2.  Aliens \n</recommendation_list>",
            ["Alien", "Aliens"],
        ),
        ("<recommendation_list>\n1. Alien\nchatter\n2. 3. Aliens", ["Alien", "3. Aliens"]),
        ("<recommendation_list></recommendation_list>", []),
        ("1. Alien", None),
        ("<recommendation_list>\n1.\n2. ", []),
    ],
)
def test_parse_answer(text: str, entries: list[str] | None) -> None:
    assert protocol.parse_answer(text) == entries


def test_a_title_inside_a_title_is_another_item() -> None:
    resolved = protocol.resolve_entries(
        ["Aliens", " alien ", "Alie", "Alien 3"], [ALIEN, ALIENS], {"a": 1, "b": 2}, "titles"
    )
    assert resolved == ["b", "a", None, None]


def test_numbers_resolve_by_number_only() -> None:
    resolved = protocol.resolve_entries(
        ["#2", "1", "#3", "Alien", "#1 Alien"], [ALIEN, ALIENS], {"a": 1, "b": 2}, "numbers"
    )
    assert resolved == ["b", "a", None, None, None]


def test_rendered_list_has_the_protocols_form() -> None:
    text = protocol.render_retrieved([ALIEN, ALIENS], {"a": 7, "b": 9}, "titles")
    assert text == (
        "\n\n<|begin_of_item_list|>\n1. Alien\n  - genres: Horror\n2. Aliens\n"
        "<|end_of_item_list|>\n\n"
    )
    text = protocol.render_retrieved([ALIEN, ALIENS], {"a": 7, "b": 9}, "numbers")
    assert "#7 Alien\n" in text
    assert "#9 Aliens\n" in text


def test_long_lines_are_cut() -> None:
    line = protocol.render_item("1.", ListedItem("a", "x" * 5000))
    assert len(line) == protocol.MAX_LINE_CHARS


@pytest.mark.parametrize("form", ["titles", "numbers"])
def test_prompt_holds_the_history_in_order_and_k(form: protocol.AnswerForm) -> None:
    messages = protocol.build_messages([ALIEN, ALIENS], k=7, answer_form=form, wishes=["only 1979"])
    text = messages[1]["content"]
    assert text.index("1. Alien\n") < text.index("2. Aliens\n")
    assert text.endswith("Recommend 7 items.")
    assert "only 1979" in text
    assert [message["role"] for message in messages] == ["system", "user"]


@pytest.mark.parametrize("form", ["titles", "numbers"])
def test_what_all_requests_share_comes_first(form: protocol.AnswerForm) -> None:
    one = protocol.build_messages([ALIEN], k=7, answer_form=form, likes=["rain"])
    other = protocol.build_messages([ALIENS, ALIEN], k=3, answer_form=form, wishes=["short"])
    assert one[0] == other[0]
    assert all(marker in one[0]["content"] for marker in ("<think>", "</recommendation_list>"))


def test_reciprocal_rank_fusion_by_hand() -> None:
    # By hand, a scores .03227 (1/61 and 1/63), b .03252 (1/62 and 1/61), c .01613 (1/62).
    assert reciprocal_rank_fusion([["a", "b"], ["b", "c", "a"]]) == ["b", "a", "c"]
    assert reciprocal_rank_fusion([]) == []
    assert reciprocal_rank_fusion([["x", "y"]]) == ["x", "y"]
    # a 3/3 + 1/4, b 3/4 + 1/3, c 1/5; with equal weights b would lead.
    lists = [["a", "b"], ["b", "a", "c"]]
    assert reciprocal_rank_fusion(lists, first_weight=3, constant=2) == ["a", "b", "c"]
    assert reciprocal_rank_fusion([["a"], ["b", "c"]], first_weight=0.5) == ["b", "c", "a"]
