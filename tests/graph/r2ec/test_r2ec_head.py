"""The head and its artefact: what is kept, what is made anew, what is refused."""

import json
import logging
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deeprec.errors import EngineError, HeadError
from deeprec.graph import app
from deeprec.graph.engine.adapter import weights_digest
from deeprec.graph.r2ec import build
from deeprec.graph.r2ec import ranker as ranking
from deeprec.graph.r2ec.backbone import Backbone, batches
from deeprec.graph.r2ec.build import r2ec_settings
from deeprec.graph.r2ec.head import (
    HEAD,
    HeadCard,
    RecommendationHead,
    read_card,
    save_head,
    weights_fingerprint,
)
from deeprec.graph.r2ec.items import ITEMS, ItemStates, catalog_readings
from deeprec.graph.r2ec.ranker import HeadRanker
from deeprec.settings import Settings
from deeprec.tools.catalog import Catalog
from deeprec.tools.interactions import Item
from deeprec.tools.lru import Lru
from deeprec.tools.retriever import Retriever

from .conftest import random_head


def count_reads(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each pass of the LLM reads from now on."""
    counts: list[int] = []
    plain = backbone.states
    monkeypatch.setattr(backbone, "states", lambda rows: (counts.append(len(rows)), plain(rows))[1])
    return counts


class Moments:
    """A catalog that is another one each time that it is looked at, up to the last."""

    def __init__(self, *snapshots: Any) -> None:
        self._left = list(snapshots)

    @property
    def snapshot(self) -> Any:
        return self._left.pop(0) if len(self._left) > 1 else self._left[0]


def workers() -> set[threading.Thread]:
    """Threads of rankers that nobody closed."""
    return {thread for thread in threading.enumerate() if thread.name == "deeprec-ranker"}


def test_padding_changes_no_state(backbone: Backbone) -> None:
    sequences = [list(range(5, 5 + n)) for n in (3, 40, 7, 1, 40)]
    found = backbone.states(sequences)
    for sequence, state in zip(sequences, found, strict=True):
        torch.testing.assert_close(backbone.states([sequence])[0], state, atol=1e-5, rtol=1e-4)


def test_batches_hold_all_and_keep_to_their_size() -> None:
    lengths = [5, 900, 3, 3000, 5000, 3]
    made = list(batches(lengths, 4096))
    assert sorted(row for batch in made for row in batch) == list(range(6))
    assert all(len(b) == 1 or max(lengths[r] for r in b) * len(b) <= 4096 for b in made)


def test_a_change_of_the_catalog_reads_only_what_changed(
    backbone: Backbone,
    small_catalog: Catalog,
    retriever: Retriever,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranker = HeadRanker(backbone, random_head(backbone.dim), small_catalog, ItemStates("tiny"))
    try:
        ranker.table()
        reads = count_reads(backbone, monkeypatch)
        ranker.table()
        assert reads == []
        now = retriever.catalog.snapshot
        some = np.array([10, 11])
        new = [Item("10", "Film 10", {"genres": ("Drama",)}), Item("2", "Film 2, recut", {})]
        small_catalog.upsert(new, now.text_embeddings[some], now.vectors[some])
        changed = ranker.table()
        assert reads == [2]
        small_catalog.remove(["0", "1"])
        removed = ranker.table()
        assert reads == [2]
        assert len(removed.vectors) == len(changed.vectors) - 2
        fresh = HeadRanker(backbone, ranker.head, small_catalog, ItemStates("tiny"))
        torch.testing.assert_close(fresh.table().vectors, removed.vectors, atol=1e-5, rtol=1e-4)
        fresh.close()
    finally:
        ranker.close()


def test_items_that_are_new_to_the_head_are_told(
    head_settings: Settings,
    head_folder: Path,
    small_catalog: Catalog,
    retriever: Retriever,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ranker = HeadRanker.load(head_settings, head_folder, small_catalog)
    try:
        assert ranker.table().untrained == frozenset()
        now = retriever.catalog.snapshot
        new = [Item("new", "A film that nobody knew", {})]
        small_catalog.upsert(new, now.text_embeddings[10:11], now.vectors[10:11])
        with caplog.at_level(logging.WARNING):
            assert ranker.table().untrained == {"new"}
        assert "1 items of the catalog are new" in caplog.text
        state = ranker.user_states([[5, 6, 7]])[0]
        assert {item.id for item in ranker.best(state, 11)} >= {"new"}
    finally:
        ranker.close()


def test_item_states_are_kept_and_read_again(
    head_settings: Settings, head_folder: Path, small_catalog: Catalog, backbone: Backbone
) -> None:
    HeadRanker.load(head_settings, head_folder, small_catalog).close()
    kept = ItemStates.read(head_folder, read_card(head_folder).weights)
    sequences = catalog_readings(small_catalog.snapshot, backbone)
    fresh = ItemStates("").of(sequences, backbone)
    assert len(kept) == 10
    torch.testing.assert_close(kept.of(sequences, backbone), fresh, atol=1e-5, rtol=1e-4)


def test_what_does_not_belong_together_is_refused(
    head_settings: Settings, head_folder: Path, small_catalog: Catalog, tmp_path: Path
) -> None:
    def load() -> None:
        HeadRanker.load(head_settings, head_folder, small_catalog).close()

    with pytest.raises(HeadError, match="holds no recommendation head"):
        HeadRanker.load(head_settings, tmp_path / "nothing", small_catalog)
    load()
    path = head_folder / HEAD
    card = json.loads(path.read_text())
    for field, value, says in (
        ("dataset", "another", "was trained for data set"),
        ("weights", "0" * 64, "reads another model"),
        ("readings", 99, "readings of version 99"),
        ("dim", "wide", "damaged"),
    ):
        path.write_text(json.dumps({**card, field: value}))
        with pytest.raises(HeadError, match=says):
            load()
    path.write_text(json.dumps(card))
    load()
    states = head_folder / ITEMS
    save_file(load_file(states), states, metadata={"weights": "f" * 64, "keys": "[]"})
    with pytest.raises(HeadError, match="are stale"):
        load()
    states.write_bytes(b"torn")
    with pytest.raises(HeadError, match="damaged"):
        load()


def test_an_empty_catalog_and_a_head_of_another_width_are_refused(
    backbone: Backbone, retriever: Retriever
) -> None:
    with pytest.raises(HeadError, match="16 wide and the model 64"):
        HeadRanker(backbone, RecommendationHead(16), retriever.catalog, ItemStates(""))

    nothing: Any = Moments(SimpleNamespace(ids=()))  # no catalog can be built so
    ranker = HeadRanker(backbone, random_head(backbone.dim), nothing, ItemStates(""))
    try:
        with pytest.raises(HeadError, match="catalog is empty"):
            ranker.table()
    finally:
        ranker.close()


def test_a_worker_that_fails_tells_and_lives_on(ranker: HeadRanker) -> None:
    with pytest.raises(ValueError, match="a sequence is empty"):
        ranker.submit([]).result()
    assert ranker.submit([5, 6]).result().shape == (ranker.backbone.dim,)


def test_a_list_does_not_wait_for_the_readings_of_others(
    ranker: HeadRanker, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker.table()
    state = ranker.user_states([[5, 6, 7]])[0]
    begun, ended = threading.Event(), threading.Event()
    plain = ranker.backbone.states

    def slow(rows: Any) -> torch.Tensor:
        begun.set()
        assert ended.wait(30)
        return plain(rows)

    monkeypatch.setattr(ranker.backbone, "states", slow)
    other = ranker.submit([8, 9])
    assert begun.wait(30)
    with ThreadPoolExecutor(1) as pool:
        listed = pool.submit(ranker.best, state, 3)
        try:
            assert len(listed.result(timeout=10)) == 3
        finally:
            ended.set()
    assert other.result(timeout=30).shape == state.shape


def test_a_catalog_that_changes_while_it_is_read(
    backbone: Backbone, small_catalog: Catalog, retriever: Retriever
) -> None:
    before = small_catalog.snapshot
    now = retriever.catalog.snapshot
    new = [Item("new", "New", {})]
    small_catalog.upsert(new, now.text_embeddings[:1], now.vectors[:1])
    changing: Any = Moments(before, small_catalog.snapshot)
    ranker = HeadRanker(backbone, random_head(backbone.dim), changing, ItemStates("tiny"))
    try:
        assert len(ranker.table().vectors) == len(before) == 10
        assert len(ranker.table().vectors) == 11
    finally:
        ranker.close()


def test_the_catalog_is_written_as_tokens_once(
    ranker: HeadRanker, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    plain = ranking.catalog_readings
    monkeypatch.setattr(
        ranking, "catalog_readings", lambda *given: (made.append(1), plain(*given))[1]
    )
    first = ranker.table()
    ranker.project_anew()
    again = ranker.table()
    assert again is not first
    assert again.readings == first.readings == plain(ranker.catalog.snapshot, ranker.backbone)
    assert made == [1]


def test_users_that_were_asked_for_last_are_remembered(
    ranker: HeadRanker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranker, "_users", Lru(2))
    for reading in ([5], [6], [5], [7]):  # 6 is forgotten, not 5
        ranker.user_states([reading])
    reads = count_reads(ranker.backbone, monkeypatch)
    ranker.user_states([[5]])
    assert reads == []
    ranker.user_states([[6]])
    assert reads == [1]


def test_states_of_no_items_are_none(backbone: Backbone) -> None:
    assert ItemStates("").of([], backbone).shape == (0, backbone.dim)


def test_a_model_is_the_same_in_its_place_and_in_anothers(tiny_llm: str, tmp_path: Path) -> None:
    trained = tmp_path / "final"
    shutil.copytree(tiny_llm, trained)
    alone = weights_digest(str(trained))
    weights = weights_fingerprint("a/base", trained)
    card = HeadCard(base="tiny", dim=4, readings=1, dataset="", weights="", history_length=3)
    save_head(trained, RecommendationHead(4), card)  # as RecPO leaves one beside a whole model
    assert weights_digest(str(trained)) == alone
    assert weights_fingerprint(str(trained), None) == weights
    assert weights_fingerprint("a/base", trained) == weights
    assert weights_fingerprint("a/base", None) != weights


def test_a_load_that_fails_leaves_no_worker(
    head_settings: Settings,
    head_folder: Path,
    small_catalog: Catalog,
    retriever: Retriever,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> Any:
        raise EngineError("no room")

    before = workers()
    place: Any = SimpleNamespace(
        settings=head_settings.model_copy(update={"head": head_folder}),
        retriever=retriever,
        catalog=small_catalog,
        histories=lambda hold_out: {},
    )
    monkeypatch.setattr(app, "load_engine", fails)
    monkeypatch.setattr(build, "load_engine", fails)
    for load in (app.load_graph, build.load_r2ec_graph):
        with pytest.raises(EngineError, match="no room"):
            load(place)
        assert workers() == before
    monkeypatch.setattr(HeadRanker, "table", fails)
    with pytest.raises(EngineError, match="no room"):
        HeadRanker.load(head_settings, head_folder, small_catalog)
    assert workers() == before


def test_r2ec_is_served_as_its_head_was_trained(
    head_settings: Settings, head_folder: Path, backbone: Backbone
) -> None:
    card = read_card(head_folder).model_copy(update={"thought_tokens": 7})
    save_head(head_folder, random_head(backbone.dim), card)
    own = head_settings.model_copy(update={"head": head_folder})
    served = r2ec_settings(own)
    assert (served.history_length, served.thought_tokens, served.decoding) == (3, 7, "free")
    assert r2ec_settings(own, thought_tokens=5).thought_tokens == 5
    with pytest.raises(HeadError, match="DEEPREC_HEAD"):
        r2ec_settings(head_settings)
