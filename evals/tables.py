"""Results as cells, for Markdown, terminal and report alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .results import AgentFigures, Cost, Results, Row
from .significance import Interval


@dataclass(frozen=True)
class Table:
    """A titled table of words; the first column names the row."""

    title: str
    note: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As Markdown; an empty title is left out."""
        lines = [self.head, ("---", *("---:" for _ in self.head[1:])), *self.rows]
        body = "\n".join(f"| {' | '.join(map(_plain, cells))} |" for cells in lines)
        title = f"### {_plain(self.title)}\n\n" if self.title else ""
        return f"{title}{_plain(self.note)}\n\n{body}\n"


def tables(results: Results) -> list[Table]:
    """All tables of one evaluation; those of what it doesn't hold are left out."""
    made = [_metrics(results), _beyond(results), _groups(results), _faults(results)]
    return [table for table in (*made, _steering(results), _agents(results)) if table.rows]


def markdown(results: Results) -> str:
    """The whole of `tables` as one Markdown text."""
    return "\n".join(table.markdown() for table in tables(results))


def interval(value: Interval | None) -> str:
    """A mean and its interval: 0.123 (0.101–0.145)."""
    if value is None:
        return ""
    if value.low is None or value.high is None:
        return number(value.mean)
    to = "–" if value.low >= 0 else " to "
    return f"{number(value.mean)} ({number(value.low)}{to}{number(value.high)})"


def number(value: float) -> str:
    """Three decimals for what is small, one for what is larger."""
    return (f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}").replace("-", "−")


def p_value(p: float) -> str:
    """A p-value as it is told."""
    return "< .001" if p < 0.001 else f"{p:.3f}"


def _metrics(results: Results) -> Table:
    rows = [
        (row.label, *(interval(row.metrics[name]) for name in results.metrics), *_versus(row))
        for row in results.rows
    ]
    best = next((row.versus.baseline for row in results.rows if row.versus), None)
    compared = f"by {results.compare_by} to the best baseline, {best}" if best else "to none"
    repeated = (
        f" {results.repeated_targets} users took something again, which no list without the past "
        "can hit."
        if results.repeated_targets
        else ""
    )
    return Table(
        "Ranking",
        f"{results.dataset}: {results.users} test users, {results.items} items, lists of "
        f"{results.k}; every user counts; 95 % bootstrap intervals over users. Compared "
        f"{compared}: mean difference, and p of a paired randomisation test, adjusted for the "
        f"number of rows.{repeated}",
        ("recommender", *results.metrics, "difference", "p"),
        tuple(rows),
    )


def _versus(row: Row) -> tuple[str, str]:
    if row.versus is None:
        return "", ""
    return interval(row.versus.difference), p_value(row.versus.p_adjusted)


def _beyond(results: Results) -> Table:
    return Table(
        f"Beyond accuracy, of the first {results.k}",
        "Coverage: share of the catalog in anybody's list. Novelty: mean self-information of a "
        "list's items, in bits. Diversity: mean distance of a list's items by their texts.",
        ("recommender", "coverage", "novelty", "diversity"),
        tuple(
            (row.label, number(row.coverage), number(row.novelty), number(row.diversity))
            for row in results.rows
        ),
    )


def _groups(results: Results) -> Table:
    groups = list(results.rows[0].groups) if results.rows else []
    sizes = {name: results.rows[0].groups[name].users for name in groups}
    return Table(
        f"Groups of users, {results.compare_by}",
        "Popularity of targets by the training part.",
        ("recommender", *(f"{name}: {sizes[name]} users" for name in groups)),
        tuple(
            (
                row.label,
                *(
                    interval(row.groups[name].metrics[results.compare_by]) if sizes[name] else ""
                    for name in groups
                ),
            )
            for row in results.rows
        ),
    )


def _faults(results: Results) -> Table:
    wrong = [
        row
        for row in results.rows
        if row.failures or row.short or row.duplicates or row.unknown or row.from_past
    ]
    return Table(
        "What counted as misses",
        f"Users without a list of the recommender's own; lists of fewer than {results.k}; places "
        "that repeat an id, name an unknown one, or one from the past.",
        ("recommender", "failures", "short lists", "repeated", "unknown", "past", "for example"),
        tuple(
            (
                row.label,
                *(
                    str(count)
                    for count in (
                        row.failures, row.short, row.duplicates, row.unknown, row.from_past
                    )
                ),
                "; ".join(row.examples),
            )
            for row in wrong
        ),
    )  # fmt: skip


def _steering(results: Results) -> Table:
    metric = results.compare_by
    return Table(
        "Steering by stated wishes",
        "Only X: a main attribute value of the user's latest items, drawn at random; no Y: the "
        "commonest of them; more like Z: one of these items. Followed: share of a list's places "
        "that fulfil the wish (more like: mean cosine of texts), in the same users' lists without "
        f"and with it, past excluded; and {metric} of both. Wishes are made of the past alone, so "
        "the held-out item need not fulfil them.",
        ("recommender, wish as …", "users", "failures", "followed without", "with", "change",
         f"{metric} without", "with", "change"),
        tuple(
            (
                f"{one.recommender}, {_WISHES[one.wish]} as {one.way}",
                str(one.users),
                str(one.failures),
                *map(interval, (one.fit_before, one.fit_after, one.fit_change)),
                *map(interval, (one.metric_before, one.metric_after, one.metric_change)),
            )
            for one in results.steering
        ),
    )  # fmt: skip


_WISHES = {"only": "only X", "without": "no Y", "more_like": "more like Z"}

_FIGURES: Sequence[tuple[str, Callable[[AgentFigures], str]]] = (
    ("strict format", lambda a: interval(a.strict)),
    ("broken rules", lambda a: _counts(a.broken_rules.items())),
    ("ended by", lambda a: _counts(a.stop_reasons.items())),
    ("failures", lambda a: _counts(a.failures.items())),
    ("searches → runs", lambda a: _counts(a.searches.items())),
    ("distinct candidates of a run", lambda a: interval(a.candidates)),
    ("target among the candidates", lambda a: interval(a.found)),
    ("target in the TRM's own list of as many", lambda a: interval(a.longer)),
    (
        "p of these two",
        lambda a: "" if a.found_versus_longer_p is None else p_value(a.found_versus_longer_p),
    ),
    (
        "answer lines; invented; repeated",
        lambda a: f"{a.answer_lines}; {a.invented_lines}; {a.repeated_lines}",
    ),
    ("served lines by source", lambda a: _counts(a.lines_by_source.items())),
    ("filled lines of a list", lambda a: interval(a.filled_lines)),
    ("tokens of a run by author", lambda a: _means(a.tokens)),
    ("LLM calls of a run", lambda a: number(a.generations)),
    ("seconds of a run, beside others", lambda a: _means(a.seconds)),
    ("for 1,000 users: tokens read; generated", lambda a: _tokens(a.cost)),
    ("for 1,000 users: seconds of the machine", lambda a: _machine(a.cost)),
)


def _tokens(cost: Cost | None) -> str:
    return f"{cost.tokens_read:,.0f}; {cost.tokens_generated:,.0f}" if cost else "not known"


def _machine(cost: Cost | None) -> str:
    if cost is None or cost.machine_seconds is None:
        return "not known"
    priced = "" if cost.price is None else f" = {cost.price:,.2f} {cost.currency}"
    return f"{cost.machine_seconds:,.0f}{priced}"


def _agents(results: Results) -> Table:
    agents = results.agents
    rows = [(name, *(shown(agent) for agent in agents)) for name, shown in _FIGURES]
    return Table(
        "Runs of the agents",
        "Over all users; a failed run found and wrote nothing. Tokens read: prompts and what the "
        "environment wrote, each counted once, whatever the engine's prefix cache spares. Seconds "
        "of the machine: from first to last answer, loading left out.",
        ("", *(agent.recommender for agent in agents)),
        tuple(rows) if agents else (),
    )


def _counts(pairs: Iterable[tuple[object, int]]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in pairs) or "none"


def _means(values: dict[str, float]) -> str:
    return ", ".join(f"{name}: {number(value)}" for name, value in values.items() if value)


def _plain(cell: str) -> str:
    """Keep a table a table, whatever stands in it: no tag, no link, no image."""
    return re.sub(r"<(?=\S)", "&lt;", re.sub(r"([\\|\[\]`])", r"\\\1", " ".join(cell.split())))
