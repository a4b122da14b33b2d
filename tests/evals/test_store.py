from collections.abc import Callable
from pathlib import Path

import pytest

from deeprec.errors import EvaluationError
from deeprec.evals.store import Ranking, Store
from deeprec.graph.state import Failure, RecommendationResponse, Usage

from ..conftest import Disk

USERS = ["u", "v", "w"]


def write(store: Store, *rankings: Ranking) -> None:
    with store:
        for ranking in rankings:
            store.append(ranking)


def one(user: str, *items: str) -> Ranking:
    return Ranking(user=user, items=items)


def outage(user: str) -> Ranking:
    run = RecommendationResponse(
        recommendations=[],
        turns=[],
        answer=[],
        violations=[],
        stop_reason="engine_failure",
        failure=Failure(reason="engine_failure", detail="gone"),
        usage=Usage(),
    )
    return Ranking(user=user, items=(), failure="gone", run=run)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "deep" / "a.jsonl")


def test_what_is_written_is_read_in_the_order_of_the_users(store: Store) -> None:
    assert store.read(USERS) == {}
    write(store, one("w", "1"), one("u", "2", "3"))
    write(store, outage("v"))
    assert list(store.read(USERS)) == USERS
    assert store.read(USERS)["u"].items == ("2", "3")
    assert store.read(USERS)["v"].is_outage


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_dropped_and_written_again(store: Store, cut: int) -> None:
    write(store, one("u", "1"), one("v", "2"))
    store.path.write_bytes(store.path.read_bytes()[:-cut])
    assert list(store.read(USERS)) == ["u"]
    write(store, one("v", "2"))
    assert {user: found.items for user, found in store.read(USERS).items()} == {
        "u": ("1",), "v": ("2",),
    }  # fmt: skip


def test_a_file_of_one_torn_line_is_empty(store: Store) -> None:
    write(store, one("u", "1"))
    store.path.write_bytes(store.path.read_bytes()[:9])
    assert store.read(USERS) == {}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"user": "v", "ite\n', "line 2 is damaged"),
        ('{"user": "v"}\n', "line 2 is damaged"),
        ('{"user": "x", "items": []}\n', "user 'x' is not among the 3 test users"),
        ('{"user": "u", "items": []}\n', "user 'u' is there twice"),
    ],
)
def test_what_can_not_be_is_told_with_its_line(store: Store, line: str, says: str) -> None:
    write(store, one("u", "1"))
    with store.path.open("a") as file:
        file.write(line)
    with pytest.raises(EvaluationError, match=says):
        store.read(USERS)


def test_a_later_answer_replaces_an_outage(store: Store) -> None:
    write(store, outage("u"))
    write(store, one("u", "1"))
    assert store.read(USERS)["u"].items == ("1",)


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EvaluationError, match="or give another output"):
        write(Store(tmp_path / "file" / "a.jsonl"))


def test_on_a_full_disk_what_is_written_stays_and_the_rest_is_asked_again(
    small_disk: Callable[[int], Disk],
) -> None:
    disk = small_disk(1)
    store = Store(disk.folder / "a.jsonl")
    write(store, one("u", "1"))
    disk.fill(leave=4096 - 64)  # the file's own block takes some more
    with pytest.raises(EvaluationError, match="Free disk space"):
        write(store, one("v", "2"), one("w", *("long" * 100 for _ in range(100))))
    assert list(store.read(USERS)) == ["u", "v"]  # of the third a part may stand there
    disk.free()
    write(store, one("w", "3"))
    assert {user: found.items for user, found in store.read(USERS).items()} == {
        "u": ("1",), "v": ("2",), "w": ("3",),
    }  # fmt: skip


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    with store:
        monkeypatch.setattr("os.write", lambda *_: 3)
        with pytest.raises(EvaluationError, match=r"3 of \d+ bytes were written\. Free disk space"):
            store.append(one("u", "1"))
