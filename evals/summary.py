"""The result table of a README: rows of several evaluations between two marker comments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..configuration import write_text
from ..errors import EvaluationError
from .report import read_runs
from .results import Results
from .significance import Interval
from .tables import Table, interval, p_value

BEGIN, END = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"


def insert_summary(folders: Sequence[Path], file: Path) -> None:
    """Put the table of these finished evaluations between the markers of a Markdown file.

    Raises EvaluationError: no results, damaged ones or those that can't be compared, or a file
    without the markers; SettingsError where it can't be written.
    """
    table = summary(read_runs(folders)).markdown()
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{file} can't be read: {error}. Give a Markdown file.") from error
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in tail:
        raise EvaluationError(
            f"{file} does not hold {BEGIN} and {END} once each, in this order: put them where the "
            "table belongs, on lines of their own"
        )
    write_text(file, f"{head}{BEGIN}\n{table}{END}{tail}")


def summary(runs: Sequence[Results]) -> Table:
    """Every row of these runs by the leading metrics of the first. A row that an earlier run holds
    for as many users with the same metrics is left out; with others, its run is named.
    """
    first = runs[0]
    names = [name for name in first.leading if all(name in run.metrics for run in runs)]
    rows: list[tuple[str, ...]] = []
    told: dict[tuple[str, int], list[list[Interval]]] = {}
    for name, row in ((run.name, row) for run in runs for row in run.rows):
        metrics = [row.metrics[metric] for metric in names]
        earlier = told.setdefault((row.label, row.users), [])
        if metrics in earlier:
            continue
        rows.append(
            (
                f"{row.label} ({name})" if earlier else row.label,
                str(row.users),
                *map(interval, metrics),
                "" if row.versus is None else interval(row.versus.difference),
                "" if row.versus is None else p_value(row.versus.p_adjusted),
            )
        )
        earlier.append(metrics)
    return Table(
        "",
        f"{first.dataset}, {first.items} items, lists of {first.k}; 95 % bootstrap intervals over "
        f"users; difference by {first.compare_by} to the best baseline of the same evaluation, and "
        "its adjusted p.",
        ("recommender", "users", *names, "difference", "p"),
        tuple(rows),
    )
