"""How long it takes to begin: the import, the help, TRM and catalog, the first recommendation.

Each is measured in processes of their own, started anew for every round, on the workspace of the
settings (`make demo` makes one) and with the shipped adapter or the settings' adapter. Files are
in the system's cache from the second round on, and the median is given.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console

from .command import OUTPUT, TRAINED, Figure, machine, run_benchmark, tell

_IMPORT = """
import time
began = time.perf_counter()
import deeprec
print(time.perf_counter() - began)
"""

_STAGES = """
import json, sys, time
began = last = time.perf_counter()
stages = {}
def done(name):
    global last
    now = time.perf_counter()
    stages[name], last = now - last, now
from pathlib import Path
from deeprec.settings import load_settings
from deeprec.tools.workspace import Workspace
settings = load_settings()
adapter = settings.adapter or Path(sys.argv[1])
workspace = Workspace(settings.model_copy(update={"adapter": adapter}))
from deeprec.tools.loading import uncollected
with uncollected():
    import deeprec.tools.retriever, deeprec.tools.text_encoder, deeprec.tools.trm.model
done("importing torch, transformers, Chroma")
retriever = workspace.retriever
done("loading TRM, encoder and catalog")
if len(sys.argv) == 2:
    print(json.dumps(stages))
    retriever.close()
    sys.exit()
from deeprec.graph.app import load_engine, load_graph
from deeprec.graph.build import build_graph
with uncollected():
    import vllm.v1.engine.async_llm
done("importing vLLM and LangGraph")
engine = load_engine(workspace.settings)
done("starting the LLM engine")
graph = load_graph(workspace, hold_out=True, engine=engine)
user = next(iter(workspace.histories(hold_out=True)))
answer = graph.invoke({"user_id": user})
done("the first run")
assert answer["recommendations"], answer
print(json.dumps(stages))
engine.close()
retriever.close()
"""


def stages(*arguments: str) -> dict[str, float]:
    """Seconds of each stage of a process that loads what `arguments` ask for, and `process`."""
    began = time.perf_counter()
    said = _output(["-c", _STAGES, str(TRAINED), *arguments])
    whole = time.perf_counter() - began
    found: dict[str, float] = json.loads(said.strip().splitlines()[-1])
    return {**found, "process": whole}


def _output(arguments: Sequence[str]) -> str:
    return subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, text=True
    ).stdout


def _seconds(arguments: Sequence[str]) -> float:
    began = time.perf_counter()
    _output(arguments)
    return time.perf_counter() - began


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Of the quick ones.")] = 5,
    engines: Annotated[int, typer.Option(min=0, help="First recommendations.")] = 2,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = OUTPUT,
) -> None:
    """Run the benchmark on the workspace of the settings."""
    console = Console()
    where = machine()
    imports = [float(_output(["-c", _IMPORT])) for _ in range(rounds)]
    helps = [_seconds(["-m", "deeprec.cli", "--help"]) for _ in range(rounds)]
    with console.status("TRM and catalog"):
        parts = [stages() for _ in range(rounds)]
    with console.status("First recommendations"):
        firsts = [stages("all") for _ in range(engines)]
    ready = [sum(part.values()) - part["process"] for part in parts]
    figures = [
        Figure("import deeprec", median(imports), "s", at_most=0.2),
        Figure("deeprec --help", median(helps), "s", at_most=0.4),
        Figure("TRM and catalog ready, imports included", median(ready), "s", at_most=5),
    ]
    if firsts:
        whole = [sum(first.values()) - first["process"] for first in firsts]
        figures.append(
            Figure("first recommendation of a cold process", median(whole), "s", at_most=60)
        )
        figures += [
            Figure(f"of it {name}", median(first[name] for first in firsts), "s")
            for name in firsts[0]
            if name != "process"
        ]
    details = {"import": imports, "help": helps, "parts": parts, "first": firsts}
    tell(console, output, "startup", figures, where=where, details=details)


if __name__ == "__main__":
    run_benchmark(main)
