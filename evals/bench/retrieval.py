"""The retriever under load: requests that arrive together beside one by one, and a lone one.

Reads a prepared workspace (`make demo` makes one). Every request is one that the retriever has not
seen, of a test user's history and with a preference of its own, but where caching is measured.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console

from ...settings import load_settings
from ...tools.retriever import RetrievalRequest, Retriever, ScoredItem
from ...tools.workspace import Workspace
from .command import OUTPUT, Figure, machine, run_benchmark, tell

_K = 10


def fresh_requests(workspace: Workspace) -> Iterator[RetrievalRequest]:
    """Requests without end, each with a preference that was not asked for before.

    A preference is two of the catalog's values and a number, so that its length is like an
    agent's.
    """
    values = sorted(
        {value for item in workspace.data.items for of in item.attributes.values() for value in of}
    )
    histories = itertools.cycle(workspace.histories(hold_out=True).values())
    for nth, history in enumerate(histories):
        one, other = values[nth % len(values)], values[(7 * nth + 3) % len(values)]
        yield RetrievalRequest(
            tuple(history), f"{one}; {other}; {nth}", k=_K, exclude=frozenset(history)
        )


def one_by_one(retriever: Retriever, requests: Sequence[RetrievalRequest]) -> float:
    """Requests a second where each waits for the one before."""
    began = time.perf_counter()
    for request in requests:
        retriever.submit(request).result()
    return len(requests) / (time.perf_counter() - began)


def together(retriever: Retriever, requests: Sequence[RetrievalRequest]) -> float:
    """Requests a second where all arrive at once."""
    began = time.perf_counter()
    retriever.retrieve(requests)
    return len(requests) / (time.perf_counter() - began)


def latency(
    answer: Callable[[RetrievalRequest], object], requests: Sequence[RetrievalRequest]
) -> float:
    """Median milliseconds of a lone request."""
    took = []
    for request in requests:
        began = time.perf_counter()
        answer(request)
        took.append(1000 * (time.perf_counter() - began))
    return median(took)


def main(
    concurrent: Annotated[int, typer.Option(min=2, help="Requests that arrive together.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Of each, in turns.")] = 5,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = OUTPUT,
) -> None:
    """Run the benchmark on the workspace of the settings."""
    console = Console()
    where = machine()
    workspace = Workspace(load_settings())
    asked = fresh_requests(workspace)

    def take(count: int) -> list[RetrievalRequest]:
        return list(itertools.islice(asked, count))

    with workspace.retriever as retriever:

        def unbatched(request: RetrievalRequest) -> object:
            """As the worker answers, without a queue or another thread."""
            future: Future[list[ScoredItem]] = Future()
            retriever._serve([(request, future)])
            return future.result()

        together(retriever, take(concurrent))  # warms up
        alone, company, lone, direct, cached = [], [], [], [], []
        for _ in range(rounds):
            alone.append(one_by_one(retriever, take(64)))
            company.append(together(retriever, take(concurrent)))
            lone.append(latency(lambda request: retriever.submit(request).result(), take(64)))
            direct.append(latency(unbatched, take(64)))
            again = take(64)
            retriever.retrieve(again)
            cached.append(latency(lambda request: retriever.submit(request).result(), again))
    figures = [
        Figure("one by one", median(alone), "requests/s"),
        Figure(f"{concurrent} together", median(company), "requests/s"),
        Figure(
            f"{concurrent} together to one by one",
            median(b / a for a, b in zip(alone, company, strict=True)),
            at_least=5,
        ),
        Figure("a lone request, p50", median(lone), "ms"),
        Figure(
            "the same to an unbatched one",
            median(a / b for a, b in zip(lone, direct, strict=True)),
            at_most=1.2,
        ),
        Figure("a repeated request, p50", median(cached), "ms"),
    ]
    details = {
        "items": len(workspace.data.items),
        "one_by_one": alone,
        "together": company,
        "lone_ms": lone,
        "unbatched_ms": direct,
        "repeated_ms": cached,
    }
    tell(console, output, "retrieval", figures, where=where, details=details)


if __name__ == "__main__":
    run_benchmark(main)
