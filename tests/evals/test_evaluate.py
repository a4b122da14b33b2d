"""Whole evaluations of the small workspace, without an LLM."""

import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from filelock import FileLock

from deeprec.configuration import load_config
from deeprec.errors import EvaluationError, SettingsError
from deeprec.evals import evaluate as module
from deeprec.evals.agents import agent_settings
from deeprec.evals.config import AgentEntry, EvalRun
from deeprec.evals.recommenders import Recommender
from deeprec.evals.results import Results
from deeprec.evals.run_eval import main
from deeprec.evals.store import Ranking
from deeprec.evals.task import Task, User
from deeprec.graph.requests import parse_settings
from deeprec.settings import load_settings
from deeprec.tools.interactions import InteractionData
from deeprec.tools.trm.baselines import Markov
from deeprec.tools.workspace import Workspace

from .conftest import BASELINES, Evaluate, config, taking_again

ROOT = Path(__file__).parents[2]
MADE = ("results.json", "table.md", "report.html", "per_user.parquet")


@pytest.fixture(scope="module")
def whole(place: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nothing interrupted."""
    from rich.console import Console

    folder = tmp_path_factory.mktemp("whole") / "run"
    module.evaluate(config(folder), place, Console(quiet=True))
    return folder


def test_every_baseline_under_both_rules(whole: Path, tiny_data: InteractionData) -> None:
    results = Results.read(whole)
    assert [row.label for row in results.rows] == [
        label for name in BASELINES for label in (name, f"{name}, past included")
    ]
    rows = {row.label: row for row in results.rows}
    for row in results.rows:
        assert row.users == results.users == 80
        assert row.failures == row.short == row.duplicates == row.unknown == row.from_past == 0
        assert 0 <= row.metrics["recall@1"].mean <= row.metrics["recall@5"].mean <= 1
        assert sum(group.users for group in row.groups.values()) == 3 * 80
    # Users walk in steps of one, so what follows is the next film.
    assert rows["markov"].metrics["recall@1"].mean > 0.9
    assert rows["popularity"].metrics["recall@5"].mean < 0.5
    best = [row for row in results.rows if row.versus is None]
    assert len(best) == 1
    versus = rows["popularity"].versus
    assert versus is not None
    assert versus.baseline == best[0].label
    assert versus.difference.mean == pytest.approx(
        rows["popularity"].metrics["ndcg@5"].mean - best[0].metrics["ndcg@5"].mean
    )
    assert versus.p_adjusted < 0.05
    assert results.fingerprint == tiny_data.fingerprint


def test_baselines_list_what_they_score_highest(whole: Path, place: Workspace) -> None:
    task = Task.of(place.data, place.split, limit=None, seed=0)
    markov = Markov(place.split.train, len(place.data.items))
    for name, excluded in (("markov", True), ("markov, past included", False)):
        lines = (whole / "rankings" / f"{name}.jsonl").read_text().splitlines()
        found = {ranking.user: ranking for ranking in map(Ranking.model_validate_json, lines)}
        for user in task.users[:10]:
            past = [int(item) for item in user.history]
            scores = markov.scores([past])[0]
            gone = set(past) if excluded else set()
            order = sorted(set(range(40)) - gone, key=lambda item: (-scores[item], item))
            assert found[user.id].items == tuple(str(item) for item in order[:20])


def test_recommenders_never_see_the_target(place: Workspace) -> None:
    task = Task.of(place.data, place.split, limit=None, seed=0)
    for at, user in enumerate(task.users):
        assert [*user.history, task.targets[user.id]] == [
            place.data.items[item].id for item in place.data.sequence(at)
        ]


def test_a_sample_of_users_is_fixed_by_the_seed(place: Workspace) -> None:
    samples = [
        [user.id for user in Task.of(place.data, place.split, limit=9, seed=seed).users]
        for seed in (0, 0, 1)
    ]
    assert samples[0] == samples[1] != samples[2]
    assert [len(set(sample)) for sample in samples] == [9, 9, 9]


def test_per_user_values_are_those_of_the_table(whole: Path) -> None:
    table = pq.read_table(whole / "per_user.parquet").to_pylist()
    rows = {row.label: row for row in Results.read(whole).rows}
    assert len(table) == len(rows) * 80
    for label, row in rows.items():
        own = [line["ndcg@5"] for line in table if line["row"] == label]
        assert sum(own) / 80 == pytest.approx(row.metrics["ndcg@5"].mean)
    for line in table:
        assert line["recall@5"] == float(line["rank"] is not None)


@pytest.mark.parametrize("share", [0.0, 0.37, 0.92])
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(
    whole: Path, run: Evaluate, tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut in the middle of a line of the second TRM, with nothing after it and no results."""
    killed = tmp_path / "run"
    shutil.copytree(whole, killed)
    for name in MADE:
        (killed / name).unlink()
    (killed / "rankings" / "trm genres, past included.jsonl").unlink()
    torn = killed / "rankings" / "trm genres.jsonl"
    content = torn.read_bytes()[: int(share * torn.stat().st_size)]
    torn.write_bytes(content)
    asked = {}
    own = module._Round._ask

    def ask(self, recommender, missing, found, store, title):  # type: ignore[no-untyped-def]
        asked[title] = len(missing)
        own(self, recommender, missing, found, store, title)

    monkeypatch.setattr(module._Round, "_ask", ask)
    run(killed)
    left = 80 - content.count(b"\n")
    assert asked == {"trm genres": left, "trm genres, past included": 80}
    for name in MADE:
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_a_finished_run_asks_nobody_again(
    whole: Path, run: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr(module, "recommender_of", lambda *_, **__: pytest.fail("asked"))
    run(tmp_path / "run")
    assert (tmp_path / "run" / "table.md").read_text() == (whole / "table.md").read_text()


@pytest.mark.slow
def test_kill_dash_nine(place: Workspace, whole: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    fields = config(tmp_path / "run").model_dump(mode="json")
    file.write_text(yaml.safe_dump(fields, sort_keys=False))
    environment = {
        **os.environ,
        "DEEPREC_HOME": str(place.settings.home),
        "DEEPREC_ENCODER": place.settings.encoder_name,
    }
    command = [sys.executable, "evals/run_eval.py", "--config", str(file)]
    seed = secrets.randbits(32)
    print(f"the point of the kill is drawn by {seed}")
    every = sum(file.read_bytes().count(b"\n") for file in (whole / "rankings").iterdir())
    enough = random.Random(seed).randrange(1, int(0.9 * every))  # the rest takes a while

    def stored() -> int:
        files = (tmp_path / "run" / "rankings").glob("*.jsonl")
        return sum(file.read_bytes().count(b"\n") for file in files)

    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        limit = time.monotonic() + 120
        while stored() < enough:
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < limit
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "run" / "results.json").exists()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    for name in ("results.json", "per_user.parquet"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"k": 4, "metrics": ["recall@1", "ndcg@4"], "compare_by": "ndcg@4"}, ["compare_by", "k"]),
        ({"seed": 1}, ["seed"]),
        ({"recommenders": {**BASELINES, "trm": {"kind": "trm", "preference": "history"}}},
         ["recommenders.trm.preference"]),
    ],
)  # fmt: skip
def test_a_changed_configuration_is_refused(
    whole: Path, run: Evaluate, tmp_path: Path, changes: dict[str, object], keys: list[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(SettingsError, match="these keys differ: ") as refused:
        run(tmp_path / "run", **changes)
    for key in keys:
        assert key in str(refused.value)


def test_what_does_not_change_results_may_change(
    whole: Path, run: Evaluate, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    run(tmp_path / "run", concurrency=3, traces=1)


def test_another_trm_is_refused(
    whole: Path, run: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    own = module._made_of
    monkeypatch.setattr(module, "_made_of", lambda *parts: {**own(*parts), "trm": "another"})
    with pytest.raises(SettingsError, match=r"these keys differ: made_of\.trm"):
        run(tmp_path / "run")


def test_another_search_is_refused(
    whole: Path, run: Evaluate, place: Workspace, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    search = place.settings.catalog.model_copy(update={"search": "hnsw"})
    other = Workspace(place.settings.model_copy(update={"catalog": search}))
    with pytest.raises(SettingsError, match=r"these keys differ: made_of\.search"):
        run(tmp_path / "run", workspace=other)


def other_data(tiny_data: InteractionData, length: int) -> InteractionData:
    """The first `length` interactions of each user."""
    keep = tiny_data.times < length
    return InteractionData(
        name="other",
        items=tiny_data.items,
        user_ids=tiny_data.user_ids,
        users=tiny_data.users[keep],
        item_indices=tiny_data.item_indices[keep],
        times=tiny_data.times[keep],
    )


def other_place(tmp_path: Path, data: InteractionData, place: Workspace) -> Workspace:
    encoder = place.settings.encoder_name
    made = Workspace(load_settings(home=tmp_path, workspace="other", encoder=encoder))
    data.save(made.dataset_dir)
    return made


def test_results_of_another_data_set_are_refused(
    whole: Path, run: Evaluate, tmp_path: Path, tiny_data: InteractionData, place: Workspace
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    other = other_place(tmp_path, other_data(tiny_data, 8), place)
    with pytest.raises(EvaluationError, match="results of another data set") as refused:
        run(tmp_path / "run", workspace=other, recommenders={"p": {"kind": "popularity"}})
    assert tiny_data.fingerprint in str(refused.value)
    assert other.data.fingerprint in str(refused.value)


def test_who_takes_something_again_is_told(
    run: Evaluate, tmp_path: Path, tiny_data: InteractionData, place: Workspace
) -> None:
    other = other_place(tmp_path, taking_again(tiny_data, 7), place)
    results = run(workspace=other, recommenders={"p": {"kind": "popularity"}})
    assert results.repeated_targets == 7
    assert "7 users took something again" in (tmp_path / "run" / "table.md").read_text()
    again = {f"u{at}" for at in range(7)}
    for line in pq.read_table(tmp_path / "run" / "per_user.parquet").to_pylist():
        if line["user"] in again and line["row"] == "p":
            assert line["rank"] is None


def test_a_data_set_without_test_users_is_refused(
    run: Evaluate, tmp_path: Path, tiny_data: InteractionData, place: Workspace
) -> None:
    other = other_place(tmp_path, other_data(tiny_data, 2), place)
    with pytest.raises(EvaluationError, match="none of its 80 users has three interactions"):
        run(workspace=other, recommenders={"p": {"kind": "popularity"}})
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused(run: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (
        FileLock(tmp_path / "run" / ".lock"),
        pytest.raises(EvaluationError, match="another evaluation is at work"),
    ):
        run(tmp_path / "run")


def test_a_folder_of_another_kind_of_run_is_refused(run: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"stages": []}')
    with pytest.raises(EvaluationError, match="damaged or of another kind of run"):
        run(tmp_path / "run")


def test_missing_packages_are_told_first(run: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NEEDED", ("jinja2", "no_such_package"))
    with pytest.raises(
        EvaluationError, match=r"needs no_such_package: install deeprec-agent\[eval"
    ):
        run()


class Odd:
    """Hits everybody, and adds what must not count; fails one user and is short for another."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def recommend(self, users: Sequence[User]) -> Iterator[Ranking]:
        for user in reversed(users):
            target = self.task.targets[user.id]
            lists = {
                "u0": ("no such film", target, target, target, user.history[0]),
                "u1": (target,),
            }
            if user.id == "u2":
                yield Ranking(user="u2", items=(), failure="it was asleep")
            else:
                yield Ranking(user=user.id, items=lists.get(user.id, (target, target)))


def odd(entry: object, task: Task, *_: object, **__: object) -> Recommender:
    return Odd(task)


def test_duplicates_and_unknown_ids_are_named_and_miss(
    run: Evaluate, place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "recommender_of", odd)
    results = run(recommenders={"odd": {"kind": "popularity"}}, past=["excluded"])
    (row,) = results.rows
    assert (row.failures, row.short) == (1, 79)
    assert (row.duplicates, row.unknown, row.from_past) == (2 + 77, 1, 1)
    task = Task.of(place.data, place.split, limit=None, seed=0)
    target, past = task.targets["u0"], task.users[0].history[0]
    assert row.examples[:4] == (
        f"user u0: {target!r} repeats",
        f"user u0: {target!r} repeats",
        "user u0: 'no such film' is unknown",
        f"user u0: {past!r} is from the past",
    )
    assert row.metrics["recall@1"].mean == 78 / 80  # u0 hits at the second place, u2 never
    assert row.metrics["recall@5"].mean == 79 / 80
    assert row.versus is None


class Silent(Odd):
    def recommend(self, users: Sequence[User]) -> Iterator[Ranking]:
        yield Ranking(user=users[0].id, items=())


class Stranger(Odd):
    def recommend(self, users: Sequence[User]) -> Iterator[Ranking]:
        yield Ranking(user="nobody", items=())


@pytest.mark.parametrize(
    ("kind", "says"), [(Silent, "left out 79 users"), (Stranger, "'nobody', who was not asked")]
)
def test_a_recommender_answers_for_whom_it_is_asked(
    run: Evaluate, monkeypatch: pytest.MonkeyPatch, kind: type[Odd], says: str
) -> None:
    monkeypatch.setattr(module, "recommender_of", lambda _, task, *a, **k: kind(task))
    with pytest.raises(RuntimeError, match=says):
        run(recommenders={"odd": {"kind": "popularity"}})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metrics": ["hits@5"]}, "there is no metric 'hits@5'"),
        ({"compare_by": "ndcg@1"}, "compare_by 'ndcg@1' is not among the metrics"),
        ({"metrics": ["ndcg@10", "ndcg@10"]}, "a metric is given twice"),
        ({"depth": 5}, "depth 5 is below k = 10"),
        ({"recommenders": {}}, "recommenders"),
        ({"recommenders": {"a/b": {"kind": "markov"}}}, "recommenders.a/b"),
        ({"recommenders": {"a": {"kind": "oracle"}}}, "popularity"),
        ({"recommenders": {"A": {"kind": "markov"}, "a": {"kind": "markov"}}}, "upper and lower"),
        ({"recommenders": {"a": {"kind": "agent", "settings": {"k": 3}}}}, "set for all"),
        ({"wurst": 1}, "wurst"),
    ],
)
def test_a_wrong_configuration_is_told_in_words(
    changes: dict[str, object], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"output": str(tmp_path / "run"), "recommenders": {"p": {"kind": "popularity"}}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**fields, **changes}))
    assert main(["--config", str(file)]) == 2
    assert says in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", sorted((ROOT / "evals" / "configs").glob("*.yaml")), ids=str)
def test_shipped_configurations_are_valid(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what runs of their agents are made with: fields, and no more items than baselines."""
    monkeypatch.chdir(ROOT)  # where the adapters' folders are named from
    shipped = load_config(file, EvalRun)
    assert shipped.workspace == "ml-100k"
    for entry in shipped.recommenders.values():
        if isinstance(entry, AgentEntry):
            if entry.kind == "r2ec":  # its head is yet to be trained
                parse_settings(**entry.settings)
            else:
                agent_settings(load_settings(), entry, shipped)
