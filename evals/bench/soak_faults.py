"""Runs that are watched, and broken on purpose: an engine, a retriever and an encoder around the
real ones.

Which run is at work is told by a context variable, which asyncio hands down to all that a run does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np

from ...errors import CatalogError, EncoderError
from ...graph.engine.base import Engine, Generation, GenerationRequest
from ...tools.retriever import RetrievalRequest, Retriever, ScoredItem
from ...tools.text_encoder import TextEncoder

Fault = Literal[
    "refused", "lost", "catalog", "encoder", "cancelled", "hurried", "no_room", "unknown_user"
]
"""refused: vLLM gets a prompt that is longer than it holds. lost: a generation never ends.
catalog: a search fails. encoder: the text encoder fails at a preference, together with all that it
encodes in the same batch. cancelled: the caller goes away while vLLM is at work. hurried: a time
budget of a fifth of a second. no_room: fewer tokens than any run takes. unknown_user: nobody."""

FAULTS: tuple[Fault, ...] = get_args(Fault)

ENDS: dict[Fault, frozenset[str]] = {
    "refused": frozenset({"engine_failure"}),
    "lost": frozenset({"time_budget"}),
    "catalog": frozenset({"retrieval_failure"}),
    "encoder": frozenset({"retrieval_failure", "EncoderError"}),
    "cancelled": frozenset({"cancelled"}),
    "hurried": frozenset({"time_budget"}),
    "no_room": frozenset({"RequestError"}),
    "unknown_user": frozenset({"RequestError"}),
}
"""What a run with each fault may end by: a reason of Failure, or the error that the caller gets."""

_MARK = "soakfault"


@dataclass(eq=False)
class Watched:
    """One run: its fault, how much it asked of engine and retriever, and how much it got."""

    fault: Fault | None
    asked: int = 0
    generations: int = 0
    retrievals: int = 0
    at_work: asyncio.Event = field(default_factory=asyncio.Event)

    def generated(self, future: Future[Generation]) -> None:
        """Count what the engine gave, from its thread."""
        if not future.cancelled() and future.exception() is None:
            self.generations += 1

    def retrieved(self, future: Future[list[ScoredItem]]) -> None:
        """Count what the retriever gave, from its thread."""
        if not future.cancelled() and future.exception() is None:
            self.retrievals += 1


at_work: ContextVar[Watched] = ContextVar("deeprec_soak")


class WatchedEngine(Engine):
    """The engine, but for the second generation of a run that is to be refused or lost."""

    def __init__(self, engine: Engine) -> None:
        self.name = engine.name
        self.max_model_len = engine.max_model_len
        self.tokenizer = engine.tokenizer
        self._engine = engine

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        """See Engine.submit."""
        run = at_work.get()
        run.asked += 1
        run.at_work.set()
        if run.fault == "lost" and run.asked > 1:
            return Future()
        if run.fault == "refused" and run.asked > 1:
            times = self.max_model_len // len(request.prompt_ids) + 1
            request = replace(request, prompt_ids=tuple(request.prompt_ids) * times)
        future = self._engine.submit(request)
        future.add_done_callback(run.generated)
        return future

    def close(self) -> None:
        """See Engine.close."""
        self._engine.close()


class WatchedRetriever(Retriever):
    """The retriever, but for the searches of a run whose catalog or encoder is to fail."""

    def submit(self, request: RetrievalRequest) -> Future[list[ScoredItem]]:
        """See Retriever.submit."""
        run = at_work.get()
        if run.fault == "catalog":
            broken: Future[list[ScoredItem]] = Future()
            broken.set_exception(CatalogError("the catalog is made to fail for the soak"))
            return broken
        if run.fault == "encoder":
            request = replace(request, preference=f"{_MARK} {id(run)}")
        future = super().submit(request)
        future.add_done_callback(run.retrieved)
        return future


class BreakableEncoder(TextEncoder):
    """The encoder, but for batches that hold the preference of a run whose encoder is to fail."""

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """See TextEncoder.encode_queries."""
        if any(text.startswith(_MARK) for text in texts):
            raise EncoderError("the text encoder is made to fail for the soak")
        return super().encode_queries(texts)
