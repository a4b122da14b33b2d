"""Exact search and HNSW as the catalog grows: latency, memory, recall, and where each wins.

Reads a prepared workspace (`make demo` makes one). Larger catalogs are made of its item vectors,
each moved by noise, and searched for its users' vectors, so that they are clustered as trained
vectors are. Each size is measured in a process of its own. An exact search reads every vector once:
its time is told beside the time that this machine takes to read as many bytes. Filling Chroma takes
minutes at 100,000 items and far longer at a million, hence `--hnsw-items`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console

from ...settings import load_settings
from ...tools import search
from ...tools.catalog import Catalog, CatalogSettings, Fingerprint
from ...tools.interactions import Item
from ...tools.search import Allowed
from ...tools.trm.scoring import history_vectors
from ...tools.workspace import Workspace
from .command import OUTPUT, Figure, machine, run_benchmark, tell

_K, _QUERIES, _BATCH = 10, 256, 64
_NOISE = 0.3  # of the spread of a vector's entries over the items


def grown(vectors: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """`[size, dim]`: rows of `vectors`, each moved by noise of its own."""
    rng = np.random.default_rng(0)
    spread = (_NOISE * vectors.std(axis=0)).astype(np.float32)
    made = rng.standard_normal((size, vectors.shape[1]), dtype=np.float32)
    made *= spread
    made += vectors[rng.integers(len(vectors), size=size)]
    return made


def exact(size: int, vectors: NDArray[np.float32], users: NDArray[np.float32]) -> dict[str, float]:
    """Milliseconds of an exact search, alone and in a batch, and of reading as many bytes."""
    matrix = torch.from_numpy(grown(vectors, size))
    asked = torch.from_numpy(users)
    everything = [Allowed(size)]

    def one(nth: int) -> None:
        row = nth % len(asked)
        search.scores(asked[row : row + 1], matrix, everything).topk(_K, dim=1)

    def batch(nth: int) -> None:
        for part in search.chunks(_BATCH, size):
            rows = asked[:_BATCH][part]
            search.scores(rows, matrix, everything * len(rows)).topk(_K, dim=1)

    rounds = 20 if size >= 500_000 else 100
    read = _milliseconds(lambda _: matrix.view(-1).sum(), rounds)
    return {
        "one_ms": _milliseconds(one, rounds),
        "batch_ms": _milliseconds(batch, max(3, rounds // 10)) / _BATCH,
        "read_ms": read,
        "gib_per_second": matrix.nbytes / 2**30 / (read / 1000),
        "gib": matrix.nbytes / 2**30,
    }


def hnsw(size: int, vectors: NDArray[np.float32], users: NDArray[np.float32]) -> dict[str, float]:
    """Milliseconds of a search in a Chroma catalog by HNSW, its recall of the exact list, seconds
    to fill it, and how much memory the process grew by when it was opened.
    """
    import psutil

    made = grown(vectors, size)
    items = [Item(f"i{n}", f"item {n}", {}) for n in range(size)]
    texts = np.random.default_rng(1).standard_normal((size, 2), dtype=np.float32)
    asked = torch.from_numpy(users)
    with tempfile.TemporaryDirectory() as folder:
        settings = CatalogSettings(folder=Path(folder) / "chroma", search="hnsw")
        began = time.perf_counter()
        Catalog.build(
            settings, items, texts, made, fingerprint=Fingerprint("bench", "bench", "bench")
        ).close()
        filled = time.perf_counter() - began
        before = psutil.Process().memory_info().rss
        with Catalog.open(settings) as catalog:
            now, everything = catalog.snapshot, Allowed(size)

            def one(nth: int) -> None:
                row = nth % len(asked)
                catalog.candidates(now, [asked[row : row + 1]], _K, [everything])

            took = _milliseconds(one, 100)
            batch = _milliseconds(
                lambda _: catalog.candidates(now, [asked[:_BATCH]], _K, [everything] * _BATCH), 5
            )
            grew = psutil.Process().memory_info().rss - before
            found = catalog.candidates(now, [asked], _K, [everything] * len(asked))
            if found.positions is None:
                raise RuntimeError("HNSW was not asked")
            best = found.positions.gather(1, found.scores[0].topk(_K, dim=1).indices)
            true = [
                search.scores(user[None], now.matrix, [everything]).topk(_K, dim=1).indices[0]
                for user in asked
            ]
            recall = fmean(
                len(set(one_.tolist()) & set(other.tolist())) / _K
                for one_, other in zip(best, true, strict=True)
            )
    return {
        "one_ms": took,
        "batch_ms": batch / _BATCH,
        "recall": recall,
        "fill_seconds": filled,
        "grew_gib": grew / 2**30,
    }


def _milliseconds(work: Callable[[int], object], rounds: int) -> float:
    work(0)
    took = []
    for nth in range(rounds):
        began = time.perf_counter()
        work(nth)
        took.append(1000 * (time.perf_counter() - began))
    return median(took)


def _apart(function: Callable[..., dict[str, float]], *given: Any) -> dict[str, float]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def break_even(
    by_exact: dict[int, dict[str, float]], by_hnsw: dict[int, dict[str, float]]
) -> float:
    """Items from which a lone HNSW search is quicker, by the straight line through the exact
    searches of the two largest catalogs; HNSW's time grows hardly, so its last is taken.
    """
    (n, first), (m, last) = sorted(by_exact.items())[-2:]
    slope = (last["one_ms"] - first["one_ms"]) / (m - n)
    _, largest = max(by_hnsw.items())
    return max(0.0, n + (largest["one_ms"] - first["one_ms"]) / slope)


def main(
    items: Annotated[list[int] | None, typer.Option(min=2000, help="Sizes of catalogs.")] = None,
    hnsw_items: Annotated[
        list[int] | None, typer.Option(min=2000, help="Sizes of those in Chroma.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = OUTPUT,
) -> None:
    """Run the benchmark on the workspace of the settings."""
    console = Console()
    where = machine()
    workspace = Workspace(load_settings())
    with workspace.catalog as catalog:
        vectors, texts = np.array(catalog.vectors), np.array(catalog.text_embeddings)
    split = workspace.split
    histories = [split.test_history(user) for user in range(min(_QUERIES, len(split.test)))]
    users = history_vectors(workspace.trm, histories, texts).numpy()
    by_exact, by_hnsw = {}, {}
    sizes: Sequence[int] = items or [10_000, 100_000, 1_000_000]
    for size in sizes:
        with console.status(f"{size:,} items, exact"):
            by_exact[size] = _apart(exact, size, vectors, users)
    for size in hnsw_items or [10_000, 100_000]:
        with console.status(f"{size:,} items, HNSW"):
            by_hnsw[size] = _apart(hnsw, size, vectors, users)
    figures = []
    for size, row in by_exact.items():
        bar = 2 if size == max(sizes) else None
        figures += [
            Figure(f"exact, {size:,} items, one request", row["one_ms"], "ms"),
            Figure(f"exact, {size:,} items, each of {_BATCH} together", row["batch_ms"], "ms"),
            Figure(
                f"exact, {size:,} items, one request to reading the matrix once",
                row["one_ms"] / row["read_ms"],
                at_most=bar,
            ),
            Figure(f"matrix of {size:,} items", row["gib"], "GiB"),
        ]
    for size, row in by_hnsw.items():
        figures += [
            Figure(f"HNSW, {size:,} items, one request", row["one_ms"], "ms"),
            Figure(f"HNSW, {size:,} items, each of {_BATCH} together", row["batch_ms"], "ms"),
            Figure(f"HNSW, {size:,} items, recall of the exact ten", row["recall"]),
            Figure(f"catalog of {size:,} items in memory", row["grew_gib"], "GiB"),
            Figure(f"filling Chroma with {size:,} items", row["fill_seconds"], "s"),
        ]
    if len(by_exact) > 1 and by_hnsw:
        figures.append(
            Figure("items from which HNSW is quicker for one", break_even(by_exact, by_hnsw))
        )
    details = {"exact": by_exact, "hnsw": by_hnsw, "dim": vectors.shape[1]}
    tell(console, output, "search_scale", figures, where=where, details=details)


if __name__ == "__main__":
    run_benchmark(main)
