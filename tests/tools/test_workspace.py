from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deeprec.errors import CatalogError, DataError, TRMError
from deeprec.settings import Settings
from deeprec.tools import assets
from deeprec.tools.interactions import InteractionData
from deeprec.tools.retriever import RetrievalRequest
from deeprec.tools.trm.config import DeepRecConfig, FitConfig
from deeprec.tools.workspace import Workspace

from .test_catalog import delete_database, empty_database, overwrite_database, truncate_database


@pytest.fixture
def settings(tmp_path: Path, tiny_encoder_folder: Path) -> Settings:
    return Settings(home=tmp_path, workspace="tiny", model="m", encoder=str(tiny_encoder_folder))


def fill(settings: Settings, data: InteractionData) -> Workspace:
    place = Workspace(settings)
    data.save(place.dataset_dir)
    place.train_trm(DeepRecConfig(), FitConfig(epochs=1, pool=100))
    place.index().close()
    return place


def test_each_missing_step_is_named(settings: Settings, tiny_data: InteractionData) -> None:
    with pytest.raises(DataError, match="deeprec prepare"):
        _ = Workspace(settings).data
    tiny_data.save(Workspace(settings).dataset_dir)
    with pytest.raises(TRMError, match="deeprec train-trm"):
        _ = Workspace(settings).trm
    Workspace(settings).train_trm(DeepRecConfig(), FitConfig(epochs=1, pool=100))
    assert not Workspace(settings).has_catalog()
    with pytest.raises(CatalogError, match="deeprec index"):
        _ = Workspace(settings).catalog


def test_from_data_to_retrieved_items(settings: Settings, tiny_data: InteractionData) -> None:
    fill(settings, tiny_data)
    place = Workspace(settings)
    assert place.has_catalog()
    histories = place.histories(hold_out=True)
    whole = place.histories(hold_out=False)
    assert whole["u0"][:-1] == histories["u0"]
    request = RetrievalRequest(
        history=tuple(histories["u0"]), preference="comedy", k=5, exclude=frozenset(histories["u0"])
    )
    with place.retriever as retriever:
        (found,) = retriever.retrieve([request])
    assert len({item.id for item in found} - set(histories["u0"])) == 5


def test_each_step_forgets_what_it_makes_stale(
    settings: Settings, tiny_data: InteractionData, tmp_path: Path
) -> None:
    place = Workspace(settings)
    tiny_data.save(place.dataset_dir)
    place.train_trm(DeepRecConfig(), FitConfig(epochs=1, pool=100))
    first = place.index()
    assert place.catalog is first  # one snapshot, not two
    assert place.has_catalog()
    retriever = place.retriever
    again = place.index()  # the open catalog is in nobody's way
    assert place.catalog is again is place.retriever.catalog
    with pytest.raises(RuntimeError, match="closed"):
        retriever.submit(RetrievalRequest(("1",)))
    place.train_trm(DeepRecConfig(), FitConfig(epochs=1, pool=100), seed=1)
    assert not place.has_catalog()
    place.index()
    (found,) = place.retriever.retrieve([RetrievalRequest(("1", "2"), k=3)])
    assert len(found) == 3

    log = tmp_path / "log.csv"
    rows = [f"u{user},i{(user + step) % 12},{step}" for user in range(30) for step in range(6)]
    log.write_text("\n".join(["user_id,item_id,timestamp", *rows, ""]))
    assert place.item_embeddings.shape[0] == len(tiny_data.items)
    place.prepare(log, k_core=2, options={"time_unit": "s"})
    assert place.item_embeddings.shape[0] == len(place.data.items) == 12
    with pytest.raises(TRMError, match="another data set"):
        _ = place.retriever
    place.train_trm(DeepRecConfig(), FitConfig(epochs=1, pool=100))
    with place.index() as catalog:
        assert len(catalog) == 12


@pytest.mark.parametrize("option", ["name", "path", "format", "k_core"])
def test_options_of_preparing_are_the_loaders_alone(
    settings: Settings, tmp_path: Path, option: str
) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\nu,i,1\n")
    with pytest.raises(DataError, match=f"no option '{option}'"):
        Workspace(settings).prepare(tmp_path / "log.csv", k_core=1, options={option: "table"})


def test_progress_is_told(settings: Settings, tiny_data: InteractionData) -> None:
    place = Workspace(settings)
    tiny_data.save(place.dataset_dir)
    embedded: list[tuple[int, int]] = []
    made = place.embed_items(progress=lambda *at: embedded.append(at))
    assert made is place.item_embeddings is place.embed_items()
    place.train_trm(DeepRecConfig(), FitConfig(epochs=1, pool=100))
    written: list[tuple[int, int]] = []
    place.index(progress=lambda *at: written.append(at)).close()
    assert embedded == written == [(40, 40)]


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        ({}, ["SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"]),
        ({"model": "m"}, ["all-MiniLM-L6-v2"]),
        ({"encoder": "e"}, ["SmolLM2-135M-Instruct"]),
        ({"model": "m", "encoder": "e"}, []),
    ],
)
def test_only_models_that_are_not_chosen_are_fetched(
    own: dict[str, str], wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(assets, "_fetch", lambda asset, *_: fetched.append(asset.name))
    Workspace(Settings(home=tmp_path, **own)).ensure_assets()
    assert fetched == wanted


def test_a_checkpoint_of_another_data_set_is_refused(
    settings: Settings, tiny_data: InteractionData
) -> None:
    place = fill(settings, tiny_data)
    items = (replace(tiny_data.items[0], title="Another film"), *tiny_data.items[1:])
    replace(tiny_data, items=items).save(place.dataset_dir)
    with pytest.raises(TRMError, match="another data set"):
        _ = Workspace(settings).trm


@pytest.mark.parametrize(
    "fault", [truncate_database, overwrite_database, empty_database, delete_database]
)
def test_a_damaged_catalog_is_made_again_from_data_and_trm(
    settings: Settings, tiny_data: InteractionData, fault: Callable[[Path], None]
) -> None:
    place = fill(settings, tiny_data)
    request = RetrievalRequest(history=("1", "2", "3"), preference="comedy", k=5)
    with Workspace(settings).retriever as retriever:
        before = retriever.catalog.snapshot
        (expected,) = retriever.retrieve([request])
        retriever.catalog.close()
    fault(place.catalog_dir)
    with pytest.raises(CatalogError, match="deeprec index"):
        _ = Workspace(settings).retriever
    again = Workspace(settings)
    again.index()
    assert again.catalog.snapshot.items == before.items
    assert np.array_equal(again.catalog.vectors, before.vectors)
    assert np.array_equal(again.catalog.text_embeddings, before.text_embeddings)
    with again.retriever as retriever:
        assert retriever.retrieve([request]) == [expected]
    again.catalog.close()


def test_a_catalog_of_another_trm_is_refused(
    settings: Settings, tiny_data: InteractionData
) -> None:
    place = fill(settings, tiny_data)
    place.train_trm(DeepRecConfig(), FitConfig(epochs=1, pool=100), seed=1)
    with pytest.raises(CatalogError, match="another TRM"):
        _ = Workspace(settings).catalog
    assert not Workspace(settings).has_catalog()
