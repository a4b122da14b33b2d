"""Selection: only the training part, within the TRM's reach, no user in two stages."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from deeprec.errors import DataError
from deeprec.settings import load_settings
from deeprec.tools.interactions import InteractionData, Item, leave_one_out
from deeprec.tools.loaders import load
from deeprec.tools.retriever import RetrievalRequest, Retriever
from deeprec.tools.text_encoder import TextEncoder, item_embeddings
from deeprec.tools.trm.config import DeepRecConfig, FitConfig
from deeprec.tools.trm.fit import fit
from deeprec.tools.trm.model import TRM
from deeprec.training.selection import (
    Candidate,
    Selected,
    Selection,
    SelectionConfig,
    candidates,
    select,
    share_out,
    training_part,
    trm_ranks,
)


@pytest.fixture(scope="session")
def movielens() -> InteractionData:
    """The real MovieLens-100K, as the demo prepares it."""
    return load(load_settings().assets_dir / "ml-100k", "recbole", name="ml-100k").k_core(5)


def data_of(*sequences: list[int], n_items: int = 12) -> InteractionData:
    return InteractionData(
        name="made",
        items=tuple(Item(str(n), f"Film {n}") for n in range(n_items)),
        user_ids=tuple(f"u{n}" for n in range(len(sequences))),
        users=np.repeat(np.arange(len(sequences)), [len(s) for s in sequences]).astype(np.int32),
        item_indices=np.concatenate([np.array(s) for s in sequences]).astype(np.int32),
        times=np.concatenate([np.arange(len(s)) for s in sequences]).astype(np.int64),
    )


def test_candidates_by_hand() -> None:
    split = leave_one_out(
        data_of(
            [0, 1, 2, 3, 4, 5, 6],  # trains on 0 1 2 3 4
            [0, 1, 2, 3, 4],  # trains on 0 1 2: the history of its last item has two
            [0, 1],  # trains on all of it
            [0, 1, 2, 1, 7, 8],  # its last training item was seen before
            [0, 1, 2, 9, 3, 9],  # its last training item is its test item as well
            [8, 1, 2, 3, 7, 8],  # its test item opens its history
        )
    )

    def told(**changes: int) -> list[tuple[int, list[int], int]]:
        config = SelectionConfig(**changes)
        found = candidates(split, config)
        return [(given.user, given.history.tolist(), given.target) for given in found]

    assert told() == [(0, [0, 1, 2, 3], 4)]
    assert told(targets_per_user=2) == [(0, [0, 1, 2, 3], 4), (0, [0, 1, 2], 3)]
    assert told(targets_per_user=9) == told(targets_per_user=2)
    assert told(min_history=2) == [(0, [0, 1, 2, 3], 4), (1, [0, 1], 2)]
    assert (2, [0], 1) in told(min_history=1)
    assert (3, [0, 1], 2) in told(min_history=2, targets_per_user=2)
    assert told(min_history=5) == []


def test_no_validation_or_test_item_on_movielens(movielens: InteractionData) -> None:
    split = leave_one_out(movielens)
    found = candidates(split, SelectionConfig(targets_per_user=10_000, min_history=1))
    assert {given.user for given in found} == set(range(len(movielens.user_ids)))
    assert len(found) == sum(len(train) - 1 for train in split.train)
    for one in found:
        sequence = movielens.sequence(one.user)
        assert one.position <= len(sequence) - 3
        assert one.history.tolist() == sequence[: one.position].tolist()
        assert one.target == sequence[one.position]
        held_out = {int(split.valid[one.user]), int(split.test[one.user])}
        assert one.target not in held_out
        assert held_out.isdisjoint(one.history.tolist())


def test_candidates_do_not_depend_on_what_is_held_out(movielens: InteractionData) -> None:
    """Another future of every user changes no example: nothing of it leaks."""
    items = movielens.item_indices.copy()
    last = np.cumsum(np.bincount(movielens.users)) - 1
    rng = np.random.default_rng(0)
    for user, end in enumerate(last):
        new = np.setdiff1d(np.arange(len(movielens.items)), movielens.sequence(user))
        items[end - 1 : end + 1] = rng.choice(new, 2, replace=False)
    other = InteractionData(
        movielens.name,
        movielens.items,
        movielens.user_ids,
        movielens.users,
        items,
        movielens.times,
    )
    config = SelectionConfig(targets_per_user=3)
    ours, theirs = (candidates(leave_one_out(data), config) for data in (movielens, other))
    assert len(ours) == len(theirs) > 900
    for one, same in zip(ours, theirs, strict=True):
        assert (one.user, one.position, one.target) == (same.user, same.position, same.target)
        np.testing.assert_array_equal(one.history, same.history)
    assert training_part(movielens).fingerprint == training_part(other).fingerprint


def test_the_training_part_is_the_split_s(movielens: InteractionData) -> None:
    for data in (movielens, data_of([0, 1], [1, 2, 3], [4], [5, 6, 7, 8])):
        part = training_part(data)
        assert part.items == data.items
        assert part.user_ids == data.user_ids
        for user, train in enumerate(leave_one_out(data).train):
            np.testing.assert_array_equal(part.sequence(user), train)


def test_the_top_is_exact() -> None:
    config = SelectionConfig(top=3, shares={"all": 1.0})
    found = [Candidate(user, 3, np.zeros(3, np.int32), 1) for user in range(5)]
    assert sorted(share_out(found, np.array([0, 2, 3, 100, 1]), config)["all"]) == [0, 1, 4]


@pytest.fixture(scope="session")
def movielens_candidates(movielens: InteractionData) -> dict[int, list[Candidate]]:
    """By targets per user."""
    split = leave_one_out(movielens)
    return {n: candidates(split, SelectionConfig(targets_per_user=n)) for n in (1, 2, 3)}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    top=st.integers(200, 1682),
    shares=st.tuples(st.floats(0.05, 0.45), st.floats(0.05, 0.5)),
    per_user=st.sampled_from([1, 2, 3]),
)
def test_stages_share_no_user_on_movielens(
    movielens: InteractionData,
    movielens_candidates: dict[int, list[Candidate]],
    seed: int,
    top: int,
    shares: tuple[float, float],
    per_user: int,
) -> None:
    config = SelectionConfig(
        seed=seed,
        top=top,
        targets_per_user=per_user,
        shares={"cold_start": shares[0], "recommendation": shares[1]},
    )
    given_ = movielens_candidates[per_user]
    ranks = np.random.default_rng(seed).integers(0, len(movielens.items), len(given_))
    stages = share_out(given_, ranks, config)
    users = {stage: {given_[at].user for at in chosen} for stage, chosen in stages.items()}
    assert users["cold_start"].isdisjoint(users["recommendation"])
    reach = {given_[at].user for at in np.flatnonzero(ranks < top)}
    for stage, chosen in stages.items():
        assert all(ranks[at] < top for at in chosen)
        # A user comes with all of its examples that are within reach.
        ours = [at for at in np.flatnonzero(ranks < top) if given_[at].user in users[stage]]
        assert sorted(chosen) == ours
        assert abs(len(users[stage]) - config.shares[stage] * len(reach)) <= 1
    again = share_out(given_, ranks, config)
    assert again == stages


def test_the_seed_decides(movielens: InteractionData) -> None:
    config = SelectionConfig()
    found = candidates(leave_one_out(movielens), config)
    ranks = np.zeros(len(found), dtype=np.int64)
    one = share_out(found, ranks, config)
    other = share_out(found, ranks, config.model_copy(update={"seed": 1}))
    assert one != other
    assert Counter(map(len, one.values())) == Counter(map(len, other.values()))
    assert sum(map(len, one.values())) == len(found)


@pytest.fixture(scope="session")
def fitted(
    tiny_data: InteractionData, tiny_encoder: TextEncoder, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TRM, np.ndarray]:
    text = item_embeddings(tiny_encoder, tiny_data.items, tmp_path_factory.mktemp("text"))
    part = training_part(tiny_data)
    given = FitConfig(epochs=2, pool=100)
    trm = fit(part, leave_one_out(part), text, tiny_encoder, DeepRecConfig(), given)
    return trm, text


def test_ranks_are_those_of_the_retriever(
    retriever: Retriever, tiny_data: InteractionData, fitted: tuple[TRM, np.ndarray]
) -> None:
    text = fitted[1]
    found = candidates(leave_one_out(tiny_data), SelectionConfig())
    ranks = trm_ranks(retriever._trm, tiny_data, text, found)
    for given_, rank in zip(found, ranks, strict=True):
        history = tuple(str(item) for item in given_.history)
        left = len(tiny_data.items) - len(set(history))
        request = RetrievalRequest(history, k=left, exclude=frozenset(history))
        listed = [item.id for item in retriever.retrieve([request])[0]]
        assert listed[rank] == str(given_.target)


CONFIG = SelectionConfig(top=20, targets_per_user=2)


def test_a_selection_is_written_and_read(
    tiny_data: InteractionData, fitted: tuple[TRM, np.ndarray], tmp_path: Path
) -> None:
    trm, text = fitted
    made = select(tiny_data, trm, text, CONFIG)
    assert made.targets_unseen_by_trm
    assert made.counts.users == 80
    assert made.counts.candidates == 160
    assert made.counts.within_reach == sum(made.counts.stages.values()) > 10
    path = tmp_path / "new" / "selection.json"
    made.save(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["selection.json"]
    stored = json.loads(path.read_text())
    assert stored["config"]["seed"] == 0
    assert stored["counts"]["stages"] == {name: len(made.stages[name]) for name in made.stages}
    assert Selection.load(path, tiny_data) == made
    split = leave_one_out(tiny_data)
    ids = [item.id for item in tiny_data.items]
    for stage, chosen in made.stages.items():
        for example, selected in zip(made.examples(stage, tiny_data), chosen, strict=True):
            train = [ids[item] for item in split.train[tiny_data.user_index[example.user]]]
            assert train[: len(example.history) + 1] == [*example.history, example.target]
            assert selected.rank < CONFIG.top
    assert select(tiny_data, trm, text, CONFIG) == made
    with pytest.raises(DataError, match="no stage 'warm'"):
        made.examples("warm", tiny_data)


def test_a_trm_that_saw_the_targets_is_told(
    tiny_data: InteractionData, fitted: tuple[TRM, np.ndarray], retriever: Retriever
) -> None:
    trm, text = fitted
    assert not select(tiny_data, retriever._trm, text, CONFIG).targets_unseen_by_trm
    more = CONFIG.model_copy(update={"targets_per_user": 3})
    assert not select(tiny_data, trm, text, more).targets_unseen_by_trm


def test_empty_selections_are_refused(movielens: InteractionData) -> None:
    config = SelectionConfig()
    found = candidates(leave_one_out(movielens), config)
    with pytest.raises(DataError, match="'cold_start': of 943 examples the TRM ranks the target"):
        share_out(found, np.full(len(found), 100), config)
    with pytest.raises(DataError, match="'cold_start'"):
        share_out([], np.zeros(0, np.int64), config)
    few = np.where(np.arange(len(found)) < 2, 0, 100)  # two users: a fifth of them is nobody
    with pytest.raises(DataError, match="'cold_start'"):
        share_out(found, few, config)


def test_bad_files_are_refused(
    tiny_data: InteractionData,
    movielens: InteractionData,
    fitted: tuple[TRM, np.ndarray],
    tmp_path: Path,
) -> None:
    made = select(tiny_data, *fitted, CONFIG)
    path = tmp_path / "selection.json"
    made.save(path)
    with pytest.raises(DataError, match="another data set"):
        Selection.load(path, movielens)
    text = path.read_text()
    for damaged in (text[:-20], text.replace('"schema_version": 1', '"schema_version": 2'), ""):
        path.write_text(damaged)
        with pytest.raises(DataError, match="damaged"):
            Selection.load(path, tiny_data)
    with pytest.raises(DataError, match="damaged"):
        Selection.load(tmp_path / "none.json", tiny_data)
    with pytest.raises(DataError, match="can't write"):
        made.save(path / "selection.json")
    for change in ({"target": "0"}, {"user": "nobody"}, {"position": 11}, {"position": 10}):
        first = made.stages["cold_start"][0]
        wrong = Selected.model_validate({**first.model_dump(), **change})
        changed = made.model_copy(update={"stages": {"cold_start": [wrong]}})
        with pytest.raises(DataError, match="changed by hand"):
            changed.examples("cold_start", tiny_data)


@pytest.mark.parametrize("shares", [{}, {"a": 0.0}, {"a": -0.1}, {"a": 0.6, "b": 0.6}])
def test_shares_that_share_nothing_out_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="shares"):
        SelectionConfig(shares=shares)
