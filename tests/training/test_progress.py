"""Baselines by progress, by hand."""

import pytest
import torch

from deeprec.graph import protocol
from deeprec.training.progress import baselines, places
from deeprec.training.trainer import by_token
from deeprec.training.trajectories import Trajectory

from ..graph.conftest import RunGraph

A, B, ANSWER = (0, False), (1, False), (1, True)


def test_a_token_is_compared_with_the_runs_that_came_as_far() -> None:
    # Two groups with means 1 and 3: the distances are 1, -1, 2, -2.
    totals = [2.0, 0.0, 5.0, 1.0]
    reached = [[A, B, ANSWER], [A, B], [A, B, ANSWER], [A]]
    found = baselines(totals, 2, reached)
    # A: the others' sum is minus the own distance. B: of 1, -1 and 2. ANSWER: one other is too few.
    assert found[0] == pytest.approx([-1 / 3, 0.5, 0.0])
    assert found[1] == pytest.approx([1 / 3, 1.5])
    assert found[2] == pytest.approx([-2 / 3, 0.0, 0.0])
    assert found[3] == pytest.approx([2 / 3])


def test_a_run_without_a_reward_is_no_comparison() -> None:
    found = baselines([1.0, None, 0.0, 2.0], 2, [[A], [A], [A], [A]])
    # Distances 0, none, -1, 1; the run without one is compared with all three.
    assert [own[0] for own in found] == pytest.approx([0.0, 0.0, 0.5, -0.5])


def test_a_baseline_does_not_know_its_own_run() -> None:
    reached = [[A, B], [A, B], [A, B], [A]]
    before = baselines([0.0, 0.0, 0.0, 0.0], 4, reached)
    moved = baselines([4.0, 0.0, 0.0, 0.0], 4, reached)
    # Its reward moves the group's mean by 1 and with it the others' distances, nothing else.
    assert moved[0][1] - before[0][1] == pytest.approx(-1.0)


def test_places_of_a_run(run_graph: RunGraph) -> None:
    search = f"{protocol.BEGIN_PREFERENCE} {{}} {protocol.END_PREFERENCE}"
    played = run_graph(
        f"{protocol.BEGIN_THINK}\nso {search.format('Comedy')}",
        f"again {search.format('Comedy')}",  # refused, and read all the same
        f"then\n{protocol.END_THINK}",
        f"\n{protocol.BEGIN_ANSWER}\n1. #1\n2. #2\n{protocol.END_ANSWER}",
        "",
        answer_form="numbers",
    )
    tokenizer = played.engine.tokenizer
    run = Trajectory.from_state(played.state, tokenizer, id="a", model="scripted")
    own = [
        (place, id_)
        for place, id_, author in zip(
            places(run, tokenizer), run.completion_ids, run.authors, strict=True
        )
        if author == "policy"
    ]
    texts = {
        place: tokenizer.decode([id_ for at, id_ in own if at == place])
        for place in dict.fromkeys(place for place, _ in own)
    }
    assert list(texts) == [(0, False), (1, False), (2, False), (2, True)]
    assert texts[1, False].startswith("again")
    assert texts[2, False] == f"then\n{protocol.END_THINK}"
    assert texts[2, True].startswith(f"\n{protocol.BEGIN_ANSWER}")


def test_each_token_has_its_own_advantage() -> None:
    own = by_token(torch.tensor([1.0, -1.0]), torch.zeros(2, 3), [[0.5, 0.0, 2.0], [0.25]])
    assert own.tolist() == [[0.5, 1.0, -1.0], [-1.25, -1.0, -1.0]]
