"""What a soak wrote down, what it is judged by, and its report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ...errors import EvaluationError
from ..json_lines import JSONLines
from .soak_faults import ENDS, Fault

MOST_GROWTH = 0.05
"""The most that the memory of one process may grow by after its warm-up, as a share."""


class Ended(BaseModel):
    """How one run ended: by a stop reason, the name of the error that its caller got, "cancelled"
    or "hang"; `why` says it in words where there is no own list.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: int
    process: int
    user: str
    fault: Fault | None
    ended: str
    why: str | None
    sound: bool  # K distinct items, none of the history's; none at all only in a failure
    accounted: bool  # its usage is what engine and retriever gave it
    seconds: float


class Memory(BaseModel):
    """Resident memory after `runs` runs of one process."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    process: int
    runs: int
    own_mib: float
    children_mib: float
    # Once all runs of the process have ended: generations that are still under way.
    unfinished: int | None = None

    @property
    def total(self) -> float:
        """Of all processes, MiB; pages that they share count for each."""
        return self.own_mib + self.children_mib


class Journal:
    """The lines of a soak; one that a kill tore is dropped."""

    def __init__(self, path: Path) -> None:
        self._lines = JSONLines(path)
        self.runs: list[Ended] = []
        self.memory: list[Memory] = []
        for number, line in enumerate(self._lines.read(), 1):
            try:
                said = json.loads(line)
                if "ended" in said:
                    self.runs.append(Ended.model_validate(said))
                else:
                    self.memory.append(Memory.model_validate(said))
            except ValueError as error:
                raise EvaluationError(f"{path}, line {number} is damaged: remove it") from error
        self.process = 1 + max((sample.process for sample in self.memory), default=0)
        self._lines.open()

    def add(self, line: Ended | Memory) -> None:
        """Keep a line. Raises EvaluationError where the disk is full."""
        if isinstance(line, Ended):
            self.runs.append(line)
        else:
            self.memory.append(line)
        self._lines.append(line.model_dump_json())


def growth(samples: Sequence[Memory], warm_up: int) -> float | None:
    """How much the memory of one process grew from the first sample after `warm_up` runs to the
    last while it was at work, as a share; None where it has no two samples to compare.
    """
    later = [each.total for each in samples if each.runs >= warm_up and each.unfinished is None]
    return later[-1] / later[0] - 1 if len(later) > 1 else None


def longest(samples: Sequence[Memory]) -> list[Memory]:
    """The samples of the process that played most runs."""
    by_process: dict[int, list[Memory]] = {}
    for each in samples:
        by_process.setdefault(each.process, []).append(each)
    return max(by_process.values(), key=lambda own: own[-1].runs, default=[])


def unfinished(memory: Sequence[Memory]) -> int | None:
    """Generations under way when the last process had ended its runs; None where it was killed
    before that was known.
    """
    last = max((sample.process for sample in memory), default=0)
    told = [sample.unfinished for sample in memory if sample.process == last]
    return next((left for left in reversed(told) if left is not None), None)


def judge(
    runs: Sequence[Ended], memory: Sequence[Memory], *, wanted: int, warm_up: int
) -> dict[str, tuple[str, bool]]:
    """Each check: what was found, and whether it passed."""
    times = Counter(run.run for run in runs)
    lost = [run for run in range(wanted) if run not in times]
    doubled = [run for run, count in times.items() if count > 1]
    hung = [run.run for run in runs if run.ended == "hang"]
    broken = [run for run in runs if run.fault is not None]
    silent = [run.run for run in broken if not run.why]
    astray = [run.run for run in broken if run.fault and run.ended not in ENDS[run.fault]]
    failed = [run.run for run in runs if run.fault is None and run.why]
    unsound = [run.run for run in runs if not run.sound]
    unaccounted = [run.run for run in runs if not run.accounted]
    left = unfinished(memory)
    own = longest(memory)
    grown = growth(own, warm_up)
    told = "not measured: too few runs in one process"
    if grown is not None:
        told = f"{grown:+.1%} from run {warm_up} to run {own[-1].runs} of one process"
    return {
        "runs lost": _none_of(lost),
        "runs ended twice": _none_of(doubled),
        "runs that hung": _none_of(hung),
        "runs with a fault and no reason": _none_of(silent),
        "runs with a fault that ended by another reason": _none_of(astray),
        "runs without a fault that failed": _none_of(failed),
        "lists that are not K new items": _none_of(unsound),
        "runs whose usage is not what engine and retriever gave": _none_of(unaccounted),
        "generations under way at the end": (
            "not known: the last process was killed; play more runs" if left is None else str(left),
            left == 0,
        ),
        "memory": (told, grown is not None and grown <= MOST_GROWTH),
    }


def _none_of(runs: Sequence[int]) -> tuple[str, bool]:
    named = ", ".join(map(str, runs[:10]))
    return (f"{len(runs)}{f' ({named})' if runs else ''}", not runs)


def report(
    runs: Sequence[Ended], memory: Sequence[Memory], checks: Mapping[str, tuple[str, bool]]
) -> str:
    """Write the soak down as Markdown."""
    ends = Counter((run.fault or "none", run.ended) for run in runs)
    rows = [
        "| check | found | passed |",
        "| --- | --- | --- |",
        *(
            f"| {name} | {found} | {'yes' if ok else 'no'} |"
            for name, (found, ok) in checks.items()
        ),
        "",
        "| fault | ended by | runs |",
        "| --- | --- | ---: |",
        *(f"| {fault} | {ended} | {count} |" for (fault, ended), count in sorted(ends.items())),
        "",
        "| process | runs | own MiB | children MiB |",
        "| ---: | ---: | ---: | ---: |",
        *(f"| {s.process} | {s.runs} | {s.own_mib} | {s.children_mib} |" for s in memory),
    ]
    return "\n".join(rows) + "\n"
