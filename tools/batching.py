"""A worker thread that answers many callers at once.

It takes all that waits as one batch and never waits for more, so a lone request is served at once.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

RequestT = TypeVar("RequestT")
AnswerT = TypeVar("AnswerT")

Waiting = tuple[RequestT, Future[AnswerT]]


class Batcher(Generic[RequestT, AnswerT]):
    """Requests from any thread or event loop, served in batches by a thread of its own.

    Args:
        serve: answers a batch by its futures, all of them, and raises nothing.
        name: of the worker, as errors and debuggers show it.
        limit: requests of one batch at most.

    """

    def __init__(
        self,
        serve: Callable[[Sequence[Waiting[RequestT, AnswerT]]], None],
        *,
        name: str,
        limit: int,
    ) -> None:
        self._serve = serve
        self._name = name
        self._limit = limit
        self._waiting: deque[Waiting[RequestT, AnswerT]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._worker = threading.Thread(target=self._work, name=f"deeprec-{name}", daemon=True)
        self._worker.start()

    def submit(self, request: RequestT) -> Future[AnswerT]:
        """Queue a request. Cancelling its future before it runs frees its place.

        Raises RuntimeError once it is closed.
        """
        future: Future[AnswerT] = Future()
        with self._wake:
            if self._closed:
                raise RuntimeError(f"the {self._name} is closed")
            self._waiting.append((request, future))
            self._wake.notify()
        return future

    def close(self) -> None:
        """Cancel what waits, finish what runs, and end the worker."""
        with self._wake:
            self._closed = True
            while self._waiting:
                self._waiting.popleft()[1].cancel()
            self._wake.notify()
        self._worker.join()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._closed:
                    self._wake.wait()
                if not self._waiting:
                    return
                taken = [
                    self._waiting.popleft() for _ in range(min(self._limit, len(self._waiting)))
                ]
            wanted = [pair for pair in taken if pair[1].set_running_or_notify_cancel()]
            if wanted:
                self._serve(wanted)
