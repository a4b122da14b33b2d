"""What is logged at the default level: no key, and nothing of what a user did or said."""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.store.memory import InMemoryStore

from deeprec.errors import DeepRecError, EngineError, SettingsError
from deeprec.graph.build import build_graph
from deeprec.graph.engine.base import GenerationRequest
from deeprec.graph.engine.vllm_server import VLLMServerEngine
from deeprec.graph.memory import Memory
from deeprec.graph.server import Discreet
from deeprec.graph.state import RunSettings
from deeprec.settings import load_settings
from deeprec.tools.retriever import Retriever

from .conftest import ScriptedEngine
from .test_streaming import SCRIPT

KEY = "sk-not-for-any-log"
THREAD: Any = {"configurable": {"thread_id": "t"}}


def test_a_run_logs_nothing_of_its_user(
    retriever: Retriever, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Runs that end well, that fail, and that are refused."""
    store = InMemoryStore()
    Memory(store, "someone").add("dislike", "clowns")
    script = [*SCRIPT, EngineError("the engine is out of reach")]
    graph = build_graph(
        ScriptedEngine(script, 8192),
        retriever,
        histories={"someone": ["7", "8"]},
        settings=RunSettings(decoding="free", k=2, retrieve_n=4),
        checkpointer=InMemorySaver(),
        store=store,
    )
    for given in (
        {"user_id": "someone", "wishes": ["I hate heights"]},
        {"history": ["Film 7", "Film 8"]},
        {"history": ["A film that nobody made"]},
        {"user_id": "someone", "filters": {"colour": "red"}},
    ):
        try:
            graph.invoke(given, THREAD)
        except DeepRecError:
            logging.getLogger("deeprec.test").warning("a run was refused")
    shown = "".join(capfd.readouterr())
    assert "a run was refused" in caplog.text
    for personal in ("Film 7", "Film 8", "nobody made", "clowns", "heights", "someone"):
        assert personal not in caplog.text
        assert personal not in shown


def record(event: str, **more: Any) -> logging.LogRecord:
    said = {"event": event, **more}
    return logging.LogRecord("langgraph_api.worker", logging.ERROR, "", 0, said, (), None)


def test_the_server_logs_no_words_of_a_refused_request() -> None:
    refused = (
        "Background run failed. Exception: <class 'deeprec.errors.RequestError'>(no item is\n'X')"
    )
    kept = record(refused, exception="Traceback … 'X'", run_id="1")
    assert Discreet().filter(kept)
    assert kept.msg == {
        "event": "Background run failed. Exception: RequestError (told to the client)",
        "run_id": "1",
    }
    asked = record("GET /store/items 200 1ms", query_string="namespace=a&key=words:clowns")
    assert Discreet().filter(asked)
    assert "clowns" not in str(asked.msg)


def test_the_server_logs_what_its_operator_has_to_mend() -> None:
    event = "Background run failed. Exception: <class 'deeprec.errors.CatalogError'>(locked)"
    kept = record(event, exception="Traceback …", query_string="")
    assert Discreet().filter(kept)
    assert kept.msg == {"event": event, "exception": "Traceback …", "query_string": ""}
    plain = logging.LogRecord("x", logging.INFO, "", 0, "text", (), None)
    assert Discreet().filter(plain)
    assert plain.msg == "text"


@contextmanager
def answering(status: int, card: bool = False) -> Iterator[str]:
    """A server that has one model, or not even that, and refuses all else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            models = {"data": [{"id": "m", "max_model_len": 512}]}
            self._say(200 if card else status, models if card else {})

        def do_POST(self) -> None:
            self._say(status, {})

        def _say(self, code: int, body: Any) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_an_llm_servers_key_is_in_no_message(caplog: pytest.LogCaptureFixture) -> None:
    said: list[BaseException] = []
    with (
        answering(401) as url,
        pytest.raises(EngineError, match="no LLM server answers") as at_start,
    ):
        VLLMServerEngine(url, api_key=KEY)
    said.append(at_start.value)
    for status in (403, 500):
        with answering(status, card=True) as url:
            engine = VLLMServerEngine(
                url, api_key=KEY, tokenizer=load_settings().model_name, retry_seconds=0.1
            )
            with pytest.raises(EngineError, match=f"HTTP {status}") as later:
                engine.submit(GenerationRequest((1,), 4)).result(30)
            engine.close()
            said.append(later.value)
    for error in said:
        assert KEY not in f"{error!r} {error.__cause__!r}"
    assert KEY not in caplog.text


def test_settings_show_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPREC_ENGINE__API_KEY", KEY)
    monkeypatch.setenv("DEEPREC_CHECKPOINTS", f"postgresql://me:{KEY}@host/threads")
    assert KEY not in repr(load_settings())
    monkeypatch.setenv("DEEPREC_ENGINE__APIKEY", KEY)  # misspelt
    with pytest.raises(SettingsError, match=r"engine\.APIKEY|engine\.apikey") as misspelt:
        load_settings()
    assert KEY not in str(misspelt.value)
    monkeypatch.delenv("DEEPREC_ENGINE__APIKEY")
    with pytest.raises(SettingsError, match="checkpoints") as wrong:
        load_settings(checkpoints=[KEY])
    assert KEY not in str(wrong.value)
    monkeypatch.setenv("DEEPREC_ENGINE__MAX_MODEL_LEN", "none")
    with pytest.raises(SettingsError, match=r"max_model_len: .* \(got 'none'\)"):
        load_settings()
