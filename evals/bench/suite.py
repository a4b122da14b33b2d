"""The benchmarks of speed, one after the other, as one JSON file and one table.

Each runs in a process of its own, so that none has another's memory or threads; one that fails is
told in the table, and the others go on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ...configuration import write_json, write_text
from ...errors import DeepRecError
from ..recbole.peer import INSTALLED
from .command import OUTPUT, Figure, markdown, run_benchmark

BENCHMARKS = ("startup", "retrieval", "search_scale", "rollouts", "grpo_step", "trm_training")
_TITLES = {
    "startup": "Start-up",
    "retrieval": "Retriever",
    "search_scale": "Search as the catalog grows",
    "rollouts": "Rollouts and prefix reuse",
    "grpo_step": "A step of GRPO",
    "trm_training": "Training of the TRM",
}
_NO_RECBOLE = "RecBole's environment is not there (make recbole)"
_TOLD = 2000  # characters of what a failed benchmark said


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the table of all benchmarks, each with its machine."""
    parts = ["# Benchmarks of speed"]
    for name in (name for name in BENCHMARKS if name in found):
        report = found[name]
        parts.append(f"## {_TITLES[name]}")
        if "skipped" in report:
            parts.append(f"skipped: {report['skipped']}")
        elif "failed" in report:
            parts.append(f"failed:\n\n```text\n{report['failed']}\n```")
        else:
            fields = [{k: v for k, v in row.items() if k != "met"} for row in report["figures"]]
            about = _about(report["machine"])
            parts.append(f"{report['date']}, {report['seconds']:.0f} s; {about}")
            parts.append(markdown([Figure(**row) for row in fields]))
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _about(where: Mapping[str, Any]) -> str:
    return (
        f"{where['processor']}, {where['cores_allowed']} of {where['cores']} cores, "
        f"{where['memory_gib']} GiB, {where['gpu'] or 'no GPU'}; "
        f"Python {where['python']}, "
        + ", ".join(f"{name} {version}" for name, version in where["packages"].items())
        + f"; load average {where['load_average_before']} before."
    )


def _earlier(file: Path) -> dict[str, dict[str, Any]]:
    """What benchmarks found before, by name. Raises DeepRecError where the file is damaged."""
    if not file.exists():
        return {}
    try:
        kept: dict[str, dict[str, Any]] = json.loads(file.read_text("utf-8"))["benchmarks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DeepRecError(
            f"{file} is damaged: {error!r}. Remove it, or give another output."
        ) from error
    return kept


def main(
    only: Annotated[list[str] | None, typer.Option(help="Names; all where none is given.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = OUTPUT,
) -> None:
    """Run the benchmarks; ends with 1 where one of them failed. Those of earlier calls that are not
    asked for stay in the table.
    """
    console = Console()
    names = only or list(BENCHMARKS)
    if unknown := set(names) - set(BENCHMARKS):
        raise typer.BadParameter(f"{sorted(unknown)}: there are {', '.join(BENCHMARKS)}")
    found = _earlier(output / "bench.json")
    for name in names:
        console.rule(name, align="left")
        if name == "trm_training" and not INSTALLED.exists():
            found.setdefault(name, {"skipped": _NO_RECBOLE})
            _write(output, found)
            console.print(f"skipped: {_NO_RECBOLE}")
            continue
        began = time.perf_counter()
        # Its output is shown as it comes, its errors are kept for the table.
        process = subprocess.run(
            [sys.executable, "-m", f"deeprec.evals.bench.{name}", "--output", str(output)],
            check=False,
            stderr=subprocess.PIPE,
            text=True,
        )
        if process.returncode:
            found[name] = {"failed": process.stderr[-_TOLD:]}
            console.print(process.stderr[-_TOLD:], style="red", markup=False)
        else:
            found[name] = json.loads((output / f"{name}.json").read_text("utf-8"))
            found[name]["seconds"] = time.perf_counter() - began
        _write(output, found)
    console.print(f"Written to {output / 'bench.json'} and {output / 'bench.md'}", soft_wrap=True)
    if any("failed" in found[name] for name in names):
        raise typer.Exit(1)


def _write(output: Path, found: Mapping[str, Mapping[str, Any]]) -> None:
    write_json(output / "bench.json", {"benchmarks": found})
    write_text(output / "bench.md", page(found))


if __name__ == "__main__":
    run_benchmark(main)
