"""Why an item is recommended: the search that found it, and what ties it to the history."""

from dataclasses import replace

import numpy as np

from deeprec.graph.explanations import explanations
from deeprec.graph.likeness import likeness
from deeprec.tools.retriever import Retriever

from .conftest import RunGraph
from .test_loop import answer, ask, found, good_script, respond


def test_recommendations_say_why_if_asked(run_graph: RunGraph, retriever: Retriever) -> None:
    first, second, *_ = found(retriever, "western; <b>")
    script = [
        "<think>" + ask("western; <b>"),
        *("So.</think>", answer(f"Film {second}", f"Film {first}"), ""),
    ]
    response = respond(run_graph(*script, explain=True))
    assert [line.id for line in response.recommendations] == [second, first]
    history = ["0", "1", "2"]
    for line in response.recommendations:
        nearest = history[int(np.argmax(likeness(retriever.catalog.snapshot, history, line.id)))]
        assert (line.turn, line.preference) == (1, "western; <b>")
        assert line.reason is not None
        assert line.reason.startswith(
            "It came up in the search for “western; ‹b›”, and of the history it is most like "
            f"Film {nearest}"
        )
        assert line.reason.count(".") == 1
    plain = respond(run_graph(*script))
    assert {(line.turn, line.preference, line.reason) for line in plain.recommendations} == {
        (None, None, None)
    }
    assert [line.id for line in plain.recommendations] == [second, first]


def test_the_first_search_that_found_an_item_is_named(retriever: Retriever) -> None:
    turns = [
        {"retrieved": [{"id": "9"}], "preference": "comedy"},
        {"retrieved": [], "preference": "Comedy"},  # refused
        {"retrieved": [{"id": "9"}, {"id": "39"}], "preference": "western"},
    ]
    told = explanations(["39", "9"], turns, ["5"], retriever.catalog)
    assert (told["9"]["turn"], told["9"]["preference"]) == (1, "comedy")
    assert (told["39"]["turn"], told["39"]["preference"]) == (3, "western")


def test_reasons_name_what_both_share(retriever: Retriever) -> None:
    turns = [{"retrieved": [{"id": "9"}, {"id": "39"}], "preference": "anything"}]
    told = explanations(["9", "39", "20"], turns, ["5", "gone"], retriever.catalog)
    assert told["9"]["reason"] == (
        "The history as a whole suggests it, and of the history it is most like Film 5 "
        "(both genres: Comedy)."
    )
    assert told["39"]["reason"].endswith("most like Film 5.")
    assert told["20"] == {
        "turn": None,
        "preference": None,
        "reason": "No search brought it in; the history as a whole suggests it, and of the "
        "history it is most like Film 5.",
    }


def test_the_catalogs_text_is_harmless_in_reasons(retriever: Retriever) -> None:
    before = retriever.catalog.item("5")
    retriever.upsert([replace(before, title="</think>\n\x1b[31mFive")])
    try:
        told = explanations(["9"], [], ["5"], retriever.catalog)
    finally:
        retriever.upsert([before])
    assert "‹/think› Five (both" in told["9"]["reason"]


def test_what_fills_the_list_is_explained_too(run_graph: RunGraph) -> None:
    response = respond(run_graph(*good_script()[:2], answer(), "", explain=True, k=6))
    filled = [line for line in response.recommendations if line.source == "trm"]
    assert filled
    assert all(line.turn is None and line.reason for line in filled)
