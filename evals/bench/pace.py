"""How fast a fit goes."""

from __future__ import annotations

import time

from ...tools.trm.fit import FitProgress


class Pace:
    """Examples a second between a fit's first step and its last; validation is not in it."""

    def __init__(self) -> None:
        self._at: list[tuple[float, int]] = []

    def __call__(self, progress: FitProgress) -> None:
        """Take note of a step."""
        new = not self._at or progress.examples > self._at[-1][1]
        if progress.stage == "fit" and new:
            self._at.append((time.perf_counter(), progress.examples))

    @property
    def examples_per_second(self) -> float:
        """Of the steps after the first."""
        (began, before), (ended, after) = self._at[0], self._at[-1]
        return (after - before) / (ended - began)
