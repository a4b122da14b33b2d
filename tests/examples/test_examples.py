"""Each file of examples/, run as a person would, over the real LLM, catalog and servers."""

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deeprec.graph import app
from deeprec.graph.engine.adapter import RUN_SETTINGS
from deeprec.graph.engine.vllm_inprocess import VLLMEngine
from deeprec.settings import load_settings
from deeprec.tools.interactions import InteractionData
from deeprec.tools.trm.config import DeepRecConfig, FitConfig
from deeprec.tools.workspace import Workspace

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"(\d+)\. (Film \d+) \[(\d+)\].*")
HISTORY = ["Film 3", "Film 4", "Film 5"]
SHORT = {
    "retrieve_n": 6,
    "thought_tokens": 8,
    "limits": {"max_retrievals": 2, "min_retrievals": 1, "max_new_tokens": 48},
}

Example = Callable[..., list[tuple[str, ...]]]


@pytest.fixture(scope="session")
def home(
    tiny_data: InteractionData,
    tiny_encoder_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    """A small workspace, as environment variables name it, and settings that make runs short."""
    folder = tmp_path_factory.mktemp("home")
    (folder / RUN_SETTINGS).write_text(json.dumps(SHORT))
    (folder / "assets").symlink_to(load_settings().assets_dir)
    place = Workspace(
        load_settings(home=folder, workspace="tiny", encoder=str(tiny_encoder_folder))
    )
    tiny_data.save(place.dataset_dir)
    place.train_trm(DeepRecConfig(), FitConfig(epochs=1, pool=100))
    place.index().close()
    return {
        "DEEPREC_HOME": str(folder),
        "DEEPREC_WORKSPACE": "tiny",
        "DEEPREC_ENCODER": str(tiny_encoder_folder),
        "DEEPREC_ADAPTER": str(folder),  # whose settings hold; no LLM of its own is loaded here
        "DEEPREC_ENGINE__MAX_MODEL_LEN": "4096",
    }


@pytest.fixture
def example(
    home: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Example]:
    """Run an example for a history, and read number, title and id off what it prints."""
    for name, value in home.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    app._loaded.cache_clear()

    def run(name: str, *options: str) -> list[tuple[str, ...]]:
        path = str(ROOT / "examples" / name)
        monkeypatch.setattr(sys, "argv", [path, *HISTORY, *options])
        runpy.run_path(path, run_name="__main__")
        printed = capsys.readouterr().out
        return [match.groups() for match in map(LINE.fullmatch, printed.splitlines()) if match]

    yield run
    app._loaded.cache_clear()


def assert_valid(lines: list[tuple[str, ...]], k: int) -> None:
    numbers, titles, ids = zip(*lines, strict=True)
    assert numbers == tuple(str(n) for n in range(1, k + 1))
    assert len(set(ids)) == k
    assert not set(titles) & set(HISTORY)
    assert all(title == f"Film {id_}" for title, id_ in zip(titles, ids, strict=True))


@pytest.mark.parametrize("name", ["create_agent.py", "subgraph.py"])
def test_other_agents_use_the_graph(
    example: Example, name: str, real_engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "load_engine", lambda _: real_engine)
    assert_valid(example(name, "-k", "4"), 4)


def test_other_agents_use_the_retriever_alone(
    example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "load_engine", lambda _: pytest.fail("an LLM was loaded"))
    assert_valid(example("retrieve_items.py", "-k", "6", "--preference", "comedy"), 6)


@pytest.mark.parametrize("options", [(), ("--prefill",), ("--decoding", "guided")])
def test_any_chat_model_can_play(
    example: Example, llm_server: str, options: tuple[str, ...]
) -> None:
    """Over an OpenAI-compatible endpoint that knows nothing of DeepRec."""
    assert_valid(example("chat_model.py", "-k", "4", "--url", f"{llm_server}/v1", *options), 4)


@pytest.fixture(scope="session")
def graph_server(
    serve: Callable[..., object],
    llm_server: str,
    home: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """LangGraph's server, as `make studio` starts it."""
    pytest.importorskip("langgraph_api", reason="needs the extra `server`")
    folder = tmp_path_factory.mktemp("studio")
    shutil.copy(ROOT / "langgraph.json", folder)
    with serve(
        *("langgraph_cli", "dev", "--host", "127.0.0.1", "--port", "PORT"),
        *("--no-browser", "--no-reload"),
        alive="/ok",
        cwd=folder,
        **home,
        DEEPREC_ENGINE__KIND="server",
        DEEPREC_ENGINE__URL=llm_server,
        LANGSMITH_TRACING="false",
        LANGGRAPH_CLI_NO_ANALYTICS="1",
    ) as url:
        yield url


@pytest.mark.slow
@pytest.mark.parametrize("name", ["remote_graph.py", "mcp_client.py"])
def test_clients_use_the_server(example: Example, name: str, graph_server: str) -> None:
    assert_valid(example(name, "-k", "4", "--url", graph_server), 4)
