"""Rewards against numbers worked out by hand from the formulas of METHOD.md §4."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deeprec.errors import EngineError
from deeprec.graph import protocol
from deeprec.tools.retriever import Retriever
from deeprec.tools.text_encoder import TextEncoder
from deeprec.training.rewards import (
    ItemLikeness,
    RewardConfig,
    Rewarder,
    diversity_reward,
    format_reward,
    format_scores,
    hit_reward,
    invocation_reward,
    point_reward,
    rank_reward,
)
from deeprec.training.trajectories import Rewards, Trajectory

from ..graph.test_loop import answer, ask
from .conftest import MakeRun

Found = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("retrievals", "reward"), [(0, 0.0), (1, 0.0), (2, 0.5), (3, 1.0), (4, 1.0), (8, 1.0)]
)
def test_invocation(retrievals: int, reward: float) -> None:
    assert invocation_reward(retrievals) == reward


E1, E2, BETWEEN = [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]


@pytest.mark.parametrize(
    ("vectors", "reward"),
    [
        ([E1], 0.0),
        ([E1, E1], 0.0),  # identical preferences
        ([E1, E2], 0.2),
        ([E1, [-1.0, 0.0]], 0.4),
        ([E1, BETWEEN], 0.2 * 0.4),
        ([E1, E2, BETWEEN], 0.2 * (1 - (0 + 0.6 + 0.8) / 3)),
        ([[3.0, 0.0], [0.3, 0.4]], 0.2 * 0.4),  # lengths do not matter
        ([E1] * 8, 0.0),
    ],
)
def test_diversity(vectors: list[list[float]], reward: float) -> None:
    assert diversity_reward(np.array(vectors, np.float32)) == pytest.approx(reward, abs=1e-7)


def test_diversity_without_preferences() -> None:
    assert diversity_reward(np.zeros((0, 2), np.float32)) == 0.0


def test_hit_and_rank() -> None:
    listed = ["a", "b", "c"]
    assert [hit_reward(listed, item, 3) for item in "abcd"] == [1, 1, 1, 0]
    assert [rank_reward(listed, item, 3) for item in "abcd"] == pytest.approx([0.6, 0.4, 0.2, 0])
    ten = [str(n) for n in range(10)]
    both = [hit_reward(ten, item, 10) + rank_reward(ten, item, 10) for item in ("0", "9", "x")]
    assert both == pytest.approx([3.0, 1.2, 0.0])  # METHOD.md: 1 + 0.2 (K - r)


def test_only_the_first_k_lines_and_the_first_naming_count() -> None:
    assert hit_reward(["a", "b", "c", "d"], "d", 2) == 0
    assert rank_reward(["a", "b", "c", "d"], "d", 2) == 0
    assert rank_reward(["a", "c", "c"], "c", 3) == pytest.approx(0.4)
    assert hit_reward([None, "a"], "a", 2) == 1
    assert hit_reward([], "a", 2) == 0


def test_point() -> None:
    # K = 4: weights 1, 9/16, 4/16, 1/16, in all 30/16.
    assert point_reward([1, 1, 1, 1], 4) == pytest.approx(10)
    assert point_reward([1, 0, 0, 0], 4) == pytest.approx(10 * 16 / 30)
    assert point_reward([0, 0, 0, 1], 4) == pytest.approx(10 / 30)
    assert point_reward([0.5, -1, 0.25, 0], 4) == pytest.approx(10 * (8 - 9 + 1) / 30)
    assert point_reward([1], 1) == pytest.approx(10)


def test_a_shorter_list_never_scores_higher() -> None:
    assert point_reward([1, 1, 1], 4) == pytest.approx(10 * 29 / 30)
    assert point_reward([], 4) == 0


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12))
def test_point_stays_in_bounds_and_prefers_the_better_first(likeness: list[float]) -> None:
    k = len(likeness)
    best = point_reward(sorted(likeness, reverse=True), k)
    assert -10 - 1e-9 <= point_reward(likeness, k) <= best + 1e-9 <= 10 + 2e-9


def test_format_by_rule() -> None:
    kept = format_scores([], finished=True)
    assert set(kept.values()) == {0}
    assert format_reward(kept) == 0
    broken = format_scores(["line_count", "duplicate_line"], finished=False)
    assert {rule for rule, score in broken.items() if score == -1} == {
        *("line_count", "duplicate_line", "unfinished")
    }
    assert format_reward(broken) == -1


def test_only_strict_rules_mind_repeated_and_invented_lines() -> None:
    holes: Any = ["duplicate_line", "not_retrieved"]
    assert format_reward(format_scores(holes, finished=True, rules="strict")) == -1
    assert format_reward(format_scores(holes, finished=True, rules="zero")) == 0
    assert format_reward(format_scores(holes, finished=True, rules="authors")) == 0
    assert format_reward(format_scores(["line_count"], finished=True, rules="authors")) == -1
    assert format_reward(format_scores([], finished=False, rules="authors")) == -1


def test_likeness() -> None:
    likeness = ItemLikeness(
        ["a", "b", "c", "blank"],
        np.array([[2, 0], [0, 1], [0.6, 0.8], [0, 0]], np.float32),
        np.array([[1, 0, 0], [5, 0, 0], [0, 3, 0], [0, 0, 0]], np.float32),
    )
    assert likeness(["a", "b", None, "c", "blank"], "a") == pytest.approx([1, 0.5, 0, 0.3, 0])
    assert likeness([], "a") == []
    assert "c" in likeness
    assert "d" not in likeness


def test_stages_are_sums_of_their_own_rewards() -> None:
    rewards = Rewards(format=-1, invocation=0.5, diversity=0.1, hit=1, rank=0.4, point=4)
    assert RewardConfig(stage="cold_start").total(rewards) == pytest.approx(-0.4)
    assert RewardConfig(stage="recommendation").total(rewards) == pytest.approx(4.4)
    weighted = RewardConfig(stage="recommendation", weights={"point": 0.5, "hit": 0, "format": 2})
    assert weighted.total(rewards) == pytest.approx(0.4)


def test_a_reward_that_cannot_be_computed_makes_no_total() -> None:
    rewards = Rewards(format=0, invocation=0.5, diversity=0.1, hit=1, rank=0.4)
    assert RewardConfig(stage="recommendation").total(rewards) is None
    without = RewardConfig(stage="recommendation", weights={"point": 0})
    assert without.total(rewards) == pytest.approx(1.4)
    assert RewardConfig(stage="cold_start").total(rewards) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ({"hits": 1.0}, "'hits', which is no reward: take some of format, invocation"),
        ({"hit": 1.0}, "'hit', which is no reward of stage 'cold_start'"),
        ({"total": 1.0}, "'total', which is no reward"),
        ({"format": float("nan")}, "the weight of 'format' is nan"),
        ({"format": 0, "invocation": 0, "diversity": 0}, "every weight is 0"),
    ],
)
def test_weights_that_weigh_nothing_are_refused(weights: dict[str, float], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        RewardConfig(stage="cold_start", weights=weights)


# Rewards of real runs: the real graph, protocol, TRM and encoder; only the policy is scripted.


class CountingEncoder:
    """The encoder, and what each call of it was given."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self.calls: list[list[str]] = []

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        self.calls.append(list(texts))
        return self._encoder.encode_queries(texts)


Reward = Callable[..., Rewards]


@pytest.fixture
def reward(tiny_encoder: TextEncoder, retriever: Retriever) -> Reward:
    def compute(run: Trajectory, stage: Any = "recommendation", rules: Any = "strict") -> Rewards:
        config = RewardConfig(stage=stage, rules=rules)
        return Rewarder(config, tiny_encoder, retriever.catalog)([run])[0]

    return compute


def titles(ids: Sequence[str]) -> list[str]:
    return [f"Film {id_}" for id_ in ids]


def test_a_good_run(
    make_run: MakeRun, found: Found, reward: Reward, retriever: Retriever, tiny_encoder: TextEncoder
) -> None:
    first, second = found("comedy")[:2]
    script = ("<think>\n" + ask("comedy"), ask("horror; 20"), "So.</think>")
    run = make_run(*script, answer(*titles([first, second])), "", target=second)
    got = reward(run)
    assert (got.format, got.invocation, got.hit) == (0, 0.5, 1)
    assert got.rank == pytest.approx(0.2)
    a, b = tiny_encoder.encode_queries(["comedy", "horror; 20"])
    assert got.diversity == pytest.approx(0.2 * (1 - float(a @ b)), abs=1e-6)
    likeness = ItemLikeness.of(retriever.catalog)([first], second)[0]
    assert got.point == pytest.approx(10 * (1 * likeness + 0.25 * 1) / 1.25, abs=1e-5)
    assert got.total == pytest.approx(got.format + got.hit + got.rank + got.point)
    cold = reward(run, stage="cold_start")
    assert cold.total == pytest.approx(0.5 + cold.diversity)
    absent = reward(make_run(*script, answer(*titles([first, second])), "", target="39"))
    assert (absent.hit, absent.rank) == (0, 0)
    assert absent.point is not None
    assert absent.point < 10


def test_an_unknown_target_leaves_the_outcome_open(make_run: MakeRun, reward: Reward) -> None:
    for target in (None, "no such item"):
        run = make_run(
            "<think>" + ask("comedy"), "So.</think>", answer("x", "y"), "", target=target
        )
        got = reward(run)
        assert (got.hit, got.rank, got.point, got.total) == (None, None, None, None)
        assert got.format == -1


def test_k_minus_one_lines_are_a_format_failure(
    make_run: MakeRun, found: Found, reward: Reward
) -> None:
    (first, *_) = found("comedy")
    for rules in ("strict", "zero", "authors"):
        run = make_run(
            "<think>\n" + ask("comedy"), "So.</think>", answer(f"Film {first}"), "", target=first
        )
        got = reward(run, rules=rules)
        assert (got.format, got.hit, got.rank, got.point) == (-1, 0, 0, 0)
        assert got.invocation == 0


def test_a_malformed_run_still_earns_its_retrievals(make_run: MakeRun, reward: Reward) -> None:
    run = make_run(
        "<think>\n" + ask("comedy"),
        ask("horror"),
        ask("20"),
        "no list",
        target="3",
        on_limit="fail",
    )
    got = reward(run, stage="cold_start")
    assert (got.format, got.invocation) == (-1, 1.0)
    assert got.diversity is not None
    assert got.diversity > 0
    assert got.total == pytest.approx(-1 + 1 + got.diversity)


def test_no_retrieval_at_all(make_run: MakeRun, reward: Reward) -> None:
    got = reward(make_run("<think>So.</think>", answer("Film 3", "Film 4"), "", target="3"))
    assert (got.format, got.invocation, got.diversity, got.hit) == (-1, 0, 0, 0)


def test_a_run_that_a_limit_ended_is_malformed(
    make_run: MakeRun, found: Found, reward: Reward
) -> None:
    """Also where the environment closed it, asked for the list, and the list was good."""
    (first, second, *_) = found("comedy")
    run = make_run(
        *("<think>\n" + ask("comedy"), ask("horror")),
        *(f"1. Film {first}\n2. Film {second}\n{protocol.END_ANSWER}", ""),
        limits={"max_retrievals": 1},
        target=first,
    )
    assert (run.stop_reason, run.violations) == ("max_retrievals", [])
    assert reward(run).format == -1


def test_an_engine_failure_earns_nothing_and_costs_nothing(
    make_run: MakeRun, reward: Reward
) -> None:
    run = make_run("<think>" + ask("comedy"), EngineError("gone"), on_limit="fail", target="3")
    assert reward(run) == Rewards()
    assert reward(run, stage="cold_start") == Rewards()


def test_a_run_that_a_user_changed_earns_nothing_and_costs_nothing(
    make_run: MakeRun, found: Found, reward: Reward
) -> None:
    first, second = titles(found("comedy")[:2])
    run = make_run(
        *("<think>" + ask("comedy"), "So.</think>", answer(first, second), ""), target="3"
    )
    assert reward(run).total is not None
    turns = [run.turns[0].model_copy(update={"asked_by": "user"}), *run.turns[1:]]
    assert reward(run.model_copy(update={"turns": turns})) == Rewards()
    assert reward(run.model_copy(update={"stop_reason": "stopped_by_user"})) == Rewards()


def test_one_title_ten_times(make_run: MakeRun, found: Found, reward: Reward) -> None:
    (first, *_) = found("comedy")
    run = make_run(
        *("<think>\n" + ask("comedy"), "So.</think>", answer(*titles([first] * 2)), ""),
        target=first,
    )
    strict, zero, authors = (reward(run, rules=rules) for rules in ("strict", "zero", "authors"))
    assert (strict.format, strict.hit, strict.point) == (-1, 0, 0)
    assert (zero.format, zero.hit, zero.rank) == (0, 1, pytest.approx(0.4))
    assert zero.point == pytest.approx(10 * 1 / 1.25)  # the second line scores nothing
    assert (authors.format, authors.hit) == (0, 1)
    assert authors.point == pytest.approx(10)


def test_a_title_that_was_never_retrieved(make_run: MakeRun, found: Found, reward: Reward) -> None:
    (first, *_) = retrieved = found("comedy")
    other = next(str(n) for n in range(3, 40) if str(n) not in retrieved)
    run = make_run(
        *("<think>\n" + ask("comedy"), "So.</think>"),
        *(answer(f"FILM  {other}", f"Film {first}"), ""),
        target=other,
    )
    strict, zero, authors = (reward(run, rules=rules) for rules in ("strict", "zero", "authors"))
    assert (strict.format, strict.hit) == (-1, 0)
    assert (zero.format, zero.hit) == (0, 0)
    assert (authors.format, authors.hit, authors.rank) == (0, 1, pytest.approx(0.4))
    assert zero.point is not None
    assert authors.point == pytest.approx(zero.point + 10 / 1.25)
    invented = make_run(
        *("<think>\n" + ask("comedy"), "So.</think>", answer("No Film", f"Film {first}"), ""),
        target=first,
    )
    assert reward(invented, rules="authors").rank == pytest.approx(0.2)
    assert reward(invented, rules="authors").point == pytest.approx(10 * 0.25 / 1.25)


def test_a_title_inside_a_title_is_no_hit(make_run: MakeRun, found: Found, reward: Reward) -> None:
    """'Film 1' stands inside 'Film 10', and the other way round a line is longer than a title."""
    pairs = [(a, b) for a in found("comedy", 30) for b in found("comedy", 30) if b.startswith(a)]
    short, long = next((a, b) for a, b in pairs if a != b)
    for named, target in ((long, short), (short, long)):
        other = next(item for item in found("comedy") if item not in (short, long))
        script = ("<think>\n" + ask("comedy"), "So.</think>", answer(*titles([named, other])), "")
        for rules in ("strict", "authors"):
            run = make_run(*script, target=target, retrieve_n=30)
            assert run.answer[0] == named
            got = reward(run, rules=rules)
            assert (got.format, got.hit, got.rank) == (0, 0, 0)


def test_a_repeated_preference_counts_only_for_the_authors(
    make_run: MakeRun, reward: Reward
) -> None:
    run = make_run("<think>\n" + ask("comedy"), *[ask("Comedy")] * 2, "So.</think>", "", target="3")
    assert (reward(run).invocation, reward(run).diversity) == (0, 0)
    assert reward(run, rules="zero").invocation == 0
    assert reward(run, rules="authors").invocation == 1
    assert reward(run, rules="authors").diversity == pytest.approx(0, abs=1e-6)


def test_an_empty_preference_counts_for_nobody(make_run: MakeRun, reward: Reward) -> None:
    blank = f"{protocol.BEGIN_PREFERENCE} ; {protocol.END_PREFERENCE}"
    run = make_run("<think>\n" + ask("comedy"), blank, "So.</think>", "", target="3")
    assert reward(run).invocation == 0
    assert reward(run, rules="authors").invocation == 0


def test_numbers(make_run: MakeRun, found: Found, reward: Reward) -> None:
    first, second, *_ = found("comedy")
    for lines, target, expected in (
        (("#2", "#1"), second, (0, 1, 0.4)),
        (("2", "1"), first, (0, 1, 0.2)),
        (("#1", "#1"), first, (-1, 0, 0)),
        (("#1", "#12"), first, (-1, 0, 0)),
    ):
        script = ("<think>\n" + ask("comedy"), "So.</think>", answer(*lines), "")
        run = make_run(*script, target=target, answer_form="numbers")
        got = reward(run)
        assert (got.format, got.hit, got.rank) == pytest.approx(expected)
    run = make_run(*script, target=first, answer_form="numbers")
    assert reward(run, rules="authors").hit == 1  # a number that was never given names nothing


def test_a_batch_takes_one_call_of_the_encoder(
    make_run: MakeRun, found: Found, tiny_encoder: TextEncoder, retriever: Retriever
) -> None:
    first, second, *_ = found("comedy")
    short, end = ("<think>\n" + ask("comedy"), "So.</think>"), ""
    runs = [
        make_run("<think>" + ask("comedy"), ask("horror"), "So.</think>", end, target="3"),
        make_run("<think>" + ask("20"), ask("comedy"), ask("drama"), "So.</think>", end),
        make_run("<think>So.</think>", end, target="3"),
        make_run(*short, answer("#1", "#2"), end, target=first, answer_form="numbers"),
        make_run(*short, answer(*titles([second, first])), end, target=first),
    ]
    encoder: Any = CountingEncoder(tiny_encoder)
    for rules in ("strict", "authors"):
        config = RewardConfig(stage="cold_start", rules=rules)
        rewarder = Rewarder(config, encoder, retriever.catalog)
        together = rewarder(runs)
        alone = [Rewarder(config, tiny_encoder, retriever.catalog)([run])[0] for run in runs]
        for one, other in zip(together, alone, strict=True):
            assert one.model_dump() == pytest.approx(other.model_dump(), abs=1e-6)
        assert [one.hit for one in together] == [0, None, 0, 1, 1]
    assert encoder.calls == [["comedy", "horror", "20", "drama"]] * 2
    assert rewarder([]) == []
    assert len(encoder.calls) == 2
