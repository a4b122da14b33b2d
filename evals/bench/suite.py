"""The benchmarks of speed, one after the other, as one JSON file and one table.

Each runs in a process of its own, so that none has another's memory or threads; one that fails is
told in the table, and the others go on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ...configuration import write_json, write_text
from .command import OUTPUT, Figure, machine, markdown, run_benchmark

BENCHMARKS = ("startup", "retrieval", "search_scale", "rollouts", "grpo_step")
_TITLES = {
    "startup": "Start-up",
    "retrieval": "Retriever",
    "search_scale": "Search as the catalog grows",
    "rollouts": "Rollouts and prefix reuse",
    "grpo_step": "A step of GRPO",
}
_TOLD = 2000  # characters of what a failed benchmark said


def page(found: dict[str, dict[str, Any]], where: dict[str, Any]) -> str:
    """Write the table of all benchmarks, the machine told first."""
    about = (
        f"{where['processor']}, {where['cores_allowed']} of {where['cores']} cores, "
        f"{where['memory_gib']} GiB, {where['gpu'] or 'no GPU'}; "
        f"Python {where['python']}, "
        + ", ".join(f"{name} {version}" for name, version in where["packages"].items())
        + f"; load average {where['load_average_before']} before."
    )
    parts = ["# Benchmarks of speed", about]
    for name, report in found.items():
        parts.append(f"## {_TITLES[name]}")
        if "failed" in report:
            parts.append(f"failed:\n\n```text\n{report['failed']}\n```")
        else:
            fields = [{k: v for k, v in row.items() if k != "met"} for row in report["figures"]]
            parts.append(f"{report['date']}, {report['seconds']:.0f} s\n")
            parts.append(markdown([Figure(**row) for row in fields]).rstrip())
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def main(
    only: Annotated[list[str] | None, typer.Option(help="Names; all where none is given.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = OUTPUT,
) -> None:
    """Run the benchmarks; ends with 1 where one of them failed."""
    console = Console()
    names = only or list(BENCHMARKS)
    if unknown := set(names) - set(BENCHMARKS):
        raise typer.BadParameter(f"{sorted(unknown)}: there are {', '.join(BENCHMARKS)}")
    where = machine()
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        console.rule(name, align="left")
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
        write_json(output / "bench.json", {"machine": where, "benchmarks": found})
        write_text(output / "bench.md", page(found, where))
    console.print(f"Written to {output / 'bench.json'} and {output / 'bench.md'}", soft_wrap=True)
    if any("failed" in report for report in found.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    run_benchmark(main)
