"""Stated wishes: what they are made of, and how lists are judged by them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deeprec.configuration import load_config
from deeprec.errors import EvaluationError, SettingsError
from deeprec.evals import agents
from deeprec.evals import evaluate as module
from deeprec.evals.config import EvalRun
from deeprec.evals.steering import Stated, Steering, Wishes
from deeprec.evals.store import Ranking
from deeprec.evals.task import Task, User
from deeprec.tools.filters import Filters
from deeprec.tools.interactions import Item
from deeprec.tools.workspace import Workspace

from ..graph.conftest import ScriptedEngine
from .conftest import WARM_UP, Evaluate, config
from .test_agents import AGENT, GOOD, SMALL

ITEMS = tuple(
    Item(str(n), f"Film {n}", {"genres": genres})
    for n, genres in enumerate(
        [("Comedy",)] * 3 + [("Drama",)] * 5 + [("Comedy", "Drama")] * 2 + [("Horror",)] * 6
    )
)
EMBEDDINGS = np.eye(len(ITEMS), dtype=np.float32)


def wishes(k: int = 2, seed: int = 0) -> Wishes:
    return Wishes(ITEMS, EMBEDDINGS, k=k, seed=seed)


def test_wishes_are_made_of_the_past() -> None:
    users = [User(str(n), ("3", "4", "8", "0")) for n in range(40)]  # three dramas, two comedies
    only = wishes().of("only", users)
    assert {wish.words for wish in only.values()} == {"only Comedy", "only Drama"}
    comedy = next(wish for wish in only.values() if wish.words == "only Comedy")
    assert comedy.preference == "genres: Comedy"
    assert np.flatnonzero(comedy.fit).tolist() == [0, 1, 2, 8, 9]
    assert {wish.words for wish in wishes().of("without", users).values()} == {"no Drama"}
    drama = wishes().of("without", users)["0"]
    assert drama.preference == "no Drama"
    assert np.flatnonzero(drama.fit).tolist() == [0, 1, 2, *range(10, 16)]
    like = wishes().of("more_like", users)
    assert {wish.words for wish in like.values()} == {f"more like Film {n}" for n in (3, 4, 8, 0)}
    assert all(wish.fit.sum() == 1 for wish in like.values())
    again = wishes().of("only", users)
    assert [w.words for w in again.values()] == [w.words for w in only.values()]


def test_a_wish_leaves_enough_to_recommend() -> None:
    """Of six horror films the user has had four: two are left."""
    user = [User("u", ("10", "11", "12", "13"))]
    assert wishes(k=2).of("only", user)["u"].words == "only Horror"
    with pytest.raises(EvaluationError, match=r"no user can state the wish 'only'.*leaves 3 items"):
        wishes(k=3).of("only", user)


def test_data_without_attributes_states_no_such_wish() -> None:
    items = tuple(replace(item, attributes={}) for item in ITEMS)
    none = Wishes(items, EMBEDDINGS, k=1, seed=0)
    with pytest.raises(EvaluationError, match="Drop it from steering"):
        none.of("without", [User("u", ("1",))])
    assert none.of("more_like", [User("u", ("1",))])["u"].words == "more like Film 1"


def test_figures_by_hand(place: Workspace, tmp_path: Path) -> None:
    """Two users of the first two and a list of two places; the third states no wish."""
    task = Task.of(place.data, place.split, limit=3, seed=0)
    one, two, _ = task.users
    free = [item.id for item in place.data.items if item.id not in one.history + two.history]
    free = [item for item in free if item not in task.targets.values()]
    fit = np.zeros(len(place.data.items))
    fit[task.data.item_index[free[0]]] = 1.0
    stated = {user.id: Stated("only X", "X", Filters(), fit) for user in (one, two)}

    def rankings(first: tuple[str, ...], second: tuple[str, ...]) -> dict[str, Ranking]:
        return {
            one.id: Ranking(user=one.id, items=first),
            two.id: Ranking(user=two.id, items=second, failure=None if second else "asleep"),
        }

    hit = task.targets[one.id]
    changes = {"k": 2, "metrics": ["ndcg@2"], "compare_by": "ndcg@2"}
    found = Steering(task, config(tmp_path, **changes)).figures(
        "trm", "only", "filter", stated,
        rankings((hit, free[1]), (free[1], free[0])),
        rankings((free[0], free[0]), ()),
    )  # fmt: skip
    assert (found.users, found.failures, found.example) == (2, 1, "only X")
    assert found.fit_before.mean == (0 + 1 / 2) / 2
    assert found.fit_after.mean == (1 / 2 + 0) / 2  # the repeated place fulfils nothing
    assert found.fit_change.mean == 0
    assert (found.fit_change.low, found.fit_change.high) == (-0.5, 0.5)
    assert (found.metric_before.mean, found.metric_after.mean) == (0.5, 0)
    assert found.metric_change.mean == -0.5


def test_the_trm_takes_wishes_in_both_forms(
    run: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()  # a finished run can be steered later, and nothing is asked twice
    asked = []
    own = module._Round._ask

    def ask(self, recommender, missing, found, store, title):  # type: ignore[no-untyped-def]
        asked.append(title)
        own(self, recommender, missing, found, store, title)

    monkeypatch.setattr(module._Round, "_ask", ask)
    kinds = ["only", "without", "more_like"]
    results = run(steering=kinds)
    both = [(kind, way) for kind in kinds[:2] for way in ("preference", "filter")]
    forms = [*both, ("more_like", "preference")]
    names = ("trm", "trm genres")
    assert asked == [f"{name}, {kind} as {way}" for name in names for kind, way in forms]
    assert [(s.recommender, s.wish, s.way) for s in results.steering] == [
        (name, *form) for name in names for form in forms
    ]
    for one in results.steering:
        assert one.users == 80
        assert one.failures == 0
        assert one.metric_before.mean == next(
            row.metrics["ndcg@5"].mean for row in results.rows if row.label == one.recommender
        )
        if one.way == "filter":
            assert one.fit_after.mean == 1.0
            assert one.fit_change.mean == pytest.approx(1 - one.fit_before.mean)
    table = (tmp_path / "run" / "table.md").read_text()
    assert "| trm genres, more like Z as preference | 80 | 0 |" in table
    asked.clear()
    assert run(steering=kinds) == results
    assert asked == []


def test_the_agent_reads_a_wish(
    run: Evaluate, place: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = ScriptedEngine((*WARM_UP, *GOOD * 4) * 2, 8192)
    monkeypatch.setattr(agents, "load_engine", lambda _: engine)
    results = run(
        tmp_path / "run",
        **{**SMALL, "recommenders": {"agent": AGENT["agent"]}, "steering": ["more_like"]},
    )
    (steered,) = results.steering
    assert (steered.recommender, steered.way, steered.users) == ("agent", "words", 4)
    prompts = [engine.tokenizer.decode(list(request.prompt_ids)) for request, _ in engine.calls]
    wished = ["The user asks for: more like Film" in prompt for prompt in prompts]
    assert wished == [False] * (len(prompts) // 2) + [True] * (len(prompts) // 2)
    assert any(steered.example in prompt for prompt in prompts)
    assert len(results.rows) == 3  # lists with a wish are no rows


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recommenders": {"p": {"kind": "popularity"}}}, "no recommender takes a wish"),
        ({"past": ["included"]}, "add excluded to past"),
        ({"steering": ["never"]}, "steering.0"),
    ],
)
def test_wishes_that_nobody_can_follow_are_told(
    tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    fields = {"output": "x", "recommenders": {"t": {"kind": "trm"}}, "steering": ["only"]}
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({**fields, **changes}))
    with pytest.raises(SettingsError, match=says):
        load_config(file, EvalRun)
