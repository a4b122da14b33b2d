"""The data model: order, k-core, split, fingerprint, saving and loading."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeprec.errors import DataError
from deeprec.tools.interactions import (
    MAX_DESCRIPTION_CHARS,
    InteractionData,
    Item,
    item_text,
    leave_one_out,
    statistics,
)

Row = tuple[str, str, float]


def data_of(
    rows: list[Row], metadata: dict[str, Item] | None = None, per_second: int = 1
) -> InteractionData:
    user_ids = list(dict.fromkeys(user for user, _, _ in rows))
    item_ids = list(dict.fromkeys(item for _, item, _ in rows))
    return InteractionData.from_rows(
        "small",
        user_ids=user_ids,
        item_ids=item_ids,
        users=np.array([user_ids.index(user) for user, _, _ in rows]),
        items=np.array([item_ids.index(item) for _, item, _ in rows]),
        times=np.array([time for _, _, time in rows], dtype=np.float64),
        metadata=metadata or {},
        per_second=per_second,
    )


def rows_of(data: InteractionData) -> list[tuple[str, str, int]]:
    return [
        (data.user_ids[u], data.items[i].id, int(t))
        for u, i, t in zip(data.users, data.item_indices, data.times, strict=True)
    ]


def ids_of(data: InteractionData, user: str) -> list[str]:
    return [data.items[i].id for i in data.sequence(data.user_index[user])]


@pytest.fixture
def films() -> InteractionData:
    items = {
        "a": Item("a", "Älpha ✓", {"year": ("1995",), "genres": ("Comedy", "Drama")}, "Two\nlines"),
        "b": Item("b", "Beta"),
    }
    rows: list[Row] = [("u", "a", 5), ("v", "b", 1), ("u", "b", 3), ("u", "c", 4), ("v", "a", 2)]
    return data_of(rows, items)


# --- order -----------------------------------------------------------------------------------


def test_rows_are_sorted_by_user_then_time_and_ties_keep_their_order() -> None:
    data = data_of([("v", "z", 9), ("u", "z", 7), ("u", "a", 7), ("v", "b", 1), ("u", "m", 7)])
    assert data.user_ids == ("v", "u")
    assert ids_of(data, "u") == ["z", "a", "m"]
    assert ids_of(data, "v") == ["b", "z"]
    assert data.times.tolist() == [1, 9, 7, 7, 7]
    assert data.users.dtype == data.item_indices.dtype == np.int32
    assert data.times.dtype == np.int64


def test_order_uses_the_precision_of_the_source_but_times_are_seconds() -> None:
    data = data_of([("u", "late", 1999), ("u", "early", 1001)], per_second=1000)
    assert ids_of(data, "u") == ["early", "late"]
    assert data.times.tolist() == [1, 1]


def test_only_exact_duplicates_are_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        data = data_of(
            [("u", "a", 1), ("u", "b", 1), ("u", "a", 1), ("u", "a", 2), ("v", "a", 1)],
        )
    assert rows_of(data) == [("u", "a", 1), ("u", "b", 1), ("u", "a", 2), ("v", "a", 1)]
    assert "1 duplicate rows were dropped" in caplog.text


def test_item_without_metadata_is_titled_by_its_id(films: InteractionData) -> None:
    assert [item.title for item in films.items] == ["Älpha ✓", "Beta", "c"]
    assert statistics(films)["untitled_items"] == 1


def test_arrays_and_sequences_are_read_only_copies() -> None:
    users = np.zeros(2, dtype=np.int32)
    data = InteractionData("x", (Item("a", "A"),), ("u",), users, np.zeros(2, int), np.arange(2))
    users[0] = 5
    assert data.users.tolist() == [0, 0]
    for array in (data.users, data.item_indices, data.times, data.sequence(0)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize("index", [-1, 2])
def test_sequence_refuses_an_index_outside(films: InteractionData, index: int) -> None:
    with pytest.raises(IndexError, match=f"user index {index} is not in 0 to 1"):
        films.sequence(index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users": np.array([0, 1, 0, 1, 1])}, "users must be sorted"),
        ({"users": np.array([0, 0, 0, 0, 0])}, "every index from 0 to 1"),
        ({"users": np.array([0, 0, 0, 1, 2])}, "every index from 0 to 1"),
        ({"item_indices": np.array([0, 1, 2, 3, 0])}, "outside 0 to 2"),
        ({"item_indices": np.array([0, 1, 2, -1, 0])}, "outside 0 to 2"),
        ({"times": np.array([3, 2, 5, 1, 2])}, "sorted by time"),
        ({"times": np.array([-3, 4, 5, 1, 2])}, "between 1970 and 9999"),
        ({"times": np.array([3, 4, 1_700_000_000_000, 1, 2])}, "between 1970 and 9999"),
        ({"times": np.array([3.5, 4, 5, 1, 2])}, "flat array of integers"),
        ({"times": np.array([3, 4])}, "do not match"),
        ({"user_ids": ("u", "u")}, "two users have the same id"),
        ({"items": (Item("a", "A"), Item("b", "B"), Item("a", "C"))}, "two items have the same id"),
        ({"user_ids": ("u", "\ud800")}, "surrogate"),
        ({k: np.array([], int) for k in ("users", "item_indices", "times")}, "no interactions"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    films: InteractionData, change: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        replace(films, **change)  # type: ignore[arg-type]


# --- items -----------------------------------------------------------------------------------


def test_item_text_names_title_sorted_attributes_and_description() -> None:
    item = Item("1", "Toy Story", {"year": ("1995",), "genres": ("Animation", "Comedy")}, "A\nboy.")
    assert item_text(item) == "Toy Story. genres: Animation, Comedy. year: 1995. A boy."
    assert item_text(Item("2", "Mother!", {"genres": ()})) == "Mother!"


def test_item_text_cuts_the_description_between_words() -> None:
    for text in ("word " * 200, "x" * MAX_DESCRIPTION_CHARS + " tail"):
        cut = item_text(Item("1", "T", {}, text)).removeprefix("T. ")
        assert len(cut) <= MAX_DESCRIPTION_CHARS
        assert text.startswith(cut + " ")
    assert len(item_text(Item("1", "T", {}, "x" * 900))) == len("T. ") + MAX_DESCRIPTION_CHARS


@pytest.mark.parametrize(
    "fields",
    [
        ("", "T"),
        ("1", ""),
        ("1", "T\ud800"),
        ("1", "T", {"g": ("\udfff",)}),
        ("1", "T", {}, "\udc00"),
    ],
)
def test_item_that_can_not_be_stored_is_refused(fields: tuple[object, ...]) -> None:
    with pytest.raises(DataError, match="item"):
        Item(*fields)  # type: ignore[arg-type]


# --- k-core ----------------------------------------------------------------------------------


def test_k_core_repeats_until_nothing_falls_away() -> None:
    # d has two users, but w falls for e, then d for w, then v for d.
    rows: list[Row] = [("u", "a", 1), ("u", "b", 2), ("x", "a", 1), ("x", "b", 2)]
    rows += [("v", "a", 1), ("v", "d", 2), ("w", "d", 1), ("w", "e", 2)]
    core = data_of(rows).k_core(2)
    assert rows_of(core) == [("u", "a", 1), ("u", "b", 2), ("x", "a", 1), ("x", "b", 2)]
    assert core.user_index == {"u": 0, "x": 1}
    assert core.item_index == {"a": 0, "b": 1}


pairs = st.lists(
    st.tuples(st.sampled_from("uvwxyz"), st.sampled_from("abcdef"), st.integers(0, 5)),
    min_size=1,
    max_size=40,
)


@settings(deadline=None)
@given(pairs, st.integers(1, 4))
def test_k_core_equals_removing_one_at_a_time(rows: list[Row], k: int) -> None:
    data = data_of(rows)
    left = rows_of(data)
    while True:
        counts = {
            name: sum(name in (("user", u), ("item", i)) for u, i, _ in left)
            for name in {n for u, i, _ in left for n in (("user", u), ("item", i))}
        }
        weak = next((name for name, count in counts.items() if count < k), None)
        if weak is None:
            break
        left = [row for row in left if weak not in (("user", row[0]), ("item", row[1]))]
    if left:
        assert rows_of(data.k_core(k)) == left
    else:
        with pytest.raises(DataError, match=f"{k}-core is empty"):
            data.k_core(k)


def test_k_core_leaves_out_items_without_interactions(films: InteractionData) -> None:
    wider = replace(films, items=(*films.items, Item("new", "New")))
    assert "new" in wider.item_index
    assert rows_of(wider.k_core(1)) == rows_of(films)
    assert "new" not in wider.k_core(1).item_index


@pytest.mark.parametrize("k", [0, -1])
def test_k_core_refuses_k_below_one(films: InteractionData, k: int) -> None:
    with pytest.raises(DataError, match=f"k = {k}"):
        films.k_core(k)


# --- split and statistics --------------------------------------------------------------------


def test_leave_one_out_by_hand() -> None:
    rows: list[Row] = [("four", i, t) for t, i in enumerate("abcd")]
    rows += [("three", i, t) for t, i in enumerate("cba")]
    rows += [("two", "a", 0), ("two", "b", 1), ("one", "d", 0)]
    data = data_of(rows)
    split = leave_one_out(data)
    ids = [item.id for item in data.items]

    def named(array: np.ndarray) -> str:
        return "".join(ids[i] if i >= 0 else "-" for i in array)

    assert [named(train) for train in split.train] == ["ab", "c", "ab", "d"]
    assert named(split.valid) == "cb--"
    assert named(split.test) == "da--"
    assert [named(split.valid_history(u)) for u in range(4)] == ["ab", "c", "ab", "d"]
    assert [named(split.test_history(u)) for u in range(4)] == ["abc", "cb", "ab", "d"]
    assert split.valid.dtype == split.test.dtype == split.test_history(0).dtype == np.int32


@settings(deadline=None)
@given(pairs)
def test_split_neither_loses_nor_doubles_an_interaction(rows: list[Row]) -> None:
    data = data_of(rows)
    split = leave_one_out(data)
    for user in range(len(data.user_ids)):
        target = [split.test[user]] if split.test[user] >= 0 else []
        whole = [*split.test_history(user), *target]
        assert whole == data.sequence(user).tolist()


def test_statistics_by_hand() -> None:
    day = 86_400
    rows: list[Row] = [("u", "a", 0), ("u", "b", day), ("u", "a", 2 * day)]
    rows += [("v", "b", 0), ("v", "b", day)]
    assert statistics(data_of(rows)) == {
        "users": 2,
        "items": 2,
        "interactions": 5,
        "density": 0.75,
        "mean_length": 2.5,
        "median_length": 2.5,
        "min_length": 2,
        "max_length": 3,
        "repeated_interactions": 2,
        "repeated_test_items": 1,
        "untitled_items": 2,
        "first_day": "1970-01-01",
        "last_day": "1970-01-03",
    }


# --- fingerprint -----------------------------------------------------------------------------


def test_fingerprint_is_of_the_content_not_of_the_name(films: InteractionData) -> None:
    assert replace(films, name="other").fingerprint == films.fingerprint
    first = films.items[0]
    turned = replace(first, attributes=dict(reversed(list(first.attributes.items()))))
    assert replace(films, items=(turned, *films.items[1:])).fingerprint == films.fingerprint


def test_every_part_changes_the_fingerprint(films: InteractionData) -> None:
    first, *rest = films.items
    changed = [
        replace(films, items=(item, *rest))
        for item in (
            replace(first, id="A"),
            replace(first, title="Alpha"),
            replace(first, description=""),
            replace(first, attributes={**first.attributes, "year": ("1996",)}),
            replace(first, attributes={**first.attributes, "genres": ("Drama", "Comedy")}),
        )
    ]
    changed += [
        replace(films, user_ids=("u", "w")),
        replace(films, item_indices=np.array([1, 2, 0, 1, 1])),
        replace(films, users=np.array([0, 0, 1, 1, 1]), times=np.array([1, 2, 3, 4, 5])),
        replace(films, times=films.times + 1),
        replace(films, items=(*films.items, Item("d", "D"))),
    ]
    fingerprints = {films.fingerprint, *(data.fingerprint for data in changed)}
    assert len(fingerprints) == len(changed) + 1


def test_fingerprint_is_the_same_in_another_process(films: InteractionData, tmp_path: Path) -> None:
    films.save(tmp_path / "films")
    code = (
        "import sys; from deeprec.tools.interactions import InteractionData as D;"
        "assert 'torch' not in sys.modules; print(D.load(sys.argv[1]).fingerprint)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "films")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.strip() == films.fingerprint


# --- save and load ---------------------------------------------------------------------------


def test_round_trip(films: InteractionData, tmp_path: Path) -> None:
    films.save(tmp_path / "deep" / "films")
    loaded = InteractionData.load(tmp_path / "deep" / "films")
    assert loaded.name == "small"
    assert loaded.items == films.items
    assert loaded.user_ids == films.user_ids
    assert rows_of(loaded) == rows_of(films)
    assert loaded.fingerprint == films.fingerprint
    assert os.listdir(tmp_path / "deep") == ["films"]


@settings(deadline=None)
@given(pairs, st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_round_trip_of_anything(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], text: str
) -> None:
    item = Item(rows[0][1], text, {text: (text, "x")}, text)
    data = data_of(rows, {item.id: item})
    folder = tmp_path_factory.getbasetemp() / "anything"
    data.save(folder)
    assert InteractionData.load(folder).fingerprint == data.fingerprint


def test_a_saved_data_set_is_replaced(films: InteractionData, tmp_path: Path) -> None:
    films.save(tmp_path / "d")
    films.k_core(2).save(tmp_path / "d")
    assert len(InteractionData.load(tmp_path / "d").users) == 4
    assert os.listdir(tmp_path) == ["d"]


@pytest.mark.parametrize("foreign", ["notes.txt", "items.parquet", ".hidden"])
def test_a_folder_that_is_no_data_set_is_not_replaced(
    films: InteractionData, tmp_path: Path, foreign: str
) -> None:
    (tmp_path / foreign).write_text("mine")
    with pytest.raises(DataError, match=f"{foreign}.*not overwritten"):
        films.save(tmp_path)
    assert (tmp_path / foreign).read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="is a file"):
        films.save(tmp_path / "file")


def test_a_data_set_with_a_foreign_file_in_it_is_not_replaced(
    films: InteractionData, tmp_path: Path
) -> None:
    films.save(tmp_path / "d")
    (tmp_path / "d" / "model.bin").write_text("mine")
    with pytest.raises(DataError, match=r"model\.bin"):
        films.save(tmp_path / "d")
    assert (tmp_path / "d" / "model.bin").read_text() == "mine"


@pytest.mark.parametrize("step", ["write", "replace"])
def test_a_save_that_fails_leaves_what_was_there(
    films: InteractionData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    films.save(tmp_path / "d")
    really_replace = os.replace

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def replace_old_only(source: Path, target: Path) -> None:
        if not source.name.endswith(".old") and target == tmp_path / "d":
            full()
        really_replace(source, target)

    if step == "write":
        monkeypatch.setattr(InteractionData, "_write", full)
    else:
        monkeypatch.setattr(os, "replace", replace_old_only)
    with pytest.raises(DataError, match="No space left on device"):
        films.k_core(2).save(tmp_path / "d")
    assert InteractionData.load(tmp_path / "d").fingerprint == films.fingerprint
    assert os.listdir(tmp_path) == ["d"]


def change_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_load_of_what_is_no_data_set(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match="holds no prepared data set"):
            InteractionData.load(folder)


def test_load_refuses_every_damage(films: InteractionData, tmp_path: Path) -> None:
    films.save(tmp_path / "good")
    films.k_core(2).save(tmp_path / "other")

    def damaged(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "good", tmp_path / name))

    folders = [damaged(str(i)) for i in range(8)]
    (folders[0] / "items.parquet").unlink()
    (folders[1] / "interactions.parquet").write_bytes(b"")
    whole = (folders[2] / "items.parquet").read_bytes()
    (folders[2] / "items.parquet").write_bytes(whole[: len(whole) // 2])
    (folders[3] / "dataset.json").write_text('{"torn')
    change_json(folders[4] / "dataset.json", schema_version=2)
    change_json(folders[5] / "dataset.json", fingerprint="0" * 64)
    shutil.copy(tmp_path / "other" / "interactions.parquet", folders[6])
    shutil.copy(folders[7] / "items.parquet", folders[7] / "interactions.parquet")
    for folder in folders:
        with pytest.raises(DataError, match="is damaged or was written by another version"):
            InteractionData.load(folder)


def test_load_names_what_does_not_fit(films: InteractionData, tmp_path: Path) -> None:
    films.save(tmp_path / "d")
    films.k_core(2).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "items.parquet", tmp_path / "d")
    with pytest.raises(DataError, match="names an item that does not exist"):
        InteractionData.load(tmp_path / "d")


def test_a_flipped_byte_never_gives_other_data(films: InteractionData, tmp_path: Path) -> None:
    films.save(tmp_path / "d")
    refused = 0
    for name in ("items.parquet", "interactions.parquet"):
        path = tmp_path / "d" / name
        good = path.read_bytes()
        for position in range(4, len(good) // 2, 7):
            path.write_bytes(
                good[:position] + bytes([good[position] ^ 0x55]) + good[position + 1 :]
            )
            try:
                loaded = InteractionData.load(tmp_path / "d")
            except DataError:
                refused += 1
            else:
                assert rows_of(loaded) == rows_of(films)
                assert loaded.items == films.items
        path.write_bytes(good)
    assert refused > 20
