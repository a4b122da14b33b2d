"""What the client of vLLM's server does when that fails: an HTTP server that answers by script.

The real server is killed, frozen and ended in test_server_faults.py.
"""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from deeprec.errors import EngineError
from deeprec.graph.engine.base import Generation, GenerationRequest
from deeprec.graph.engine.vllm_server import VLLMServerEngine
from deeprec.settings import load_settings

Reply = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers generations by the server's script; its last entry is repeated."""

    server: "Server"

    def do_GET(self) -> None:
        if self.path == "/health":
            self.server.health(self)
        else:
            send({"data": [{"id": "scripted", "max_model_len": 100}]})(self)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked += 1
        script = self.server.script
        (script.pop(0) if len(script) > 1 else script[0])(self)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Reply] = []
        self.health: Reply = status(200)
        self.asked = 0
        self.released = threading.Event()


def send(answer: Any) -> Reply:
    """A JSON answer."""

    def reply(to: Handler) -> None:
        body = json.dumps(answer).encode()
        to.send_response(200)
        to.send_header("Content-Length", str(len(body)))
        to.end_headers()
        to.wfile.write(body)

    return reply


def status(code: int) -> Reply:
    """A code alone."""

    def reply(to: Handler) -> None:
        to.send_response(code)
        to.send_header("Content-Length", "0")
        to.end_headers()

    return reply


def events(*told: Any) -> Reply:
    """A stream, as vLLM sends it."""

    def reply(to: Handler) -> None:
        to.send_response(200)
        to.end_headers()
        for event in told:
            to.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        to.wfile.write(b"data: [DONE]\n\n")

    return reply


def silence(to: Handler) -> None:
    """Nothing, until the test is over."""
    to.server.released.wait(60)


def cut(to: Handler) -> None:
    """The connection breaks."""
    to.close_connection = True


def choice(finish: str | None) -> Any:
    return {
        "choices": [
            {
                "token_ids": [5, 6],
                "logprobs": {"token_logprobs": [-1.0, -2.0]},
                "finish_reason": finish,
                "text": "ab",
            }
        ]
    }


GOOD = send(choice("stop"))
EXPECTED = Generation((5, 6), (-1.0, -2.0), "eos")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


Ask = Callable[..., Generation]


@pytest.fixture
def ask(server: Server) -> Iterator[Ask]:
    """Have the engine generate over a script of replies."""
    engines: list[VLLMServerEngine] = []

    def asked(
        *script: Reply, retry_seconds: float = 30.0, on_text: Callable[[str], None] | None = None
    ) -> Generation:
        server.script = list(script)
        url = f"http://127.0.0.1:{server.server_address[1]}"
        engine = VLLMServerEngine(
            url, tokenizer=load_settings().model_name, retry_seconds=retry_seconds
        )
        engines.append(engine)
        return engine.submit(GenerationRequest([1, 2], 10, on_text=on_text)).result(timeout=60)

    yield asked
    for engine in engines:
        engine.close()


@pytest.mark.parametrize(
    "trouble",
    [status(503), status(500), status(429), cut, send(choice("abort"))],
    ids=["dead engine", "error", "too many", "cut", "ended"],
)
def test_what_a_server_fails_at_is_tried_again(server: Server, ask: Ask, trouble: Reply) -> None:
    assert ask(trouble, trouble, GOOD) == EXPECTED
    assert server.asked == 3


@pytest.mark.parametrize(
    "trouble",
    [
        events({**choice(None)}, {"error": {"message": "EngineCore died", "code": 500}}),
        events({**choice(None)}, choice("abort")),
    ],
    ids=["dead engine", "ended"],
)
def test_a_stream_that_breaks_is_tried_again_and_heard_once(
    server: Server, ask: Ask, trouble: Reply
) -> None:
    heard: list[str] = []
    assert ask(trouble, GOOD, on_text=heard.append) == EXPECTED
    assert server.asked == 2
    assert heard[0] == "ab"


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (status(400), "refused"),
        (events(choice("error")), "gave up"),
        (send({"choices": []}), "lacks token ids"),
        (send([]), "lacks token ids"),
        (events({"error": {"message": "too long", "code": 400}}), "broke off"),
        (events({"error": "what"}), "broke off"),
        (events([]), "broke off"),
        (events(), "lacks token ids"),
    ],
)
def test_what_a_server_refuses_is_not_tried_again(
    server: Server, ask: Ask, reply: Reply, says: str
) -> None:
    with pytest.raises(EngineError, match=says):
        ask(reply, on_text=lambda _: None)
    assert server.asked == 1


def test_tries_end_with_a_reason(server: Server, ask: Ask) -> None:
    with pytest.raises(EngineError, match=r"for 0\.5 s, no more tries: HTTP 503"):
        ask(status(503), retry_seconds=0.5)
    assert server.asked >= 2


def test_the_bound_counts_from_the_first_failure(server: Server, ask: Ask) -> None:
    def late(to: Handler) -> None:
        to.server.released.wait(1.0)
        cut(to)

    assert ask(late, GOOD, retry_seconds=0.3) == EXPECTED


def test_a_silent_server_is_left(server: Server, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deeprec.graph.engine.vllm_server._LOOK_AFTER_S", 0.2)
    server.health = silence
    with pytest.raises(EngineError, match="no more tries: it is silent"):
        ask(silence, retry_seconds=0.5)
    server.health = status(503)
    with pytest.raises(EngineError, match="no more tries: its engine is dead"):
        ask(silence, retry_seconds=0.5)


def test_a_server_that_lives_is_waited_for(
    server: Server, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long generation is no silence, and one without /health (behind a proxy) no death."""
    monkeypatch.setattr("deeprec.graph.engine.vllm_server._LOOK_AFTER_S", 0.1)
    server.health = status(404)

    def slow(to: Handler) -> None:
        to.server.released.wait(1.5)
        GOOD(to)

    assert ask(slow, retry_seconds=0.2) == EXPECTED
    assert server.asked == 1
