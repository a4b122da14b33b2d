"""R2ec's graph: one thought, then the whole catalog in the head's order."""

import asyncio
import json
import threading
from typing import Any

import pytest
import torch

from deeprec.errors import EngineError, HeadError, RequestError
from deeprec.graph.as_tool import recommendation_tool
from deeprec.graph.r2ec import build
from deeprec.graph.r2ec.backbone import Backbone
from deeprec.graph.r2ec.build import build_r2ec_graph
from deeprec.graph.r2ec.items import ItemStates, catalog_readings, content_key
from deeprec.graph.r2ec.ranker import HeadRanker
from deeprec.graph.r2ec.readings import CLOSING, MARK, OPENING
from deeprec.graph.state import RecommendationResponse, RunSettings
from deeprec.graph.transcript import Transcript
from deeprec.tools.catalog import Catalog
from deeprec.tools.interactions import Item
from deeprec.tools.retriever import Retriever

from ..conftest import Run, ScriptedEngine
from .conftest import RunR2ec, random_head


def respond(run: Run) -> RecommendationResponse:
    return RecommendationResponse.model_validate(
        {name: run.state[name] for name in RecommendationResponse.model_fields}
    )


def brute_force(ranker: HeadRanker, ids: list[int]) -> dict[str, float]:
    """Scores of every item, each reading by itself, unpadded."""
    body, head = ranker.backbone.body, ranker.head

    def state(sequence: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return body(input_ids=torch.tensor([sequence])).last_hidden_state[0, -1]

    with torch.no_grad():
        user = head.user(state(ids))
        user = user / user.norm() * head.log_scale.exp()
        found = {}
        for id_, reading in zip(
            ranker.catalog.snapshot.ids,
            catalog_readings(ranker.catalog.snapshot, ranker.backbone),
            strict=True,
        ):
            item = head.item(state(reading))
            found[id_] = float(user @ (item / item.norm()))
    return found


def test_a_thought_then_the_catalog_in_the_heads_order(
    run_r2ec: RunR2ec, ranker: HeadRanker
) -> None:
    run = run_r2ec("They like horror.\n</think>")
    response = respond(run)
    transcript = Transcript(run.state["segments"])
    text = run.engine.tokenizer.decode(transcript.completion_ids)
    assert text == f"{OPENING}They like horror.\n</think>\n{MARK}"
    assert [item["author"] for item in transcript.segments] == [
        "prompt", "forced", "policy", "forced",
    ]  # fmt: skip
    scores = brute_force(ranker, transcript.ids)
    rest = sorted((s for s in scores if s not in ("0", "1", "2")), key=lambda s: -scores[s])
    assert [line.id for line in response.recommendations] == rest[:3]
    for line in response.recommendations:
        assert line.score == pytest.approx(scores[line.id], abs=1e-4)
        assert line.source == "head"
    assert response.answer == rest[:3]
    assert [turn.thought for turn in response.turns] == ["They like horror."]
    assert (response.stop_reason, response.failure, response.violations) == ("answered", None, [])
    assert response.usage.generations == 1
    assert response.usage.policy_tokens == len(run.engine.calls[0][1].ids)


def test_a_long_thought_is_closed_for_it(run_r2ec: RunR2ec) -> None:
    run = run_r2ec("They like horror and much else besides.", thought_tokens=3)
    text = run.engine.tokenizer.decode(Transcript(run.state["segments"]).completion_ids)
    assert text == f"{OPENING}They like horror{CLOSING}"
    assert respond(run).stop_reason == "generation_length"
    assert respond(run).failure is None


def test_without_reasoning_nothing_is_generated(run_r2ec: RunR2ec) -> None:
    run = run_r2ec(reasoning=False)
    assert not run.engine.calls
    assert respond(run).usage.written_tokens == 0
    assert respond(run).turns == []
    assert len(respond(run).recommendations) == 3


def test_the_thought_changes_what_the_head_reads(run_r2ec: RunR2ec) -> None:
    one, other = run_r2ec("Horror.</think>"), run_r2ec("A western, and nothing else.</think>")
    assert respond(one).recommendations[0].score != respond(other).recommendations[0].score


def test_filters_and_more_like_act_on_the_ranking(run_r2ec: RunR2ec) -> None:
    asked: dict[str, Any] = {"user_id": "u", "filters": {"genres": ["Western"]}, "k": 10}
    run = run_r2ec("So.</think>", request=asked)
    assert {line.id for line in respond(run).recommendations} == {str(n) for n in range(30, 40)}
    plain = run_r2ec("So.</think>", request={"user_id": "u", "k": 5})
    leaning = run_r2ec(
        "So.</think>", request={"user_id": "u", "k": 5, "wishes": ["more like Film 35"]}
    )
    ids = [[line.id for line in respond(run).recommendations] for run in (plain, leaning)]
    assert ids[0] != ids[1]


def test_an_engine_that_fails_leaves_a_list_by_the_history(run_r2ec: RunR2ec) -> None:
    run = run_r2ec(EngineError("gone"))
    response = respond(run)
    assert response.failure is not None
    assert response.failure.reason == response.stop_reason == "engine_failure"
    assert len(response.recommendations) == 3
    strict = respond(run_r2ec(EngineError("gone"), on_limit="fail"))
    assert strict.recommendations == []


def test_a_ranking_that_fails_is_told(
    run_r2ec: RunR2ec, ranker: HeadRanker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise HeadError("the catalog is empty")

    monkeypatch.setattr(ranker, "best", fails)
    response = respond(run_r2ec("So.</think>", explain=True))
    assert response.recommendations == []
    assert response.failure is not None
    assert response.failure.reason == response.stop_reason == "retrieval_failure"


@pytest.mark.parametrize("explain", [False, True])
def test_a_catalog_that_changed_holds_up_no_loop(
    backbone: Backbone,
    small_catalog: Catalog,
    retriever: Retriever,
    monkeypatch: pytest.MonkeyPatch,
    explain: bool,
) -> None:
    ranker = HeadRanker(backbone, random_head(backbone.dim), small_catalog, ItemStates("tiny"))
    graph = build_r2ec_graph(ScriptedEngine([], 4096), ranker, histories={"u": ["0", "1"]})
    context = {"reasoning": False, "k": 3, "explain": explain}
    free = threading.Event()
    plain = backbone.states

    def slow(rows: Any) -> torch.Tensor:
        assert free.wait(10), "the loop stood still while the LLM read"
        return plain(rows)

    async def ask() -> Any:
        asyncio.get_running_loop().call_later(0.2, free.set)
        return await graph.ainvoke({"user_id": "u"}, context=context)

    try:
        graph.invoke({"user_id": "u"}, context=context)  # the user's state is known from now on
        now = retriever.catalog.snapshot
        small_catalog.upsert([Item("new", "New", {})], now.text_embeddings[:1], now.vectors[:1])
        monkeypatch.setattr(backbone, "states", slow)
        assert len(asyncio.run(ask())["recommendations"]) == 3
    finally:
        ranker.close()


def test_no_room_is_kept_for_lists_that_are_not_written(ranker: HeadRanker) -> None:
    short = ScriptedEngine(["So.</think>"], 256)
    graph = build_r2ec_graph(short, ranker, histories={"u": ["0", "1"]})
    assert len(graph.invoke({"user_id": "u"}, context={"k": 30})["recommendations"]) == 30
    with pytest.raises(RequestError, match="no room to think"):
        graph.invoke({"user_id": "u"}, context={"thought_tokens": 200})


def test_bad_requests_are_refused(run_r2ec: RunR2ec) -> None:
    with pytest.raises(RequestError, match="k = 38"):
        run_r2ec(request={"user_id": "u", "k": 38})
    with pytest.raises(RequestError, match="asks nobody"):
        run_r2ec(ask_after_ranking=True)


def test_it_is_a_tool_as_deeprec_is(ranker: HeadRanker) -> None:
    graph = build_r2ec_graph(ScriptedEngine([], 4096), ranker, histories={"u": ["0"]})
    settings = RunSettings(reasoning=False)
    answer = recommendation_tool(graph, settings=settings).invoke({"user_id": "u", "k": 2})
    assert [line["source"] for line in json.loads(answer)["recommendations"]] == ["head", "head"]


def test_new_items_are_told_where_reasons_are(
    backbone: Backbone, small_catalog: Catalog, retriever: Retriever
) -> None:
    known = [content_key(reading) for reading in catalog_readings(small_catalog.snapshot, backbone)]
    ranker = HeadRanker(
        backbone, random_head(backbone.dim), small_catalog, ItemStates("tiny"), trained=known
    )
    now = retriever.catalog.snapshot
    small_catalog.upsert([Item("new", "New", {})], now.text_embeddings[:1], now.vectors[:1])
    graph = build_r2ec_graph(ScriptedEngine([], 4096), ranker)
    try:
        told = graph.invoke(
            {"history": ["id:0"], "k": 10}, context={"reasoning": False, "explain": True}
        )
    finally:
        ranker.close()
    reasons = {line["id"]: line["reason"] for line in told["recommendations"]}
    assert "new to the head" in reasons.pop("new")
    assert not any("new to the head" in reason for reason in reasons.values())


def test_served_without_a_head_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPREC_HEAD", raising=False)
    build._loaded.cache_clear()
    try:
        graph = asyncio.run(build.served())
        assert "history" in graph.get_input_jsonschema()["properties"]
        with pytest.raises(RequestError, match="DEEPREC_HEAD"):
            graph.invoke({"user_id": "u"})
    finally:
        build._loaded.cache_clear()


def test_many_at_once_get_what_each_gets_alone(ranker: HeadRanker) -> None:
    users = {f"u{n}": [str(n), str(n + 1)] for n in range(12)}
    graph = build_r2ec_graph(ScriptedEngine([], 4096), ranker, histories=users)
    context = {"reasoning": False, "k": 5}

    async def all_at_once() -> list[dict[str, Any]]:
        asked = [graph.ainvoke({"user_id": user}, context=context) for user in users]
        return list(await asyncio.gather(*asked))

    together = asyncio.run(all_at_once())
    ranker.refresh("again")
    alone = [graph.invoke({"user_id": user}, context=context) for user in users]
    for one, other in zip(together, alone, strict=True):
        scores = [[line["score"] for line in run["recommendations"]] for run in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
