"""A trajectory as people read it (rich): who wrote what, what the loss sees, what it earned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ..terminal import visible
from .trajectories import Piece, Rewards, Trajectory

if TYPE_CHECKING:
    from rich.console import RenderableType

_STYLE = {
    "prompt": "dim",
    "policy": "bold green",
    "guided": "cyan",
    "chat": "cyan",
    "forced": "yellow",
    "environment": "dim",
    "user": "bold",
}
_ROLE = {
    "prompt": "the request",
    "policy": "sampled by the policy, trained on",
    "guided": "sampled under a grammar, masked",
    "chat": "text of a chat model, never trained on",
    "forced": "written for the policy, masked",
    "environment": "written by the environment, masked",
    "user": "said by the user, masked",
}


def trajectory_lines(trajectory: Trajectory, *, prompt: bool = False) -> list[RenderableType]:
    """Return one trajectory: what it is, each span with its author, its turns' sum and rewards.

    Masked spans are told by their heading as well as by colour, so that they are visible in a
    file or on a terminal without colours. `prompt` shows the request's text too.
    """
    lines: list[RenderableType] = [Text(visible(trajectory.id), "bold"), _about(trajectory)]
    for piece in trajectory.pieces:
        lines.append(_heading(piece))
        if prompt or piece.author != "prompt":
            lines.append(Text(visible(piece.text.strip("\n")), _STYLE[piece.author]))
    return [*lines, Rule(style="dim"), *_verdict(trajectory)]


def overview(trajectories: Sequence[Trajectory]) -> Table:
    """Return a table of many trajectories, one line each."""
    table = Table(box=None, pad_edge=False)
    for name in ("trajectory", "stopped by", "searches", "tokens", "trained on", "broken rules"):
        table.add_column(name)
    table.add_column("reward", justify="right")
    for run in trajectories:
        table.add_row(
            Text(visible(run.id)),
            run.stop_reason,
            str(run.usage.retrievals),
            str(len(run.completion_ids)),
            f"{_share(run):.0%}",
            ", ".join(run.violations),
            _number(run.rewards.total),
        )
    return table


def _about(run: Trajectory) -> Text:
    sampling = f"temperature {run.settings.temperature:g}" if run.settings.temperature else "greedy"
    text = Text(style="dim")
    weights = visible(run.model_fingerprint[:12]) or "weights unknown"
    text.append(f"{visible(run.model)} [{weights}], ")
    text.append(f"{run.settings.decoding} decoding, {sampling}, ")
    text.append(f"settings [{run.settings_fingerprint[:12]}]\n")
    counts = Counter(run.authors)
    by_author = ", ".join(f"{count} {author}" for author, count in counts.items())
    text.append(f"{len(run.prompt_ids)} prompt tokens, then {by_author or 'none'}; ")
    return text.append(f"{_share(run):.0%} are trained on")


def _heading(piece: Piece) -> Rule:
    title = f"{piece.author} · {piece.tokens} tokens · {_ROLE[piece.author]}"
    return Rule(title, align="left", style="dim", characters="─")


def _verdict(run: Trajectory) -> list[RenderableType]:
    text = Text()
    text.append("stopped by   ", "dim").append(run.stop_reason + "\n")
    if run.failure:
        text.append("failed       ", "dim").append(visible(run.failure.detail) + "\n", "red")
    text.append("broken rules ", "dim")
    text.append(", ".join(run.violations) or "none", "red" if run.violations else "green")
    text.append("\nanswer       ", "dim")
    for at, item in enumerate(run.answer):
        text.append(" " if at else "")
        if item is None:
            text.append("(not retrieved)", "red")
        else:
            text.append(visible(item), "bold green" if item == run.target else "")
    text.append("\ntarget       ", "dim").append(visible(run.target or "unknown"))
    places = [
        f"search {turn} place {at}"
        for turn, said in enumerate(run.turns, 1)
        for at, item in enumerate(said.retrieved, 1)
        if item.id == run.target
    ]
    text.append(f" (retrieved: {', '.join(places) or 'never'})" if run.target else "", "dim")
    rewards = [
        f"{name} {_number(value)}"
        for name in Rewards.model_fields
        if (value := getattr(run.rewards, name)) is not None
    ]
    text.append("\nrewards      ", "dim").append(", ".join(rewards) or "not computed")
    return [text]


def _share(run: Trajectory) -> float:
    return sum(run.env_mask) / max(1, len(run.env_mask))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"
