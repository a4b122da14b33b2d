"""examples/auth.py on LangGraph's server: what one user tries to get at of another's.

The LLM is tiny and random, which the server does not know: runs are short, their lists the TRM's.
"""

import importlib.util
import json
import shutil
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from langgraph_sdk import get_client

import deeprec
from deeprec.graph.memory import namespace
from deeprec.settings import load_settings
from deeprec.tools.interactions import InteractionData
from deeprec.tools.trm.config import DeepRecConfig, FitConfig
from deeprec.tools.workspace import Workspace

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),  # that of the fixtures
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("langgraph_api") is None, reason="needs the extra `server`"
    ),
]

REPOSITORY = Path(deeprec.__file__).parent
GRAPH = "deeprec"
SECRET = "clowns"  # what ada told, and nobody else may read
CONTEXT = {"decoding": "free", "k": 2, "limits": {"max_retrievals": 1, "max_new_tokens": 16}}
ADA, BOB, SHOP = "u1", "u2", "shop"


@dataclass
class Served:
    """A running server with its log, the folder of its files, and the keys of its users."""

    url: str
    log: Path
    folder: Path
    keys: dict[str, str]

    def client(self, user: str | None) -> httpx.AsyncClient:
        headers = {} if user is None else {"authorization": f"Bearer {self.keys[user]}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=120)

    def sdk(self, user: str) -> Any:
        return get_client(url=self.url, headers={"authorization": f"Bearer {self.keys[user]}"})


@pytest.fixture(scope="module")
def environment(
    tiny_data: InteractionData,
    tiny_encoder_folder: Path,
    tiny_llm: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    home = tmp_path_factory.mktemp("auth-home")
    place = Workspace(load_settings(home=home, workspace="tiny", encoder=str(tiny_encoder_folder)))
    tiny_data.save(place.dataset_dir)
    place.train_trm(DeepRecConfig(), FitConfig(epochs=1, pool=100))
    place.index().close()
    return {
        "DEEPREC_HOME": str(home),
        "DEEPREC_WORKSPACE": "tiny",
        "DEEPREC_ENCODER": str(tiny_encoder_folder),
        "DEEPREC_MODEL": tiny_llm,
        "DEEPREC_ENGINE__KIND": "transformers",
        "DEEPREC_ENGINE__MAX_MODEL_LEN": "2048",
        "DEEPREC_ENGINE__KV_CACHE_GIB": "1",
        "DEEPREC_ENGINE__MAX_NUM_SEQS": "4",
        "LANGSMITH_TRACING": "false",
        "LANGGRAPH_CLI_NO_ANALYTICS": "1",
    }


COMMAND = ("langgraph_cli", "dev", "--port", "PORT", "--no-browser", "--no-reload", "--config")


@pytest.fixture(scope="module")
def served(
    serve: Callable[..., Any],
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("auth")
    for name in ("auth.py", "langgraph.auth.json"):
        shutil.copy(REPOSITORY / "examples" / name, folder)
    spec = importlib.util.spec_from_file_location("example_auth_keys", folder / "auth.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    path = folder / "keys.json"
    keys = {name: example.add_key(path, name, []) for name in (ADA, BOB)}
    keys[SHOP] = example.add_key(path, SHOP, [example.ANY_USER])
    log = tmp_path_factory.mktemp("auth-log") / "log"
    with serve(
        *(*COMMAND, "langgraph.auth.json"),
        alive="/ok",
        cwd=folder,
        log=log,
        AUTH_KEYS=str(path),
        **environment,
    ) as url:
        yield Served(url, log, folder, keys)


@dataclass
class Thread:
    id: str
    run: str
    checkpoint: str


@pytest.fixture(scope="module")
async def ada(served: Served) -> Thread:
    """A thread of ada's with a finished run, in which she told something about herself."""
    client = served.sdk(ADA)
    thread = (await client.threads.create())["thread_id"]
    given = {"user_id": ADA, "wishes": [f"I hate {SECRET}"]}
    ended = await client.runs.wait(thread, GRAPH, input=given, context=CONTEXT)
    assert len(ended["recommendations"]) == 2
    (run,) = await client.runs.list(thread)
    state = await client.threads.get_state(thread)
    assert SECRET in json.dumps(state)
    return Thread(thread, run["run_id"], state["checkpoint"]["checkpoint_id"])


@pytest.fixture
async def bob(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with served.client(BOB) as client:
        yield client


async def told(client: httpx.AsyncClient, method: str, path: str, sent: Any) -> tuple[int, str]:
    """Status and text of a reply, also of one that breaks off."""
    pieces: list[str] = []
    try:
        async with client.stream(method, path, json=sent) as reply:
            async for piece in reply.aiter_text():
                pieces.append(piece)
            return reply.status_code, "".join(pieces)
    except (httpx.ReadError, httpx.RemoteProtocolError):
        return 500, "".join(pieces)


def documented() -> list[tuple[str, str]]:
    """Each method and path that LangGraph's server says it has."""
    package = importlib.util.find_spec("langgraph_api")
    if package is None or package.origin is None:
        return []
    spec = json.loads((Path(package.origin).parents[1] / "openapi.json").read_text())
    routes = [
        (method.upper(), path) for path, methods in spec["paths"].items() for method in methods
    ]
    return [(method, path) for method, path in routes if path != "/ok"]


def filled(path: str, thread: Thread) -> str:
    ids = {"thread_id": thread.id, "run_id": thread.run, "checkpoint_id": thread.checkpoint}
    for name in ("assistant_id", "cron_id", "namespace"):
        ids[name] = str(uuid.uuid4())
    return path.format(**ids)


def body_for(path: str, thread: Thread) -> Any:
    """A request that every route can read."""
    if path == "/runs/batch":
        return [{"assistant_id": GRAPH, "input": {"history": ["Film 3"]}}]
    return {
        "assistant_id": GRAPH,
        "input": {"history": ["Film 3"]},
        "context": CONTEXT,
        "checkpoint": {"checkpoint_id": thread.checkpoint, "checkpoint_ns": ""},
        "thread_ids": [thread.id],
        "thread_id": thread.id,
        "run_ids": [thread.run],
        "channels": ["values"],
        "values": {"pending": None},
        "metadata": {},
        "schedule": "* * * * *",
    }


async def test_without_a_key_nothing_is_told(served: Served, ada: Thread) -> None:
    tried = 0
    for headers in ({}, {"x-auth-scheme": "langsmith"}, {"authorization": "Bearer guess"}):
        async with httpx.AsyncClient(base_url=served.url, headers=headers) as client:
            for method, path in documented():
                sent = body_for(path, ada) if method in {"POST", "PATCH", "PUT", "DELETE"} else None
                reply = await client.request(method, filled(path, ada), json=sent)
                assert reply.status_code in {401, 404, 405}, (method, path, reply.text)
                assert SECRET not in reply.text
                tried += 1
            wrong = {"assistant_id": GRAPH, "input": {"history": ["a"], "filters": {"x": 1}}}
            reply = await client.post("/runs/wait", json=wrong)  # not even what is wrong with it
            assert reply.status_code == 401
    assert tried > 150


async def test_another_key_opens_no_thread(
    served: Served, ada: Thread, bob: httpx.AsyncClient
) -> None:
    """Each route on a thread, with bob's key and the ids of ada's."""
    before = await served.sdk(ADA).threads.get_state(ada.id)
    for method, path in documented():
        if "{thread_id}" not in path and path not in {"/threads/prune", "/runs/cancel"}:
            continue
        sent = body_for(path, ada) if method in {"POST", "PATCH", "PUT"} else None
        status, text = await told(bob, method, filled(path, ada), sent)
        assert SECRET not in text
        refused = status >= 400 or text.strip() in {"", "[]", "null"}
        assert refused or "error" in text, (method, path, status, text)
    assert await served.sdk(ADA).threads.get_state(ada.id) == before
    assert len(await served.sdk(ADA).runs.list(ada.id)) == 1


async def test_searching_finds_ones_own(ada: Thread, bob: httpx.AsyncClient) -> None:
    for sent in (
        {},
        {"metadata": {"owner": ADA}},
        {"ids": [ada.id]},
        {"values": {"user": ADA}},
        {"metadata": {"graph_id": GRAPH}},
    ):
        found = (await bob.post("/threads/search", json=sent)).json()
        assert ada.id not in json.dumps(found)
        assert (await bob.post("/threads/count", json=sent)).json() == len(found)


async def test_a_thread_stays_its_owners(
    served: Served, ada: Thread, bob: httpx.AsyncClient
) -> None:
    claimed = await bob.post("/threads", json={"metadata": {"owner": ADA}})
    mine = claimed.json()["thread_id"]
    assert claimed.json()["metadata"]["owner"] == BOB
    given = await bob.patch(f"/threads/{mine}", json={"metadata": {"owner": ADA}})
    assert given.json()["metadata"]["owner"] == BOB
    found = await served.sdk(ADA).threads.search()
    assert mine not in {thread["thread_id"] for thread in found}
    for how in ("raise", "do_nothing"):
        taken = await bob.post("/threads", json={"thread_id": ada.id, "if_exists": how})
        assert taken.status_code == 409
    run = {"assistant_id": GRAPH, "input": {"history": ["Film 3"]}, "if_not_exists": "create"}
    assert (await bob.post(f"/threads/{ada.id}/runs", json=run)).status_code == 404


async def test_a_checkpoint_of_another_thread_is_not_read(
    served: Served, ada: Thread, bob: httpx.AsyncClient
) -> None:
    before = await served.sdk(ADA).threads.get_history(ada.id)
    mine = (await bob.post("/threads", json={})).json()["thread_id"]
    own = {"assistant_id": GRAPH, "input": {"history": ["Film 3"]}, "context": CONTEXT}
    assert (await bob.post(f"/threads/{mine}/runs/wait", json=own)).status_code == 200
    point = {"thread_id": ada.id, "checkpoint_id": ada.checkpoint, "checkpoint_ns": ""}
    run = {"assistant_id": GRAPH, "input": None}
    for path, sent in (
        ("state/checkpoint", {"checkpoint": point}),
        ("history", {"checkpoint": point}),
        ("history", {"before": {"configurable": point}}),
        ("state", {"values": {"pending": None}, "checkpoint": point, "as_node": "rank"}),
        ("runs/wait", {**run, "checkpoint": point}),
        ("runs/wait", {**run, "checkpoint_id": ada.checkpoint}),
        ("runs/wait", {**run, "config": {"configurable": point}}),
    ):
        _, text = await told(bob, "POST", f"/threads/{mine}/{path}", sent)
        assert SECRET not in text, path
    reply = await bob.get(f"/threads/{mine}/state/{ada.checkpoint}")
    assert SECRET not in reply.text
    assert await served.sdk(ADA).threads.get_history(ada.id) == before


async def test_nobody_plays_another_user(bob: httpx.AsyncClient, ada: Thread) -> None:
    """Ada's history and what she told would be in the prompt, and in the messages."""
    mine = (await bob.post("/threads", json={})).json()["thread_id"]
    signed = {"langgraph_auth_user": {"identity": ADA}, "langgraph_auth_user_id": ADA}
    named = {"assistant_id": GRAPH, "input": {"user_id": ADA}}
    own = {"assistant_id": GRAPH, "input": {"user_id": BOB}, "context": CONTEXT}
    assert (await bob.post(f"/threads/{mine}/runs/wait", json=own)).status_code == 200
    for run in (
        {**named, "context": CONTEXT},
        {**named, "config": {"configurable": signed}},
        {**named, "metadata": {"owner": ADA}},
        {"assistant_id": GRAPH, "command": {"update": {"user_id": ADA}, "goto": "read_request"}},
    ):
        reply = await bob.post(f"/threads/{mine}/runs/wait", json=run)
        assert f"that of user '{BOB}'" in reply.text, (run, reply.status_code, reply.text)
        assert SECRET not in reply.text
    edit = {"values": {"user_id": ADA}, "as_node": "__start__"}
    assert (await bob.post(f"/threads/{mine}/state", json=edit)).status_code == 200
    reply = await bob.post(f"/threads/{mine}/runs/wait", json={**own, "input": None})
    assert f"that of user '{BOB}'" in reply.text
    states = (await bob.get(f"/threads/{mine}/history")).text
    assert SECRET not in states


async def test_an_application_asks_for_its_users(served: Served, ada: Thread) -> None:
    given = {"user_id": ADA}
    ended = await served.sdk(SHOP).runs.wait(None, GRAPH, input=given, context=CONTEXT)
    assert len(ended["recommendations"]) == 2
    async with served.client(SHOP) as client:
        assert (await client.get(f"/threads/{ada.id}/state")).status_code == 404


async def test_memory_is_read_and_written_by_its_user_alone(
    served: Served, ada: Thread, bob: httpx.AsyncClient
) -> None:
    own = await served.sdk(ADA).store.search_items(namespace(ADA))
    (note,) = own["items"]
    assert note["value"]["about"] == SECRET
    where = list(namespace(ADA))
    at = {"namespace": ".".join(where), "key": note["key"]}
    spy = {"kind": "like", "about": "spam"}
    replies = [
        await bob.get("/store/items", params=at),
        await bob.request("DELETE", "/store/items", json={"namespace": where, "key": note["key"]}),
        await bob.put("/store/items", json={"namespace": where, "key": "x", "value": spy}),
        *[
            await bob.post("/store/items/search", json={"namespace_prefix": prefix})
            for prefix in (where, where[:2], [], [*where[:2], "*"])
        ],
        *[
            await bob.post("/store/namespaces", json=sent)
            for sent in ({}, {"prefix": where}, {"suffix": where[-1:]}, {"prefix": where[:2]})
        ],
    ]
    assert {reply.status_code for reply in replies} == {403}
    assert await served.sdk(ADA).store.search_items(namespace(ADA)) == own


async def test_what_is_not_needed_is_closed(served: Served, ada: Thread) -> None:
    """The dev server's back doors, for anybody; and what would run without knowing who asks."""
    async with served.client(ADA) as client:
        for method, path in (
            ("GET", f"/internal/debug/thread/{ada.id}"),
            ("POST", "/internal/truncate"),
            ("GET", "/deploy"),
            ("POST", "/deploy"),
            ("POST", "/mcp/"),
            ("POST", f"/a2a/{uuid.uuid4()}"),
            ("GET", "/docs"),
        ):
            reply = await client.request(method, path, json={})
            assert reply.status_code == 404, path
        cron = {"assistant_id": GRAPH, "schedule": "* * * * *"}
        for path, sent in (("/assistants", {"graph_id": GRAPH}), ("/runs/crons", cron)):
            reply = await client.post(path, json=sent)
            assert reply.status_code == 403, (path, reply.text)
        hook = {
            "assistant_id": GRAPH,
            "input": {"history": ["Film 3"]},
            "webhook": "https://93.184.215.14/x",
        }
        assert (await client.post("/runs/wait", json=hook)).status_code == 403
        evil = {"origin": "https://evil.example", "access-control-request-method": "POST"}
        assert (
            "access-control-allow-origin"
            not in (await client.options("/threads", headers=evil)).headers
        )
    assert (await served.sdk(ADA).threads.get(ada.id))["thread_id"] == ada.id


async def test_logs_and_files_hold_no_secret_and_no_history(served: Served, ada: Thread) -> None:
    """Also of what fails: titles that nobody made, names of others."""
    typed = "A film that only ada knows"
    client = served.sdk(ADA)
    given = {"history": [typed]}
    ended = await client.runs.wait(None, GRAPH, input=given, context=CONTEXT, raise_error=False)
    assert typed in ended["__error__"]["message"]
    given = {"history": ["Film 3", "Film 4"]}
    await client.runs.wait(None, GRAPH, input=given, context=CONTEXT)
    await client.store.get_item(namespace(ADA), key=f"words:{SECRET}")
    async with served.client(None) as stranger:
        await stranger.get("/threads", headers={"authorization": "Bearer another-secret"})
    log = served.log.read_text()
    assert "Starting background run" in log
    assert "Run encountered an error in graph" in log
    for secret in (*served.keys.values(), "another-secret", typed, SECRET, "Film 3", "Film 4"):
        assert secret not in log, [line for line in log.splitlines() if secret in line][:3]
    kept = [path for path in served.folder.rglob("*") if path.is_file()]
    kept += [path for path in served.log.parent.rglob("*") if path.is_file()]
    home = Path(served.folder).parent
    kept += [path for path in home.glob("auth-home*/threads.sqlite*") if path.is_file()]
    assert any(path.name == "threads.sqlite" for path in kept)
    for path in kept:
        content = path.read_bytes()
        for key in served.keys.values():
            assert key.encode() not in content, path


async def test_the_server_listens_to_this_machine_alone(
    serve: Callable[..., Any], environment: dict[str, str], tmp_path: Path
) -> None:
    """As langgraph.json has it, without keys; other pages in the browser are not answered."""
    shutil.copy(REPOSITORY / "langgraph.json", tmp_path)
    with serve(*COMMAND, "langgraph.json", alive="/ok", cwd=tmp_path, **environment) as url:
        port = int(url.rpartition(":")[2])
        (server,) = [
            child
            for child in psutil.Process().children()
            if str(port) in child.cmdline() and sys.executable in child.cmdline()[0]
        ]
        open_at = [at.laddr for at in server.net_connections("inet") if at.status == "LISTEN"]
        assert {at.ip for at in open_at} == {"127.0.0.1"}
        async with httpx.AsyncClient(base_url=url) as client:
            for origin, allowed in (
                ("https://smith.langchain.com", True),
                ("https://evil.example", False),
                ("null", False),
            ):
                asked = {"origin": origin, "access-control-request-method": "POST"}
                reply = await client.options("/threads", headers=asked)
                assert (reply.headers.get("access-control-allow-origin") == origin) is allowed
            for method, path in (("POST", "/internal/truncate"), ("POST", "/deploy")):
                assert (await client.request(method, path)).status_code == 404
