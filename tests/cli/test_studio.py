"""LangGraph's server with this graph, as `make studio` starts it, seen by a client of its SDK."""

import asyncio
import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from langgraph_sdk import get_client

import deeprec
from deeprec.graph.memory import forget_notes, list_notes
from deeprec.settings import load_settings
from deeprec.tools.interactions import InteractionData
from deeprec.tools.trm.config import DeepRecConfig, FitConfig
from deeprec.tools.workspace import Workspace

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("langgraph_api") is None, reason="needs the extra `server`"
    ),
]

REPOSITORY = Path(deeprec.__file__).parent
GRAPH = "deeprec"
SHORT = {"k": 3, "thought_tokens": 16, "limits": {"max_retrievals": 2, "min_retrievals": 1}}


class Server:
    """One server after another, over the same threads."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder = folder
        self._environment = environment
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.memory = str(folder / "workspaces" / "tiny" / "memory.sqlite")
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        config = str(REPOSITORY / "langgraph.json")
        command = [sys.executable, "-m", "langgraph_cli", "dev", "--config", config]
        command += ["--host", "127.0.0.1", "--port", str(self._port), "--no-browser", "--no-reload"]
        command += ["--n-jobs-per-worker", "32"]
        log = self._folder / "log"
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                command, stdout=sink, stderr=sink, env=self._environment, cwd=self._folder
            )
        deadline = time.monotonic() + 800
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/ok", timeout=2).is_success:
                    return
            except httpx.TransportError:
                time.sleep(1)
        pytest.fail(f"the server did not start: {log.read_text()[-3000:]}")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(60)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(60)


@pytest.fixture(scope="module")
def server(
    tiny_data: InteractionData,
    tiny_encoder_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("studio")
    (home / "assets").symlink_to(load_settings().assets_dir)
    settings = {
        "DEEPREC_HOME": str(home),
        "DEEPREC_WORKSPACE": "tiny",
        "DEEPREC_ENCODER": str(tiny_encoder_folder),
        "DEEPREC_ENGINE__KV_CACHE_GIB": "1",
        "DEEPREC_ENGINE__MAX_MODEL_LEN": "4096",
    }
    place = Workspace(load_settings(home=home, workspace="tiny", encoder=str(tiny_encoder_folder)))
    tiny_data.save(place.dataset_dir)
    place.train_trm(DeepRecConfig(), FitConfig(epochs=1, pool=100))
    place.index().close()
    quiet = {"LANGSMITH_TRACING": "false", "LANGGRAPH_CLI_NO_ANALYTICS": "1"}
    started = Server(home, {**os.environ, **settings, **quiet})
    try:
        started.start()
        yield started
    finally:
        started.stop()


def _client_script() -> Any:
    path = REPOSITORY / "examples" / "studio_client.py"
    spec = importlib.util.spec_from_file_location("studio_client", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["studio_client"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


async def test_a_client_watches_a_run_and_forks_it(server: Server) -> None:
    script = _client_script()
    schemas = await script.show_schemas(get_client(url=server.url))
    assert all(said["description"] for said in schemas["input_schema"]["properties"].values())
    assert schemas["context_schema"]["properties"]["k"]["default"] == 10
    assert "segments" not in schemas["state_schema"]["properties"]
    titles = ["Film 3", "Film 4", "Film 5"]
    seen, forked = await script.main(server.url, titles, "horror; 25", 3)
    assert seen.first_token_s is not None
    assert "This user seems to like" in seen.thoughts
    assert len(seen.preferences) == len(seen.retrieved) == 2
    assert {"call_trm", "list"} <= set(seen.tools)
    for final in (seen.final, forked.final):
        assert len({line["id"] for line in final["recommendations"]} - {"3", "4", "5"}) == 3
    assert forked.final["turns"][0]["preference"] == "horror; 25"
    assert seen.final["turns"][0]["preference"] != "horror; 25"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"history": ["Film 3"], "k": 0}, "k: "),
        ({"history": ["Film 3"], "filters": {"colour": "red"}}, "Known attributes"),
    ],
)
async def test_a_malformed_run_is_refused(server: Server, given: Any, says: str) -> None:
    async with httpx.AsyncClient(base_url=server.url) as client:
        reply = await client.post("/runs/wait", json={"assistant_id": GRAPH, "input": given})
    assert reply.status_code == 422
    assert says in reply.json()["detail"]


async def test_what_a_run_finds_wrong_is_told(server: Server) -> None:
    client = get_client(url=server.url)
    given = {"history": ["A film that nobody made"]}
    ended = await client.runs.wait(None, GRAPH, input=given, raise_error=False)
    assert "A film that nobody made" in ended["__error__"]["message"]


async def test_two_runs_on_one_thread_do_not_mix(server: Server) -> None:
    client = get_client(url=server.url)
    thread = (await client.threads.create())["thread_id"]
    first, second = await asyncio.gather(
        client.runs.wait(thread, GRAPH, input={"history": ["Film 3"]}, context=SHORT),
        client.runs.wait(thread, GRAPH, input={"history": ["Film 20"]}, context=SHORT),
    )
    for ended, own in ((first, "3"), (second, "20")):
        ids = [line["id"] for line in ended["recommendations"]]
        assert len(set(ids)) == 3
        assert own not in ids
    state = await client.threads.get_state(thread)
    assert sum(message["type"] == "human" for message in state["values"]["messages"]) == 1


async def test_a_person_steps_in_and_is_remembered(server: Server) -> None:
    client = get_client(url=server.url)
    thread = (await client.threads.create())["thread_id"]
    context = {**SHORT, "ask_before_search": True, "ask_after_ranking": True}
    user = {"user_id": "u1"}
    asked: Any = await client.runs.wait(thread, GRAPH, input=user, context=context)
    nonsense: Any = {"resume": {"action": "dance"}}
    asked = await client.runs.wait(thread, GRAPH, command=nonsense)
    assert "malformed answer" in asked["__interrupt__"][0]["value"]["complaint"]
    async with httpx.AsyncClient(base_url=server.url) as plain:
        nothing = {"assistant_id": GRAPH, "command": {"resume": None}}
        reply = await plain.post(f"/threads/{thread}/runs/wait", json=nothing)
    assert reply.status_code == 422
    edit, accept = {"action": "edit", "preference": "horror; 25"}, {"action": "accept"}
    rejected = None
    while "__interrupt__" in asked:
        value = asked["__interrupt__"][0]["value"]
        answer: Any = accept
        if "preference" in value and value["searches_so_far"] == 0 and rejected is None:
            answer = edit
        elif "recommendations" in value and rejected is None:
            rejected = value["recommendations"][0]["id"]
            items = [{"item": f"id:{rejected}", "reason": "seen it"}]
            answer = {"action": "reject", "items": items}
        asked = await client.runs.wait(thread, GRAPH, command={"resume": answer})
    assert asked["turns"][0]["preference"] == "horror; 25"
    assert asked["turns"][0]["asked_by"] == "user"
    listed = [line["id"] for line in asked["recommendations"]]
    assert len(set(listed)) == 3
    assert rejected not in listed
    # The command line sees what the running server keeps, on every thread.
    (note,) = await asyncio.to_thread(list_notes, server.memory, "u1")
    assert note.endswith(f"rejected  Film {rejected} [{rejected}]: seen it")
    later: Any = await client.runs.wait(None, GRAPH, input=user, context=SHORT)
    found = [item["id"] for turn in later["turns"] for item in turn["retrieved"]]
    assert found
    assert rejected not in found
    assert await asyncio.to_thread(forget_notes, server.memory, "u1") == 1


async def test_many_runs_at_once(server: Server) -> None:
    client = get_client(url=server.url)
    users = [{"user_id": f"u{n}"} for n in range(32)]
    ended = await asyncio.gather(
        *(client.runs.wait(None, GRAPH, input=user, context=SHORT) for user in users)
    )
    assert [len(run["recommendations"]) for run in ended] == [3] * 32
    assert all(run["failure"] is None for run in ended)


async def test_a_killed_server_goes_on_at_the_last_finished_node(server: Server) -> None:
    client = get_client(url=server.url)
    thread = (await client.threads.create())["thread_id"]
    found: list[Any] = []
    stream = client.runs.stream(
        thread,
        GRAPH,
        input={"history": ["Film 3", "Film 4"]},
        context=SHORT,
        stream_mode="custom",
        durability="sync",
    )
    async for part in stream:
        if part.event == "custom" and "retrieved" in part.data:
            found.append(part.data["retrieved"])
        elif found and "thought" in (part.data or {}):
            server.kill()
            break
    server.start()
    # A run that its last save (every 10 s) knows of goes on by itself; another one is asked to.
    await client.threads.create(thread_id=thread, if_exists="do_nothing")
    runs = await client.runs.list(thread)
    for run in runs:
        await client.runs.join(thread, run["run_id"])
    if not runs:
        await client.runs.wait(thread, GRAPH, input=None, context=SHORT)
    states = await client.threads.get_history(thread, limit=100)
    turns = states[0]["values"]["turns"]
    assert len(states[0]["values"]["recommendations"]) == 3
    assert [item["title"] for item in turns[0]["retrieved"]] == found[0]
    steps = [node for state in states for node in state["next"]]
    assert steps.count("read_request") == 1
    assert steps.count("call_trm") == sum(turn["preference"] is not None for turn in turns)
