"""What every benchmark is: a command of its own, and a file that says when and where it ran."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import typer

from ...configuration import write_text
from ...terminal import run_app
from ...tools.workspace import Workspace


def leave(workspace: Workspace, name: str, found: Mapping[str, Any]) -> Path:
    """Write `<name>.json` into the workspace's folder `bench`, dated and with the machine told.

    Gives the folder. Raises SettingsError where it can't be written.
    """
    report = {
        "date": date.today().isoformat(),
        "machine": {
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        **found,
    }
    folder = workspace.folder / "bench"
    write_text(folder / f"{name}.json", json.dumps(report, indent=2) + "\n")
    return folder


def run_benchmark(main: Callable[..., None]) -> None:
    """Run a benchmark's `main` as a command; its parameters are the options."""
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    run_app(app)
