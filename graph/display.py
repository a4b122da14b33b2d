"""A run as people read it: turns, retrieved titles, the list and who wrote its lines (rich)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from ..terminal import visible
from .state import Failure, Recommendation, RecommendationResponse, Turn

if TYPE_CHECKING:
    from rich.console import RenderableType

_SOURCE = {
    "policy": ("policy", "green"),
    "guided": ("guided", "cyan"),
    "head": ("head", "green"),
    "fused": ("filled (fused lists)", "yellow"),
    "trm": ("filled (TRM alone)", "yellow"),
}
_SHOWN = 5


def history_lines(titles: Sequence[str]) -> Text:
    """Return the end of a history, on a few lines."""
    shown = titles[-8:]
    more = f"… {len(titles) - len(shown)} more, then " if len(titles) > len(shown) else ""
    return Text(f"History, oldest first: {more}{visible(' → '.join(shown))}", style="dim")


def turn_lines(turn: Turn, number: int, *, target: str | None = None) -> Text:
    """One turn: thought, preference, and the best retrieved titles.

    The item `target`, if retrieved, is shown with its place.
    """
    text = Text()
    text.append(f"Turn {number}\n" if turn.preference or turn.refused else "Last thought\n", "bold")
    text.append("  thought     ", "dim").append(visible(turn.thought or "(none)") + "\n")
    if turn.preference:
        text.append("  preference  ", "dim").append(visible(turn.preference), "magenta")
        text.append(" (the user's)\n" if turn.asked_by == "user" else "\n", "dim")
    if turn.refused:
        text.append("  refused     ", "dim").append(visible(turn.refused) + "\n", "red")
    if turn.retrieved:
        titles = [visible(item.title) for item in turn.retrieved]
        more = f" … ({len(titles)} in all)" if len(titles) > _SHOWN else ""
        text.append("  retrieved   ", "dim").append(" · ".join(titles[:_SHOWN]) + more + "\n")
        places = [at for at, item in enumerate(turn.retrieved, 1) if item.id == target]
        if places:
            text.append(f"  the held-out item came back at place {places[0]}\n", "green")
    return text


def recommendation_table(
    recommendations: Sequence[Recommendation], *, target: str | None = None
) -> Table:
    """Show the ranked list with the source of each line, and why where that is known; the item
    `target` is marked.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("#", justify="right", style="dim")
    table.add_column("Recommendation")
    table.add_column("Written by")
    table.add_column("TRM score", justify="right", style="dim")
    for line in recommendations:
        label, style = _SOURCE[line.source]
        hit = line.id == target
        title = Text(
            visible(line.title) + ("  ← held out" if hit else ""), "bold green" if hit else ""
        )
        if line.reason:
            title.append(f"\n{visible(line.reason)}", "dim")
        table.add_row(
            str(line.rank),
            title,
            Text(label, style),
            "" if line.score is None else f"{line.score:.3f}",
        )
    return table


def summary_line(response: RecommendationResponse) -> Text:
    """How the run ended and what it cost."""
    usage = response.usage
    text = Text(
        f"{usage.retrievals} retrievals, {usage.written_tokens} tokens "
        f"written by the LLM in {usage.generations} calls, {usage.seconds:.1f} s; thinking ended: "
        f"{response.stop_reason}",
        style="dim",
    )
    return text.append(failure_text(response.failure)) if response.failure else text


def failure_text(failure: Failure) -> Text:
    """Why a run has no answer of the policy's own."""
    return Text(f"\nThe list is not the LLM's: {visible(failure.detail)}", style="red")


def response_lines(
    response: RecommendationResponse, *, trace: bool, target: str | None = None
) -> list[RenderableType]:
    """Return a whole response, with its turns where `trace` asks for them."""
    turns = response.turns if trace else []
    understood = [
        Text(f"Understood {wish.wish!r} as {wish.means}", "dim")
        for wish in response.understood_wishes
    ]
    return [
        *understood,
        *(turn_lines(turn, number, target=target) for number, turn in enumerate(turns, 1)),
        recommendation_table(response.recommendations, target=target),
        summary_line(response),
    ]
