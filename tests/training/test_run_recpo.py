"""RecPO from end to end: short runs on a small LLM, and what is refused."""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from deeprec.configuration import load_config
from deeprec.errors import SettingsError
from deeprec.graph import protocol
from deeprec.graph.engine.base import Generation, GenerationRequest
from deeprec.graph.r2ec.head import load_head, read_card
from deeprec.graph.r2ec.ranker import HeadRanker
from deeprec.settings import load_settings
from deeprec.tools.interactions import InteractionData
from deeprec.tools.trm.config import DeepRecConfig, FitConfig
from deeprec.tools.workspace import Workspace
from deeprec.training import run_recpo
from deeprec.training.card import quarters
from deeprec.training.run_recpo import RecPORun
from deeprec.training.trajectory_file import read_trajectories

from ..conftest import GENRES
from ..graph.conftest import ScriptedEngine
from ..graph.test_loop import ask


@pytest.fixture(scope="session")
def home(
    tiny_data: InteractionData, tiny_encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A workspace of the films, with a TRM and a catalog."""
    folder = tmp_path_factory.mktemp("home")
    settings = load_settings(home=folder, workspace="tiny", encoder=str(tiny_encoder_folder))
    workspace = Workspace(settings)
    tiny_data.save(workspace.dataset_dir)
    workspace.train_trm(DeepRecConfig(), FitConfig(epochs=1, pool=100))
    workspace.index().close()
    return folder


@pytest.fixture
def here(
    home: Path, tiny_encoder_folder: Path, tiny_llm: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    monkeypatch.setenv("DEEPREC_HOME", str(home))
    monkeypatch.setenv("DEEPREC_ENCODER", str(tiny_encoder_folder))
    monkeypatch.setenv("DEEPREC_MODEL", tiny_llm)
    monkeypatch.setenv("DEEPREC_ENGINE__DTYPE", "float32")
    monkeypatch.setenv("DEEPREC_ENGINE__KV_CACHE_GIB", "1")
    return


def config(output: Path, **changes: Any) -> RecPORun:
    fields: dict[str, Any] = {
        "output": output,
        "workspace": "tiny",
        "head_start": {"readings": 60},
        "steps": 2,
        "users_per_step": 2,
        "group_size": 3,
        "updates": 2,
        "objective": {"negatives": 8},
        "precision": "float32",
        "max_length": 1024,
        "refresh_every": 2,
        "save_every": 1,
        "learning_rate": 0.01,
    }
    run = {
        "decoding": "free",
        "history_length": 3,
        "thought_tokens": 8,
        "temperature": 1.0,
        "on_limit": "fail",
    }
    return RecPORun.model_validate({**fields, "run": run, **changes})


class CutError(Exception):
    """As a kill would."""


@pytest.mark.engine
def test_a_run_learns_goes_on_after_a_kill_and_leaves_what_is_served(
    here: None, tmp_path: Path, tiny_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_recpo, "local_engine", lambda *_, **__: Kept(tiny_engine))
    console = Console(quiet=True)
    whole = run_recpo.run(config(tmp_path / "whole"), console)
    log = json.loads((tmp_path / "whole" / "log.json").read_text())
    assert [row["step"] for row in log] == [0, 1]
    for row in log:
        assert row["reward/total"] > 0
        assert row["run/policy_tokens"] > 0
    assert log[0]["engine_gap/mean"] > 0.0  # the second update of a step is off-policy
    runs = read_trajectories(tmp_path / "whole")
    assert len(runs) == 12
    assert all(run.rewards.total is not None for run in runs)
    assert {line.source for run in runs for line in run.recommendations} == {"head"}
    settings = load_settings(workspace="tiny")
    workspace = Workspace(settings)
    ranker = HeadRanker.load(settings, whole, workspace.catalog)  # fingerprints hold
    assert len(ranker.table().vectors) == 40
    ranker.close()

    tell = run_recpo._tell

    def cut(row: dict[str, float], console: Console) -> None:
        tell(row, console)
        if row["step"] == 1:
            raise CutError

    monkeypatch.setattr(run_recpo, "_tell", cut)
    with pytest.raises(CutError):
        run_recpo.run(config(tmp_path / "cut"), console)
    monkeypatch.setattr(run_recpo, "_tell", tell)
    resumed = run_recpo.run(config(tmp_path / "cut"), console)
    one, other = (load_head(folder, read_card(folder)) for folder in (whole, resumed))
    for (name, value), again in zip(
        one.state_dict().items(), other.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, again, atol=2e-3, rtol=1e-2, msg=name)


class Explorer(ScriptedEngine):
    """Searches once, by its seed for one genre or another, then ends its thought."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__([], 4096)
        self.synced = 0

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        said = self.tokenizer.decode(list(request.prompt_ids))
        searched = said.rstrip().endswith(protocol.END_ITEMS)
        genre = GENRES[(request.seed or 0) % len(GENRES)].lower()
        self.script = [f"So, {genre}.</think>" if searched else "<think>\n" + ask(genre)]
        return super().submit(request)

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.synced += 1


class Rambler(Explorer):
    """Writes one thought or another, by its seed."""

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        genre = GENRES[(request.seed or 0) % len(GENRES)]
        self.script = [f"Some {genre.lower()}.</think>"]
        return ScriptedEngine.submit(self, request)


@pytest.mark.slow
def test_a_short_run_learns_and_its_control_does_not(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_recpo, "local_engine", Rambler)
    changes = {
        "steps": 12, "users_per_step": 4, "group_size": 4, "examples": 8, "updates": 1,
        "learning_rate": 0.0001, "head_learning_rate": 0.003, "lora": None,
    }  # fmt: skip
    found = {}
    for shuffled in (False, True):
        made = config(tmp_path / f"run{shuffled}", shuffle_rewards=shuffled, **changes)
        run_recpo.run(made, Console(quiet=True))
        log = json.loads((made.output / "log.json").read_text())
        found[shuffled] = quarters(log, "reward/total") or (0.0, 0.0)
    first, last = found[False]
    assert last > first + 0.1
    # The control learns which films are anybody's targets, and not whose.
    assert last > found[True][1] + 0.05


def test_deeprec_is_trained_with_the_head_in_its_rank(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_recpo, "local_engine", Explorer)
    run = {
        "decoding": "free", "rank": "head", "answer_form": "numbers", "retrieve_n": 5, "k": 3,
        "history_length": 3, "temperature": 1.0, "on_limit": "fail", "fill": False,
    }  # fmt: skip
    made = config(tmp_path / "run", agent="deeprec", run=run, updates=1)
    folder = run_recpo.run(made, Console(quiet=True))
    runs = read_trajectories(tmp_path / "run")
    assert len(runs) == 12
    for played in runs:
        assert [line.source for line in played.recommendations] == ["head"] * 3
        found = {item.id for turn in played.turns for item in turn.retrieved}
        assert {line.id for line in played.recommendations} <= found
        # A target that no search brought in earns nothing, whatever the head thinks of it.
        assert (played.rewards.total or 0) == 0 or played.target in found
    assert any((played.rewards.total or 0) > 0 for played in runs)
    before, after = (load_head(at, read_card(at)) for at in (tmp_path / "run" / "head", folder))
    assert not torch.equal(before.user.weight, after.user.weight)
    log = json.loads((tmp_path / "run" / "log.json").read_text())
    assert any(row["loss/item"] != 0 for row in log)


class Kept:
    """The session's engine; a run's close leaves it open."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"run": {"temperature": 0.7}}, "temperature is 0.7"),
        ({"agent": "deeprec"}, "rank: head"),
        ({"run": {"temperature": 1.0, "rank": "head"}}, "rank: head"),
        ({"run": {"temperature": 1.0, "reasoning": False}}, "reasoning is false"),
        ({"selection": {"shares": {"cold_start": 1.0}}}, "no users out"),
        ({"group_size": 1}, "group_size"),
        ({"objective": {"alpha": 1.5}}, "alpha"),
    ],
)
def test_a_configuration_that_can_not_be_meant_is_refused(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    fields = {"output": "out", "steps": 1, **changes}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(SettingsError, match=says):
        load_config(path, RecPORun)


def test_the_shipped_configurations_are_sound() -> None:
    folder = Path(run_recpo.__file__).parent / "configs"
    for path in folder.glob("recpo_*.yaml"):
        assert load_config(path, RecPORun).steps >= 0
