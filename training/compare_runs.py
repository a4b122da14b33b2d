r"""Lay runs of GRPO side by side: did they learn, and did the control not?

    python training/compare_runs.py runs/smoke-0 runs/smoke-1 runs/smoke-shuffled \
        --stage cold_start --plot runs/learning.png

Runs whose rewards were dealt out at random (`--shuffle-rewards`) stand apart from the others. Each
figure is a mean over the first and the last quarter of a run's steps; over several runs the mean
and the least and greatest of theirs.
"""

from __future__ import annotations

import argparse
import json
import sys
from argparse import RawTextHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from deeprec.errors import SettingsError
from deeprec.terminal import tells_errors
from deeprec.training.card import FIGURES, quarters
from deeprec.training.curves import History, compare
from deeprec.training.rewards import STAGES


@dataclass(frozen=True)
class Logged:
    """A finished run: whether its rewards were shuffled, its seed, and its trainer's log."""

    shuffled: bool
    seed: int
    history: History

    @property
    def name(self) -> str:
        """What it is called in a picture."""
        return f"{_kind(self.shuffled)}, seed {self.seed}"


def _kind(shuffled: bool) -> str:
    return "shuffled rewards" if shuffled else "own rewards"


def read_run(folder: Path, stage: str) -> Logged:
    """Read a run's configuration and log. Raises SettingsError where a file is missing."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        history = json.loads((folder / stage / "log.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{folder} holds no finished stage {stage!r} of training/run_grpo.py: {error}"
        ) from error
    return Logged(config["shuffle_rewards"], config["seed"], history)


def table(runs: Sequence[Logged]) -> Table:
    """First against last quarter of each figure that all runs of a kind logged."""
    shown = Table("figure", "runs", "first quarter", "last quarter", "change")
    for figure in FIGURES:
        for shuffled in (False, True):
            found = [quarters(run.history, figure) for run in runs if run.shuffled is shuffled]
            pairs = [pair for pair in found if pair is not None]
            if pairs and len(pairs) == len(found):
                changes = [last - first for first, last in pairs]
                columns = (*zip(*pairs, strict=True), changes)
                kind = f"{_kind(shuffled)} ({len(pairs)})"
                shown.add_row(figure, kind, *(_spread(values) for values in columns))
    return shown


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


@tells_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of run_grpo.py")
    parser.add_argument("--stage", choices=list(STAGES), default="cold_start")
    parser.add_argument("--plot", type=Path, help="write the curves into this PNG")
    given = parser.parse_args(arguments)
    runs = [read_run(folder, given.stage) for folder in given.runs]
    Console().print(table(runs))
    if given.plot is not None:
        compare({run.name: run.history for run in runs}, given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
