"""A script in the policy's place, so that the real graph plays what a demonstrator wrote."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from ..errors import EngineError
from ..graph.engine.base import Engine, Generation, GenerationRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ScriptedPolicy(Engine):
    """An engine that says the next text of a script, up to the first stop string in it.

    Its logprobs are 0: nothing was sampled.
    """

    name = "demonstrator"

    def __init__(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_model_len: int
    ) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self._texts = list(texts)

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        """See Engine.submit."""
        future: Future[Generation] = Future()
        try:
            future.set_result(self._say(request))
        except EngineError as error:
            future.set_exception(error)
        return future

    def _say(self, request: GenerationRequest) -> Generation:
        if not self._texts:
            raise EngineError("the demonstration has nothing more to say")
        text = self._texts.pop(0)
        stop = next((stop for stop in request.stop if text.endswith(stop)), None)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if stop is None:
            ids.append(int(self.tokenizer.eos_token_id))
        if len(ids) > request.max_tokens:
            raise EngineError(
                f"{len(ids)} tokens of a demonstration don't fit into {request.max_tokens}: raise "
                "max_new_tokens or max_total_tokens, or lower retrieve_n or history_length"
            )
        return Generation(
            tuple(ids), (0.0,) * len(ids), "stop" if stop is not None else "eos", stop
        )

    def close(self) -> None:
        """Hold nothing, release nothing."""
