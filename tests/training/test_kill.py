"""`kill -9` of a training run, where it hurts: the run that goes on ends as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from deeprec.settings import load_settings
from deeprec.tools.interactions import InteractionData
from deeprec.tools.workspace import Workspace
from deeprec.training.trajectory_file import read_trajectories

ROOT = Path(__file__).parents[2]
STEPS = 4
CONFIG = {
    "workspace": "tiny",
    "stages": [{"stage": "cold_start", "steps": STEPS}],
    "selection": {"shares": {"cold_start": 1}, "top": 40},
    "prompts_per_step": 2,
    "group_size": 2,
    "max_length": 1024,
    "run": {"k": 2, "history_length": 3, "temperature": 1.0, "limits": {"max_new_tokens": 64}},
    "lora": {"r": 4},
    "trainer": {"save_steps": 1, "report_to": "none"},
}


@pytest.fixture
def train(
    tiny_data: InteractionData, tiny_encoder_folder: Path, tiny_llm: str, tmp_path: Path
) -> Iterator[Callable[[Path], subprocess.Popen[bytes]]]:
    """Start a run that leaves its results in a folder; none outlives the test."""
    settings = load_settings(home=tmp_path, workspace="tiny", encoder=str(tiny_encoder_folder))
    tiny_data.save(Workspace(settings).dataset_dir)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG | {"output": "nowhere"}))
    environment = {
        **os.environ,
        "DEEPREC_HOME": str(tmp_path),
        "DEEPREC_MODEL": tiny_llm,
        "DEEPREC_ENCODER": str(tiny_encoder_folder),
        "DEEPREC_ENGINE__KV_CACHE_GIB": "1",
    }

    started: list[subprocess.Popen[bytes]] = []

    def start(output: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "training/run_grpo.py", "--config", str(config)]
        with (tmp_path / f"{output.name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*command, "--output", str(output)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def during_generation(run: Path) -> bool:
    """The first checkpoint is whole, so that the next step's runs are being made."""
    return (run / "cold_start" / "checkpoint-1" / "complete.json").exists()


def during_the_update(run: Path) -> bool:
    """The third step's runs were written, and its checkpoint is not there."""
    return (run / "trajectories" / "cold_start-000002.parquet").exists()


def during_a_checkpoint(run: Path) -> bool:
    """The last checkpoint is being written."""
    folder = run / "cold_start" / f"checkpoint-{STEPS}"
    return folder.exists() and not (folder / "complete.json").exists()


@pytest.mark.engine
@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stood(
    train: Callable[[Path], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(whole).wait(timeout=300) == 0
    for moment in (during_generation, during_the_update, during_a_checkpoint):
        process = train(killed)
        limit = time.monotonic() + 300
        while not moment(killed):
            assert process.poll() is None, f"it ended before it was {moment.__name__}"
            assert time.monotonic() < limit
            time.sleep(0.001)
        own = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (killed / "cold_start" / "final").exists()
        assert not psutil.wait_procs(own, timeout=60)[1]  # vLLM ends with its owner
    assert train(killed).wait(timeout=300) == 0
    expected, found = (
        [(run.id, run.target, run.history_ids) for run in read_trajectories(folder)]
        for folder in (whole, killed)
    )
    assert found == expected
    assert len({id_ for id_, _, _ in found}) == STEPS * 4
    logs = [
        json.loads((folder / "cold_start" / "log.json").read_text()) for folder in (whole, killed)
    ]
    steps = [[row["step"] for row in log if "reward/total" in row] for log in logs]
    assert steps == [list(range(1, STEPS + 1))] * 2
