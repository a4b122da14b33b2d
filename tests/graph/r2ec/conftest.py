"""A small LLM with a recommendation head over the films' catalog."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deeprec.graph.r2ec.backbone import Backbone
from deeprec.graph.r2ec.build import build_r2ec_graph
from deeprec.graph.r2ec.head import HeadCard, RecommendationHead, save_head, weights_fingerprint
from deeprec.graph.r2ec.items import ItemStates, catalog_readings, content_key
from deeprec.graph.r2ec.ranker import HeadRanker
from deeprec.graph.r2ec.readings import VERSION
from deeprec.graph.state import RunSettings, State
from deeprec.settings import Settings, load_settings
from deeprec.tools.catalog import Catalog, CatalogSettings, Fingerprint
from deeprec.tools.interactions import InteractionData
from deeprec.tools.retriever import Retriever

from ..conftest import Run, Said, ScriptedEngine

RunR2ec = Callable[..., Run]


def random_head(dim: int) -> RecommendationHead:
    """A head whose projections are no identities, so that leaving one out is seen."""
    torch.manual_seed(1)
    head = RecommendationHead(dim)
    with torch.no_grad():
        for parameter in (head.user.weight, head.item.weight, head.user.bias, head.item.bias):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return head.eval()


@pytest.fixture(scope="session")
def backbone(tiny_llm: str) -> Backbone:
    return Backbone.load(tiny_llm, dtype="float32")


@pytest.fixture
def ranker(backbone: Backbone, retriever: Retriever) -> Iterator[HeadRanker]:
    made = HeadRanker(backbone, random_head(backbone.dim), retriever.catalog, ItemStates("tiny"))
    yield made
    made.close()


@pytest.fixture
def small_catalog(
    tiny_data: InteractionData, retriever: Retriever, tmp_path: Path
) -> Iterator[Catalog]:
    """A catalog of ten films that a test may change."""
    now = retriever.catalog.snapshot
    catalog = Catalog.build(
        CatalogSettings(folder=tmp_path / "chroma"),
        tiny_data.items[:10],
        now.text_embeddings[:10],
        now.vectors[:10],
        fingerprint=Fingerprint("data", "trm", "encoder"),
    )
    yield catalog
    catalog.close()


@pytest.fixture
def head_settings(tiny_llm: str, tmp_path: Path) -> Settings:
    engine = {"dtype": "float32"}
    return load_settings(home=tmp_path / "home", model=tiny_llm, engine=engine)


@pytest.fixture
def head_folder(
    head_settings: Settings, backbone: Backbone, small_catalog: Catalog, tmp_path: Path
) -> Path:
    """A head's artefact for `small_catalog`."""
    folder = tmp_path / "head"
    readings = catalog_readings(small_catalog.snapshot, backbone)
    card = HeadCard(
        base="tiny",
        dim=backbone.dim,
        readings=VERSION,
        dataset="data",
        weights=weights_fingerprint(head_settings.model_name, None),
        history_length=3,
        trained_items=tuple(content_key(reading) for reading in readings),
    )
    save_head(folder, random_head(backbone.dim), card)
    return folder


@pytest.fixture
def run_r2ec(ranker: HeadRanker) -> RunR2ec:
    """Run the graph over a script. Keywords: settings of the run; `request`."""

    def run(*script: Said, request: dict[str, Any] | None = None, **settings: Any) -> Run:
        engine = ScriptedEngine(script, 4096)
        chosen = RunSettings.model_validate({"k": 3, "thought_tokens": 32, **settings})
        graph = build_r2ec_graph(engine, ranker, histories={"u": ["0", "1", "2"]}, settings=chosen)
        *_, state = graph.stream(
            request or {"user_id": "u"},
            stream_mode="values",
            output_keys=list(State.__annotations__),
        )
        return Run(state, engine)

    return run
