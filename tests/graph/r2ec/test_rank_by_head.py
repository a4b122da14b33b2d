"""DeepRec with rank: head: it explores, the head orders what it found, and nothing is decoded."""

import threading
from typing import Any

import pytest

from deeprec.errors import RequestError
from deeprec.graph.build import build_graph
from deeprec.graph.r2ec.ranker import HeadRanker
from deeprec.graph.r2ec.readings import user_ids
from deeprec.graph.resources import listed_item
from deeprec.graph.state import RecommendationResponse, RunSettings, State
from deeprec.graph.transcript import Transcript
from deeprec.tools.retriever import Retriever

from ..conftest import Run, Said, ScriptedEngine
from ..test_loop import answer, ask
from .test_r2ec_graph import brute_force, respond

EXPLORES = ("<think>\n" + ask("comedy"), ask("horror"), "The odd ones.</think>")


@pytest.fixture
def explore(retriever: Retriever, ranker: HeadRanker) -> Any:
    def run(*script: Said, loaded: bool = True, **settings: Any) -> Run:
        engine = ScriptedEngine(script, 8192)
        chosen = RunSettings.model_validate(
            {"decoding": "free", "k": 4, "retrieve_n": 4, "rank": "head", **settings}
        )
        graph = build_graph(
            engine,
            retriever,
            histories={"u": ["0", "1", "2"]},
            settings=chosen,
            ranker=ranker if loaded else None,
        )
        *_, state = graph.stream(
            {"user_id": "u"}, stream_mode="values", output_keys=list(State.__annotations__)
        )
        return Run(state, engine)

    return run


def candidates(response: RecommendationResponse) -> set[str]:
    return {item.id for turn in response.turns for item in turn.retrieved}


def test_the_head_orders_what_was_found(explore: Any, ranker: HeadRanker) -> None:
    run = explore(*EXPLORES)
    response = respond(run)
    history = [listed_item(ranker.catalog, item) for item in ("0", "1", "2")]
    reading = user_ids(history, "The odd ones.", run.engine.tokenizer)
    scores = brute_force(ranker, reading)
    best = sorted(candidates(response), key=lambda item: -scores[item])[:4]
    assert [line.id for line in response.recommendations] == best == response.answer
    assert {line.source for line in response.recommendations} == {"head"}
    assert response.violations == []
    assert response.stop_reason == "answered"


def test_nothing_is_decoded_in_the_rank_step(explore: Any) -> None:
    written = explore(*EXPLORES, answer("#1", "#2", "#3", "#4"), "", rank="generate",
                      answer_form="numbers")  # fmt: skip
    by_head = explore(*EXPLORES)
    thinking = sum(len(said.ids) for _, said in by_head.engine.calls)
    assert len(by_head.engine.calls) == 3
    assert respond(by_head).usage.policy_tokens == thinking
    of_rank = respond(written).usage.policy_tokens - thinking
    assert of_rank > 0  # what the head saves: all of it
    assert Transcript(by_head.state["segments"]).authors[-1] == "policy"


def test_an_open_thought_is_closed_before_it_is_read(explore: Any) -> None:
    limits = {"max_retrievals": 1}
    run = explore("<think>\n" + ask("comedy"), "So then " + ask("horror"), limits=limits)
    response = respond(run)
    assert response.stop_reason == "max_retrievals"
    text = run.engine.tokenizer.decode(Transcript(run.state["segments"]).completion_ids)
    assert text.endswith("</think>")
    assert len(response.recommendations) == 4


def test_a_broken_format_is_told_as_without_a_head(explore: Any) -> None:
    response = respond(explore("<think>\n" + ask("comedy"), "</think>"))
    assert response.violations == ["no_final_thought"]


def test_too_few_candidates_are_filled_and_flagged(explore: Any) -> None:
    response = respond(explore("<think>\n" + ask("comedy"), "So.</think>", k=6))
    assert [line.source for line in response.recommendations] == ["head"] * 4 + ["trm"] * 2
    assert len({line.id for line in response.recommendations}) == 6
    assert "line_count" in response.violations


def test_a_head_that_is_not_loaded_is_an_error_at_once(explore: Any) -> None:
    with pytest.raises(RequestError, match="no recommendation head is loaded"):
        explore(*EXPLORES, loaded=False)


def test_a_ranking_that_takes_long_holds_up_no_loop_and_keeps_to_the_budget(
    explore: Any, ranker: HeadRanker, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    threads: list[str] = []

    def slow(*_: Any, **__: Any) -> Any:
        threads.append(threading.current_thread().name)
        ended.wait(30)

    monkeypatch.setattr(ranker, "best", slow)
    try:
        response = respond(explore(*EXPLORES, limits={"time_budget_s": 3}))
    finally:
        ended.set()
    assert threads
    assert threads != ["deeprec-graph"]  # the loop's own
    assert response.stop_reason == "time_budget"
    assert {line.source for line in response.recommendations} == {"fused"}
