"""Checkpoints of a real trainer: on a full disk, and with pickles where numbers belong."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import SFTConfig

from deeprec.configuration import keep_origin
from deeprec.errors import SettingsError
from deeprec.graph.engine.tokenizer import load_tokenizer
from deeprec.settings import load_settings
from deeprec.training.card import leave_results
from deeprec.training.checkpoints import Sealer, newest_whole, seal
from deeprec.training.trainer import WarmStart

from ..conftest import Disk
from ..test_artefacts import Bomb

STEPS = 3


class At(TrainerCallback):
    """Does something once a step is done, before its checkpoint is written."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self._step, self._act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            self._act()


Make = Callable[..., WarmStart]


@pytest.fixture(scope="module")
def make() -> Make:
    """A trainer of a model of a few weights that saves every step into a folder."""
    tokenizer = load_tokenizer(load_settings().model_name)
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 64

    def trainer(folder: Path, *callbacks: TrainerCallback) -> WarmStart:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=2000,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        return WarmStart(
            model=LlamaForCausalLM(config),
            args=SFTConfig(
                str(folder),
                max_steps=STEPS,
                save_steps=1,
                report_to="none",
                use_cpu=True,
                bf16=False,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[*callbacks, Sealer()],
        )

    return trainer


@pytest.fixture(scope="module")
def whole(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run leaves."""
    folder = tmp_path_factory.mktemp("whole")
    make(folder).train()
    return folder


# What is left when the disk is full decides which writer meets it: the weights' (safetensors), the
# tokenizer's, torch's (the optimizer).
@pytest.mark.parametrize("left", [8_000, 1_000_000, 4_500_000], ids=["weights", "json", "pickle"])
def test_a_full_disk_ends_training_in_words_and_it_goes_on(
    make: Make, whole: Path, small_disk: Callable[[int], Disk], left: int
) -> None:
    disk = small_disk(30)
    folder = disk.folder / "run"
    trainer = make(folder, At(2, lambda: disk.fill(leave=left)))
    with pytest.raises(SettingsError, match="Free disk space and start the same run again"):
        trainer.train()
    assert (folder / "checkpoint-2").is_dir()
    assert newest_whole(folder) == folder / "checkpoint-1"
    assert not (folder / "checkpoint-2").exists()
    disk.free()
    again = make(folder)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    last = f"checkpoint-{STEPS}"
    assert newest_whole(folder) == folder / last
    expected, found = (load_file(place / last / "model.safetensors") for place in (whole, folder))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_full_disk_at_the_end_is_told(
    make: Make, small_disk: Callable[[int], Disk], tmp_path: Path
) -> None:
    disk = small_disk(30)
    trainer = make(tmp_path / "elsewhere")
    disk.fill(leave=8_000)
    with pytest.raises(SettingsError, match="can't write weights"):
        leave_results(
            trainer,
            disk.folder / "run",
            trainer.args,
            run=None,  # type: ignore[arg-type]  # it doesn't come so far
            base="",
            stage="",
            data="",
            adapter=False,
            title="",
        )


def test_the_newest_checkpoint_is_that_of_the_latest_step(tmp_path: Path) -> None:
    """Whatever the clock said when they were written."""
    for step in (9, 10, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"x")
        seal(tmp_path / f"checkpoint-{step}")
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("torchs", [False, True], ids=["pickle", "torch"])
def test_a_bomb_in_a_checkpoint_does_not_go_off(
    make: Make, whole: Path, tmp_path: Path, name: str, torchs: bool
) -> None:
    """Transformers keeps its own state in pickles. It reads them with weights_only."""
    checkpoint = shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-2")
    mark = tmp_path / "it-went-off"
    assert (checkpoint / name).is_file()
    if torchs:
        torch.save({"state": Bomb(mark)}, checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps(Bomb(mark)))
    seal(checkpoint)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        make(tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert not mark.exists()


def test_training_args_are_read_by_nobody(make: Make, whole: Path, tmp_path: Path) -> None:
    """A pickle of any objects, which transformers writes beside the weights."""
    checkpoint = shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-2")
    mark = tmp_path / "it-went-off"
    (checkpoint / "training_args.bin").write_bytes(pickle.dumps(Bomb(mark)))
    make(tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert (tmp_path / "checkpoint-3" / "model.safetensors").is_file()
    assert not mark.exists()


@pytest.mark.parametrize("part", ["data set", "LLM", "TRM"])
def test_a_run_over_something_else_is_refused(tmp_path: Path, part: str) -> None:
    keep_origin({"data set": "a", "LLM": "b"}, tmp_path)
    keep_origin({"TRM": "c"}, tmp_path)
    keep_origin({"LLM": "b", "data set": "a", "TRM": "c"}, tmp_path)
    with pytest.raises(SettingsError, match=rf"over another {part} \(fingerprint ., this") as no:
        keep_origin({part: "other"}, tmp_path)
    assert "Give another output" in str(no.value)
    (tmp_path / "made_of.json").write_text("{")
    with pytest.raises(SettingsError, match="can't read"):
        keep_origin({part: "a"}, tmp_path)
