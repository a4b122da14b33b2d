"""The HTML report: what stands in it, and that nothing in it can act."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from deeprec.cli import main
from deeprec.errors import EvaluationError
from deeprec.evals.report import render, report
from deeprec.evals.results import Outcome as Line
from deeprec.evals.results import Results, Trace, TracedItem, TracedTurn
from deeprec.evals.tables import Table, markdown, p_value
from deeprec.terminal import visible

from ..red_team import TEXTS, whole
from .conftest import Evaluate
from .test_agents import AGENT, GOOD, INVENTS, OUTAGE, REPEATS, Play, play

__all__ = ["play"]

EVIL = "</summary><script>alert('x')</script><img src=http://evil/x onerror=y>{{ 731 * 733 }}"


class Page(HTMLParser):
    """Tags with their attributes, and all text that a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str, **attributes: str) -> int:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return sum(
            name == tag and all(value in (has.get(key) or "") for key, value in wanted.items())
            for name, has in self.tags
        )


@pytest.fixture
def results(play: Play) -> Results:
    return play(
        *GOOD, *REPEATS, *OUTAGE, *INVENTS, recommenders={**AGENT, "p": {"kind": "popularity"}}
    )


def test_the_report_holds_every_row_and_told_run(results: Results, tmp_path: Path) -> None:
    html = (tmp_path / "run" / "report.html").read_text()
    page = Page(html)
    assert html.lstrip().startswith("<!doctype html>")
    for row in results.rows:
        assert row.label in page.text
        assert f"{row.metrics['ndcg@2'].mean:.3f}" in page.text
    assert page.count("svg") == 1 + 2  # bars; the agent's curve and distributions
    assert page.count("details", class_="trace") == len(results.traces) == 4
    outcomes = {trace.outcome for trace in results.traces}
    assert page.count("input", type="radio") == 1 + len(outcomes)
    told = results.traces[0]
    for text in (told.target, told.turns[0].thought, told.turns[0].preference or "", *told.history):
        assert text in page.text
    hits = sum(
        item.hit for trace in results.traces for turn in trace.turns for item in turn.retrieved
    ) + sum(line.hit for trace in results.traces for line in trace.list)
    assert page.count("mark") == hits


def test_the_report_needs_no_network_and_runs_nothing(results: Results, tmp_path: Path) -> None:
    html = (tmp_path / "run" / "report.html").read_text()
    page = Page(html)
    assert page.count("meta", content="default-src 'none'") == 1
    assert not page.count("script")
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "xlink:href", "action"}:
                assert (value or "").startswith("#")
    assert "@import" not in html


def evil_trace(text: str = EVIL) -> Trace:
    return Trace(
        recommender="agent",
        user=text,
        outcome="hit",
        history=(text,),
        target=text,
        turns=(
            TracedTurn(
                thought=text,
                preference=text,
                refused=text,
                retrieved=(TracedItem(title=text, score=1, hit=True),),
            ),
        ),
        list=(Line(title=text, source="policy", hit=True),),
        stop_reason="answered",
        broken_rules=(),
        failure=text,
        tokens=1,
        seconds=1,
    )


def test_what_model_and_catalog_wrote_stays_text(results: Results) -> None:
    row = results.rows[0].model_copy(update={"unknown": 1, "examples": (EVIL,)})
    tainted = results.model_copy(
        update={
            "name": EVIL,
            "dataset": EVIL,
            "traces": (evil_trace(),),
            "rows": (row, *results.rows[1:]),
            "made_with": {EVIL: EVIL},
        }
    )
    page = Page(render([tainted]))
    assert page.text.count(EVIL) >= 12
    assert not page.count("script")
    assert not page.count("img")
    assert "535823" not in page.text
    assert page.count("mark") == 2
    assert "<script" not in markdown(tainted)


def test_the_red_team_adds_no_tag_and_turns_no_line(results: Results) -> None:
    def shown(texts: list[str]) -> tuple[str, Page]:
        row = results.rows[0].model_copy(update={"unknown": 1, "examples": tuple(texts)})
        changes = {"traces": tuple(map(evil_trace, texts)), "rows": (row, *results.rows[1:])}
        html = render([results.model_copy(update=changes)])
        return html, Page(html)

    texts = [whole(text)[:1000] for text in TEXTS]
    html, hostile = shown(texts)
    assert hostile.tags == shown(["x"] * len(texts))[1].tags
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)
    assert all(visible(text).strip() in hostile.text for text in texts)


def test_a_cell_can_not_break_its_table() -> None:
    table = Table("t", "n", ("a", "b"), (("x|y", "two\nlines"),))
    assert table.markdown().splitlines()[-1] == "| x\\|y | two lines |"
    table = Table("t", "n", ("a",), (("![x](http://evil/x.png)<b>`y`",),))
    assert table.markdown().splitlines()[-1] == "| !\\[x\\](http://evil/x.png)&lt;b>\\`y\\` |"


def test_light_dark_and_print(results: Results, tmp_path: Path) -> None:
    html = (tmp_path / "run" / "report.html").read_text()
    for part in ("color-scheme: light dark", "prefers-color-scheme: dark", "@media print"):
        assert part in html
    assert "currentColor" in html
    assert "#010203" not in html


Compared = Callable[[], list[Path]]


@pytest.fixture
def compared(run: Evaluate, tmp_path: Path) -> Compared:
    def make() -> list[Path]:
        one, other = tmp_path / "one", tmp_path / "other"
        run(one)
        run(other, recommenders={"popularity": {"kind": "trm"}, "markov": {"kind": "markov"}})
        return [one, other]

    return make


def test_runs_side_by_side(
    compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = compared()
    output = tmp_path / "both.html"
    monkeypatch.setattr(
        "sys.argv", ["deeprec", "eval-report", str(one), str(other), "--output", str(output)]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    page = Page(output.read_text())
    assert "Side by side" in page.text
    assert "Difference to one, ndcg@5" in page.text
    first, second = (Results.read(folder).rows[0] for folder in (one, other))
    gap = second.metrics["ndcg@5"].mean - first.metrics["ndcg@5"].mean
    assert f"{gap:+.3f} (p " in page.text
    assert "+0.000 (p 1.000)" in page.text  # the transitions are the same in both


def test_runs_of_different_data_are_not_compared(compared: Compared) -> None:
    one, other = compared()
    Results.read(other).model_copy(update={"fingerprint": "another"}).write(other)
    with pytest.raises(EvaluationError, match="they can't be compared"):
        report([one, other])


def test_runs_without_a_common_metric_are_not_compared(compared: Compared) -> None:
    one, other = compared()
    Results.read(other).model_copy(update={"metrics": ("mrr",)}).write(other)
    with pytest.raises(EvaluationError, match="has no ndcg@5"):
        report([one, other])


def test_lists_of_different_lengths_are_not_compared(compared: Compared) -> None:
    one, other = compared()
    Results.read(other).model_copy(update={"k": 6}).write(other)
    with pytest.raises(EvaluationError, match=r"other judges lists of 6, \S*one of 5: they can't"):
        report([one, other])


def damaged(folder: Path) -> None:
    (folder / "results.json").write_text("{}")


def without_users(folder: Path) -> None:
    (folder / "per_user.parquet").write_text("no parquet")


def gone(folder: Path) -> None:
    (folder / "results.json").unlink()


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (damaged, "results.json is damaged"),
        (without_users, "per_user.parquet can't be read"),
        (gone, "holds no finished evaluation"),
    ],
)
def test_what_can_not_be_read_is_told(
    run: Evaluate, tmp_path: Path, harm: Callable[[Path], Any], says: str
) -> None:
    run(tmp_path / "run")
    harm(tmp_path / "run")
    with pytest.raises(EvaluationError, match=says):
        report([tmp_path / "run"])


def test_p_values_in_words() -> None:
    assert [p_value(p) for p in (0.0004, 0.0321, 1.0)] == ["< .001", "0.032", "1.000"]
