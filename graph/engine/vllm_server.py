"""Engine over vLLM's OpenAI-compatible server: token ids go out and come back, no text.

Start one with `deeprec serve-llm`, or point at replicas behind a load balancer.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    wait_random_exponential,
)

from ...errors import EngineError
from .base import Engine, Generation, GenerationRequest, LoopThread
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

if TYPE_CHECKING:
    from ...settings import EngineSettings

_CONNECT_TIMEOUT_S = 5.0
_LOOK_AFTER_S = 10.0  # a generation that takes longer has its server asked whether it lives


class _ServerBusyError(Exception):
    """The server answered 5xx or 429, or not at all, or broke off: worth another try within the
    bound.
    """


@dataclass(frozen=True)
class ServedModel:
    """What a server says of its model."""

    name: str
    max_model_len: int
    root: str  # hub name or folder, as the server knows it


def served_model(url: str, *, api_key: str | None = None) -> ServedModel:
    """Ask a server for its model. Raises EngineError: nobody answers, or it serves none."""
    try:
        reply = httpx.get(
            f"{url.rstrip('/')}/v1/models",
            headers=_authorised(api_key),
            timeout=_CONNECT_TIMEOUT_S,
        ).raise_for_status()
        card: dict[str, Any] = reply.json()["data"][0]
        name = str(card["id"])
        return ServedModel(name, int(card["max_model_len"]), str(card.get("root") or name))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EngineError(
            f"no LLM server answers at {url!r} ({error}): start one with `deeprec serve-llm` "
            "or correct DEEPREC_ENGINE__URL"
        ) from error
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise EngineError(f"the server at {url!r} is not vLLM's: {error!r}") from error


def _authorised(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


class VLLMServerEngine(Engine):
    """Engine over a running server.

    Args:
        url: root of the server, e.g. "http://127.0.0.1:8000".
        tokenizer: hub name or folder of the tokenizer; the served model's name by default.
        api_key: sent as a bearer token where the server asks for one.
        retry_seconds: for how long an unreachable, dead or overloaded server is tried again,
            counted from a generation's first failure; and how long it may be silent when it is
            asked whether it lives.

    Raises:
        EngineError: nobody answers, or what answers serves no model.

    """

    def __init__(
        self,
        url: str,
        *,
        tokenizer: str | None = None,
        api_key: str | None = None,
        retry_seconds: float = 30.0,
    ) -> None:
        self.url = url.rstrip("/")
        self._retry_seconds = retry_seconds
        headers = _authorised(api_key)
        served = served_model(url, api_key=api_key)
        self.name, self.max_model_len = served.name, served.max_model_len
        self.tokenizer = load_tokenizer(tokenizer or served.root)
        self._loop = LoopThread("deeprec-vllm-client")
        # Generations may take as long as they do: the run's time budget bounds them.
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )
        self._closed = False

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        """See Engine.submit."""
        return self._loop.submit(self._generate(request))

    async def _generate(self, request: GenerationRequest) -> Generation:
        failed_at: list[float] = []

        def is_over(_: RetryCallState) -> bool:
            # From the first failure on: what was cut off after minutes has its tries still.
            failed_at.append(time.monotonic())
            return failed_at[-1] - failed_at[0] >= self._retry_seconds

        try:
            async for attempt in AsyncRetrying(
                stop=is_over,
                wait=wait_random_exponential(multiplier=0.2, max=5),
                retry=retry_if_exception_type(_ServerBusyError),
                reraise=True,
            ):
                with attempt:
                    made = _generation(await self._watched(request))
                # Another try may write another text: what was heard of the first stays alone.
                request = replace(request, on_text=None)
        except _ServerBusyError as error:
            raise EngineError(
                f"no answer from {self.url} for {self._retry_seconds:g} s, no more tries: {error}"
            ) from error
        return made

    async def _watched(self, request: GenerationRequest) -> dict[str, Any]:
        """Await the answer, however long it takes, from a server that shows that it lives."""
        asked = asyncio.ensure_future(self._post(request))
        try:
            while not (await asyncio.wait({asked}, timeout=_LOOK_AFTER_S))[0]:
                await self._check_alive()
            return asked.result()
        finally:
            asked.cancel()  # the server drops what nobody waits for
            await asyncio.wait({asked})

    async def _check_alive(self) -> None:
        try:
            reply = await self._client.get("/health", timeout=self._retry_seconds)
        except httpx.TransportError as error:
            raise _ServerBusyError(f"it is silent: {error!r}") from error
        if reply.status_code >= 500:
            raise _ServerBusyError(f"its engine is dead: HTTP {reply.status_code}")

    async def _post(self, request: GenerationRequest) -> dict[str, Any]:
        body = _body(self.name, request)
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as reply:
                if request.on_text is not None and reply.is_success:
                    return await _hear(reply, request.on_text)
                await reply.aread()
        except httpx.TransportError as error:
            raise _ServerBusyError(repr(error)) from error
        if reply.status_code >= 500 or reply.status_code == 429:
            raise _ServerBusyError(f"HTTP {reply.status_code}: {reply.text[:200]}")
        if reply.is_error:
            raise EngineError(
                f"the LLM server refused a generation: HTTP {reply.status_code} {reply.text[:500]}"
            )
        try:
            answer: dict[str, Any] = reply.json()
        except ValueError as error:
            raise EngineError(f"{self.url} answered with no JSON: {reply.text[:200]!r}") from error
        return answer

    def close(self) -> None:
        """Close the connections; the server goes on."""
        if self._closed:
            return
        self._closed = True
        self._loop.submit(self._client.aclose()).result(timeout=10)
        self._loop.close()


def _body(model: str, request: GenerationRequest) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.prompt_ids),
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "stop": list(request.stop),
        "include_stop_str_in_output": True,
        "stream": request.on_text is not None,
        "logprobs": 0,
        "return_token_ids": True,
        "skip_special_tokens": False,
        "add_special_tokens": False,
    }
    if request.constraint is not None:
        constraint = request.constraint
        body["structured_outputs"] = (
            {"choice": list(constraint.choices)}
            if constraint.choices
            else {"regex": constraint.regex}
        )
    return body


async def _hear(reply: httpx.Response, on_text: Callable[[str], None]) -> dict[str, Any]:
    """Read server-sent events, and join them to what an answer without a stream would be."""
    ids: list[int] = []
    logprobs: list[float] = []
    last: dict[str, Any] = {}
    async for line in reply.aiter_lines():
        data = line.removeprefix("data: ")
        if data in (line, "[DONE]"):
            continue
        try:
            event = json.loads(data)
            if int(event.get("error", {}).get("code", 0)) >= 500:  # its engine died meanwhile
                raise _ServerBusyError(data[:200])
            last = event["choices"][0]
            ids += last["token_ids"]
            logprobs += last["logprobs"]["token_logprobs"] if last["token_ids"] else []
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise EngineError(
                f"the LLM server broke off a generation or is not vLLM's: {data[:500]} ({error!r})"
            ) from error
        if text := last.get("text"):
            on_text(text)
    joined = {**last, "token_ids": ids, "logprobs": {"token_logprobs": logprobs}}
    return {"choices": [joined]}


def _generation(reply: dict[str, Any]) -> Generation:
    try:
        choice = reply["choices"][0]
        ids = tuple(choice["token_ids"])
        logprobs = tuple(choice["logprobs"]["token_logprobs"])
        reason, stop = choice["finish_reason"], choice.get("stop_reason")
        if len(ids) != len(logprobs):
            raise ValueError(f"{len(ids)} token ids with {len(logprobs)} logprobs")
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise EngineError(
            f"the server's answer lacks token ids or logprobs ({error!r}): it must be vLLM, "
            "0.11 or newer"
        ) from error
    if reason == "length":
        return Generation(ids, logprobs, "length")
    if reason == "abort":  # a server that is being ended gives up what it has not finished
        raise _ServerBusyError("it gave the generation up")
    if reason != "stop":
        raise EngineError(f"the server gave up a generation: finish_reason {reason!r}")
    if isinstance(stop, str):
        return Generation(ids, logprobs, "stop", stop)
    return Generation(ids, logprobs, "eos")


def serve(model: str, settings: EngineSettings, *, host: str, port: int) -> None:
    """Replace this process by vLLM's server. Raises EngineError where it could not start.

    The server is started as a module, since the `vllm` command looks for a distribution of that
    name, which the CPU build isn't.
    """
    check_model_folder(model)
    max_model_len, dtype = settings.max_model_len, str(settings.dtype)
    on_cpu = _without_gpu()
    if on_cpu:
        dtype = cpu_dtype(dtype)
        check_kv_cache(
            model, max_model_len=max_model_len, kv_cache_gib=settings.kv_cache_gib, dtype=dtype
        )
    _check_port(host, port)
    environment = {
        **CPU_ENVIRONMENT,
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model, "--host", host, "--port", str(port), "--dtype", dtype]
    command += ["--max-model-len", str(max_model_len), "--generation-config", "vllm"]
    command += ["--structured-outputs-config.backend", GRAMMAR_BACKEND]
    command += ["--load-format", WEIGHTS_FORMAT]
    command += ["--max-num-seqs", str(settings.max_num_seqs)]
    command += ["--gpu-memory-utilization", str(settings.gpu_memory_utilization)]
    for name, value in (cpu_options(max_model_len) if on_cpu else {}).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command += [f"--{flag}" if value else f"--no-{flag}"]
        else:
            command += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)  # noqa: S606  # no shell, fixed program


def _check_port(host: str, port: int) -> None:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise EngineError(
            f"port {port} on {host} can't be used ({error.strerror}): choose another --port or "
            "--host"
        ) from error


def _without_gpu() -> bool:
    import torch

    return not torch.cuda.is_available()
