"""The head and its artefact: what is kept, what is made anew, what is refused."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deeprec.errors import HeadError
from deeprec.graph.r2ec.backbone import Backbone, batches
from deeprec.graph.r2ec.head import HEAD, RecommendationHead, read_card
from deeprec.graph.r2ec.items import ITEMS, ItemStates, catalog_readings
from deeprec.graph.r2ec.ranker import HeadRanker
from deeprec.settings import Settings
from deeprec.tools.catalog import Catalog
from deeprec.tools.interactions import Item
from deeprec.tools.retriever import Retriever

from .conftest import random_head


def count_reads(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each pass of the LLM reads from now on."""
    counts: list[int] = []
    plain = backbone.states
    monkeypatch.setattr(backbone, "states", lambda rows: (counts.append(len(rows)), plain(rows))[1])
    return counts


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
    sequences = catalog_readings(small_catalog, backbone)
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

    class Nothing:
        ids = ()

    class Empty:
        snapshot = Nothing()

    with pytest.raises(HeadError, match="catalog is empty"):
        catalog_readings(Empty(), backbone)  # type: ignore[arg-type]  # no catalog can be built so


def test_a_worker_that_fails_tells_and_lives_on(ranker: HeadRanker) -> None:
    with pytest.raises(ValueError, match="a sequence is empty"):
        ranker.submit([]).result()
    assert ranker.submit([5, 6]).result().shape == (ranker.backbone.dim,)
