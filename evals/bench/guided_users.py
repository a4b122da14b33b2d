"""Guided runs over test users: does every run end with a valid list, and how fast.

Reads a prepared workspace (`make demo` makes one). Writes guided_users.json and .md into the
workspace's folder `bench`. Every user counts: a run that fails is a failure in the table.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from ...errors import RequestError
from ...graph.app import load_graph
from ...graph.requests import parse_request, parse_settings
from ...graph.state import Failure, RecommendationResponse, Usage
from ...settings import load_settings
from ...terminal import run_app
from ...tools.workspace import Workspace

if TYPE_CHECKING:
    from langgraph.graph.state import CompiledStateGraph

_SETTINGS = {"retrieve_n": 10, "temperature": 0.7, "thought_tokens": 48}


def measure(
    responses: Mapping[str, RecommendationResponse],
    histories: Mapping[str, Sequence[str]],
    known: frozenset[str],
    *,
    k: int,
    seconds: float,
) -> dict[str, Any]:
    """Figures over all users; a list counts as valid when it holds K distinct catalog items,
    none of them from the history. Invented are answer lines that name nothing retrieved.
    """

    def valid(user: str, response: RecommendationResponse) -> bool:
        ids = {line.id for line in response.recommendations}
        return len(response.recommendations) == len(ids) == k and not (
            ids & set(histories[user]) or ids - known
        )

    tokens = sum(r.usage.policy_tokens + r.usage.guided_tokens for r in responses.values())
    sources = [line.source for r in responses.values() for line in r.recommendations]
    return {
        "users": len(responses),
        "valid_lists": mean(valid(user, r) for user, r in responses.items()),
        "failures": sum(r.failure is not None for r in responses.values()),
        "retrievals_mean": mean(r.usage.retrievals for r in responses.values()),
        "retrievals_min": min(r.usage.retrievals for r in responses.values()),
        "invented_titles": sum(r.answer.count(None) for r in responses.values()),
        "lines_by_source": {source: sources.count(source) for source in sorted(set(sources))},
        "stop_reasons": {
            reason: sum(r.stop_reason == reason for r in responses.values())
            for reason in sorted({r.stop_reason for r in responses.values()})
        },
        "seconds": round(seconds, 1),
        "llm_tokens_per_second": round(tokens / seconds, 1),
        "llm_tokens_per_user": round(tokens / len(responses), 1),
    }


async def run_users(
    graph: CompiledStateGraph[Any, Any, Any, Any],
    users: Sequence[str],
    concurrency: int,
    console: Console,
) -> dict[str, RecommendationResponse]:
    """Recommend for every user, at most `concurrency` at the same time."""
    gate = asyncio.Semaphore(concurrency)
    with Progress(console=console) as bars:
        task = bars.add_task("users", total=len(users))

        async def one(user: str) -> RecommendationResponse:
            async with gate:
                try:
                    answer = await graph.ainvoke(parse_request(user_id=user))
                    response = RecommendationResponse.model_validate(answer)
                except RequestError as error:
                    response = _unanswered(str(error))
            bars.advance(task)
            return response

        answers = await asyncio.gather(*(one(user) for user in users))
    return dict(zip(users, answers, strict=True))


def _unanswered(why: str) -> RecommendationResponse:
    """A request that was refused counts like a run that failed."""
    return RecommendationResponse(
        recommendations=[],
        turns=[],
        answer=[],
        violations=[],
        stop_reason="no_answer",
        failure=Failure(reason="no_answer", detail=why),
        usage=Usage(),
    )


def main(
    users: Annotated[int, typer.Option(min=1, help="Test users.")] = 100,
    concurrency: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 32,
    min_retrievals: Annotated[int, typer.Option(min=0, help="Searches before it may stop.")] = 2,
    max_retrievals: Annotated[int, typer.Option(min=1, help="Most searches.")] = 4,
) -> None:
    """Run the benchmark on the workspace of the settings."""
    console = Console()
    workspace = Workspace(load_settings())
    limits = {"min_retrievals": min_retrievals, "max_retrievals": max_retrievals}
    settings = parse_settings(**_SETTINGS, seed=0, limits=limits)
    with console.status("Loading"):
        graph = load_graph(workspace, settings, hold_out=True)
    histories = workspace.histories(hold_out=True)
    tested = [
        name
        for index, name in enumerate(workspace.data.user_ids)
        if workspace.split.test[index] >= 0
    ][:users]
    started = time.monotonic()
    responses = asyncio.run(run_users(graph, tested, concurrency, console))
    known = frozenset(workspace.catalog.ids)
    figures = measure(responses, histories, known, k=settings.k, seconds=time.monotonic() - started)
    report = {
        "date": date.today().isoformat(),
        "machine": {
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "model": workspace.settings.model_name.rpartition("/")[2],
        "settings": settings.model_dump(mode="json"),
        "concurrency": concurrency,
        "figures": figures,
    }
    folder = workspace.folder / "bench"
    folder.mkdir(exist_ok=True)
    rows = [f"| {name} | {value} |" for name, value in figures.items()]
    _replace(folder / "guided_users.json", json.dumps(report, indent=2) + "\n")
    _replace(
        folder / "guided_users.md", "\n".join(["| figure | value |", "| --- | --- |", *rows]) + "\n"
    )
    for name, value in figures.items():
        console.print(f"{name:<24}{value}", highlight=False)
    console.print(f"Written to {folder}", soft_wrap=True)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    run_app(app)
