import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from deeprec.errors import SettingsError
from deeprec.settings import Settings, load_settings
from deeprec.tools.interactions import InteractionData
from deeprec.tools.trm.config import DeepRecConfig, FitConfig
from deeprec.tools.workspace import Workspace


def deeprec(
    *args: str, home: Path | None = None, **environment: str
) -> "subprocess.CompletedProcess[str]":
    import os

    extra = {"DEEPREC_HOME": str(home)} if home else {}
    return subprocess.run(
        [sys.executable, "-m", "deeprec.cli", *args],
        capture_output=True,
        text=True,
        env={**os.environ, **extra, **environment},
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("args", [["--help"], ["recommend", "--help"], ["demo", "--help"]])
def test_help_loads_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['deeprec', *%r]\n"
        "from deeprec.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'vllm', 'transformers', 'chromadb', 'langgraph', 'pyarrow'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code % args], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_version() -> None:
    assert deeprec("--version").stdout.strip() == version("deeprec-agent")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, deeprec.graph, deeprec.tools\nassert not {'torch', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["recommend", "--user", "1"], "run `deeprec prepare` first"),
        (["train-trm"], "run `deeprec prepare` first"),
        (["index"], "run `deeprec prepare` first"),
        (["recommend", "--user", "1", "-k", "0"], "k: Input should be greater than or equal to 1"),
        (["recommend", "--user", "1", "--decoding", "wild"], "decoding"),
        (["recommend", "--user", "1", "--filters", "{oops"], "is not JSON"),
        (["recommend", "--user", "1", "--filters", "[1]"], "is not a JSON object"),
        (["prepare", "/no/such/place"], "/no/such/place"),
        (["prepare", "x", "-o", "nonsense"], "NAME=VALUE"),
        (["train-trm", "--architecture", "gru"], "gru"),
        (["eval-trm", "/no/such/run"], "/no/such/run"),
    ],
)
def test_errors_are_told_in_words(args: list[str], says: str, tmp_path: Path) -> None:
    done = deeprec(*args, home=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "workspaces").exists()  # nothing half-written


@pytest.fixture(scope="module")
def ready(
    tiny_data: InteractionData, tiny_encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The environment of a workspace with everything but an LLM."""
    home = tmp_path_factory.mktemp("ready")
    place = Workspace(Settings(home=home, workspace="tiny", encoder=str(tiny_encoder_folder)))
    tiny_data.save(place.dataset_dir)
    place.train_trm(DeepRecConfig(), FitConfig(epochs=1, pool=100))
    place.index()
    return {
        "DEEPREC_HOME": str(home),
        "DEEPREC_WORKSPACE": "tiny",
        "DEEPREC_ENCODER": str(tiny_encoder_folder),
        "DEEPREC_MODEL": "/no/such/model",
    }


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--user", "nobody"], "user 'nobody' is unknown"),
        (["Film 1", "-k", "40"], "k = 40 recommendations are asked for and 39 items"),
        (["Film 1", "-k", "3"], "model folder '/no/such/model' does not exist"),
    ],
)
def test_what_cannot_be_answered_is_told_before_the_llm_loads(
    ready: dict[str, str], args: list[str], says: str
) -> None:
    done = deeprec("recommend", *args, **ready)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_table_is_prepared(tmp_path: Path) -> None:
    rows = [f"u{u},i{(u + n) % 6},{1_000_000 + n}" for u in range(6) for n in range(5)]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    done = deeprec("prepare", str(tmp_path / "log.csv"), "-w", "mine", home=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = tmp_path / "workspaces" / "mine" / "dataset" / "dataset.json"
    assert json.loads(manifest.read_text())["name"] == "mine"


def test_settings_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DEEPREC_HOME", str(tmp_path))
    monkeypatch.setenv("DEEPREC_ENGINE__MAX_MODEL_LEN", "1024")
    settings = load_settings(workspace="mine")
    assert settings.workspace_dir == tmp_path / "workspaces" / "mine"
    assert settings.engine.max_model_len == 1024


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("DEEPREC_ENGINE__MAX_MODEL_LEN", "many", "engine.max_model_len"),
        ("DEEPREC_ENGINE__KIND", "magic", "engine.kind"),
        ("DEEPREC_WORKSPACE", "../elsewhere", "workspace"),
        ("DEEPREC_ENGINE__COLOUR", "red", "engine.colour"),
    ],
)
def test_bad_settings_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=says):
        load_settings()
