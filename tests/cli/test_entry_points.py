"""The demo, the commands and the server's graph, to the end, over the real LLM in vLLM."""

import asyncio
import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from deeprec import cli, demo
from deeprec.errors import RequestError
from deeprec.evals import agents
from deeprec.evals.config import EvalRun
from deeprec.evals.evaluate import evaluate
from deeprec.graph import app
from deeprec.graph.engine.adapter import merged_model
from deeprec.graph.engine.vllm_inprocess import VLLMEngine
from deeprec.settings import load_settings
from deeprec.tools.interactions import InteractionData
from deeprec.tools.trm.config import DeepRecConfig, FitConfig
from deeprec.tools.workspace import Workspace

pytestmark = pytest.mark.engine


@pytest.fixture
def workspace(
    tiny_data: InteractionData,
    tiny_encoder_folder: Path,
    real_engine: VLLMEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Workspace]:
    """A small workspace in the environment's settings, and an engine that is loaded already."""
    (tmp_path / "assets").symlink_to(load_settings().assets_dir)
    monkeypatch.setenv("DEEPREC_HOME", str(tmp_path))
    monkeypatch.setenv("DEEPREC_WORKSPACE", "tiny")
    monkeypatch.setenv("DEEPREC_ENCODER", str(tiny_encoder_folder))
    place = Workspace(load_settings())
    tiny_data.save(place.dataset_dir)
    place.train_trm(DeepRecConfig(), FitConfig(epochs=1, pool=100))
    place.index().close()
    for module in (app, agents, demo):
        monkeypatch.setattr(module, "load_engine", lambda _: real_engine)
    place = Workspace(load_settings())
    yield place
    place.retriever.close()
    place.catalog.close()


def test_demo_tells_every_turn_and_the_list(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an LLM without an adapter, in guided runs."""
    monkeypatch.setenv("DEEPREC_MODEL", workspace.settings.model_name)
    monkeypatch.setitem(demo._SETTINGS, "limits", {"max_retrievals": 2})
    workspace = Workspace(load_settings())
    console = Console(record=True, width=200)
    demo.run_demo(workspace, console, users=1, seed=0)
    told = console.export_text()
    for part in ("Turn 1", "preference", "retrieved", "Recommendation", "guided", "Held out: Film"):
        assert part in told
    assert "What to try next" in told


@pytest.fixture
def tuned(real_engine: VLLMEngine, tmp_path: Path) -> Iterator[None]:
    """The shipped adapter's weights in the engine."""
    own = AutoModelForCausalLM.from_pretrained(real_engine.name, dtype=torch.float32)
    folder = merged_model(
        real_engine.name, demo.SHIPPED_ADAPTER, tmp_path / "merged", dtype="float32"
    )
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    real_engine.load_weights(dict(merged.named_parameters()))
    yield
    real_engine.load_weights(dict(own.named_parameters()))


def test_demo_with_the_shipped_adapter_writes_everything_itself(
    workspace: Workspace, tuned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a catalog that it has never seen."""
    users = 2
    monkeypatch.setitem(demo._SETTINGS, "k", 5)
    console = Console(record=True, width=200)
    demo.run_demo(workspace, console, users=users, seed=0)
    told = console.export_text()
    assert "writes everything by itself" in told
    assert told.count("preference  anything") == users  # the first search of each
    assert told.count("ended: answered") >= users - 1
    assert told.count("policy") >= 5 * users - 1


def test_demo_tells_an_error_in_words(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(demo._SETTINGS, "limits", {"max_total_tokens": 256})
    with pytest.raises(RequestError, match="no room to think"):
        demo.run_demo(workspace, Console(quiet=True), users=2, seed=0)


def test_recommend_prints_json(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    request = ["recommend", "Film 3", "Film 4", "-k", "3", "--json", "--time-budget", "10"]
    monkeypatch.setattr("sys.argv", ["deeprec", *request])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    response = json.loads(capsys.readouterr().out)
    assert len({line["id"] for line in response["recommendations"]} - {"3", "4"}) == 3


def test_the_servers_graph_is_loaded_once(workspace: Workspace) -> None:
    async def twice() -> list[object]:
        return list(await asyncio.gather(app.served(), app.served()))

    app._loaded.cache_clear()
    kept = gc.get_freeze_count()
    try:
        one, other = asyncio.run(twice())
        assert gc.get_freeze_count() > kept
    finally:
        gc.unfreeze()
    assert one is other is app.graph()
    limits = {"max_retrievals": 1, "min_retrievals": 1, "time_budget_s": 30}
    answer = app.graph().invoke({"user_id": "u3", "k": 2, "limits": limits})
    assert len(answer["recommendations"]) == 2
    app._loaded.cache_clear()


def test_guided_runs_are_judged_as_whole_lists(
    workspace: Workspace, real_engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(real_engine, "close", lambda: None)  # other tests use it too
    short = {"retrieve_n": 4, "history_length": 4, "thought_tokens": 8, "answer_form": "numbers"}
    entry = {"kind": "agent", "settings": {**short, "limits": {"max_retrievals": 2}}}
    run = EvalRun.model_validate(
        {"output": tmp_path / "run", "workspace": "tiny", "users": 2, "resamples": 100, "k": 3,
         "metrics": ["ndcg@3"], "compare_by": "ndcg@3", "recommenders": {"agent": entry}}
    )  # fmt: skip
    results = evaluate(run, workspace, Console(quiet=True))
    row = results.rows[0]
    assert (row.label, row.users, row.failures, row.short) == ("agent, served", 2, 0, 0)
    assert (row.duplicates, row.unknown, row.from_past) == (0, 0, 0)
    assert results.agents[0].invented_lines == 0
