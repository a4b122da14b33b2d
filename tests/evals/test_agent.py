import math

import pytest

from deeprec.evals.bench.agent import judge, measure, ranks
from deeprec.graph.state import Failure, Recommendation, RecommendationResponse, Usage


def response(*ids: str, answer: list[str | None], failure: bool = False) -> RecommendationResponse:
    return RecommendationResponse(
        recommendations=[
            Recommendation(id=id_, title=id_, rank=rank, source="guided")
            for rank, id_ in enumerate(ids, 1)
        ],
        turns=[],
        answer=answer,
        violations=[],
        stop_reason="answered",
        failure=Failure(reason="engine_failure", detail="x") if failure else None,
        usage=Usage(policy_tokens=30, guided_tokens=10, retrievals=len(ids)),
    )


def test_every_fault_of_a_list_counts() -> None:
    responses = {
        "good": response("a", "b", answer=["a", "b"]),
        "short": response("a", answer=["a"]),
        "double": response("a", "a", answer=["a", "a"]),
        "seen": response("a", "h", answer=["a", "h"]),
        "unknown": response("a", "?", answer=["a", None], failure=True),
    }
    figures = measure(
        responses, {user: ["h"] for user in responses}, frozenset("abh"), k=2, seconds=10.0
    )
    assert figures["valid_lists"] == 0.2
    assert figures["failures"] == 1
    assert figures["invented_titles"] == 1
    assert figures["retrievals_mean"] == 1.8
    assert figures["retrievals_min"] == 1
    assert figures["llm_tokens_per_second"] == 20.0
    assert figures["strict_format"] == 0.8
    assert figures["repeated_lines"] == 1
    assert figures["answer_lines"] == 9
    assert figures["lines_by_source"] == {"guided": 9}


def test_ranks_of_targets() -> None:
    targets = {"u": "a", "v": "a", "w": "a"}
    found = ranks({"u": ["a", "b"], "v": [None, "b", "a"], "w": ["b", "c"]}, targets)
    assert found[:2].tolist() == [0, 2]
    assert found[2] > 1000


def test_strict_judgement_drops_runs_that_break_a_rule() -> None:
    good = response("a", "b", answer=["a", "b"])
    broken = good.model_copy(update={"violations": ["duplicate_line"]})
    figures = judge(
        {"u": good, "v": broken},
        {"u": ["b", "a"], "v": ["b", "c"]},
        {"u": "a", "v": "a"},
        k=2,
    )
    assert figures["ndcg@2_strict"] == 0.5
    assert figures["ndcg@2_served"] == 1.0
    assert figures["ndcg@2_trm_alone"] == pytest.approx(0.5 / math.log2(3))
    assert figures["ndcg@2_fused_lists"] == figures["target_retrieved"] == 0.0
