"""Charts as SVG text that takes the page's own colour, so that it is readable in light and dark."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .results import AgentFigures, Results
from .significance import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#010203"  # drawn in, then replaced by the page's colour
_BASELINE, _AGENT = "#6b8fb5", "#d9853b"  # readable on white and on near-black
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "deeprec",  # the same figures give the same file
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
    ),
}


def bars(results: Results) -> str:
    """The leading metric and the longest recall of every row, with intervals."""
    names = results.leading
    agents = {agent.recommender for agent in results.agents}
    rows = results.rows[::-1]  # the first on top
    colours = [_AGENT if row.recommender in agents else _BASELINE for row in rows]

    def draw(figure: Figure) -> None:
        places = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
        for axes, name in zip(places, names, strict=True):
            found = [row.metrics[name] for row in rows]
            axes.barh(
                [row.label for row in rows],
                [one.mean for one in found],
                xerr=_reach(found),
                color=colours,
                ecolor=_INK,
                error_kw={"linewidth": 0.8},
            )
            axes.set_title(name)
            axes.set_xlim(left=0)
            axes.locator_params(axis="x", nbins=5)

    return _svg(draw, width=9, height=0.8 + 0.28 * len(rows))


def turns(agent: AgentFigures) -> str:
    """Share of users whose target was retrieved, search by search, and the TRM's list beside it."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        at = [point.searches for point in agent.turns]
        found = [point.found for point in agent.turns]
        # Side by side, so that no interval hides the other.
        _line(axes, [x - 0.04 for x in at], found, _AGENT, "retrieved by the agent", "o-")
        longer = [point.longer for point in agent.turns if point.longer is not None]
        if longer:
            beside = [x + 0.04 for x in at]
            _line(axes, beside, longer, _BASELINE, "in the TRM's list of as many items", "s--")
        axes.set_xticks(at)
        axes.set_xlabel("after so many searches")
        axes.set_ylim(bottom=0)
        axes.set_title("target among the candidates")
        axes.legend(frameon=False)

    return _svg(draw, width=5, height=2.8)


def distributions(agent: AgentFigures) -> str:
    """How many searches, and how many distinct candidates, runs have."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        left.bar(list(agent.searches), list(agent.searches.values()), color=_AGENT)
        left.set_xticks(list(agent.searches))
        left.set_title("searches of a run")
        left.set_ylabel("runs")
        counts = Counter(agent.candidate_counts)
        right.bar(list(counts), list(counts.values()), color=_AGENT, width=1)
        right.set_title("distinct candidates")

    return _svg(draw, width=5, height=2.8)


def _line(
    axes: Axes, at: Sequence[float], found: Sequence[Interval], colour: str, name: str, style: str
) -> None:
    axes.errorbar(
        at,
        [one.mean for one in found],
        yerr=_reach(found),
        fmt=style,
        color=colour,
        label=name,
        capsize=2,
        linewidth=1.2,
    )


def _reach(found: Sequence[Interval]) -> list[list[float]]:
    """How far intervals reach below and above their means."""
    low = [0.0 if one.low is None else max(0.0, one.mean - one.low) for one in found]
    high = [0.0 if one.high is None else max(0.0, one.high - one.mean) for one in found]
    return [low, high]


def _svg(draw: Any, *, width: float, height: float) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        text = io.StringIO()
        nobody = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nobody)
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")
