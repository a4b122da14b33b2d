"""What is too large is refused at once, in a few words that name the value."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from deeprec.errors import RequestError
from deeprec.graph.requests import parse_request, parse_settings
from deeprec.graph.state import MAX_HISTORY, MAX_K, MAX_NAME_CHARS, MAX_SECONDS, MAX_TOKENS
from deeprec.tools.filters import Filters


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = {"not": [value]}
    return value


LONG = "x" * 10_000_000


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"history": ["a"] * (MAX_HISTORY + 1)}, "history: List should have at most 1000 items"),
        ({"history": ["a" * (MAX_NAME_CHARS + 1)]}, "history.0: String should have at most 1000"),
        ({"history": ["a"] * 1_000_000}, "history: "),
        ({"history": [LONG]}, "history.0: "),
        ({"user_id": LONG}, "user_id: String should have at most 1000 characters"),
        ({"wishes": ["a"] * 9}, "wishes: List should have at most 8 items"),
        ({"wishes": [LONG]}, "wishes.0: String should have at most 200 characters"),
        ({"k": MAX_K + 1}, "k: Input should be less than or equal to 100"),
        ({"k": 10**5000}, "k: "),
        ({"k": nested(5000)}, "k: "),
        ({"k": [LONG]}, "k: "),
        ({"filters": [nested(5000)]}, "filters: "),
        ({"limits": {"max_retrievals": 65}}, "limits.max_retrievals: "),
        ({"limits": {"max_new_tokens": MAX_TOKENS + 1}}, "limits.max_new_tokens: "),
        ({"limits": {"max_total_tokens": MAX_TOKENS + 1}}, "limits.max_total_tokens: "),
        ({"limits": {"time_budget_s": MAX_SECONDS + 1}}, "limits.time_budget_s: "),
        ({"limits": {"time_budget_s": float("inf")}}, "limits.time_budget_s: "),
        ({"limits": {"time_budget_s": float("nan")}}, "limits.time_budget_s: "),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_requests_are_bounded(fields: dict[str, Any], says: str) -> None:
    check_refused(lambda: parse_request(**fields), says)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"k": MAX_K + 1}, "k: "),
        ({"retrieve_n": 201}, "retrieve_n: "),
        ({"history_length": 201}, "history_length: "),
        ({"thought_tokens": MAX_TOKENS + 1}, "thought_tokens: "),
        ({"seed": 2**63}, "seed: "),
        ({"temperature": float("nan")}, "temperature: "),
    ],
    ids=str,
)
def test_settings_of_a_run_are_bounded(fields: dict[str, Any], says: str) -> None:
    check_refused(lambda: parse_settings(**fields), says)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"a": nested(100_000)}, "is no value"),
        ({"x" * 201: "y"}, "is not an attribute's name of 1 to 200"),
        ({LONG: "y"}, "is not an attribute's name of 1 to 200"),
        ({"a": LONG}, "is no value. Give a text of 1 to 200 characters"),
        ({"a": ["x"] * 101}, "lists 101 values; at most 100 are allowed"),
        ({"a": ["x"] * 1_000_000}, "at most 100 are allowed"),
        ({str(n): "x" for n in range(33)}, "name 33 attributes; at most 32 are allowed"),
        ({"year": {"gte": 2**63}}, "is no bound"),
        ({"year": 2**64}, "is no value"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_filters_are_bounded(raw: dict[str, Any], says: str) -> None:
    check_refused(lambda: Filters.parse(raw), says)


def check_refused(ask: Callable[[], object], says: str) -> None:
    began = time.thread_time()
    with pytest.raises(RequestError) as refused:
        ask()
    assert time.thread_time() - began < 0.5
    assert says in str(refused.value)
    assert len(str(refused.value)) < 1000
