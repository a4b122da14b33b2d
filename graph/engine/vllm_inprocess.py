"""vLLM in this process's care: an AsyncLLM whose engine core runs in a child process.

Starting takes from half a minute on a CPU. Everything that can be refused before that (no such
model, too little memory for the KV cache) is refused at once and in words.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, cast

from ...errors import EngineError
from .base import Engine, Finish, Generation, GenerationRequest, LoopThread
from .limits import (
    CPU_ENVIRONMENT,
    GRAMMAR_BACKEND,
    WEIGHTS_FORMAT,
    check_kv_cache,
    check_model_folder,
    cpu_dtype,
    cpu_options,
)
from .tokenizer import load_tokenizer
from .weight_sync import SyncWorker, handed_over

if TYPE_CHECKING:
    from torch import Tensor
    from vllm import CompletionOutput, SamplingParams
    from vllm.logprobs import FlatLogprobs
    from vllm.v1.engine.async_llm import AsyncLLM


_WORKER = f"{SyncWorker.__module__}.{SyncWorker.__qualname__}"


class VLLMEngine(Engine):
    """Engine over vLLM's AsyncLLM, on a GPU where vLLM finds one, else on the CPU.

    Args:
        model: hub name or local folder of a causal LM with its tokenizer.
        max_model_len: the most tokens of one trajectory, prompt included.
        dtype: weights and activations: "auto", "bfloat16" or "float32" (limits.cpu_dtype).
        kv_cache_gib: memory of the KV cache on a CPU; a GPU uses `gpu_memory_utilization`.
        gpu_memory_utilization: share of the GPU's memory that vLLM may take.
        max_num_seqs: sequences that vLLM decodes at the same time.

    Raises:
        EngineError: no such model, too little memory, vLLM missing or unable to start.

    """

    def __init__(
        self,
        model: str,
        *,
        max_model_len: int = 4096,
        dtype: str = "auto",
        kv_cache_gib: int = 2,
        gpu_memory_utilization: float = 0.85,
        max_num_seqs: int = 64,
    ) -> None:
        check_model_folder(model)
        # vLLM reads these when it is imported. A forked child would inherit locks of the threads
        # that this process already runs.
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(kv_cache_gib)
        for name, value in CPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        os.environ.setdefault("TORCH_LOGS", "-all")
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.platforms import current_platform
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise EngineError(
                f"vLLM can't be imported ({error}). Install deeprec-agent[gpu] on an NVIDIA "
                "machine or deeprec-agent[cpu] elsewhere; or set DEEPREC_ENGINE__KIND=transformers."
            ) from error
        self._on_cpu = current_platform.is_cpu()
        if self._on_cpu:
            dtype = cpu_dtype(dtype)
            check_kv_cache(
                model, max_model_len=max_model_len, kv_cache_gib=kv_cache_gib, dtype=dtype
            )
        self.tokenizer = load_tokenizer(model)
        self.name = model
        self.max_model_len = max_model_len
        self._ids = itertools.count()
        self._loop = LoopThread("deeprec-vllm")
        args = AsyncEngineArgs(
            model=model,
            max_model_len=max_model_len,
            dtype=dtype,
            max_num_seqs=max_num_seqs,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_prefix_caching=True,
            structured_outputs_config={"backend": GRAMMAR_BACKEND},
            load_format=WEIGHTS_FORMAT,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            generation_config="vllm",  # sampling is the caller's, never the model folder's
            **(cpu_options(max_model_len) if self._on_cpu else {"worker_extension_cls": _WORKER}),
        )
        try:
            # Starting blocks, which servers forbid in event loops; a thread of its own has none.
            with ThreadPoolExecutor(max_workers=1) as apart:
                self._llm: AsyncLLM = apart.submit(AsyncLLM.from_engine_args, args).result()
            # A killed process closes nothing, and vLLM's own would live on.
            watch = self._llm.collective_rpc("deeprec_watch", args=(os.getpid(),))
            self._loop.submit(watch).result()
        except Exception as error:  # the boundary: vLLM raises anything from its child process
            self._loop.close()
            raise EngineError(
                f"vLLM could not start {model!r}: {error}. Its own messages above name the "
                "cause; DEEPREC_ENGINE__MAX_MODEL_LEN and DEEPREC_ENGINE__KV_CACHE_GIB set how "
                "much memory it takes."
            ) from error
        self._closed = False
        atexit.register(self.close)  # else the interpreter tears the engine core down mid-step

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        """See Engine.submit."""
        return self._loop.submit(self._generate(request))

    async def _generate(self, request: GenerationRequest) -> Generation:
        outputs = self._llm.generate(
            {"prompt_token_ids": list(request.prompt_ids)},
            _sampling_params(request),
            request_id=f"deeprec-{next(self._ids)}",
        )
        ids: list[int] = []
        logprobs: list[float] = []
        cached: int | None = None
        last: CompletionOutput | None = None
        try:
            async for output in outputs:  # one, or piece by piece where somebody listens
                last, cached = output.outputs[0], output.num_cached_tokens
                ids += last.token_ids
                sampled = cast("FlatLogprobs | None", last.logprobs)
                logprobs += sampled.logprobs if sampled else ()
                if request.on_text is not None and last.text:
                    request.on_text(last.text)
        except Exception as error:  # the boundary: vLLM's errors have no common base
            raise EngineError(f"vLLM refused or lost a generation: {error!r}") from error
        if last is None:
            raise EngineError("vLLM ended a generation without a result")
        finish = _finish(last.finish_reason, last.stop_reason)
        return Generation(tuple(ids), tuple(logprobs), *finish, cached_tokens=cached)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the model's weights; the next generation is made with them.

        `weights` are the model's parameters by their names in transformers, a tied head left out.
        Not to be called while generations are under way. Raises EngineError.
        """
        with handed_over(weights) as folder:
            try:
                self._loop.submit(self._load_weights(folder)).result()
            except Exception as error:  # the boundary: vLLM's errors have no common base
                raise EngineError(f"vLLM did not take the new weights: {error!r}") from error

    async def _load_weights(self, folder: str) -> None:
        await self._llm.collective_rpc("deeprec_load", args=(folder,))
        await self._llm.reset_prefix_cache()  # it holds keys and values of the old weights

    def forget_prefixes(self) -> None:
        """See Engine.forget_prefixes."""
        try:
            self._loop.submit(self._llm.reset_prefix_cache()).result()
        except Exception as error:  # the boundary: vLLM's errors have no common base
            raise EngineError(f"vLLM did not empty its prefix cache: {error!r}") from error

    def unfinished(self) -> int:
        """Return the number of generations that the engine is working on."""
        return int(self._llm.get_num_unfinished_requests())

    def close(self) -> None:
        """End the engine core's process and the loop."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._loop.submit(self._stop()).result()
        self._loop.close()

    async def _stop(self) -> None:
        self._llm.shutdown()
        del self._llm  # its finaliser fails in a closing interpreter
        await asyncio.sleep(0)


def _sampling_params(request: GenerationRequest) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    guided = None
    if request.constraint is not None:
        guided = StructuredOutputsParams(
            choice=list(request.constraint.choices) or None,
            regex=request.constraint.regex or None,
        )
    return SamplingParams(
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        stop=list(request.stop),
        include_stop_str_in_output=True,  # else text is held back in case it becomes one
        logprobs=0,  # of the sampled token alone
        flat_logprobs=True,  # one list; else two objects a token, for the collector to look through
        structured_outputs=guided,
        skip_special_tokens=False,
        output_kind=RequestOutputKind.DELTA if request.on_text else RequestOutputKind.FINAL_ONLY,
    )


def _finish(finish_reason: str | None, stop_reason: int | str | None) -> tuple[Finish, str | None]:
    """VLLM's words in ours: it calls EOS a "stop" that has no stop_reason."""
    if finish_reason == "length":
        return "length", None
    if finish_reason != "stop":
        raise EngineError(f"vLLM gave up a generation: finish_reason {finish_reason!r}")
    if isinstance(stop_reason, str):
        return "stop", stop_reason
    return "eos", None
