"""What a step of GRPO is made of: a short run of training/run_grpo.py, and its log.

Reads a prepared workspace (`make demo` makes one; its training ground is made at the first call),
and needs the extra `train`. The run starts from the shipped warm start and is thrown away. Times
are of the steps after the first; the update is what lies between two steps' rollouts.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.console import Console

from ...configuration import write_json
from ...errors import DeepRecError
from ...settings import load_settings
from .command import OUTPUT, WARM_START, Figure, machine, run_benchmark, tell

_TOKENS = ("read", "trained")
_PARTS = ("generate", "update", "sync", "reward")
_PASSES_OF_LORA = 4  # operations a parameter and token: forward, and backward through activations


def configuration(
    output: Path, workspace: str, *, steps: int, rows_per_pass: int
) -> dict[str, Any]:
    """Configuration of a run as GRPORun reads it: three prompts a step, half of eight runs kept."""
    return {
        "output": str(output),
        "workspace": workspace,
        "start": str(WARM_START),
        "stages": [{"stage": "cold_start", "steps": steps}],
        "prompts_per_step": 3,
        "group_size": 8,
        "kept_per_group": 4,
        "rows_per_pass": rows_per_pass,
        "run": {
            "answer_form": "numbers",
            "retrieve_n": 10,
            "history_length": 6,
            "list_attributes": False,
            "temperature": 1.0,
            "limits": {"max_new_tokens": 160},
        },
        "trainer": {"optim": "sgd", "learning_rate": 0.01, "report_to": [], "save_steps": 1000},
    }


def split(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean seconds of the parts of a step, over the steps after the first.

    An update is told by the step that comes after it.
    """
    later = [row for row in history if "seconds/generate" in row][1:]
    if not later:
        raise DeepRecError("the run's log holds no second step; give --steps 2 or more")
    names = {part: f"seconds/{part}" for part in _PARTS} | {"update": "seconds/update_before"}
    return {part: fmean(float(row[names[part]]) for row in later) for part in _PARTS}


def updated(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean tokens of a pass, read and trained on, over the updates whose seconds `split` tells:
    those of all steps but the last.
    """
    earlier = [row for row in history if "seconds/generate" in row][:-1]
    return {part: fmean(float(row[f"tokens/{part}"]) for row in earlier) for part in _TOKENS}


def main(
    steps: Annotated[int, typer.Option(min=2, help="Of the run.")] = 3,
    rows_per_pass: Annotated[int, typer.Option(min=1, help="Runs in one pass; divides 12.")] = 2,
    peak_tflops: Annotated[float, typer.Option(help="Of the GPU, dense 16-bit; H100's.")] = 989,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = OUTPUT,
) -> None:
    """Run the benchmark on the workspace of the settings."""
    console = Console()
    where = machine()
    settings = load_settings()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        config = configuration(run, settings.workspace, steps=steps, rows_per_pass=rows_per_pass)
        write_json(Path(folder) / "config.yaml", config)  # JSON is YAML
        command = ["-m", "deeprec.training.run_grpo", "--config", str(Path(folder) / "config.yaml")]
        with console.status(f"{steps} steps of GRPO"):
            ended = subprocess.run(
                [sys.executable, *command], check=False, capture_output=True, text=True
            )
        if ended.returncode:
            raise DeepRecError(f"the run failed:\n{ended.stdout[-2000:]}{ended.stderr[-4000:]}")
        history = json.loads((run / "cold_start" / "log.json").read_text("utf-8"))
    rows = [row for row in history if "seconds/generate" in row]
    seconds = split(history)
    whole = sum(seconds.values())
    kept = config["prompts_per_step"] * config["kept_per_group"]
    played = config["prompts_per_step"] * config["group_size"]
    passes = kept // rows_per_pass
    read, trained = (passes * tokens for tokens in updated(history).values())
    written = played * fmean(row["run/policy_tokens"] for row in rows[1:])
    gpu = [row["memory/peak_gib"] for row in rows if "memory/peak_gib" in row]
    peak = max(gpu) if gpu else resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    figures = [
        Figure("a step", whole, "s"),
        *(Figure(f"of it to {part}", 100 * seconds[part] / whole, "%") for part in _PARTS[:2]),
        Figure("of it to hand weights over", 100 * seconds["sync"] / whole, "%", at_most=3),
        Figure("of it to reward", 100 * seconds["reward"] / whole, "%", at_most=1),
        Figure(
            f"padding of what is computed, {rows_per_pass} runs a pass",
            100 * fmean(row["tokens/padding_share"] for row in rows),
            "%",
            at_most=10,
        ),
        Figure("written by the policy", written / seconds["generate"], "tokens/s"),
        Figure("read in the update", read / seconds["update"], "tokens/s"),
        Figure("of them scored by the head and trained on", 100 * trained / read, "%"),
        Figure(f"peak memory of the {'trainer' if gpu else 'largest process'}", peak, "GiB"),
    ]
    if gpu:
        work = _PASSES_OF_LORA * _parameters(settings.model_name) * read
        utilisation = work / seconds["update"] / (peak_tflops * 1e12)
        figures.append(
            Figure("model FLOP utilisation of the update", 100 * utilisation, "%", at_least=35)
        )
    details = {"config": config, "log": history}
    tell(console, output, "grpo_step", figures, where=where, details=details)


def _parameters(model: str) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    return int(made.num_parameters())


if __name__ == "__main__":
    run_benchmark(main)
