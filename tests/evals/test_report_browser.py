"""The report in a real browser: it asks for nothing, opens its traces, is readable and prints."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console

from deeprec.evals import agents
from deeprec.evals.evaluate import evaluate
from deeprec.evals.report import report
from deeprec.evals.results import Results
from deeprec.tools.workspace import Workspace

from ..graph.conftest import ScriptedEngine
from .conftest import WARM_UP, Evaluate, config
from .test_agents import AGENT, GOOD, INVENTS, OUTAGE, REPEATS, SMALL

_CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
pytestmark = pytest.mark.skipif(
    _CHROMIUM is None, reason="no Chromium on the path (Debian: apt-get install chromium)"
)


@pytest.fixture(scope="module")
def file(place: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of an evaluation with every kind of run."""
    folder = tmp_path_factory.mktemp("browser") / "run"
    engine = ScriptedEngine([*WARM_UP, *GOOD, *REPEATS, *OUTAGE, *INVENTS], 8192)
    entries = {**AGENT, "markov": {"kind": "markov"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agents, "load_engine", lambda _: engine)
        evaluate(config(folder, **{**SMALL, "recommenders": entries}), place, Console(quiet=True))
    return folder / "report.html"


@pytest.fixture(scope="module")
def results(file: Path) -> Results:
    return Results.read(file.parent)


@pytest.fixture(scope="module")
def browser(file: Path) -> Iterator[Browser]:
    # After `file`: Playwright's loop runs in this thread, where agents' runs need one of their own.
    with sync_playwright() as playwright:
        # Root, as in containers, has no sandbox of Chromium's.
        own = playwright.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        yield own
        own.close()


Open = Callable[..., Page]


@pytest.fixture
def open_(browser: Browser) -> Iterator[Open]:
    """Open a file; at the end of the test nothing may have been asked for or complained about."""
    trouble: list[str] = []
    pages: list[Page] = []

    def go(file: Path, scheme: Literal["light", "dark"] = "light", width: int = 1200) -> Page:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        own = file.as_uri()
        page.on("console", lambda message: trouble.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
        page.on("request", lambda r: r.url == own or trouble.append(f"request: {r.url}"))
        page.goto(own)
        pages.append(page)
        return page

    yield go
    for page in pages:
        page.close()
    assert trouble == []


def test_tables_and_charts_are_there(open_: Open, file: Path, results: Results) -> None:
    page = open_(file)
    head = page.locator("table").first.locator("thead th").all_inner_texts()
    assert head == ["recommender", *results.metrics, "difference", "p"]
    labels = page.locator("table").first.locator("tbody th").all_inner_texts()
    assert labels == [row.label for row in results.rows]
    for chart in page.locator("svg").all():
        box = chart.bounding_box()
        assert box is not None
        assert box["width"] > 300
        assert box["height"] > 100
    assert page.locator("svg text", has_text="target among the candidates").is_visible()


def test_a_trace_opens_by_a_click(open_: Open, file: Path, results: Results) -> None:
    page = open_(file)
    told = next(trace for trace in results.traces if trace.outcome != "failed" and trace.turns)
    shown = page.locator("details.trace", has_text=f"user {told.user},")
    turn = told.turns[0]
    thought = shown.get_by_text(turn.thought, exact=True).first
    asked = shown.locator(".preference", has_text=turn.preference or "").first
    listed = shown.locator(".items li", has_text=turn.retrieved[0].title).first
    for part in (thought, asked, listed):
        assert not part.is_visible()
    shown.locator("summary").click()
    for part in (thought, asked, listed):
        assert part.is_visible()
    assert shown.locator(".items").last.locator("li").count() == len(told.list)


def test_a_hit_stands_out(open_: Open, file: Path, results: Results) -> None:
    page = open_(file)
    hits = [t for t in results.traces if any(i.hit for turn in t.turns for i in turn.retrieved)]
    assert hits
    shown = page.locator("details.trace", has_text=f"user {hits[0].user},")
    shown.locator("summary").click()
    mark = shown.locator("mark").first
    assert mark.is_visible()
    assert mark.inner_text() == hits[0].target
    around = mark.locator("xpath=..")
    colour = "node => getComputedStyle(node).backgroundColor"
    assert mark.evaluate(colour) != around.evaluate(colour)


def test_traces_are_chosen_by_outcome(open_: Open, file: Path, results: Results) -> None:
    page = open_(file)
    outcome = results.traces[0].outcome
    page.get_by_label(outcome, exact=True).check()
    visible = [one for one in page.locator("details.trace").all() if one.is_visible()]
    assert len(visible) == sum(trace.outcome == outcome for trace in results.traces)
    assert len(visible) < len(results.traces)
    page.get_by_label("all", exact=True).check()
    assert all(one.is_visible() for one in page.locator("details.trace").all())


def test_runs_stand_side_by_side(open_: Open, run: Evaluate, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        run(folder, recommenders={"markov": {"kind": "markov"}})
    both = tmp_path / "both.html"
    both.write_text(report(folders))
    page = open_(both)
    beside = page.locator("section.table", has=page.get_by_role("heading", name="ndcg@5")).first
    heads = beside.locator("thead th")
    assert heads.all_inner_texts() == ["recommender", "one", "two"]
    boxes = [head.bounding_box() for head in heads.all()[1:]]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] < boxes[1]["x"]


def contrast(page: Page, where: str) -> float:
    """WCAG's ratio of an element's text to the page behind it."""

    def luminance(selector: str, name: str) -> float:
        get = "(node, name) => getComputedStyle(node)[name]"
        rgb = page.locator(selector).first.evaluate(get, name)
        parts = [int(part) / 255 for part in rgb.strip("rgba()").split(",")[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    text, ground = luminance(where, "color"), luminance("body", "backgroundColor")
    return (max(text, ground) + 0.05) / (min(text, ground) + 0.05)


def test_light_and_dark_are_readable(open_: Open, file: Path) -> None:
    light, dark = open_(file, "light"), open_(file, "dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    assert light.evaluate(ground) != dark.evaluate(ground)
    for page in (light, dark):
        for where in ("p", ".note", "td", "td small", "svg"):
            assert contrast(page, where) >= 4.5  # WCAG AA


def test_a_narrow_window_scrolls_tables_alone(open_: Open, file: Path) -> None:
    page = open_(file, width=400)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    first = page.locator("table").first.locator("xpath=..")
    assert first.evaluate("node => node.scrollWidth > node.clientWidth")


def test_it_prints(open_: Open, file: Path) -> None:
    page = open_(file)
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.emulate_media(media="print")
    assert not page.locator(".filter").is_visible()
    assert page.locator("details.trace .thought").first.is_visible()  # though nobody opened it
