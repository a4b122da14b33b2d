"""The policy in transformers with continuous batching, for machines where vLLM is not installed.

Slower than vLLM, and without grammars: it plays free runs, as training does. Token ids in, token
ids out, as with the other engines.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from tokenizers.decoders import DecodeStream

from ...errors import EngineError
from .base import Engine, Finish, Generation, GenerationRequest, LoopThread
from .limits import check_kv_cache, check_model_folder, cpu_dtype, kv_token_bytes
from .tokenizer import load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.generation.continuous_batching import GenerationOutput

_PAGE = 32  # tokens; only whole pages of a prefix are reused when a run goes on
_BATCH_TOKENS = 2048
_GREEDY = 1e-4  # a temperature at which the likeliest token is the only one
_WATCH_SECONDS = 0.5


class TransformersEngine(Engine):
    """Engine over transformers' continuous batching, on a GPU where torch finds one.

    Logprobs are those of the distribution that was sampled from: after temperature and top_p, so
    nearly 0 in greedy decoding. Requests can't be seeded one by one; `seed` of a request is not
    heeded, the engine's own seeds them all.

    Args:
        model: hub name or local folder of a causal LM with its tokenizer.
        max_model_len: the most tokens of one trajectory, prompt included.
        dtype: weights and activations: "auto", "bfloat16" or "float32" (limits.cpu_dtype).
        kv_cache_gib: memory of the KV cache at most.
        max_num_seqs: sequences decoded at the same time; the cache holds no more than they need.
        seed: of sampling; none draws anew in each process.

    Raises:
        EngineError: no such model, or too little memory.

    """

    def __init__(
        self,
        model: str,
        *,
        max_model_len: int = 4096,
        dtype: str = "auto",
        kv_cache_gib: int = 2,
        max_num_seqs: int = 64,
        seed: int | None = None,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        check_model_folder(model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            dtype = cpu_dtype(dtype)
            check_kv_cache(
                model, max_model_len=max_model_len, kv_cache_gib=kv_cache_gib, dtype=dtype
            )
        self.tokenizer = load_tokenizer(model)
        self.name = model
        self.max_model_len = max_model_len
        self._kv_cache_gib = kv_cache_gib
        self._max_num_seqs = max_num_seqs
        self._seed = seed
        self._ids = itertools.count()
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation="sdpa", use_safetensors=True
        ).to(device)
        self._loop = LoopThread("deeprec-transformers")
        self._closed = False
        self._start()
        self._loop.submit(self._end_with_main())

    def _start(self) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        config = self._model.config.get_text_config()
        page_bytes = kv_token_bytes(config, self._model.dtype.itemsize) * _PAGE
        # Each step's buffers grow with the cache, so it is no larger than can be used.
        needed = self._max_num_seqs * (self.max_model_len // _PAGE + 1)
        self._manager = self._model.init_continuous_batching(
            # Processors exist only where these differ from 1; each request brings its own values.
            generation_config=GenerationConfig(
                do_sample=True,
                temperature=0.5,
                top_p=0.5,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=_PAGE,
                num_blocks=min(needed, self._kv_cache_gib * 2**30 // page_bytes),
                max_requests_per_batch=self._max_num_seqs,
                max_batch_tokens=max(_BATCH_TOKENS, self.max_model_len),
                return_logprobs=True,
                per_request_processors=True,
                seed=self._seed,
            ),
        )
        self._manager.start()

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        """See Engine.submit."""
        return self._loop.submit(self._generate(request))

    async def _generate(self, request: GenerationRequest) -> Generation:
        if request.constraint is not None:
            raise EngineError(
                "the transformers engine has no grammars, so it can't decode guided: use "
                "--decoding free, or install vLLM"
            )
        room = self.max_model_len - len(request.prompt_ids)
        if room < 1:
            raise EngineError(
                f"a prompt of {len(request.prompt_ids)} tokens was refused: the engine takes "
                f"{self.max_model_len} with the answer (DEEPREC_ENGINE__MAX_MODEL_LEN)"
            )
        stream = _Stream(request, self.tokenizer)
        name = f"deeprec-{next(self._ids)}"
        self._forget_late_output()
        self._manager.register_result_handler(name, stream.receive)
        try:
            self._manager.add_request(
                list(request.prompt_ids),
                request_id=name,
                max_new_tokens=min(request.max_tokens, room),
                streaming=True,
                eos_token_id=self.tokenizer.eos_token_id,
                temperature=request.temperature or _GREEDY,
                top_p=request.top_p,
            )
            return await stream.result
        finally:
            self._manager.cancel_request(name)
            self._manager.output_router.result_handlers.pop(name, None)

    def _forget_late_output(self) -> None:
        """What comes for requests that have ended goes to a queue that nobody reads."""
        late = self._manager.output_router.output_queue
        try:
            while True:
                late.get_nowait()
        except queue.Empty:
            return

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the model's weights; the next generation is made with them.

        `weights` are the model's parameters by their names, a tied head left out. Not to be called
        while generations are under way. Raises EngineError.
        """
        import torch

        own = dict(self._model.named_parameters())
        if unknown := weights.keys() - own.keys():
            raise EngineError(f"the model has no weights named {', '.join(sorted(unknown)[:3])}")
        # A new manager: the old one's cache holds keys and values of the old weights.
        self._manager.stop(block=True)
        with torch.no_grad():
            for name, weight in weights.items():
                own[name].copy_(weight)
        self._start()

    def close(self) -> None:
        """End the generation thread and the loop."""
        if self._closed:
            return
        self._closed = True
        self._manager.stop(block=True, hard_stop=True)
        self._loop.close()

    async def _end_with_main(self) -> None:
        """The manager's thread is no daemon: unclosed, it would keep the interpreter alive."""
        while threading.main_thread().is_alive():  # noqa: ASYNC110  # its end sets no event
            await asyncio.sleep(_WATCH_SECONDS)
        self._manager.stop(block=False, hard_stop=True)


class _Stream:
    """One generation as its tokens arrive; ends it at the first stop string."""

    def __init__(self, request: GenerationRequest, tokenizer: Any) -> None:
        self.result: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._request = request
        self._tokenizer = tokenizer
        self._seen = 0
        self._text = DecodeStream(skip_special_tokens=False)
        # Every token but a few stands for a character at least.
        self._tail = max(map(len, request.stop), default=0) + 8

    def receive(self, output: GenerationOutput) -> None:
        """Take the tokens so far."""
        if self.result.done():
            return
        if output.error is not None:
            self.result.set_exception(
                EngineError(f"transformers refused or lost a generation: {output.error}")
            )
            return
        ids = output.generated_tokens
        while self._seen < len(ids):
            self._tell(ids[self._seen])
            self._seen += 1
            if stop := self._stop_string(ids[max(0, self._seen - self._tail) : self._seen]):
                self._finish(output, "stop", stop)
                return
        if output.is_finished():
            ended = ids[-1] == self._tokenizer.eos_token_id
            self._finish(output, "eos" if ended else "length", None)

    def _tell(self, token: int) -> None:
        if self._request.on_text is not None and (
            text := self._text.step(self._tokenizer.backend_tokenizer, token)
        ):
            self._request.on_text(text)

    def _stop_string(self, tail: list[int]) -> str | None:
        if not self._request.stop:
            return None
        text = self._tokenizer.decode(tail)
        return next((stop for stop in self._request.stop if stop in text), None)

    def _finish(self, output: GenerationOutput, finish: Finish, stop: str | None) -> None:
        kept = slice(0, self._seen)
        self.result.set_result(
            Generation(
                tuple(output.generated_tokens[kept]), tuple(output.logprobs[kept]), finish, stop
            )
        )
