"""One node's step of one run: what it may still spend, what it writes, what it hands on.

Every token of a run passes through `Step`, so limits, the time budget and authorship are
enforced in one place.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ..errors import EngineError
from . import protocol
from .engine.base import Constraint, Engine, Generation, GenerationRequest
from .state import Limits, RunSettings, State, StopReason
from .streaming import generate
from .transcript import Author, Segment, Transcript, pieces, segment

MIN_GENERATION = 8  # tokens; with less room a generation is not started
_ANSWER_LINE_TOKENS = {"titles": 24, "numbers": 8}


class LimitReachedError(Exception):
    """A limit of the run ends its thinking; handled by the node that meets it."""

    def __init__(self, reason: StopReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Step:
    """Reads a run's state, generates and writes on its transcript, and keeps what is new."""

    def __init__(self, engine: Engine, state: State) -> None:
        self.settings = RunSettings.model_validate(state["run"])
        self._engine = engine
        self._old = list(state.get("segments", ()))
        self._ids = Transcript(self._old).ids
        self._started = time.monotonic()
        spent = float(state.get("counts", {}).get("seconds", 0.0))
        self._spent = spent - state.get("round_began", {}).get("seconds", 0.0)
        self.segments: list[Segment] = []
        self.generations = 0

    @property
    def limits(self) -> Limits:
        """Limits of this run."""
        return self.settings.limits

    @property
    def transcript(self) -> Transcript:
        """Everything so far, this step's segments included."""
        return Transcript([*self._old, *self.segments])

    def answer_reserve(self) -> int:
        """Tokens kept free for the answer, so that a run that hits a limit can still give one."""
        return answer_tokens(self.settings)

    def room(self, *, reserve: int = 0) -> int:
        """Tokens that may still be added to the transcript, `reserve` of them left out."""
        total = min(self.limits.max_total_tokens, self._engine.max_model_len)
        return total - len(self._ids) - reserve

    def check_time(self) -> float | None:
        """Seconds that are left, None where there is no budget. Raises LimitReachedError."""
        budget = self.limits.time_budget_s
        if budget is None:
            return None
        left = budget - self._spent - (time.monotonic() - self._started)
        if left <= 0:
            raise LimitReachedError("time_budget", f"the time budget of {budget:g} s is used up")
        return left

    async def generate(
        self,
        *,
        max_tokens: int | None = None,
        stop: tuple[str, ...] = (),
        constraint: Constraint | None = None,
        reserve: int = 0,
    ) -> Generation:
        """Let the policy go on and append exactly what it sampled.

        Writing freely it also keeps to `max_new_tokens` of the limits.
        Raises LimitReachedError where no room or time is left, or the engine fails.
        """
        room = self.room(reserve=reserve)
        if room < MIN_GENERATION:
            raise LimitReachedError(
                "trajectory_length", f"{len(self._ids)} tokens leave no room for another generation"
            )
        bounds = (max_tokens, room, None if constraint else self.limits.max_new_tokens)
        request = GenerationRequest(
            prompt_ids=tuple(self._ids),
            max_tokens=min(bound for bound in bounds if bound is not None),
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            seed=generation_seed(self.settings, len(self._ids)),
            stop=stop,
            constraint=constraint,
        )
        left = self.check_time()
        try:
            async with asyncio.timeout(left):
                result = await generate(self._engine, request)
        except TimeoutError as error:
            raise LimitReachedError(
                "time_budget", f"the time budget of {self.limits.time_budget_s:g} s is used up"
            ) from error
        except EngineError as error:
            raise LimitReachedError("engine_failure", str(error)) from error
        self.generations += 1
        if self._engine.trainable:
            self._append("guided" if constraint else "policy", result.ids, result.logprobs)
        else:
            self._append("chat", result.ids, None)
        return result

    @property
    def trainable(self) -> bool:
        """Whether the engine's tokens are what its model sampled."""
        return self._engine.trainable

    @property
    def eos_token_id(self) -> int:
        """The tokenizer's end-of-sequence token."""
        return int(self._engine.tokenizer.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """Token ids of words that are not the policy's, without special tokens at the ends."""
        return list(self._engine.tokenizer.encode(text, add_special_tokens=False))

    def write(self, author: Author, text: str) -> None:
        """Append the environment's own words."""
        self.write_ids(author, self.encode(text))

    def write_ids(self, author: Author, ids: list[int]) -> None:
        """Append tokens that nobody sampled."""
        self._append(author, tuple(ids), None)

    def pieces(self, *, since_list: bool = False) -> list[tuple[Author, str]]:
        """See transcript.pieces."""
        return pieces(self.transcript, self._engine.tokenizer, since_list=since_list)

    def text(self, *, since_list: bool = False) -> str:
        """Text of `pieces`, joined."""
        return "".join(text for _, text in self.pieces(since_list=since_list))

    def update(self, **changes: Any) -> dict[str, Any]:
        """Return the state update of this step: its segments, its cost, and `changes`."""
        counts = {
            "seconds": time.monotonic() - self._started,
            "generations": float(self.generations),
        }
        return {"segments": self.segments, "counts": counts, **changes}

    def _append(
        self, author: Author, ids: tuple[int, ...], logprobs: tuple[float, ...] | None
    ) -> None:
        self.segments.append(segment(author, ids, logprobs))
        self._ids.extend(ids)


def generation_seed(settings: RunSettings, tokens: int) -> int | None:
    """Return the sampling seed of the generation that follows `tokens` tokens of a run."""
    # One seed for all generations of a run would start each of them with the same draw.
    return None if settings.seed is None else (settings.seed * 1_000_003 + tokens) % 2**31


def answer_tokens(settings: RunSettings) -> int:
    """Tokens that an answer is expected to take."""
    return _ANSWER_LINE_TOKENS[settings.answer_form] * settings.k + 32


def closing(text: str) -> str:
    """Write what opens the answer after `text`, however far the policy got with it."""
    inside = text.rpartition(protocol.BEGIN_PREFERENCE)[2]
    open_preference = protocol.BEGIN_PREFERENCE in text and protocol.END_PREFERENCE not in inside
    parts = [protocol.END_PREFERENCE] if open_preference else []
    if protocol.END_THINK not in text:
        parts.append(protocol.END_THINK)
    return "\n" + "\n".join([*parts, protocol.BEGIN_ANSWER]) + "\n"
