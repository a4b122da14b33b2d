"""RecPO from end to end: short runs on a small LLM, and what is refused."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from deeprec.configuration import load_config
from deeprec.errors import HeadError, SettingsError
from deeprec.graph import protocol
from deeprec.graph.engine.adapter import BASE
from deeprec.graph.engine.base import Generation, GenerationRequest
from deeprec.graph.r2ec.backbone import Backbone
from deeprec.graph.r2ec.head import HEAD, load_head, read_card, weights_fingerprint
from deeprec.graph.r2ec.ranker import HeadRanker
from deeprec.settings import load_settings
from deeprec.tools.interactions import InteractionData
from deeprec.tools.trm.config import DeepRecConfig, FitConfig
from deeprec.tools.workspace import Workspace
from deeprec.training import head_folder, run_recpo
from deeprec.training.card import quarters
from deeprec.training.configuration import LoRA
from deeprec.training.policy import load_policy
from deeprec.training.recpo_trainer import RecPOTrainer
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


def cut_once(monkeypatch: pytest.MonkeyPatch, module: ModuleType, step: int) -> list[float]:
    """Have a run of `module` cut off when it tells that step for the first time; gives the steps
    that are told.
    """
    told: list[float] = []

    def tell(row: dict[str, float], console: Console) -> None:
        told.append(row["step"])
        if row["step"] == step and told.count(step) == 1:
            raise CutError

    monkeypatch.setattr(module, "_tell", tell)
    return told


@pytest.fixture
def adapter(tiny_llm: str, tmp_path: Path) -> Path:
    folder = tmp_path / "warm" / "final"
    load_policy(tiny_llm, None, LoRA(r=2)).save_pretrained(folder)
    return folder


@pytest.fixture
def started(here: None, tmp_path: Path) -> Path:
    """A head that was fitted over the small LLM."""
    return run_recpo.run(config(tmp_path / "started", steps=0), Console(quiet=True))


@pytest.mark.engine
def test_a_run_learns_and_leaves_what_is_served(
    here: None, tmp_path: Path, tiny_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_recpo, "local_engine", lambda *_, **__: Kept(tiny_engine))
    whole = run_recpo.run(config(tmp_path / "whole"), Console(quiet=True))
    log = json.loads((tmp_path / "whole" / "log.json").read_text())
    assert [row["step"] for row in log] == [0, 1]
    for row in log:
        assert row["run/policy_tokens"] > 0
        assert row["engine_gap/mean"] > 1e-3  # the second update of a step is off-policy
    runs = read_trajectories(tmp_path / "whole")
    assert len(runs) == 12
    for run in runs:
        assert run.rewards.total is not None
        places = {line.id: line.rank for line in run.recommendations}
        at = places.get(str(run.target))
        if at is None:
            assert run.rewards.total < 0.95 / math.log2(12) + 0.05
        else:  # what is left is the target's probability
            assert 0 < run.rewards.total - 0.95 / math.log2(at + 1) < 0.05
    assert {line.source for run in runs for line in run.recommendations} == {"head"}
    settings = load_settings(workspace="tiny")
    workspace = Workspace(settings)
    ranker = HeadRanker.load(settings, whole, workspace.catalog)  # fingerprints hold
    assert len(ranker.table().vectors) == 40
    ranker.close()


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


def test_a_run_goes_on_after_a_kill(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_recpo, "local_engine", Rambler)
    changes = {"refresh_every": 1, "head_learning_rate": 0.01, "updates": 1}
    told = cut_once(monkeypatch, run_recpo, 1)
    with pytest.raises(CutError):
        run_recpo.run(config(tmp_path / "cut", **changes), Console(quiet=True))
    resumed = run_recpo.run(config(tmp_path / "cut", **changes), Console(quiet=True))
    assert told == [0, 1, 1]  # not from the start
    whole = run_recpo.run(config(tmp_path / "whole", **changes), Console(quiet=True))
    log = json.loads((tmp_path / "cut" / "log.json").read_text())
    assert [row["step"] for row in log] == [0, 1]
    for name in ("adapter_model.safetensors", "head.safetensors"):
        one, other = (load_file(folder / name) for folder in (whole, resumed))
        for key, value in one.items():
            torch.testing.assert_close(value, other[key], atol=1e-4, rtol=0, msg=key)
    assert all(row["items/kept"] > 0.9 for row in log)
    before = load_file(tmp_path / "whole" / "head" / "head.safetensors")
    moved = load_file(whole / "head.safetensors")["user.weight"] - before["user.weight"]
    assert moved.abs().max() > 0.01  # much more than what is forgiven


def test_a_control_is_taught_the_targets_of_others_without_negatives_too(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_recpo, "local_engine", Rambler)
    taught: list[list[str]] = []
    plain = RecPOTrainer._groups

    def groups(self: RecPOTrainer, runs: Any, targets: Any, step: int) -> Any:
        taught.append(list(targets))
        found = plain(self, runs, targets, step)
        assert found[2].shape == (0, self._ranker.backbone.dim)
        return found

    monkeypatch.setattr(RecPOTrainer, "_groups", groups)
    changes = {"steps": 1, "users_per_step": 4, "objective": {"negatives": 0}}
    run_recpo.run(config(tmp_path / "run", shuffle_rewards=True, **changes), Console(quiet=True))
    runs = read_trajectories(tmp_path / "run")
    own = [str(run.target) for run in runs[::3]]
    assert len(set(own)) == 4
    assert sorted(taught[0]) == sorted(own)
    assert all(given != target for given, target in zip(taught[0], own, strict=True))


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
    card = (folder / "README.md").read_text()
    assert "DEEPREC_HEAD and DEEPREC_ADAPTER to this folder, and `rank: head`" in card
    assert (folder / BASE).is_file()


class Searcher(Explorer):
    """Asks for one search after another, so that a limit ends it."""

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        said = self.tokenizer.decode(list(request.prompt_ids))
        self.script = ["<think>\n" + ask(GENRES[said.count(protocol.END_ITEMS) % 4].lower())]
        return ScriptedEngine.submit(self, request)


def test_a_run_without_a_list_has_earned_nothing(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_recpo, "local_engine", Searcher)
    run = {
        "decoding": "free", "rank": "head", "retrieve_n": 40, "history_length": 3,
        "temperature": 1.0, "on_limit": "fail", "limits": {"max_retrievals": 1},
    }  # fmt: skip
    made = config(tmp_path / "run", agent="deeprec", run=run, steps=1, updates=1)
    run_recpo.run(made, Console(quiet=True))
    runs = read_trajectories(tmp_path / "run")
    for played in runs:
        assert played.stop_reason == "max_retrievals"
        assert played.target in {item.id for turn in played.turns for item in turn.retrieved}
        assert played.recommendations == []
        assert played.rewards.total == 0


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


@pytest.mark.parametrize("with_start", [False, True])
def test_a_head_starts_from_what_the_policy_starts_from(
    here: None, tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, with_start: bool
) -> None:
    monkeypatch.setenv("DEEPREC_ADAPTER", str(adapter))  # of the graph's runs, not of this one
    read: list[str] = []
    plain = Backbone.load

    def load(model: str, *, dtype: str = "auto") -> Backbone:
        read.append(model)
        return plain(model, dtype=dtype)

    monkeypatch.setattr(Backbone, "load", load)
    start = adapter if with_start else None
    settings = load_settings()
    folder = run_recpo.run(config(tmp_path / "run", steps=0, start=start), Console(quiet=True))
    merged = [str(path) for path in settings.merged_dir.glob("warm-*")] if with_start else []
    assert read == (merged or [settings.model_name])
    weights = weights_fingerprint(settings.model_name, start)
    card = read_card(folder)
    assert (card.weights, card.history_length, card.thought_tokens) == (weights, 3, 8)


def test_a_head_of_another_llm_or_data_set_is_refused(
    started: Path, tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_recpo, "local_engine", Rambler)

    def again(**changes: Any) -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        run_recpo.run(config(tmp_path / "run", head=started, **changes), Console(quiet=True))

    again(steps=0)
    with pytest.raises(HeadError, match="reads another model"):
        again(start=adapter)
    card = json.loads((started / HEAD).read_text())
    (started / HEAD).write_text(json.dumps({**card, "dataset": "another"}))
    with pytest.raises(HeadError, match="was trained for data set another"):
        again()


def test_a_run_goes_on_over_nothing_else(
    started: Path, tmp_path: Path, tiny_llm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llm, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, other / "model.safetensors")
    monkeypatch.setenv("DEEPREC_MODEL", str(other))
    with pytest.raises(SettingsError, match="over another LLM"):
        run_recpo.run(config(started.parent, steps=0), Console(quiet=True))


def test_an_adapter_over_a_model_of_another_run_is_refused(
    here: None, tmp_path: Path, tiny_llm: str
) -> None:
    with pytest.raises(SettingsError, match="Name that folder as `model`"):
        run_recpo.run(config(tmp_path / "run", start=tiny_llm), Console(quiet=True))


def test_the_policy_is_trained_where_the_gpu_is(
    started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []

    class Policy:
        def to(self, device: str) -> None:
            moved.append(device)
            raise CutError

    monkeypatch.setattr(run_recpo, "local_engine", Rambler)
    monkeypatch.setattr(head_folder, "load_policy", lambda *_, **__: Policy())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(CutError):
        run_recpo.run(config(tmp_path / "run", head=started), Console(quiet=True))
    assert moved == ["cuda"]
