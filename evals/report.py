"""The HTML report: one file that needs nothing else, and holds no script.

Titles, thoughts and preferences are untrusted text: the template escapes all that is put into it
but our own charts, and the page's policy forbids scripts and loads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import EvaluationError
from ..terminal import visible
from . import charts
from .per_user import paired, read_per_user
from .results import Results, Row
from .significance import paired_p
from .tables import Table, interval, number, p_value, tables

if TYPE_CHECKING:
    from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"
_RESAMPLES = 2000
_INTERVAL = re.compile(r" (\([−\d.]+(?:–| to )[−\d.]+\))")


def report(folders: Sequence[Path]) -> str:
    """The report of one finished evaluation, or of several side by side, as HTML.

    Raises EvaluationError: no results, damaged ones, or those that can't be compared.
    """
    runs = read_runs(folders)
    return render(runs, [read_per_user(folder, runs[0].compare_by) for folder in folders])


def read_runs(folders: Sequence[Path]) -> list[Results]:
    """Results that can stand side by side.

    Raises EvaluationError: none, damaged ones, those of different data sets or lengths of lists, or
    without the metric by which the first compares.
    """
    runs = [Results.read(folder) for folder in folders]
    first = runs[0]
    for folder, run in zip(folders, runs, strict=True):
        if run.fingerprint != first.fingerprint:
            raise EvaluationError(
                f"{folder} holds results of data set {run.dataset!r} ({run.fingerprint}), "
                f"{folders[0]} of {first.dataset!r} ({first.fingerprint}): they can't be compared."
            )
        if run.k != first.k:
            raise EvaluationError(
                f"{folder} judges lists of {run.k}, {folders[0]} of {first.k}: they can't be "
                "compared. Evaluate both with the same k."
            )
        if first.compare_by not in run.metrics:
            raise EvaluationError(
                f"{folder} has no {first.compare_by}, by which {folders[0]} compares: add it to "
                "its metrics"
            )
    return runs


def render(runs: Sequence[Results], per_user: Sequence[Mapping[str, dict[str, float]]] = ()) -> str:
    """HTML of results; `per_user` holds each run's leading metric by row and user, for tests."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    page = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters["number"] = number
    page.filters["cell"] = _with_interval_below
    shown = [
        {
            "results": run,
            "tables": tables(run),
            "bars": Markup(charts.bars(run)),  # noqa: S704  # our own drawing, text escaped
            "agents": [
                {
                    "name": agent.recommender,
                    "settings": agent.settings,
                    "charts": [
                        Markup(chart)  # noqa: S704
                        for chart in (charts.turns(agent), charts.distributions(agent))
                        if agent.turns
                    ],
                    "traces": [t for t in run.traces if t.recommender == agent.recommender],
                }
                for agent in run.agents
            ],
        }
        for run in runs
    ]
    outcomes = list(dict.fromkeys(trace.outcome for run in runs for trace in run.traces))
    return page.get_template("report.html").render(
        runs=shown, beside=_beside(runs, per_user), outcomes=outcomes
    )


def _visible(value: object) -> object:
    """Text as `visible` makes it; our own markup is left as it is."""
    return visible(value) if type(value) is str else value


def _with_interval_below(cell: str) -> Markup:
    """A cell with the interval that stands in it on a line of its own."""
    from markupsafe import Markup, escape

    return Markup(_INTERVAL.sub(r"<small>\1</small>", str(escape(visible(cell)))))  # noqa: S704


def _beside(
    runs: Sequence[Results], per_user: Sequence[Mapping[str, dict[str, float]]]
) -> list[Table]:
    """For each metric a table with a column for each run; of one run nothing."""
    if len(runs) < 2:
        return []
    names = [name for name in runs[0].metrics if all(name in run.metrics for run in runs)]
    rows = [{row.label: row for row in run.rows} for run in runs]
    labels = list(dict.fromkeys(label for of in rows for label in of))
    heads = tuple(run.name for run in runs)
    made = [
        Table(
            name,
            "",
            ("recommender", *heads),
            tuple((label, *(_cell(of.get(label), name) for of in rows)) for label in labels),
        )
        for name in names
    ]
    tested = [
        Table(
            f"Difference to {heads[0]}, {runs[0].compare_by}",
            "With p of a paired randomisation test; nothing where the users are not the same.",
            ("recommender", *heads[1:]),
            tuple(
                (label, *(_difference(per_user[0], other, label) for other in per_user[1:]))
                for label in labels
            ),
        )
    ]
    return made + tested


def _cell(row: Row | None, metric: str) -> str:
    return "" if row is None else interval(row.metrics[metric])


def _difference(
    first: Mapping[str, dict[str, float]], other: Mapping[str, dict[str, float]], label: str
) -> str:
    if label not in first or label not in other:
        return ""
    pair = paired(other[label], first[label])
    if pair is None:
        return ""
    p = paired_p(*pair, resamples=_RESAMPLES, seed=0)
    return f"{pair[0].mean() - pair[1].mean():+.3f} (p {p_value(p)})"
