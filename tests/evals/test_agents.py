"""The agent in an evaluation: the real graph over a scripted policy."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deeprec.errors import EngineError, RequestError, SettingsError
from deeprec.evals import agents
from deeprec.evals.agent_figures import Runs, is_strict, lists_of
from deeprec.evals.agents import Agent, check_one_llm, policy_digest
from deeprec.evals.config import AgentEntry
from deeprec.evals.results import Results
from deeprec.evals.store import Ranking
from deeprec.evals.task import Task, User
from deeprec.graph.engine import vllm_server
from deeprec.graph.engine.vllm_server import ServedModel
from deeprec.graph.fusion import reciprocal_rank_fusion
from deeprec.graph.state import RecommendationResponse, RunSettings
from deeprec.settings import Settings, load_settings
from deeprec.tools.retriever import RetrievalRequest
from deeprec.tools.workspace import Workspace

from ..graph.conftest import Said, ScriptedEngine
from ..graph.test_loop import answer, ask
from .conftest import WARM_UP, Evaluate

RUN = {
    "decoding": "free",
    "answer_form": "numbers",
    "retrieve_n": 4,
    "limits": {"max_retrievals": 3},
}
AGENT = {
    "trm": {"kind": "trm"},
    "agent": {"kind": "agent", "settings": RUN},
}
SMALL = {
    "k": 2,
    "metrics": ["recall@2", "ndcg@2"],
    "compare_by": "ndcg@2",
    "users": 4,
    "concurrency": 1,
    "past": ["excluded"],
    "recommenders": AGENT,
}
GOOD = ("<think>\n" + ask("comedy"), ask("horror"), "So.</think>", answer("#3", "#1"), "")
REPEATS = ("<think>\n" + ask("western"), "So.</think>", answer("#2", "#2"), "")
INVENTS = ("<think>\n" + ask("drama"), "So.</think>", answer("#1", "#99"), "")
OUTAGE = (EngineError("the engine is gone"),)

Play = Callable[..., Results]


@pytest.fixture
def play(run: Evaluate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Play:
    """Evaluate with an engine that says a script."""

    def go(*script: Said, **changes: Any) -> Results:
        engine = ScriptedEngine((*WARM_UP, *script), 8192)
        monkeypatch.setattr(agents, "load_engine", lambda _: engine)
        results = run(tmp_path / "run", **{**SMALL, **changes})
        assert engine.script == ([] if script else [*WARM_UP])
        return results

    return go


def stored(tmp_path: Path) -> dict[str, RecommendationResponse]:
    lines = (tmp_path / "run" / "rankings" / "agent.jsonl").read_text().splitlines()
    rankings = [Ranking.model_validate_json(line) for line in lines]
    return {ranking.user: ranking.run for ranking in rankings if ranking.run}


def test_every_kind_of_run_counts(play: Play, place: Workspace, tmp_path: Path) -> None:
    results = play(*GOOD, *REPEATS, *OUTAGE, *INVENTS)
    task = Task.of(place.data, place.split, limit=4, seed=0)
    runs = stored(tmp_path)
    users = [user.id for user in task.users]
    assert list(runs) == users
    assert [is_strict(runs[user]) for user in users] == [True, False, False, False]
    rows = {row.label: row for row in results.rows}
    assert list(rows) == ["trm", "agent, strict", "agent, served", "agent, lists fused"]
    strict = [runs[user].answer if is_strict(runs[user]) else [] for user in users]
    assert len(runs[users[2]].recommendations) == 2  # the outage's list was filled, and is a miss
    served = [
        [] if runs[user].failure else [line.id for line in runs[user].recommendations]
        for user in users
    ]
    found = [[[item.id for item in turn.retrieved] for turn in runs[user].turns] for user in users]
    fused = [reciprocal_rank_fusion(lists)[:2] for lists in found]
    for name, lists in (("strict", strict), ("served", served), ("lists fused", fused)):
        hits = [task.targets[user] in ids for user, ids in zip(users, lists, strict=True)]
        assert rows[f"agent, {name}"].metrics["recall@2"].mean == sum(hits) / 4
        assert rows[f"agent, {name}"].users == 4
        assert rows[f"agent, {name}"].failures == 1
    assert rows["agent, strict"].short == 3
    assert rows["agent, served"].short == 1
    (figures,) = results.agents
    assert figures.strict is not None
    assert figures.strict.mean == 0.25
    # A run that an outage ended has written nothing, which the rules mind too.
    assert figures.broken_rules["duplicate_line"] == 1
    assert figures.broken_rules["not_retrieved"] == 1
    assert figures.failures == {"engine_failure": 1}
    assert figures.stop_reasons == {"answered": 3, "engine_failure": 1}
    assert figures.searches == {0: 1, 1: 2, 2: 1}
    assert (figures.answer_lines, figures.invented_lines, figures.repeated_lines) == (6, 1, 1)
    assert figures.lines_by_source["policy"] == 2 + 1 + 1
    assert figures.filled_lines.mean == (0 + 1 + 0 + 1) / 4
    assert sum(figures.lines_by_source.values()) == 3 * 2
    counts = tuple(len({item for ids in lists for item in ids}) for lists in found)
    assert figures.candidate_counts == counts
    assert counts[2] == 0
    assert figures.tokens["policy"] > figures.tokens["guided"] == 0


def failing(lists: list[list[str]], reason: str | None) -> RecommendationResponse:
    """A run that found these lists, and was served the first, whatever stopped it."""
    failure = None if reason is None else {"reason": reason, "detail": "x"}
    lines = [
        {"id": item, "title": item, "rank": rank, "source": "fused"}
        for rank, item in enumerate(lists[0], 1)
    ]
    changes = {
        "recommendations": lines,
        "stop_reason": reason or "max_retrievals",
        "failure": failure,
    }
    return RecommendationResponse.model_validate({**played(*lists).model_dump(), **changes})


@pytest.mark.parametrize("reason", ["engine_failure", "retrieval_failure", "time_budget"])
def test_a_failed_run_misses_whatever_its_list_was_filled_with(reason: str) -> None:
    """One at a limit, who was answered all the same, does not."""
    runs = [failing([["t", "x"]], reason), failing([["t", "x"]], None)]
    named = lists_of(runs, free=False)
    assert named == {"served": [[], ["t", "x"]], "fused": [[], ["t", "x"]]}
    assert lists_of(runs, free=False, searches=False) == {"ranked": [[], ["t", "x"]]}
    figures = Runs(
        recommender="a",
        settings=RunSettings(),
        runs=runs,
        targets=["t", "t"],
        alone=np.array([1, 1]),
        resamples=200,
        seed=0,
    ).figures()
    assert figures.found.mean == figures.turns[0].found.mean == 0.5
    assert figures.longer is not None
    assert figures.longer.mean == 0.5
    assert figures.candidate_counts == (0, 2)
    assert figures.filled_lines.mean == 1
    assert figures.lines_by_source == {"fused": 2}
    assert figures.failures == {reason: 1}
    assert figures.tokens["policy"] == 10  # of both: what was written was paid for


def test_the_list_of_an_outage_is_not_stored_as_one(play: Play, tmp_path: Path) -> None:
    """Steering and the progress bar read it."""
    play(*OUTAGE * 4)
    lines = (tmp_path / "run" / "rankings" / "agent.jsonl").read_text().splitlines()
    for ranking in map(Ranking.model_validate_json, lines):
        assert ranking.items == ()
        assert ranking.failure == "the engine is gone"
        assert ranking.run is not None
        assert len(ranking.run.recommendations) == 2


def test_candidates_stand_against_a_list_of_as_many(
    play: Play, place: Workspace, tmp_path: Path
) -> None:
    results = play(*GOOD, *GOOD, *REPEATS, *INVENTS)
    task = Task.of(place.data, place.split, limit=4, seed=0)
    runs = stored(tmp_path)
    agents_hits, alone_hits, first = [], [], []
    for user in task.users:
        lists = [[item.id for item in turn.retrieved] for turn in runs[user.id].turns]
        candidates = {item for ids in lists for item in ids}
        request = RetrievalRequest(user.history, k=len(candidates), exclude=frozenset(user.history))
        (alone,) = place.retriever.retrieve([request])
        target = task.targets[user.id]
        agents_hits.append(target in candidates)
        alone_hits.append(target in {item.id for item in alone})
        first.append(target in lists[0])
    (figures,) = results.agents
    assert figures.found.mean == sum(agents_hits) / 4
    assert figures.longer is not None
    assert figures.longer.mean == sum(alone_hits) / 4
    assert [point.searches for point in figures.turns] == [1, 2]
    assert [point.runs for point in figures.turns] == [4, 2]
    assert figures.turns[0].found.mean == sum(first) / 4
    assert figures.turns[0].candidates == 4
    assert figures.turns[1].found == figures.found
    assert figures.turns[1].longer == figures.longer


def test_without_the_trm_nothing_stands_against_the_candidates(play: Play) -> None:
    results = play(*GOOD * 4, recommenders={"agent": AGENT["agent"]})
    (figures,) = results.agents
    assert figures.longer is figures.found_versus_longer_p is None
    assert all(row.versus is None for row in results.rows)


def test_who_met_an_outage_is_asked_again_and_nobody_else(play: Play, tmp_path: Path) -> None:
    before = play(*GOOD, *OUTAGE, *GOOD, *GOOD)
    assert before.agents[0].failures == {"engine_failure": 1}
    after = play(*GOOD)
    assert after.agents[0].failures == {}
    assert len(stored(tmp_path)) == 4
    whole = play()  # nobody is left to ask
    assert whole == after


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_run_that_was_cut_off_ends_with_each_user_once(
    play: Play, place: Workspace, tmp_path: Path, share: float
) -> None:
    """Cut in the middle of a line, as a kill leaves it."""
    whole = play(*GOOD * 4)
    file = tmp_path / "run" / "rankings" / "agent.jsonl"
    kept = file.read_bytes()[: int(share * file.stat().st_size)]
    assert not kept.endswith(b"\n")
    file.write_bytes(kept)
    (tmp_path / "run" / "results.json").unlink()
    again = play(*GOOD * (4 - kept.count(b"\n")))
    lines = file.read_text().splitlines()
    users = [user.id for user in Task.of(place.data, place.split, limit=4, seed=0).users]
    assert sorted(Ranking.model_validate_json(line).user for line in lines) == sorted(users)
    assert again.rows == whole.rows


@pytest.mark.parametrize("field", [{"kind": "transformers"}, {"dtype": "float32"}])
def test_another_engine_is_refused(
    play: Play, run: Evaluate, place: Workspace, tmp_path: Path, field: dict[str, str]
) -> None:
    play(*GOOD * 4)
    engine = place.settings.engine.model_copy(update=field)
    other = Workspace(place.settings.model_copy(update={"engine": engine}))
    with pytest.raises(SettingsError, match=r"these keys differ: made_of\.engine"):
        run(tmp_path / "run", workspace=other, **SMALL)


def test_guided_runs_are_judged_as_served(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**RUN, "decoding": "guided"}
    results = play(*OUTAGE * 4, recommenders={"agent": {"kind": "agent", "settings": settings}})
    assert [row.label for row in results.rows] == ["agent, served", "agent, lists fused"]
    assert results.agents[0].strict is None


def test_a_refused_request_is_a_miss(
    play: Play, place: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = place.histories(hold_out=True)
    gone = Task.of(place.data, place.split, limit=4, seed=0).users[1].id
    monkeypatch.setattr(
        Workspace, "histories", lambda *_, **__: {u: h for u, h in own.items() if u != gone}
    )
    results = play(*GOOD * 3)
    assert results.agents[0].failures == {"refused": 1}
    assert {row.failures for row in results.rows if row.recommender == "agent"} == {1}
    assert results.agents[0].searches == {0: 1, 2: 3}
    lines = (tmp_path / "run" / "rankings" / "agent.jsonl").read_text().splitlines()
    (told,) = [json.loads(line) for line in lines if json.loads(line)["run"] is None]
    assert f"user '{gone}' is unknown" in told["failure"]


def test_a_user_who_cannot_be_served_holds_nobody_up(
    run: Evaluate, place: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the user of the run that is thrown away."""
    own = place.histories(hold_out=True)
    monkeypatch.setattr(Workspace, "histories", lambda *_, **__: {"nobody": ["gone"], **own})
    monkeypatch.setattr(agents, "load_engine", lambda _: ScriptedEngine(GOOD * 4, 8192))
    results = run(tmp_path / "run", **SMALL)
    assert results.agents[0].searches == {2: 4}


def test_a_blind_agent_gets_what_the_history_suggests(
    play: Play, place: Workspace, tmp_path: Path
) -> None:
    blind = {**AGENT["agent"], "kind": "blind_agent"}
    play(*GOOD * 4, recommenders={"agent": blind})
    task = Task.of(place.data, place.split, limit=4, seed=0)
    for user in task.users:
        turns = stored(tmp_path)[user.id].turns[:2]
        assert [turn.preference for turn in turns] == ["comedy", "horror"]
        request = RetrievalRequest(user.history, k=4, exclude=frozenset(user.history))
        (alone,) = place.retriever.retrieve([request])
        for turn in turns:
            assert [item.id for item in turn.retrieved] == [item.id for item in alone]


def test_what_an_agent_takes_is_told_with_and_without_a_price(play: Play, tmp_path: Path) -> None:
    unpriced = play(*GOOD * 4).agents[0].cost
    lines = (tmp_path / "run" / "rankings" / "agent.jsonl").read_text().splitlines()
    seconds = [Ranking.model_validate_json(line).seconds or 0 for line in lines]
    assert all(one > 0 for one in seconds)
    assert unpriced is not None
    assert unpriced.machine_seconds == pytest.approx(1000 * sum(seconds) / 4)
    assert unpriced.price is None
    assert " = " not in next(
        line
        for line in (tmp_path / "run" / "table.md").read_text().splitlines()
        if "seconds of the machine" in line
    )
    priced = play(cost={"per_hour": 7.2, "currency": "EUR"}).agents[0].cost
    assert priced is not None
    assert priced.price == pytest.approx(sum(seconds) / 4 * 2)  # 0.002 a second
    assert f" = {priced.price:,.2f} EUR" in (tmp_path / "run" / "table.md").read_text()


def test_agents_of_one_llm_share_its_engine(
    run: Evaluate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded, closed, forgot = [], [], []

    class Engine(ScriptedEngine):
        def forget_prefixes(self) -> None:
            forgot.append(len(self.calls))

        def close(self) -> None:
            closed.append(self)

    def load(settings: Settings) -> Engine:
        loaded.append(settings.model)
        return Engine((*GOOD, *GOOD * 4) * 2, 8192)

    monkeypatch.setattr(agents, "load_engine", load)
    one = {"kind": "agent", "settings": RUN}
    entries = {"a": one, "b": one, "c": {**one, "model": "another"}}
    run(tmp_path / "run", **{**SMALL, "recommenders": entries})
    assert loaded == [None, "another"]
    assert len(closed) == 2
    # Each agent has a run before the first that counts, and begins with an empty prefix cache.
    once = len(closed[0].calls) // 10
    assert forgot == [once, 6 * once, once]
    assert len((tmp_path / "run" / "rankings" / "b.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("entry", "error", "says"),
    [
        ({"settings": {"wurst": 1}}, RequestError, "wurst"),
        ({"settings": {"retrieve_n": 20}}, SettingsError, "may retrieve 160 items"),
        ({"adapter": "/no/such/adapter", "settings": RUN}, EngineError, "/no/such/adapter"),
    ],
)
def test_a_wrong_agent_is_told_before_anything_runs(
    run: Evaluate, tmp_path: Path, entry: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        run(tmp_path / "run", **{**SMALL, "recommenders": {"a": {"kind": "agent", **entry}}})
    assert not (tmp_path / "run" / "rankings").exists()


SEVERAL = {
    "a": AgentEntry(kind="agent", adapter=Path("one")),
    "b": AgentEntry(kind="agent", adapter=Path("two")),
}


@pytest.mark.parametrize("kind", ["server", "chat"])
def test_one_served_llm_is_not_several(
    run: Evaluate, place: Workspace, tmp_path: Path, kind: str
) -> None:
    settings = load_settings(home=tmp_path, engine={"kind": kind})
    with pytest.raises(SettingsError, match=f"2 LLMs, .* of kind '{kind}' plays the one"):
        check_one_llm(settings, SEVERAL.values())
    check_one_llm(settings, [SEVERAL["a"], SEVERAL["a"]])
    check_one_llm(load_settings(home=tmp_path), SEVERAL.values())
    own = place.settings.model_copy(update={"engine": settings.engine})
    entries = {name: entry.model_dump(mode="json") for name, entry in SEVERAL.items()}
    with pytest.raises(SettingsError, match="2 LLMs"):
        run(tmp_path / "run", workspace=Workspace(own), recommenders=entries)


def test_a_server_is_known_by_what_it_serves(
    place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def served(url: str, *, api_key: str | None) -> ServedModel:
        asked.append((url, api_key))
        return ServedModel("merged-7", 4096, "merged-7")

    monkeypatch.setattr(vllm_server, "served_model", served)
    settings = load_settings(
        home=place.settings.home, engine={"kind": "server", "url": "http://x", "api_key": "k"}
    )
    entry = AgentEntry(kind="agent", adapter=Path("/no/such/adapter"))
    assert policy_digest(settings, entry) == "merged-7"
    assert asked == [("http://x", "k")]


def test_an_adapter_is_known_by_its_content(place: Workspace, tmp_path: Path) -> None:
    digests = []
    for content in (b"a", b"b"):
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
        entry = AgentEntry(kind="agent", adapter=tmp_path)
        digests.append(policy_digest(place.settings, entry))
    assert digests[0] != digests[1]


class Slow:
    """A graph that counts how many runs are in it."""

    def __init__(self) -> None:
        self.inside = self.most = self.ended = 0

    async def ainvoke(self, request: object) -> dict[str, object]:
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await asyncio.sleep(0.01)
        finally:
            self.inside -= 1
            self.ended += 1
        raise RequestError("no")


def test_runs_share_the_engine_within_the_limit() -> None:
    graph = Slow()
    users = [User(str(n), ("1",)) for n in range(7)]
    found = list(Agent(lambda: graph, 3).recommend(users))  # type: ignore[arg-type,return-value]
    assert sorted(ranking.user for ranking in found) == [user.id for user in users]
    assert graph.most == 3


def test_runs_end_when_nobody_asks_on() -> None:
    graph = Slow()
    answers = Agent(lambda: graph, 2).recommend([User(str(n), ("1",)) for n in range(9)])  # type: ignore[arg-type,return-value]
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert graph.inside == 0
    assert graph.ended <= 4


def played(*lists: list[str]) -> RecommendationResponse:
    turns = [
        {
            "thought": "t",
            "preference": f"p{at}",
            "retrieved": [{"id": item, "title": item, "score": 0.0} for item in ids],
        }
        for at, ids in enumerate(lists)
    ]
    return RecommendationResponse.model_validate(
        {
            "recommendations": [],
            "turns": turns,
            "answer": [],
            "violations": [],
            "stop_reason": "answered",
            "failure": None,
            "usage": {
                "retrievals": len(lists),
                "seconds": 2.0,
                "policy_tokens": 10,
                "generations": 4,
            },
        }
    )


def test_candidates_by_hand() -> None:
    """Three users with 3, 2 and no candidates, whose targets the TRM alone ranks 3rd, 3rd, 1st."""
    figures = Runs(
        recommender="a",
        settings=RunSettings(decoding="free"),
        runs=[played(["x", "y"], ["y", "t"]), played(["t", "y"]), None],
        targets=["t", "t", "t"],
        alone=np.array([3, 3, 1]),
        resamples=200,
        seed=0,
    ).figures()
    assert figures.candidate_counts == (3, 2, 0)
    assert figures.candidates.mean == pytest.approx(5 / 3)
    assert figures.found.mean == pytest.approx(2 / 3)
    assert figures.longer is not None
    assert figures.longer.mean == pytest.approx(1 / 3)
    first, second = figures.turns
    assert (first.runs, first.candidates) == (2, pytest.approx(4 / 3))
    assert first.found.mean == pytest.approx(1 / 3)
    assert first.longer is not None
    assert first.longer.mean == 0
    assert (second.runs, second.found) == (1, figures.found)
    assert figures.searches == {0: 1, 1: 1, 2: 1}
    assert figures.failures == {"refused": 1}
    # Over all users: who was refused took nothing.
    assert figures.tokens["policy"] == pytest.approx(20 / 3)
    assert figures.generations == pytest.approx(8 / 3)
    assert figures.seconds["median"] == 2
    assert figures.seconds["mean"] == pytest.approx(4 / 3)
    assert figures.cost is not None
    assert figures.cost.tokens_read == 0
    assert figures.cost.tokens_generated == pytest.approx(20_000 / 3)
    assert figures.cost.machine_seconds is None  # kept without times
