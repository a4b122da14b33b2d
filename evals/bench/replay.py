"""Engines over an engine: one that keeps what was said, one that says it again at once, one that
takes so many generations at a time.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from dataclasses import dataclass

from ...errors import EngineError
from ...graph.engine.base import Engine, Generation, GenerationRequest


@dataclass(frozen=True)
class Call:
    """A generation that was asked for, and what came of it."""

    request: GenerationRequest
    said: Generation


class Recorder(Engine):
    """Keeps the calls of an engine, and the seconds that they took, summed.

    Closing it leaves the engine open.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name, self.max_model_len = engine.name, engine.max_model_len
        self.tokenizer = engine.tokenizer
        self.calls: list[Call] = []
        self.seconds = 0.0

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        """See Engine.submit."""
        began = time.perf_counter()
        future = self._engine.submit(request)
        future.add_done_callback(lambda done: self._keep(request, done, began))
        return future

    def _keep(self, request: GenerationRequest, done: Future[Generation], began: float) -> None:
        if not done.cancelled() and done.exception() is None:
            self.calls.append(Call(request, done.result()))
            self.seconds += time.perf_counter() - began

    def close(self) -> None:
        """Nothing to let go of."""


class Replay(Engine):
    """Answers each recorded request at once as it was answered; any other is an error.

    So whoever plays to the end has asked for exactly what was asked for before.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.name, self.max_model_len = recorder.name, recorder.max_model_len
        self.tokenizer = recorder.tokenizer
        self._said = {call.request: call.said for call in recorder.calls}

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        """See Engine.submit."""
        future: Future[Generation] = Future()
        said = self._said.get(request)
        if said is None:
            future.set_exception(EngineError("this generation was not recorded"))
        else:
            future.set_result(said)
        return future

    def close(self) -> None:
        """Nothing to let go of."""


class Gate(Engine):
    """Lets at most `width` generations into an engine at a time; for callers of one event loop."""

    def __init__(self, engine: Engine, width: int) -> None:
        self._engine = engine
        self._free = asyncio.Semaphore(width)
        self.name, self.max_model_len = engine.name, engine.max_model_len
        self.tokenizer = engine.tokenizer

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        """See Engine.submit."""
        raise NotImplementedError("await `generate`")

    async def generate(self, request: GenerationRequest) -> Generation:
        """See Engine.generate."""
        async with self._free:
            return await self._engine.generate(request)

    def close(self) -> None:
        """Nothing to let go of."""
