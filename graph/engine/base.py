"""The engine interface: token ids in; token ids, logprobs and a stop reason out.

An engine owns its event loop, so one engine serves sync callers, async callers of any loop and
LangGraph's server alike. Nothing here tokenises: what was sampled is what the caller gets.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

Finish = Literal["stop", "eos", "length"]
MAX_STOPS = 4  # what the OpenAI-compatible protocol takes


@dataclass(frozen=True, slots=True)
class Constraint:
    """What guided decoding may write: exactly one of the strings, or a match of the regex."""

    choices: tuple[str, ...] = ()
    regex: str = ""

    def __post_init__(self) -> None:
        if bool(self.choices) == bool(self.regex):
            raise ValueError("a constraint is either a list of choices or a regex")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One call of the engine.

    `stop` strings end the generation; the tokens that spell one are part of the result. There
    are at most MAX_STOPS of them.
    `constraint` masks the vocabulary (guided decoding); logprobs are then those after the mask.
    `temperature` 0 is greedy decoding.
    `on_text`, if any, is called with each piece of text as it is sampled, stop strings included,
    in whatever thread the engine decodes; it must return at once. The result doesn't depend on it,
    and an engine that can't stream never calls it.
    """

    prompt_ids: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    constraint: Constraint | None = None
    on_text: Callable[[str], None] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.stop) > MAX_STOPS:
            raise ValueError(f"{len(self.stop)} stop strings; an engine takes {MAX_STOPS} at most")


@dataclass(frozen=True, slots=True)
class Generation:
    """What the engine sampled: `ids` and `logprobs` (natural log, one per id), as it did.

    `finish` is "stop" (a stop string, named in `stop_string`, or a finished constraint), "eos",
    or "length" (`max_tokens` reached). An EOS token is part of `ids`. An engine that
    is not trainable has no logprobs to give: they are NaN. `cached_tokens` of the prompt were taken
    from the engine's prefix cache; None where it doesn't say.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    stop_string: str | None = None
    cached_tokens: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.logprobs):
            raise ValueError(f"{len(self.ids)} token ids came with {len(self.logprobs)} logprobs")


class LoopThread:
    """An asyncio event loop on a daemon thread of its own."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `coroutine` on the loop; cancelling the future cancels it there."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Stop the loop and wait for its thread; pending work is abandoned."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._loop.is_running():
            self._loop.close()


class Engine(ABC):
    """A language model that continues token ids.

    Attributes:
        name: model name or folder, for reports and fingerprints.
        max_model_len: the most tokens that prompt and generation may hold together.
        tokenizer: the model's own tokenizer (Hugging Face).
        trainable: whether ids and logprobs are those that the model sampled. Where they are not, a
            run can't be trained on, and a constraint that is not met gives an empty generation.

    """

    trainable: ClassVar[bool] = True

    name: str
    max_model_len: int
    tokenizer: PreTrainedTokenizerBase

    @abstractmethod
    def submit(self, request: GenerationRequest) -> Future[Generation]:
        """Start one generation, from any thread; cancelling the future frees its engine work.

        The future raises EngineError where the engine can't be reached, died, or refused.
        """

    async def generate(self, request: GenerationRequest) -> Generation:
        """Await one generation on the caller's own event loop. Raises EngineError."""
        return await asyncio.wrap_future(self.submit(request))

    def forget_prefixes(self) -> None:  # noqa: B027  # not every engine has such a cache
        """Empty the prefix cache, so that what is measured next has nothing from before.

        Does nothing where the engine keeps none, or a server keeps it. Not to be called while
        generations are under way. Raises EngineError.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the model and end the engine's thread or process; idempotent."""
