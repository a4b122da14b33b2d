"""The benchmarks of speed: what they play is what the graph plays, and what they tell is so."""

import asyncio
import json
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deeprec.errors import DeepRecError, EngineError
from deeprec.evals.bench import rollouts, suite
from deeprec.evals.bench.command import Figure, leave, machine, tell
from deeprec.evals.bench.grpo_step import configuration, split, updated
from deeprec.evals.bench.idle_graph import idle_graph
from deeprec.evals.bench.replay import Call, Gate, Recorder
from deeprec.evals.bench.retrieval import fresh_requests
from deeprec.evals.bench.rollouts import (
    added_cpu,
    faster,
    in_bare_loop,
    prefix_reuse,
    schedules,
    shared_prefill,
)
from deeprec.evals.bench.search_scale import break_even, exact, grown, hnsw
from deeprec.evals.bench.trm_training import figures as training_figures
from deeprec.graph.build import build_graph
from deeprec.graph.engine.base import Engine, Generation, GenerationRequest
from deeprec.graph.state import Limits, RunSettings
from deeprec.tools.workspace import Workspace
from deeprec.training.run_grpo import GRPORun

from ..graph.conftest import ScriptedEngine
from ..graph.test_loop import answer, ask

SCRIPTS = (
    (ask("Comedy"), ask("comedy"), ask("Drama; 1990"), "done</think>", answer("#1", "#3"), ""),
    (ask("Horror"), "enough</think>", answer("#2", "#2"), "more"),
    ("I stop here.",),
    tuple(ask(genre) for genre in ("Comedy", "Drama", "Horror", "Western", "1970", "1980")),
    ("no end " * 100,),
    ("nothing</think>", answer(), ""),
    (ask("anything"), "good</think><recommendation_list>\n1. #1\n2. #2", answer("#1", "#2"), ""),
)
"""Runs that search, repeat themselves, end early, search too often, never end, answer wrongly."""


class Scripts(Engine):
    """A script for each run, told apart by its seed."""

    name = "scripts"

    def __init__(self) -> None:
        self._engines = [ScriptedEngine(script, 4096) for script in SCRIPTS]
        self.max_model_len = 4096
        self.tokenizer = self._engines[0].tokenizer

    def submit(self, request: GenerationRequest) -> Any:
        assert request.seed is not None
        # generation_seed takes the run's times this number, and adds the tokens so far.
        return self._engines[request.seed // 1_000_003].submit(request)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def runs() -> list[rollouts.Run]:
    settings = RunSettings(
        k=2,
        retrieve_n=4,
        decoding="free",
        answer_form="numbers",
        on_limit="fail",
        fill=False,
        limits=Limits(max_retrievals=3, max_new_tokens=64),
    )
    return [
        ((str(nth), str(nth + 1)), settings.model_copy(update={"seed": nth}))
        for nth in range(len(SCRIPTS))
    ]


def test_graph_bare_loop_and_lock_step_play_the_same(
    place: Workspace, runs: list[rollouts.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever = place.retriever
    names = ("graph", "bare loop", "lock-step")
    recorders = [Recorder(Scripts()) for _ in names]
    played = [
        asyncio.run(schedules(Gate(recorder, 3), retriever)[name](runs))
        for recorder, name in zip(recorders, names, strict=True)
    ]
    assert played[0] == played[1] == played[2]
    asked = [{call.request for call in recorder.calls} for recorder in recorders]
    assert asked[0] == asked[1] == asked[2]
    assert len(asked[0]) > 15
    spent = added_cpu(recorders[0], retriever, runs, rounds=1)
    assert min(spent.values()) > 0

    async def otherwise(*given: Any) -> rollouts.Segments:
        *most, last = await in_bare_loop(*given)
        return [*most, last[:-1]]

    with monkeypatch.context() as patch:
        patch.setattr(rollouts, "in_bare_loop", otherwise)
        with pytest.raises(DeepRecError, match="wrote different transcripts"):
            added_cpu(recorders[0], retriever, runs, rounds=1)
    recorders[0].calls.pop()
    with pytest.raises(EngineError, match="was not recorded"):
        added_cpu(recorders[0], retriever, runs, rounds=1)


def test_who_waits_for_whom(place: Workspace, runs: list[rollouts.Run]) -> None:
    """In lock-step no run is a turn ahead of another; elsewhere the quick one is."""

    class Slow(Scripts):
        def __init__(self) -> None:
            super().__init__()
            self.order: list[int] = []

        async def generate(self, request: GenerationRequest) -> Generation:
            assert request.seed is not None
            run = request.seed // 1_000_003
            self.order.append(run)
            await asyncio.sleep(0.2 if run == 0 else 0)
            return await super().generate(request)

    two = [runs[0], runs[3]]
    orders = []
    for name in ("graph", "bare loop", "lock-step"):
        engine = Slow()
        asyncio.run(schedules(engine, place.retriever)[name](two))
        orders.append(engine.order[:4])
    assert orders == [[0, 3, 3, 3], [0, 3, 3, 3], [0, 3, 0, 3]]
    three = [*two, runs[4]]
    places = {}
    for name in ("graph", "lock-step"):
        engine = Slow()
        asyncio.run(schedules(engine, place.retriever, at_once=2)[name](three))
        last = {run: nth for nth, run in enumerate(engine.order)}
        places[name] = (last[3], engine.order.index(4), last[0])
    quick_ends, begins, slow_ends = places["graph"]
    assert quick_ends < begins < slow_ends
    quick_ends, begins, slow_ends = places["lock-step"]
    assert quick_ends < slow_ends < begins  # the slowest of the batch


def test_the_idle_graph_takes_the_same_steps(place: Workspace, runs: list[rollouts.Run]) -> None:
    async def steps(graph: Any, request: dict[str, Any], settings: RunSettings) -> list[str]:
        told = graph.astream(request, context=settings, stream_mode="updates")
        return [name async for update in told for name in update]

    graph = build_graph(Scripts(), place.retriever)
    for nth, searches in ((0, 3), (1, 1), (2, 0)):
        history, settings = runs[nth]
        real = {"history": [f"id:{item}" for item in history]}
        taken = asyncio.run(steps(graph, real, settings))
        assert taken.count("call_trm") == searches
        assert asyncio.run(steps(idle_graph(), {**real, "k": searches + 1}, settings)) == taken


def test_so_many_generations_at_a_time(place: Workspace, runs: list[rollouts.Run]) -> None:
    class Counting(Scripts):
        at_work = most = 0

        async def generate(self, request: GenerationRequest) -> Generation:
            self.at_work += 1
            self.most = max(self.most, self.at_work)
            await asyncio.sleep(0.01)
            self.at_work -= 1
            return await super().generate(request)

    for name in ("graph", "lock-step"):
        engine = Counting()
        asyncio.run(schedules(Gate(engine, 2), place.retriever)[name](runs))
        assert engine.most == 2


def test_seconds_of_generations_add_up() -> None:
    class Late(Scripts):
        def submit(self, request: GenerationRequest) -> Future[Generation]:
            future: Future[Generation] = Future()
            threading.Timer(0.1, future.set_result, [Generation((1,), (0.0,), "eos")]).start()
            return future

    async def two(engine: Engine) -> None:
        request = GenerationRequest(prompt_ids=(1,), max_tokens=9)
        await asyncio.gather(engine.generate(request), engine.generate(request))

    recorder = Recorder(Late())
    asyncio.run(two(recorder))
    assert 0.2 <= recorder.seconds < 2


def test_prefix_figures_by_hand() -> None:
    def call(prompt: list[int], said: list[int], cached: int) -> Call:
        request = GenerationRequest(prompt_ids=tuple(prompt), max_tokens=9)
        logprobs = tuple(0.0 for _ in said)
        return Call(request, Generation(tuple(said), logprobs, "eos", cached_tokens=cached))

    first = call([1, 2, 3, 4], [5, 6], 0)
    later = call([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [11], 5)
    assert prefix_reuse([first, later]) == {
        "generations": 1,
        "prompt_tokens": 10,
        "of_prompts": 0.5,
        "of_seen": 5 / 6,
    }
    group = [call([1, 2, 3, 4], [nth], 0 if nth == 0 else 3) for nth in range(8)]
    assert shared_prefill([*group, later]) == pytest.approx(0.75)


def test_a_ratio_is_of_neighbours() -> None:
    def rounds(*values: float) -> list[dict[str, float]]:
        return [{"trajectories_per_second": value} for value in values]

    assert faster({"a": rounds(2, 30, 5), "b": rounds(1, 10, 5)}, "a", "b") == 2


def test_fresh_requests_differ(place: Workspace) -> None:
    made = fresh_requests(place)
    asked = [next(made).preference for _ in range(300)]
    assert len(set(asked)) == 300


def test_search_is_measured_on_what_the_catalog_holds() -> None:
    vectors = np.random.default_rng(0).standard_normal((50, 8), dtype=np.float32)
    users = np.random.default_rng(1).standard_normal((70, 8), dtype=np.float32)
    assert grown(vectors, 3000).shape == (3000, 8)
    by_exact = exact(3000, vectors, users)
    by_hnsw = hnsw(3000, vectors, users)
    assert by_exact["gib"] == 3000 * 8 * 4 / 2**30
    assert by_hnsw["recall"] > 0.8
    assert min(by_exact.values()) > 0


def test_break_even_by_hand() -> None:
    by_exact = {10: {"one_ms": 1.0}, 100: {"one_ms": 10.0}, 1000: {"one_ms": 100.0}}
    assert break_even(by_exact, {10: {"one_ms": 1}, 100: {"one_ms": 20.0}}) == pytest.approx(200)


def test_the_split_of_a_step(tmp_path: Path) -> None:
    def row(generate: float, update: float) -> dict[str, float]:
        return {
            "tokens/read": 100 * generate,
            "tokens/trained": 10 * generate,
            "seconds/generate": generate,
            "seconds/update_before": update,
            "seconds/sync": 1,
            "seconds/reward": 0.5,
        }

    history = [row(70, 0), row(10, 20), row(30, 40), {"train_runtime": 1.0}]
    assert split(history) == {"generate": 20, "update": 30, "sync": 1, "reward": 0.5}
    # The updates that took 20 and 40 s are those of the first two steps.
    assert updated(history) == {"read": 4000, "trained": 400}
    with pytest.raises(DeepRecError, match="second step"):
        split(history[:1])
    config = configuration(tmp_path, "tiny", steps=2, rows_per_pass=4)
    assert GRPORun.model_validate(json.loads(json.dumps(config))).kept == 4


def test_a_figure_and_its_bar() -> None:
    assert Figure("a", 1).met is None
    assert Figure("a", 0.97, at_least=0.97).met is True
    assert Figure("a", 0.96, at_least=0.97).met is False
    assert Figure("a", 3.1, at_most=3).met is False
    assert Figure("a", 3, at_most=3).bar == "≤ 3"


class Played:
    """Benchmarks that are over at once, on a machine of so many cores; the retriever's fails."""

    def __init__(self, output: Path) -> None:
        self.output, self.cores = output, 2

    def __call__(self, command: list[str], **_: Any) -> SimpleNamespace:
        name = command[2].rpartition(".")[2]
        if name == "retrieval":
            return SimpleNamespace(returncode=1, stderr="no workspace")
        figures = [Figure("import deeprec", 0.5, "s", at_most=0.2)]
        where = {**machine(), "cores": self.cores}
        tell(suite.Console(quiet=True), self.output, name, figures, where=where, details={})
        return SimpleNamespace(returncode=0, stderr="")


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Played:
    made = Played(tmp_path)
    monkeypatch.setattr(suite, "subprocess", SimpleNamespace(run=made, PIPE=-1))
    monkeypatch.setattr(suite, "INSTALLED", tmp_path / "installed")
    (tmp_path / "installed").touch()
    return made


def test_the_suite_goes_on_after_a_failure(tmp_path: Path, played: Played) -> None:
    with pytest.raises(suite.typer.Exit):
        suite.main(only=None, output=tmp_path)
    page = (tmp_path / "bench.md").read_text("utf-8")
    assert "no workspace" in page
    assert (
        page.count("| import deeprec | 0.5 s | ≤ 0.2 | **missed** |") == len(suite.BENCHMARKS) - 1
    )
    found = json.loads((tmp_path / "bench.json").read_text("utf-8"))
    assert set(found["benchmarks"]) == set(suite.BENCHMARKS)


def test_one_benchmark_leaves_the_others_in_the_table(tmp_path: Path, played: Played) -> None:
    suite.main(only=["startup", "rollouts"], output=tmp_path)
    played.cores = 64
    suite.main(only=["rollouts"], output=tmp_path)
    found = json.loads((tmp_path / "bench.json").read_text("utf-8"))["benchmarks"]
    assert {name: found[name]["machine"]["cores"] for name in found} == {
        "startup": 2, "rollouts": 64,
    }  # fmt: skip
    start, rest = (tmp_path / "bench.md").read_text("utf-8").split("## Rollouts")
    assert " of 2 cores" in start
    assert " of 64 cores" in rest
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(DeepRecError, match=r"bench\.json is damaged.* Remove it"):
        suite.main(only=["startup"], output=tmp_path)


def test_without_recbole_its_comparison_is_skipped_in_words(tmp_path: Path, played: Played) -> None:
    (tmp_path / "installed").unlink()
    suite.main(only=["trm_training"], output=tmp_path)
    assert "skipped: RecBole's environment is not there (make recbole)" in (
        tmp_path / "bench.md"
    ).read_text("utf-8")


def test_training_speed_is_compared_round_by_round() -> None:
    paces = {"RecBole SASRec": [1, 10, 4], "TRM": [2, 30, 4], "TRM without preferences": [9, 9, 9]}
    found = {figure.name: figure for figure in training_figures(paces)}
    assert found["RecBole SASRec"].value == 4
    assert found["TRM to SASRec"].value == 2  # of 2, 3 and 1; that of the medians is 1
    assert found["TRM to SASRec"].met is True
    assert found["TRM without preferences to SASRec"].met is None


def test_a_machine_is_told_as_it_was_before(place: Workspace) -> None:
    where = {"load_average_before": 0.25}
    folder = leave(place, "some", {"found": 1}, where=where)
    assert json.loads((folder / "some.json").read_text("utf-8"))["machine"] == where
