"""Requests of many callers, served in batches by one worker."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future

import pytest

from deeprec.tools.batching import Batcher


class Doubling:
    """Answers twice the number, once it is let to; remembers the batches."""

    def __init__(self, limit: int) -> None:
        self.batches: list[list[int]] = []
        self.started, self.go_on = threading.Event(), threading.Event()
        self.batcher = Batcher[int, int](self.serve, name="doubling", limit=limit)

    def serve(self, batch: Sequence[tuple[int, Future[int]]]) -> None:
        self.batches.append([number for number, _ in batch])
        self.started.set()
        assert self.go_on.wait(20)
        for number, future in batch:
            future.set_result(2 * number)


def test_what_waits_is_a_batch_of_at_most_the_limit():
    doubling = Doubling(limit=3)
    futures = [doubling.batcher.submit(1)]
    assert doubling.started.wait(20)
    futures += [doubling.batcher.submit(number) for number in (2, 3, 4, 5)]
    doubling.go_on.set()
    assert [future.result(20) for future in futures] == [2, 4, 6, 8, 10]
    doubling.batcher.close()
    assert doubling.batches == [[1], [2, 3, 4], [5]]


def test_what_is_cancelled_while_it_waits_is_not_served():
    doubling = Doubling(limit=8)
    first = doubling.batcher.submit(1)
    assert doubling.started.wait(20)
    assert doubling.batcher.submit(2).cancel()
    last = doubling.batcher.submit(3)
    doubling.go_on.set()
    assert (first.result(20), last.result(20)) == (2, 6)
    doubling.batcher.close()
    assert doubling.batches == [[1], [3]]


def test_a_closed_one_says_so():
    doubling = Doubling(limit=1)
    doubling.batcher.close()
    with pytest.raises(RuntimeError, match="the doubling is closed"):
        doubling.batcher.submit(1)
