"""R2ec and rank: head in an evaluation, over a scripted policy and a small head."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from deeprec.evals import agents
from deeprec.evals.results import Results
from deeprec.graph.r2ec.backbone import Backbone
from deeprec.graph.r2ec.head import HeadCard, RecommendationHead, save_head, weights_fingerprint
from deeprec.graph.r2ec.readings import VERSION
from deeprec.tools.workspace import Workspace

from ..graph.conftest import Said, ScriptedEngine
from ..graph.test_loop import ask
from .conftest import WARM_UP, Evaluate

Play = Callable[..., Results]


@pytest.fixture
def head(place: Workspace, tiny_llm: str, tmp_path: Path) -> Path:
    folder = tmp_path / "head"
    dim = Backbone.load(tiny_llm, dtype="float32").dim
    card = HeadCard(
        base="tiny",
        dim=dim,
        readings=VERSION,
        dataset=place.catalog.fingerprint.dataset,
        weights=weights_fingerprint(tiny_llm, None),
        history_length=3,
    )
    save_head(folder, RecommendationHead(dim), card)
    return folder


@pytest.fixture
def play(
    run: Evaluate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llm: str, head: Path
) -> Play:
    """Evaluate one recommender, its LLM the small one, with an engine that says a script."""

    def go(*script: Said, **entry: Any) -> Results:
        engine = ScriptedEngine((*WARM_UP, *script), 8192)
        monkeypatch.setattr(agents, "load_engine", lambda _: engine)
        results = run(
            tmp_path / "run",
            k=2,
            metrics=["recall@2", "ndcg@2"],
            compare_by="ndcg@2",
            users=4,
            concurrency=1,
            past=["excluded"],
            recommenders={
                "trm": {"kind": "trm"},
                "it": {"model": tiny_llm, "head": str(head), **entry},
            },
        )
        assert engine.script == ([] if script else [*WARM_UP])
        return results

    return go


def test_r2ec_is_one_row_with_its_cost(play: Play) -> None:
    results = play(*["So.</think>"] * 4, kind="r2ec", settings={"thought_tokens": 16})
    (row,) = [row for row in results.rows if row.recommender == "it"]
    assert (row.label, row.list, row.users, row.failures, row.short) == ("it", "ranked", 4, 0, 0)
    assert row.versus is not None
    (figures,) = results.agents
    assert figures.lines_by_source == {"head": 8}
    assert figures.tokens["policy"] > 0
    assert figures.strict is None
    assert any("head" in made for made in results.made_with.values())


def test_r2ec_without_a_thought_asks_no_engine(play: Play) -> None:
    results = play(kind="r2ec", settings={"reasoning": False})
    assert results.agents[0].generations == 0
    assert results.agents[0].lines_by_source == {"head": 8}


def test_deeprec_ranked_by_the_head_keeps_its_rows(play: Play) -> None:
    script = ["<think>\n" + ask("comedy"), "So.</think>"] * 4
    results = play(
        *script,
        kind="agent",
        settings={
            "decoding": "free", "rank": "head", "retrieve_n": 4, "limits": {"max_retrievals": 3},
        },
    )  # fmt: skip
    labels = [row.label for row in results.rows]
    assert labels == ["trm", "it, strict", "it, served", "it, lists fused"]
    assert results.agents[0].lines_by_source == {"head": 8}
    assert results.agents[0].strict is not None
    assert results.agents[0].strict.mean == 1


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"kind": "r2ec", "head": None}, "head is missing"),
        ({"kind": "agent", "settings": {"rank": "head"}, "head": None}, "head is missing"),
        ({"kind": "agent"}, "nothing ranks by it"),
    ],
)
def test_entries_and_heads_go_together(play: Play, entry: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        play(**entry)
