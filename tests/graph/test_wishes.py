"""Wishes in a user's own words, over the tiny catalog: films of four genres, one a year."""

from typing import Any

import numpy as np
import pytest

from deeprec.errors import RequestError
from deeprec.graph.likeness import likeness
from deeprec.graph.wishes import Leaning, lean, read_wishes
from deeprec.tools.retriever import RetrievalRequest, Retriever

from .conftest import RunGraph
from .test_loop import answer, ask, found, respond


@pytest.mark.parametrize(
    ("wish", "means"),
    [
        ("only from the 1990s", {"year": {"gte": 1990, "lte": 1999}}),
        ("Only 1990s.", {"year": {"gte": 1990, "lte": 1999}}),
        ("just films of the '80s", {"year": {"gte": 1980, "lte": 1989}}),
        ("only 1994", {"year": {"gte": 1994, "lte": 1994}}),
        ("only between 1970 and 1979", {"year": {"gte": 1970, "lte": 1979}}),
        ("only 1970-1979", {"year": {"gte": 1970, "lte": 1979}}),
        ("only before 1980", {"year": {"lte": 1979}}),
        ("only after 1980", {"year": {"gte": 1981}}),
        ("only from 1980 on", {"year": {"gte": 1980}}),
        ("nothing before 1980", {"year": {"gte": 1980}}),
        ("no films older than 1980", {"year": {"gte": 1980}}),
        ("nothing after 1980", {"year": {"lte": 1980}}),
        ("only Comedy", {"genres": {"any": ["Comedy"]}}),
        ("only comedies and westerns", {"genres": {"any": ["Comedy", "Western"]}}),
        ("nothing but horror movies", {"genres": {"any": ["Horror"]}}),
        ("no Horror", {"genres": {"not": ["Horror"]}}),
        ("no horror, no westerns", {"genres": {"not": ["Horror", "Western"]}}),
        (
            "only dramas from the 1970s",
            {"genres": {"any": ["Drama"]}, "year": {"gte": 1970, "lte": 1979}},
        ),
    ],
)
def test_what_is_certain_filters(retriever: Retriever, wish: str, means: dict[str, Any]) -> None:
    read = read_wishes([wish], retriever.catalog)
    assert read.where == [means]
    assert [line.wish for line in read.understood] == [wish]
    assert read.words == [read.understood[0].means]


@pytest.mark.parametrize(
    "wish",
    [
        "something light",
        "no sequels",
        "nothing gory",
        "only good ones",
        "only comedies that are short",
        "only comedies or sequels",
        "no films from the 1990s",
        "something from the 1990s",
        "only between 1999 and 1990",
        "less like nothing on earth",
        "the only Comedy",
    ],
)
def test_what_is_not_certain_stays_words(retriever: Retriever, wish: str) -> None:
    read = read_wishes([wish], retriever.catalog)
    assert (read.where, read.leanings, read.understood) == ([], [], [])
    assert read.words == [wish]


def test_a_value_of_two_attributes_is_not_certain(retriever: Retriever) -> None:
    from dataclasses import replace

    before = retriever.catalog.item("7")
    retriever.upsert([replace(before, attributes={**before.attributes, "tag": ("Horror",)})])
    try:
        assert read_wishes(["no horror"], retriever.catalog).where == []
    finally:
        retriever.upsert([before])


def test_tastes_are_words_and_more(retriever: Retriever) -> None:
    wishes = ["I like slow films", "I don't like gore.", "i love westerns"]
    read = read_wishes(wishes, retriever.catalog)
    assert read.words == wishes
    assert read.tastes == [
        ("like", "slow films"),
        ("dislike", "gore"),
        ("like", "westerns"),
    ]


def test_leanings_reorder_what_is_found(retriever: Retriever) -> None:
    read = read_wishes(["less like film 25", "something more like Film 3"], retriever.catalog)
    assert read.leanings == [Leaning("25", more=False), Leaning("3", more=True)]
    assert read.named == ["25", "3"]
    assert read.understood[0].means == "items like Film 25 come later"
    items = retriever.retrieve([RetrievalRequest(("0", "1"), None, 12)])[0]
    now = retriever.catalog.snapshot
    for more in (True, False):
        moved = lean(items, [Leaning("25", more=more)], retriever.catalog)
        assert sorted(item.id for item in moved) == sorted(item.id for item in items)
        alike = [
            float(np.mean(likeness(now, [item.id for item in order[:4]], "25")))
            for order in (items, moved)
        ]
        assert (alike[1] > alike[0]) == more
    gone = lean(items, [Leaning("of nobody", more=True)], retriever.catalog)
    assert gone == items


def test_likeness_is_the_mean_of_two_cosines(retriever: Retriever) -> None:
    now = retriever.catalog.snapshot
    unit = [m / np.linalg.norm(m, axis=1)[:, None] for m in (now.text_embeddings, now.vectors)]
    expected = [np.mean([m[at] @ m[9] for m in unit]) for at in (3, 9)]
    assert likeness(now, ["3", "9"], "9") == pytest.approx(expected, abs=1e-5)
    assert likeness(now, ["9"], "9") == pytest.approx([1.0], abs=1e-5)


def test_wishes_hold_for_every_list_and_the_answer(
    run_graph: RunGraph, retriever: Retriever
) -> None:
    run = run_graph(
        "<think>" + ask("comedy"),
        "So.</think>",
        answer("x", "y"),
        "",
        request={
            "user_id": "u",
            "filters": {"genres": ["Horror", "Western"]},
            "wishes": ["no horror", "less like Film 35", "a surprise"],
        },
    )
    response = respond(run)
    ids = [item.id for turn in response.turns for item in turn.retrieved]
    ids += [line.id for line in response.recommendations]
    assert all(30 <= int(item) < 40 for item in ids)
    assert "35" not in ids
    assert [wish.means for wish in response.understood_wishes] == [
        "genres: not Horror",
        "items like Film 35 come later",
    ]
    prompt = run.engine.tokenizer.decode(run.engine.calls[0][0].prompt_ids)
    said = "genres: Horror or Western; genres: not Horror; less like Film 35; a surprise\n"
    assert f"The user asks for: {said}" in prompt
    assert response.turns[0].retrieved != found(retriever, "comedy")


def test_wishes_that_leave_nothing_are_refused_in_words(run_graph: RunGraph) -> None:
    request = {"user_id": "u", "wishes": ["only comedies from the 1990s"]}
    with pytest.raises(RequestError, match="as genres: Comedy; year: from 1990, up to 1999"):
        run_graph(request=request)
