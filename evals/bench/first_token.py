"""How soon a client of the server sees something: the first text of a run, the first that the LLM
sampled, the first list, the answer.

Needs a running server (`make studio`). Runs are made one after the other, each for another user of
the workspace, so that no run is helped by the one before it more than users help each other. A
guided thought opens with words that are given, and come before the LLM has read the prompt; the
first sampled text is what comes after them. Writes first-token.json into the workspace's folder
`bench`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from statistics import median
from typing import Annotated, Any

import typer
from langgraph_sdk import get_client
from rich.console import Console
from rich.table import Table

from ...errors import EvaluationError
from ...settings import load_settings
from ...tools.workspace import Workspace
from .command import leave, machine, run_benchmark

GRAPH = "deeprec"
MOMENTS = ("accepted", "request read", "first text", "first sampled", "first list", "answer")
"""What a client can see of a run, in this order: the server names the run; read_request has ended;
the first piece of the thought; the second, which in guided decoding is the first sampled one; the
first retrieved list; the end."""


async def watch(client: Any, user: str, context: dict[str, Any]) -> dict[str, float]:
    """Seconds from a user's request to each of MOMENTS. Raises EvaluationError where it fails."""
    began = time.perf_counter()
    seen: dict[str, float] = {}
    stream = client.runs.stream(
        None, GRAPH, input={"user_id": user}, context=context, stream_mode=["custom", "tasks"]
    )
    async for part in stream:
        if part.event == "error":
            raise EvaluationError(f"the run of user {user!r} failed: {part.data}")
        moment = _moment(part, seen)
        if moment is not None:
            seen.setdefault(moment, time.perf_counter() - began)
    seen["answer"] = time.perf_counter() - began
    return seen


def _moment(part: Any, seen: dict[str, float]) -> str | None:
    if part.event == "metadata":
        return "accepted"
    if part.event == "tasks" and part.data["name"] == "read_request" and "result" in part.data:
        return "request read"
    if part.event == "custom" and "thought" in part.data:
        return "first sampled" if "first text" in seen else "first text"
    return "first list" if part.event == "custom" and "retrieved" in part.data else None


def summary(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, least and most seconds of each moment, over the runs that had it."""
    table = {}
    for moment in MOMENTS:
        times = [run[moment] for run in runs if moment in run]
        if times:
            table[moment] = {"median": median(times), "least": min(times), "most": max(times)}
    return table


async def _all(url: str, users: Sequence[str], context: dict[str, Any]) -> list[dict[str, float]]:
    client = get_client(url=url)
    return [await watch(client, user, context) for user in users]


def main(
    url: Annotated[str, typer.Option(help="Address of the server.")] = "http://127.0.0.1:2024",
    runs: Annotated[int, typer.Option(min=1, help="Runs, one after the other.")] = 12,
    k: Annotated[int, typer.Option(min=1, help="Items of a list.")] = 10,
) -> None:
    """Measure what a client of the server waits for."""
    where = machine()
    workspace = Workspace(load_settings())
    users = [*workspace.histories(hold_out=False)][:runs]
    context = {"k": k, "limits": {"max_retrievals": 1, "min_retrievals": 1}}
    measured = asyncio.run(_all(url, users, context))
    told = summary(measured)
    table = Table("until", "median s", "least", "most", box=None)
    for moment, seconds in told.items():
        table.add_row(moment, *(f"{seconds[name]:.2f}" for name in ("median", "least", "most")))
    Console().print(table)
    found = {"context": context, "seconds": told, "runs": measured}
    leave(workspace, "first-token", found, where=where)


if __name__ == "__main__":
    run_benchmark(main)
