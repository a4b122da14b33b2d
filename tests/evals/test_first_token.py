"""What a client of the server waited for, read off a stream that was made up."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from deeprec.errors import EvaluationError
from deeprec.evals.bench.first_token import MOMENTS, summary, watch


def client(*parts: tuple[str, Any]) -> Any:
    async def stream(*_: Any, **asked: Any) -> AsyncIterator[Any]:
        assert asked["input"] == {"user_id": "u"}
        for event, data in parts:
            yield SimpleNamespace(event=event, data=data)

    return SimpleNamespace(runs=SimpleNamespace(stream=stream))


async def test_each_moment_is_the_first_of_its_kind() -> None:
    seen = await watch(
        client(
            ("metadata", {"run_id": "r"}),
            ("tasks", {"name": "read_request", "input": {}}),
            ("tasks", {"name": "read_request", "result": {}}),
            ("custom", {"thought": "This user seems to like"}),
            ("custom", {"thought": " films"}),
            ("custom", {"thought": " that"}),
            ("custom", {"preference": "comedy"}),
            ("custom", {"retrieved": ["Babe"]}),
            ("tasks", {"name": "think", "result": {}}),
        ),
        "u",
        {},
    )
    assert tuple(seen) == MOMENTS
    assert list(seen.values()) == sorted(seen.values())


async def test_a_run_that_fails_is_told() -> None:
    with pytest.raises(EvaluationError, match=r"user 'u' failed: \{'message': 'no room'\}"):
        await watch(client(("error", {"message": "no room"})), "u", {})


def test_moments_that_a_run_did_not_reach_do_not_count() -> None:
    assert summary([{"accepted": 1.0, "answer": 3.0}, {"accepted": 2.0}, {"accepted": 4.0}]) == {
        "accepted": {"median": 2.0, "least": 1.0, "most": 4.0},
        "answer": {"median": 3.0, "least": 3.0, "most": 3.0},
    }
