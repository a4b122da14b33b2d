"""Adapters: merged into the model that they were trained on, and into no other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from deeprec.errors import EngineError
from deeprec.graph.engine import weight_sync
from deeprec.graph.engine.adapter import BASE, keep_base, merged_model, weights_digest
from deeprec.graph.engine.tokenizer import load_tokenizer
from deeprec.graph.engine.weight_sync import handed_over
from deeprec.training.configuration import LoRA
from deeprec.training.policy import load_policy

from ..conftest import Disk


@pytest.fixture
def adapter(tiny_llm: str, tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "final"
    load_policy(tiny_llm, None, LoRA(r=2)).save_pretrained(folder)
    keep_base(tiny_llm, folder)
    return folder


def other_llm(tiny_llm: str, to: Path, **changes: int) -> str:
    """A model like the small one but for some sizes, or for its weights alone."""
    config = AutoConfig.from_pretrained(tiny_llm)
    config.update(changes)
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(to)
    load_tokenizer(tiny_llm).save_pretrained(to)
    return str(to)


def test_an_adapter_of_other_shapes_is_refused(
    adapter: Path, tiny_llm: str, tmp_path: Path
) -> None:
    deeper = other_llm(tiny_llm, tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(EngineError, match=r"another model.*num_hidden_layers 2, here 3"):
        merged_model(deeper, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_other_tokens_is_refused(
    adapter: Path, tiny_llm: str, tmp_path: Path
) -> None:
    """Shapes fit, so that nothing else would notice."""
    other = tmp_path / "other"
    shutil.copytree(tiny_llm, other)
    about = json.loads((other / "tokenizer.json").read_text("utf-8"))
    vocabulary = about["model"]["vocab"]
    first, second = list(vocabulary)[500:502]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(about), "utf-8")
    with pytest.raises(EngineError, match=r"another model.*: tokens [0-9a-f]{64}, here"):
        merged_model(str(other), adapter, tmp_path / "merged")


def test_an_adapter_that_says_nothing_is_left_to_peft(
    adapter: Path, tiny_llm: str, tmp_path: Path
) -> None:
    (adapter / BASE).unlink()
    assert merged_model(tiny_llm, adapter, tmp_path / "merged")
    wider = other_llm(tiny_llm, tmp_path / "wider", intermediate_size=64)
    with pytest.raises(EngineError, match="is no adapter of"):
        merged_model(wider, adapter, tmp_path / "merged")
    (adapter / BASE).write_text("{")
    with pytest.raises(EngineError, match="can't read"):
        merged_model(tiny_llm, adapter, tmp_path / "anew")


def test_new_weights_under_an_old_name_are_merged_anew(
    adapter: Path, tiny_llm: str, tmp_path: Path
) -> None:
    base = str(shutil.copytree(tiny_llm, tmp_path / "base"))
    first = merged_model(base, adapter, tmp_path / "merged")
    before = weights_digest(base)
    other_llm(tiny_llm, tmp_path / "base")
    assert weights_digest(base) != before
    assert merged_model(base, adapter, tmp_path / "merged") != first


def test_a_full_disk_leaves_no_half_of_a_merged_model(
    adapter: Path, tiny_llm: str, small_disk: Callable[[int], Disk]
) -> None:
    disk = small_disk(60)
    for left in (1_000_000, 26_000_000):  # in the midst of the weights; of the tokenizer
        disk.fill(leave=left)
        with pytest.raises(EngineError, match=r"can't write the merged model.*Free disk space"):
            merged_model(tiny_llm, adapter, disk.folder / "merged")
        assert list((disk.folder / "merged").iterdir()) == []
        disk.free()
    assert merged_model(tiny_llm, adapter, disk.folder / "merged")


WEIGHTS = {"a": torch.ones(1_000_000)}  # 4 MB


def test_weights_go_round_a_shared_memory_that_is_too_small(
    small_disk: Callable[[int], Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers often have 64 MiB of it."""
    disk = small_disk(8)
    monkeypatch.setattr(weight_sync, "_SHARED_MEMORY", disk.folder)
    with handed_over(WEIGHTS) as folder:
        assert Path(folder).parent == disk.folder
    disk.fill(leave=3_000_000)
    with handed_over(WEIGHTS) as folder:
        assert Path(folder).parent != disk.folder
        assert (Path(folder) / "model.safetensors").stat().st_size > 4_000_000
    assert {path.name for path in disk.folder.iterdir()} == {".filler"}


def test_weights_that_find_no_room_are_told(
    small_disk: Callable[[int], Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk(2)
    monkeypatch.setattr(weight_sync, "_SHARED_MEMORY", disk.folder)
    monkeypatch.setattr("tempfile.tempdir", str(disk.folder))
    with (
        pytest.raises(EngineError, match=r"no room in .* for 4 MiB of weights"),
        handed_over(WEIGHTS),
    ):
        pass
    assert list(disk.folder.iterdir()) == []
