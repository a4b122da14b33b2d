"""vLLM's server is killed, frozen or ended under real runs of the graph: they wait and go on, or
end with a reason. One small model, one server at a time on one port.
"""

import asyncio
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from deeprec.graph.build import build_graph
from deeprec.graph.engine.base import Engine, Generation, GenerationRequest
from deeprec.graph.engine.vllm_server import VLLMServerEngine
from deeprec.graph.state import RecommendationResponse, RunSettings
from deeprec.tools.retriever import Retriever

from .conftest import ScriptedEngine
from .test_loop import good_script

pytestmark = [pytest.mark.engine, pytest.mark.slow]

_START_S = 300
_RUNS = 4


class Server:
    """`deeprec serve-llm` as a process that a test starts, freezes and kills."""

    def __init__(self, model: str, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"
        self._model = model
        self._environment = {
            **os.environ,
            "DEEPREC_MODEL": model,
            "DEEPREC_ENGINE__KV_CACHE_GIB": "1",
            "DEEPREC_ENGINE__MAX_MODEL_LEN": "2048",
        }
        self.process: subprocess.Popen[bytes] | None = None
        self._own: list[psutil.Process] = []

    def start(self) -> None:
        """Start it, and wait until it answers; nothing where it does already."""
        if self.process is not None and self.process.poll() is None:
            return
        command = [sys.executable, "-m", "deeprec.cli", "serve-llm", "--port", str(self.port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment)
        wait_for(self._answers, _START_S)
        # Its first generation is slow: what samples is compiled then.
        body = {
            "model": self._model,
            "prompt": [1, 2],
            "max_tokens": 2,
            "temperature": 1,
            "seed": 1,
        }
        httpx.post(f"{self.url}/v1/completions", json=body, timeout=_START_S).raise_for_status()
        self._own = psutil.Process(self.process.pid).children(recursive=True)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            return httpx.get(f"{self.url}/health", timeout=2).is_success
        except httpx.TransportError:
            return False

    def core(self) -> psutil.Process:
        """The process that computes."""
        return next(one for one in self._own if "EngineCore" in " ".join(one.cmdline()))

    def working(self) -> int:
        """Generations that it is working on or holds in its queue."""
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        found = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} ([\d.e+]+)$", text, re.M)
        assert len(found) == 2, text[:2000]
        return int(sum(map(float, found)))

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server's own process."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """`kill -9`, of its engine too, and wait until nothing of it is left."""
        self.signal(signal.SIGKILL)
        self.ended()

    def ended(self) -> None:
        """Wait until it has ended, and end what it left behind."""
        assert self.process is not None
        self.process.wait(timeout=120)
        _, left = psutil.wait_procs(self._own, timeout=10)
        for process in left:
            process.kill()
        assert not psutil.wait_procs(left, timeout=60)[1]


def wait_for(happens: Callable[[], object], seconds: float = 240) -> None:
    limit = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.fixture(scope="module")
def machine(tiny_llm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tiny_llm, tmp_path_factory.mktemp("server"))
    yield server
    if server.process is not None and server.process.poll() is None:
        server.kill()


@pytest.fixture
def server(machine: Server) -> Server:
    machine.start()
    return machine


Connect = Callable[[float], VLLMServerEngine]


@pytest.fixture
def connect(server: Server) -> Iterator[Connect]:
    """An engine over the server that tries again for so many seconds."""
    made: list[VLLMServerEngine] = []

    def connected(retry_seconds: float) -> VLLMServerEngine:
        made.append(VLLMServerEngine(server.url, retry_seconds=retry_seconds))
        return made[-1]

    yield connected
    for engine in made:
        engine.close()


def play(engine: Engine, retriever: Retriever, seed: int, **changes: Any) -> RecommendationResponse:
    """A guided run of long thoughts: the small model hardly ever stops by itself."""
    settings = {
        "k": 3,
        "retrieve_n": 5,
        "thought_tokens": 600,
        "temperature": 1.0,
        "seed": seed,
        "limits": {"max_retrievals": 1, "min_retrievals": 1, "max_total_tokens": 2048},
        **changes,
    }
    chosen = RunSettings.model_validate(settings)
    graph = build_graph(engine, retriever, settings=chosen)
    return RecommendationResponse.model_validate(
        graph.invoke({"history": [str(seed), str(seed + 1)]})
    )


class Runs:
    """Several runs at once, in threads."""

    def __init__(self, server: Server, engine: Engine, retriever: Retriever, **changes: Any):
        self._pool = ThreadPoolExecutor(_RUNS)
        self._futures = [
            self._pool.submit(play, engine, retriever, seed, **changes) for seed in range(_RUNS)
        ]
        wait_for(lambda: server.working() == _RUNS or self.done())

    def done(self) -> bool:
        return any(future.done() for future in self._futures)

    def responses(self, seconds: float) -> list[RecommendationResponse]:
        """What became of them; fails where one hangs."""
        return [future.result(timeout=seconds) for future in self._futures]


def check_whole(responses: list[RecommendationResponse]) -> None:
    for response in responses:
        assert response.failure is None
        assert len({line.id for line in response.recommendations}) == 3
        assert {line.source for line in response.recommendations} == {"guided"}


def check_failed(responses: list[RecommendationResponse], says: str) -> None:
    for response in responses:
        assert response.stop_reason == "engine_failure"
        assert response.failure is not None
        assert "no more tries" in response.failure.detail
        assert says in response.failure.detail
        # What was asked for comes from the TRM all the same.
        assert len({line.id for line in response.recommendations}) == 3
        assert {line.source for line in response.recommendations} <= {"fused", "trm"}


def test_cancelling_frees_the_server(
    server: Server, connect: Connect, retriever: Retriever
) -> None:
    engine = connect(30)
    prompt = engine.tokenizer.encode("Once upon a time")
    for listener in (None, lambda _: None):
        endless = engine.submit(
            GenerationRequest(prompt, 1900, temperature=1.0, seed=1, on_text=listener)
        )
        wait_for(lambda: server.working() == 1)
        assert not endless.done()
        endless.cancel()
        wait_for(lambda: server.working() == 0)

    async def leave_a_run() -> None:
        settings = RunSettings(decoding="free", k=2, retrieve_n=4, temperature=1.0)
        graph = build_graph(engine, retriever, settings=settings)
        task = asyncio.create_task(graph.ainvoke({"history": ["1"]}))
        await asyncio.to_thread(wait_for, lambda: server.working() == 1)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave_a_run())
    wait_for(lambda: server.working() == 0)


def test_runs_over_a_frozen_server_end_with_a_reason(
    server: Server, connect: Connect, retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deeprec.graph.engine.vllm_server._LOOK_AFTER_S", 1.0)
    runs = Runs(server, connect(3), retriever)
    server.signal(signal.SIGSTOP)
    try:
        assert not runs.done()
        check_failed(runs.responses(120), "silent")
    finally:
        server.signal(signal.SIGCONT)
    wait_for(lambda: server.working() == 0)


def test_a_killed_engine_core_is_waited_for(
    server: Server, connect: Connect, retriever: Retriever
) -> None:
    """What the kernel kills where memory runs out. vLLM's server ends then, and is started anew."""
    engine = connect(_START_S)
    runs = Runs(server, Mixed(engine), retriever)
    server.core().kill()
    server.ended()
    assert not runs.done()
    server.start()
    check_whole(runs.responses(240))


def test_runs_over_a_killed_server_wait_and_go_on(
    server: Server, connect: Connect, retriever: Retriever
) -> None:
    runs = Runs(server, connect(_START_S), retriever)
    server.kill()
    time.sleep(2)
    assert not runs.done()
    # Other runs don't wait for them.
    other = play(ScriptedEngine(good_script(), 8192), retriever, 7, decoding="free", k=2)
    assert other.failure is None
    assert len(other.recommendations) == 2
    assert not runs.done()
    server.start()
    check_whole(runs.responses(240))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_runs_over_a_server_that_stays_dead_end_with_a_reason(
    server: Server, connect: Connect, retriever: Retriever, end: signal.Signals
) -> None:
    runs = Runs(server, connect(2), retriever)
    server.signal(end)
    server.ended()
    check_failed(runs.responses(120), "no answer from")


class Mixed(Engine):
    """Streams every other generation."""

    def __init__(self, engine: Engine) -> None:
        self.name, self.max_model_len = engine.name, engine.max_model_len
        self.tokenizer = engine.tokenizer
        self._engine = engine
        self._turn = itertools.count()

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        listener = (lambda _: None) if next(self._turn) % 2 else None
        return self._engine.submit(replace(request, on_text=listener))

    def close(self) -> None:
        pass
