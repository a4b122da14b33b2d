"""A warm start that is interrupted: it goes on from what is whole, over what it was made of."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from deeprec.errors import SettingsError
from deeprec.graph.engine.adapter import BASE
from deeprec.settings import load_settings
from deeprec.tools.interactions import InteractionData
from deeprec.tools.trm.config import DeepRecConfig, FitConfig
from deeprec.tools.workspace import Workspace
from deeprec.training.run_sft import SFTRun, run
from deeprec.training.selection import training_part

WEIGHTS = "adapter_model.safetensors"


def test_a_torn_checkpoint_is_made_again_and_other_data_refused(
    tiny_data: InteractionData,
    tiny_encoder_folder: Path,
    tiny_llm: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DEEPREC_HOME", str(tmp_path))
    monkeypatch.setenv("DEEPREC_MODEL", tiny_llm)
    monkeypatch.setenv("DEEPREC_ENCODER", str(tiny_encoder_folder))
    place = Workspace(load_settings(workspace="tiny"))
    tiny_data.save(place.dataset_dir)
    ground = Workspace(load_settings(workspace="tiny.training"))
    training_part(tiny_data).save(ground.dataset_dir)
    ground.train_trm(DeepRecConfig(), FitConfig(epochs=1, pool=100))
    config = SFTRun.model_validate(
        {
            "output": tmp_path / "run",
            "workspace": "tiny",
            "demonstrations": 4,
            "selection": {"shares": {"warm_start": 1}, "top": 40},
            "run": {"k": 2, "retrieve_n": 4, "history_length": 3, "answer_form": "numbers"},
            "max_length": 2048,
            "lora": {"r": 2},
            "trainer": {"max_steps": 2, "save_steps": 1, "report_to": "none"},
        }
    )
    final = run(config, Console(quiet=True))
    whole = load_file(final / WEIGHTS)
    assert (final / BASE).is_file()
    newest = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    (newest / WEIGHTS).write_bytes((newest / WEIGHTS).read_bytes()[:1000])  # as a kill leaves it
    (final / WEIGHTS).unlink()
    again = load_file(run(config, Console(quiet=True)) / WEIGHTS)
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())
    assert (newest / WEIGHTS).stat().st_size > 1000
    items = (replace(tiny_data.items[0], title="Another film"), *tiny_data.items[1:])
    replace(tiny_data, items=items).save(place.dataset_dir)
    with pytest.raises(SettingsError, match="over another data set"):
        run(config, Console(quiet=True))
