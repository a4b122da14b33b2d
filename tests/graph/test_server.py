"""What stands around LangGraph's server: malformed runs at its door, and where threads are kept."""

import asyncio
import json
import sqlite3
from pathlib import Path
from typing import Any

import httpx
import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import empty_checkpoint
from starlette.requests import Request
from starlette.responses import JSONResponse

from deeprec.errors import SettingsError
from deeprec.graph import app, server
from deeprec.graph.build import build_graph
from deeprec.graph.persistence import open_checkpointer
from deeprec.graph.state import RunSettings
from deeprec.settings import load_settings
from deeprec.tools.filters import Filters
from deeprec.tools.retriever import Retriever

from .conftest import ScriptedEngine
from .test_streaming import SCRIPT


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Stands for LangGraph's server: answers with what it was sent."""
    body = await Request(scope, receive).body()
    await JSONResponse({"got": body.decode()})(scope, receive, send)


@pytest.fixture
def door(retriever: Retriever, monkeypatch: pytest.MonkeyPatch) -> httpx.AsyncClient:
    catalog = retriever.catalog
    monkeypatch.setattr(
        app, "check_filters", lambda raw: catalog.snapshot.allowed((), Filters.parse(raw))
    )
    transport = httpx.ASGITransport(app=server.RefuseMalformed(echo))
    return httpx.AsyncClient(transport=transport, base_url="http://door")


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ({"input": {"history": ["a"], "k": 0}}, "k: "),
        ({"input": {"history": "a"}}, "history: "),
        ({"input": {"limits": {"max_retrievals": 99}}}, "limits.max_retrievals: "),
        ({"input": {"titles": ["a"]}}, "titles: "),
        ({"input": "Toy Story"}, "input: "),
        ({"input": None, "context": {"temperature": 9}}, "temperature: "),
        (
            {"input": None, "context": {"filters": {"colour": "red"}}},
            "Known attributes: year, genres",
        ),
        ({"command": {"resume": None}}, "command.resume: "),
        (
            {"input": {"history": ["a"], "filters": {"colour": "red"}}},
            "Known attributes: year, genres",
        ),
        ({"input": {"history": ["a"], "filters": {"genres": "Horor"}}}, "Known values: Horror"),
    ],
)
@pytest.mark.parametrize("path", ["/runs/wait", "/threads/t/runs/stream", "/runs/batch"])
async def test_malformed_runs_are_refused_with_the_field_named(
    door: httpx.AsyncClient, run: dict[str, Any], says: str, path: str
) -> None:
    reply = await door.post(path, json=[run] if path.endswith("batch") else run)
    assert reply.status_code == 422
    assert says in reply.json()["detail"]


async def test_what_is_too_long_too_deep_or_too_many_is_refused(
    door: httpx.AsyncClient,
) -> None:
    bounds = load_settings().server
    long = {"input": {"history": ["x" * bounds.max_body_bytes]}}
    reply = await door.post("/runs/wait", json=long)
    assert reply.status_code == 413
    assert f"longer than {bounds.max_body_bytes} bytes" in reply.json()["detail"]
    deep = '{"input": {"filters": ' + '{"a": ' * 100_000 + "1" + "}" * 100_002
    reply = await door.post("/runs/wait", content=deep)
    assert reply.status_code == 422
    assert "nested too deeply" in reply.json()["detail"]
    many = [{"input": {"history": ["a"]}}] * (bounds.max_open_runs + 1)
    reply = await door.post("/runs/batch", json=many)
    assert reply.status_code == 422
    assert "257 runs in one batch; at most 256" in reply.json()["detail"]


@pytest.mark.parametrize(
    ("path", "closed"),
    [
        ("/internal/truncate", True),
        ("/internal/debug/thread/t", True),
        ("/%69nternal/truncate", True),
        ("/deploy", True),
        ("/deploy/1/stream", True),
        ("/threads/internal", False),
        ("/deployed", False),
        ("/runs", False),
    ],
)
async def test_the_dev_servers_back_doors_are_closed(path: str, closed: bool) -> None:
    transport = httpx.ASGITransport(app=server.CloseBackDoors(echo))
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
        for method in ("GET", "POST"):
            assert (await client.request(method, path)).status_code == (404 if closed else 200)


def test_the_servers_app_has_both_doors() -> None:
    doors = {middleware.cls for middleware in server.app.user_middleware}
    assert doors >= {server.CloseBackDoors, server.RefuseMalformed}


async def test_no_more_runs_are_waited_for_than_the_settings_allow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DEEPREC_SERVER__MAX_OPEN_RUNS", "1")
    began, end = asyncio.Event(), asyncio.Event()

    async def works(scope: Any, receive: Any, send: Any) -> None:
        began.set()
        await end.wait()
        await echo(scope, receive, send)

    transport = httpx.ASGITransport(app=server.RefuseMalformed(works))
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
        first = asyncio.create_task(client.post("/runs/wait", json={"input": None}))
        await began.wait()
        async with asyncio.timeout(10):  # admitted, it would wait for `end` for ever
            reply = await client.post("/runs/wait", json={"input": None})
        assert reply.status_code == 429
        assert "1 runs are waited for already" in reply.json()["detail"]
        end.set()
        assert (await first).status_code == 200
        assert (await client.post("/runs/wait", json={"input": None})).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/runs/wait", {"input": {"history": ["a"], "filters": {"genres": ["Horror"]}}}),
        ("/threads/t/runs", {"input": None, "context": {"k": 3, "limits": {"max_retrievals": 1}}}),
        ("/threads/t/runs", {"command": {"resume": 1}}),
        ("/threads/t/runs", {"command": {"resume": None, "update": {"pending": None}}}),
        ("/threads/t/runs", {"command": None, "input": None}),
        ("/threads/t/runs/r/cancel", {"input": 1}),
        ("/threads", {"input": {"k": 0}}),
    ],
)
async def test_other_requests_pass_as_they_came(
    door: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    reply = await door.post(path, json=body)
    assert json.loads(reply.json()["got"]) == body
    unread = await door.post("/runs/wait", content=b"{")
    assert unread.json() == {"got": "{"}


async def check_that_threads_outlive_the_process(source: str, retriever: Retriever) -> None:
    """A run that broke off goes on at the node after the last finished one."""
    config: RunnableConfig = {"configurable": {"thread_id": "t"}}
    settings = RunSettings(decoding="free", k=2, retrieve_n=4)

    async def play(script: list[Any], given: Any, **options: Any) -> Any:
        engine = ScriptedEngine(script, 8192)
        async with open_checkpointer(source) as saver:
            graph = build_graph(engine, retriever, settings=settings, checkpointer=saver)
            async with asyncio.timeout(20):
                return await graph.ainvoke(given, config, durability="sync", **options)

    await play(SCRIPT[:1], {"history": ["0"]}, interrupt_after=["call_trm"])
    asked: list[Any] = []
    submit = retriever.submit
    retriever.submit = lambda request: (asked.append(request), submit(request))[1]  # type: ignore[method-assign]
    try:
        ended = await play(SCRIPT[1:], None)
    finally:
        del retriever.submit  # type: ignore[method-assign]
    assert asked == []
    assert [turn["preference"] for turn in ended["turns"]] == ["comedy", None]
    assert len(ended["recommendations"]) == 2


async def test_threads_outlive_the_process_in_sqlite(retriever: Retriever, tmp_path: Path) -> None:
    source = str(tmp_path / "new" / "threads.sqlite")
    await check_that_threads_outlive_the_process(source, retriever)


async def test_what_is_no_place_for_threads_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text("no database, but longer than its header" * 40)
    for source in (str(tmp_path / "text"), str(tmp_path / "text" / "below")):
        with pytest.raises(SettingsError, match="DEEPREC_CHECKPOINTS"):
            async with open_checkpointer(source):
                pass
    monkeypatch.setitem(__import__("sys").modules, "langgraph.checkpoint.postgres.aio", None)
    with pytest.raises(SettingsError, match=r"pip install deeprec-agent\[postgres\]"):
        async with open_checkpointer("postgresql://me:secret@127.0.0.1:1/db"):
            pass


async def test_the_server_keeps_threads_where_the_settings_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPREC_CHECKPOINTS", str(tmp_path / "mine.sqlite"))
    async with server.checkpointer():
        pass
    tables = sqlite3.connect(tmp_path / "mine.sqlite").execute("SELECT name FROM sqlite_master")
    assert "checkpoints" in {name for (name,) in tables}
    monkeypatch.delenv("DEEPREC_CHECKPOINTS")
    settings = load_settings(home=tmp_path)
    assert settings.checkpoints_at == str(tmp_path / "threads.sqlite")
    assert "secret" not in repr(load_settings(checkpoints="postgresql://me:secret@host/db"))


async def test_threads_are_forgotten_without_letting_other_runs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dev server holds a place in its list of threads meanwhile."""
    monkeypatch.setenv("DEEPREC_CHECKPOINTS", str(tmp_path / "mine.sqlite"))

    def saved(thread: str) -> RunnableConfig:
        return {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}

    async with server.checkpointer() as saver:
        for thread in "ab":
            await saver.aput(saved(thread), empty_checkpoint(), {}, {})
        with pytest.raises(StopIteration):
            saver.adelete_thread("a").send(None)  # one step is the whole of it
    async with server.checkpointer() as saver:
        assert await saver.aget_tuple(saved("a")) is None
        assert await saver.aget_tuple(saved("b")) is not None


def test_langgraph_json_names_what_is_there() -> None:
    import importlib

    import deeprec

    named = json.loads((Path(deeprec.__file__).parent / "langgraph.json").read_text())
    graphs = [named["graphs"][name]["path"] for name in ("deeprec", "r2ec")]
    for path in (*graphs, named["http"]["app"]):
        module, _, name = path.partition(":")
        assert hasattr(importlib.import_module(module), name)
    for part in ("checkpointer", "store"):
        module, _, name = named[part]["path"].rpartition(".")
        assert hasattr(importlib.import_module(module), name)
