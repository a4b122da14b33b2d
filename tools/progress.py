"""Progress bars of long work on a terminal (rich)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

if TYPE_CHECKING:
    from .trm.fit import FitProgress


@contextmanager
def counted(console: Console, title: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback that takes how many are done, and of how many."""
    with Progress(*_columns(), console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def trm_progress(console: Console) -> Iterator[Callable[[FitProgress], None]]:
    """Yield the callback of `fit`: a bar for the preferences, one for the steps."""
    titles = {"preferences": "embedding preferences", "fit": "training the TRM"}
    with Progress(*_columns("{task.fields[note]}"), console=console) as bars:
        tasks = {}

        def report(at: FitProgress) -> None:
            if at.stage not in tasks:
                tasks[at.stage] = bars.add_task(titles[at.stage], total=at.total, note="")
            note = f"epoch {at.epoch}, loss {at.loss:.3f}" if at.stage == "fit" else ""
            if at.valid_ndcg is not None:
                without, with_preference = at.valid_ndcg
                note += f", NDCG@10 {without:.3f} alone, {with_preference:.3f} with a preference"
            bars.update(tasks[at.stage], completed=at.step, total=at.total, note=note)

        yield report


@contextmanager
def judged(
    console: Console, title: str, *, done: int, total: int
) -> Iterator[Callable[[int, str], None]]:
    """Yield a callback that takes how many users are done, and a note beside the bar.

    `done` of them were before. Where no bar can be drawn, ten lines are printed on the way.
    """
    with Progress(*_columns("{task.fields[note]}"), console=console) as bars:
        task = bars.add_task(title, total=total, completed=done, note="")
        began = time.monotonic()

        def report(now: int, note: str) -> None:
            rate = (now - done) / max(time.monotonic() - began, 1e-9)
            told = f"{rate:.3g} users/s, {note}"
            bars.update(task, completed=now, note=told)
            if not console.is_terminal and now * 10 // total > (now - 1) * 10 // total:
                console.print(f"{title}: {now} of {total} users, {told}", highlight=False)

        yield report


def _columns(note: str = "") -> tuple[ProgressColumn, ...]:
    """What every bar shows, and a note behind it where there is one."""
    shown = (
        TextColumn("  {task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return (*shown, TextColumn(note, style="dim")) if note else shown
