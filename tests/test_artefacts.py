"""What is loaded runs nothing: safetensors, JSON and Parquet, and no pickle on any load path."""

import ast
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from pydantic import BaseModel

import deeprec
from deeprec.configuration import load_config
from deeprec.errors import (
    CatalogError,
    EncoderError,
    EngineError,
    SettingsError,
    TrajectoryError,
    TRMError,
)
from deeprec.graph.engine.adapter import ADAPTER_CONFIG, merged_model
from deeprec.graph.engine.transformers_engine import TransformersEngine
from deeprec.graph.engine.vllm_inprocess import VLLMEngine
from deeprec.graph.engine.vllm_server import serve
from deeprec.graph.persistence import serializer
from deeprec.settings import EngineSettings
from deeprec.tools.catalog import Catalog, CatalogSettings, Fingerprint
from deeprec.tools.interactions import InteractionData, Item
from deeprec.tools.text_encoder import TextEncoder
from deeprec.tools.trm.config import DeepRecConfig
from deeprec.tools.trm.model import TRM
from deeprec.training.configuration import LoRA
from deeprec.training.policy import load_policy
from deeprec.training.trajectory_file import read_trajectories

ROOT = Path(deeprec.__file__).parent
PICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE = {"load", "read_pickle", "unsafe_load", "unsafe_load_all", "full_load"}
READERS = {"torch", "np", "numpy", "pd", "pandas", "yaml"}
SAFE = {"use_safetensors", "gguf_file"}
FLAGS = {"allow_pickle": True, "trust_remote_code": True, "weights_only": False}


def sources() -> Iterator[Path]:
    """Every file of the package, without its tests and environments."""
    for path in sorted(ROOT.rglob("*.py")):
        if not {"tests", ".venv", ".venv-recbole", "build"} & set(path.relative_to(ROOT).parts):
            yield path


def unsafe(tree: ast.AST) -> Iterator[str]:
    """What of a module could run what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                alias.name for alias in node.names if alias.name.partition(".")[0] in PICKLERS
            )
        elif isinstance(node, ast.ImportFrom):
            name = (node.module or "").partition(".")[0]
            if not node.level and name in PICKLERS:
                yield name
        elif isinstance(node, ast.Call):
            yield from _unsafe_call(node)


def _unsafe_call(call: ast.Call) -> Iterator[str]:
    function = call.func
    if isinstance(function, ast.Name) and function.id in {"eval", "exec", "compile", "__import__"}:
        yield function.id
    if isinstance(function, ast.Attribute):
        owner = function.value
        if isinstance(owner, ast.Name) and owner.id in READERS and function.attr in UNSAFE:
            yield f"{owner.id}.{function.attr}"
        given = {keyword.arg for keyword in call.keywords}
        model = isinstance(owner, ast.Name) and owner.id.startswith("AutoModel")
        if model and function.attr == "from_pretrained" and not given & SAFE:
            yield f"{ast.unparse(owner)}.from_pretrained without use_safetensors"
    for keyword in call.keywords:
        value = getattr(keyword.value, "value", None)
        if keyword.arg in FLAGS and value is FLAGS[keyword.arg]:
            yield f"{keyword.arg}={value}"


def test_nothing_in_the_package_unpickles_or_runs_what_it_reads() -> None:
    files = list(sources())
    assert len(files) > 100
    found = {
        f"{path.relative_to(ROOT)}: {what}"
        for path in files
        for what in unsafe(ast.parse(path.read_text("utf-8")))
    }
    assert found == set()


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "torch.load('x', weights_only=True)",
        "np.load('x.npy', allow_pickle=True)",
        "yaml.load(text)",
        "read('x', weights_only=False)",
        "Model(name, trust_remote_code=True)",
        "AutoModelForCausalLM.from_pretrained(name)",
        "eval(text)",
    ],
)
def test_what_would_be_found(code: str) -> None:
    assert list(unsafe(ast.parse(code)))


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """Where a bomb leaves its mark; after the test it must not be there."""
    mark = tmp_path / "it-went-off"
    yield mark
    assert not mark.exists()


Plant = Callable[[Path], None]


@pytest.fixture(params=["pickle", "torch"])
def plant(mark: Path, request: pytest.FixtureRequest) -> Plant:
    """Write a bomb into a file, as pickle does it or as torch does."""

    def write(path: Path) -> None:
        if request.param == "torch":
            torch.save({"weight": Bomb(mark)}, path)
        else:
            path.write_bytes(pickle.dumps(Bomb(mark)))

    return write


def test_a_bomb_would_go_off(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()
    torch.save(Bomb(tmp_path / "other"), tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "other").exists()


@pytest.fixture
def pickled_llm(tiny_llm: str, tmp_path: Path, plant: Plant) -> Path:
    """An LLM with a pickle in the place of its safetensors."""
    folder = shutil.copytree(tiny_llm, tmp_path / "llm")
    (folder / "model.safetensors").unlink()
    plant(folder / "pytorch_model.bin")
    return folder


LOADS: dict[str, Callable[[Path], object]] = {
    "vllm": lambda folder: VLLMEngine(str(folder), max_model_len=512, kv_cache_gib=1),
    "server": lambda folder: serve(str(folder), EngineSettings(), host="127.0.0.1", port=1),
    "transformers": lambda folder: TransformersEngine(str(folder), max_model_len=512),
    "training": lambda folder: load_policy(str(folder), None, None),
    "start": lambda folder: load_policy("nothing", folder, None),
}


@pytest.mark.parametrize("load", LOADS)
def test_an_llm_in_a_pickle_is_refused(pickled_llm: Path, load: str) -> None:
    with pytest.raises((EngineError, SettingsError), match="safetensors"):
        LOADS[load](pickled_llm)


def test_an_adapter_in_a_pickle_is_refused(tiny_llm: str, tmp_path: Path, plant: Plant) -> None:
    folder = tmp_path / "adapter"
    load_policy(tiny_llm, None, LoRA(r=2)).save_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()
    plant(folder / "adapter_model.bin")
    assert (folder / ADAPTER_CONFIG).is_file()
    with pytest.raises(EngineError, match=r"lacks adapter_model\.safetensors"):
        merged_model(tiny_llm, folder, tmp_path / "cache")
    with pytest.raises(SettingsError, match=r"lacks adapter_model\.safetensors"):
        load_policy(tiny_llm, folder, LoRA(r=2))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_trm_in_a_pickle_is_refused(tmp_path: Path, plant: Plant, name: str) -> None:
    folder = tmp_path / "trm"
    TRM(DeepRecConfig(text_dim=8), [str(n) for n in range(5)]).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    plant(folder / name)
    with pytest.raises(TRMError, match=r"damaged|lacks model\.safetensors"):
        TRM.from_pretrained(folder)


def test_an_encoder_in_a_pickle_is_refused(
    tiny_encoder_folder: Path, tmp_path: Path, plant: Plant
) -> None:
    folder = shutil.copytree(tiny_encoder_folder, tmp_path / "encoder")
    (folder / "model.safetensors").unlink()
    plant(folder / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="safetensors"):
        TextEncoder(str(folder))


def test_an_encoder_with_code_of_its_own_is_refused(
    tiny_encoder_folder: Path, tmp_path: Path, mark: Path
) -> None:
    folder = shutil.copytree(tiny_encoder_folder, tmp_path / "encoder")
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "own.Own"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(EncoderError, match="own"):
        TextEncoder(str(folder))


def test_an_llm_with_code_of_its_own_is_refused(tiny_llm: str, tmp_path: Path, mark: Path) -> None:
    folder = shutil.copytree(tiny_llm, tmp_path / "llm")
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    about = json.loads((folder / "config.json").read_text())
    about |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(EngineError, match="configuration of model"):
        VLLMEngine(str(folder), max_model_len=512, kv_cache_gib=1, dtype="float32")


def test_a_data_set_and_a_trajectory_file_in_a_pickle_are_refused(
    tiny_data: InteractionData, tmp_path: Path, plant: Plant
) -> None:
    plant(tmp_path / "runs.parquet")
    with pytest.raises(TrajectoryError, match="no Parquet file"):
        read_trajectories(tmp_path / "runs.parquet")
    tiny_data.save(tmp_path / "data")
    for path in (tmp_path / "data").iterdir():
        plant(path)
    with pytest.raises(deeprec.errors.DataError):
        InteractionData.load(tmp_path / "data")


def test_a_bomb_in_chromas_own_pickle_does_not_go_off(tmp_path: Path, plant: Plant) -> None:
    """Chroma keeps the list of an index's ids as a pickle. What reads it is no Python."""
    n = 1200  # from 1,000 on Chroma writes an index
    rows = np.random.default_rng(0).normal(size=(n, 8)).astype(np.float32)
    settings = CatalogSettings(folder=tmp_path / "catalog")
    items = [Item(str(at), f"Film {at}") for at in range(n)]
    Catalog.build(settings, items, rows, rows, fingerprint=Fingerprint("a", "b", "c")).close()
    planted = list((tmp_path / "catalog").glob("*/index_metadata.pickle"))
    assert planted
    for path in planted:
        plant(path)
    with pytest.raises(CatalogError, match="deeprec index"):
        Catalog.open(settings)


def test_a_configuration_makes_no_objects(tmp_path: Path, mark: Path) -> None:
    text = f"output: !!python/object/apply:os.mknod [{mark}]\n"
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(yaml.constructor.ConstructorError):
        yaml.safe_load(text)
    with pytest.raises(SettingsError, match="can't read the configuration"):
        load_config(tmp_path / "config.yaml", BaseModel)


def test_a_thread_makes_no_objects(mark: Path) -> None:
    """A checkpoint in a database names the classes that it is made of."""
    item = Item("a", "b")
    kept = JsonPlusSerializer(allowed_msgpack_modules=True).dumps_typed({"x": item})
    assert JsonPlusSerializer(allowed_msgpack_modules=True).loads_typed(kept)["x"] == item
    assert serializer().loads_typed(kept)["x"] == asdict(item)
    with pytest.raises(NotImplementedError, match="pickle"):
        serializer().loads_typed(("pickle", pickle.dumps(Bomb(mark))))
