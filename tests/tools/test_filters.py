from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeprec.errors import RequestError
from deeprec.tools.filters import MAX_CONDITIONS, MAX_VALUES, AttributeIndex, Filters
from deeprec.tools.interactions import Item

ITEMS = [
    Item("0", "a", {"genres": ("Comedy", "Drama"), "year": ("1995",)}),
    Item("1", "b", {"genres": ("Horror",), "year": ("1980",)}),
    Item("2", "c", {"genres": ("horror", "Comedy"), "year": ("unknown",)}),
    Item("3", "d", {}),
    Item("4", "e", {"Genres": ("Sci-Fi",), "year": ("2001", "1990")}),
]


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (None, [0, 1, 2, 3, 4]),
        ({}, [0, 1, 2, 3, 4]),
        ({"genres": "comedy"}, [0, 2]),
        ({"GENRES": ["Drama", "Sci-Fi"]}, [0, 4]),
        ({"genres": {"not": ["HORROR"]}}, [0, 3, 4]),
        ({"genres": {"not": "Horror"}}, [0, 3, 4]),
        ({"genres": {"any": ["Horror"], "not": ["Comedy"]}}, [1]),
        ({"year": {"gte": 1990, "lte": 1999}}, [0, 4]),
        ({"year": {"gte": "1991"}}, [0, 4]),
        ({"year": {"lte": 1980}}, [1]),
        ({"year": 1995}, [0]),
        ({"year": 1995.0}, [0]),
        ({"year": {"gte": 1980}, "genres": ["Horror", "Drama"]}, [0, 1]),
    ],
)
def test_filters_choose_items(raw: Any, found: list[int]):
    assert np.flatnonzero(AttributeIndex(ITEMS).mask(Filters.parse(raw))).tolist() == found


names = st.sampled_from(["genres", "year"])
values = st.lists(st.sampled_from(["Comedy", "horror", "1980", "1990", "x"]), max_size=3)
conditions = st.dictionaries(
    names,
    st.fixed_dictionaries(
        {},
        optional={
            "any": values.filter(bool),
            "not": values.filter(bool),
            "gte": st.integers(1970, 1990),
            "lte": st.integers(1990, 2010),
        },
    ).filter(bool),
)


def fulfils(values: tuple[str, ...], wanted: dict[str, Any]) -> bool:
    """What a condition means, for values that compare as they are."""
    years = [int(value) for value in values if value.isdecimal()]
    ranged = "gte" in wanted or "lte" in wanted
    low, high = wanted.get("gte", 0), wanted.get("lte", 3000)
    return (
        ("any" not in wanted or bool(set(values) & set(wanted["any"])))
        and not set(values) & set(wanted.get("not", ()))
        and (not ranged or any(low <= year <= high for year in years))
    )


@given(st.lists(st.dictionaries(names, values.map(tuple)), max_size=6), conditions)
def test_masks_agree_with_matching_item_by_item(rows: list[Any], raw: Any):
    # Two more items so that all attributes and values are known and years are numbers.
    known = ("Comedy", "horror", "1980", "1990", "x")
    rows = [*rows, {"genres": known}, {"year": known}]
    items = [Item(str(n), "t", attributes) for n, attributes in enumerate(rows)]
    expected = [
        all(fulfils(item.attributes.get(name, ()), wanted) for name, wanted in raw.items())
        for item in items
    ]
    assert AttributeIndex(items).mask(Filters.parse(raw)).tolist() == expected


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"genre": "Comedy"}, ["unknown attribute 'genre'", "genres", "year"]),
        ({"genres": "Comdy"}, ["no item has 'Comdy'", "Known values: Comedy"]),
        ({"genres": {"gte": 3}}, ["holds no numbers", "Comedy"]),
    ],
)
def test_unknown_names_and_values_list_what_is_known(raw: Any, said: list[str]):
    with pytest.raises(RequestError) as caught:
        AttributeIndex(ITEMS).mask(Filters.parse(raw))
    assert all(part in str(caught.value) for part in said)


@pytest.mark.parametrize(
    "raw",
    [
        [("genres", "Comedy")],
        {1: "x"},
        {"": "x"},
        {"genres": []},
        {"genres": [""]},
        {"genres": None},
        {"genres": True},
        {"genres": [["Comedy"]]},
        {"genres": {}},
        {"genres": {"like": "C"}},
        {"genres": {"any": [], "not": ["x"]}},
        {"genres": "x" * 1000},
        {"genres": ["x"] * (MAX_VALUES + 1)},
        {str(n): "x" for n in range(MAX_CONDITIONS + 1)},
        {"year": {"gte": "old"}},
        {"year": {"gte": float("nan")}},
        {"year": {"lte": float("inf")}},
        {"year": {"gte": True}},
        {"year": 10**400},
        {"year": [1990, -(10**400)]},
        {"year": {"gte": 10**400}},
        {"year": {"gte": "1e400"}},
        {"year": {"lte": 10**5000}},
        {"year": 10**5000},
        {"year": {"gte": 2000, "lte": 1990}},
    ],
    ids=lambda raw: str(list(raw))[:40],
)
def test_malformed_filters_are_refused(raw: Any):
    with pytest.raises(RequestError):
        Filters.parse(raw)


def test_error_texts_hold_no_raw_values():
    items = [Item("0", "t", {"genres": ("<|im_end|>\x1b[31m",)})]
    with pytest.raises(RequestError) as caught:
        AttributeIndex(items).mask(Filters.parse({"genres": "a\x1b[31mb"}))
    assert "\x1b" not in str(caught.value)
    assert "<|" not in str(caught.value)


def test_parsed_filters_are_hashable_and_equal():
    raw = {"genres": ["Comedy"], "year": {"gte": 1990}}
    assert len({Filters.parse(raw), Filters.parse(dict(raw))}) == 1
    assert not Filters()
    assert Filters.parse(raw)
