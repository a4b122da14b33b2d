"""A small workspace with everything but an LLM, and evaluations of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from deeprec.errors import EngineError
from deeprec.evals.config import EvalRun
from deeprec.evals.evaluate import evaluate
from deeprec.evals.results import Results
from deeprec.settings import load_settings
from deeprec.tools.interactions import InteractionData
from deeprec.tools.trm.config import DeepRecConfig, FitConfig
from deeprec.tools.workspace import Workspace

BASELINES: dict[str, Any] = {
    "popularity": {"kind": "popularity"},
    "markov": {"kind": "markov"},
    "trm": {"kind": "trm"},
    "trm genres": {"kind": "trm", "preference": "history"},
}

WARM_UP = (EngineError("this run is thrown away"),)
"""What a scripted engine says to the first run of an agent, which counts for nothing."""

Evaluate = Callable[..., Results]


@pytest.fixture(scope="session")
def place(
    tiny_data: InteractionData, tiny_encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Workspace:
    settings = load_settings(
        home=tmp_path_factory.mktemp("home"), workspace="tiny", encoder=str(tiny_encoder_folder)
    )
    workspace = Workspace(settings)
    tiny_data.save(workspace.dataset_dir)
    workspace.train_trm(DeepRecConfig(), FitConfig(epochs=1, pool=100))
    workspace.index()
    return workspace


def taking_again(data: InteractionData, users: int) -> InteractionData:
    """The data, but that the first users take their first item once more at the end."""
    items = data.item_indices.copy()
    for user in range(users):
        rows = np.flatnonzero(data.users == user)
        items[rows[-1]] = items[rows[0]]
    return replace(data, item_indices=items)


def config(output: Path, **changes: Any) -> EvalRun:
    fields = {
        "output": output,
        "workspace": "tiny",
        "k": 5,
        "depth": 20,
        "resamples": 200,
        "recommenders": BASELINES,
    }
    metrics = {"metrics": ["recall@1", "recall@5", "ndcg@5", "mrr"], "compare_by": "ndcg@5"}
    return EvalRun.model_validate({**fields, **metrics, **changes})


@pytest.fixture
def run(place: Workspace, tmp_path: Path) -> Evaluate:
    """Evaluate in the small workspace; keywords change the configuration."""

    def go(
        output: Path = tmp_path / "run", workspace: Workspace = place, **changes: Any
    ) -> Results:
        return evaluate(config(output, **changes), workspace, Console(quiet=True))

    return go
