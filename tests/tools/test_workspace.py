from dataclasses import replace
from pathlib import Path

import pytest

from deeprec.errors import CatalogError, DataError, TRMError
from deeprec.settings import Settings
from deeprec.tools.interactions import InteractionData
from deeprec.tools.retriever import RetrievalRequest
from deeprec.tools.trm.config import DeepRecConfig, FitConfig
from deeprec.tools.workspace import Workspace


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


def test_a_checkpoint_of_another_data_set_is_refused(
    settings: Settings, tiny_data: InteractionData
) -> None:
    place = fill(settings, tiny_data)
    items = (replace(tiny_data.items[0], title="Another film"), *tiny_data.items[1:])
    replace(tiny_data, items=items).save(place.dataset_dir)
    with pytest.raises(TRMError, match="another data set"):
        _ = Workspace(settings).trm


def test_a_catalog_of_another_trm_is_refused(
    settings: Settings, tiny_data: InteractionData
) -> None:
    place = fill(settings, tiny_data)
    place.train_trm(DeepRecConfig(), FitConfig(epochs=1, pool=100), seed=1)
    with pytest.raises(CatalogError, match="another TRM"):
        _ = Workspace(settings).catalog
    assert not Workspace(settings).has_catalog()
