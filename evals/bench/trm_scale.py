"""How fitting the TRM grows with the catalog: memory and speed on made-up data.

Each catalog is fitted for one epoch in a process of its own, so that its peak memory is its own.
Items stand in categories, a user stays in one or moves on to the next; text embeddings are random,
since embedding a million texts would be timed instead. Writes trm_scale.json into the workspace's
folder `bench`; the sentence encoder is that of the settings.
"""

from __future__ import annotations

import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from ...settings import load_settings
from ...tools.interactions import InteractionData, Item, leave_one_out
from ...tools.text_encoder import TextEncoder
from ...tools.trm.config import DeepRecConfig, FitConfig
from ...tools.trm.fit import fit
from ...tools.workspace import Workspace
from .command import leave, machine, run_benchmark
from .pace import Pace

_CATEGORIES, _LENGTH, _STAYS = 200, 20, 0.8


def made_up(n_items: int, n_users: int, seed: int = 0) -> InteractionData:
    """Users of 20 interactions each over items in 200 categories."""
    rng = np.random.default_rng(seed)
    items = tuple(
        Item(f"i{n}", f"item {n}", {"category": (f"category {n % _CATEGORIES}",)})
        for n in range(n_items)
    )
    moves = rng.random((n_users, _LENGTH)) > _STAYS
    category = (rng.integers(_CATEGORIES, size=(n_users, 1)) + moves.cumsum(1)) % _CATEGORIES
    within = rng.integers(n_items // _CATEGORIES, size=category.shape)
    return InteractionData(
        name=f"made up, {n_items:,} items",
        items=items,
        user_ids=tuple(f"u{n}" for n in range(n_users)),
        users=np.repeat(np.arange(n_users, dtype=np.int32), _LENGTH),
        item_indices=(within * _CATEGORIES + category).ravel().astype(np.int32),
        times=np.tile(np.arange(_LENGTH, dtype=np.int64), n_users),
    )


def measure(n_items: int, n_users: int, threads: int, encoder_name: str) -> dict[str, float]:
    """Fit one epoch; gives seconds, speed and peak memory of this process."""
    torch.set_num_threads(threads)
    data = made_up(n_items, n_users)
    encoder = TextEncoder(encoder_name)
    rng = np.random.default_rng(0)
    text = rng.standard_normal((n_items, encoder.dim), dtype=np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    pace = Pace()
    began = time.perf_counter()
    fit(
        data,
        leave_one_out(data),
        text,
        encoder,
        DeepRecConfig(),
        FitConfig(epochs=1, valid_users=1000),
        progress=pace,
    )
    return {
        "items": n_items,
        "seconds": time.perf_counter() - began,
        "examples_per_second": pace.examples_per_second,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2,
        "text_gib": text.nbytes / 1024**3,
    }


def main(
    items: Annotated[list[int] | None, typer.Option(min=1000, help="Sizes of catalogs.")] = None,
    users: Annotated[int, typer.Option(min=100, help="Made-up users.")] = 10_000,
    threads: Annotated[int, typer.Option(min=1, help="Of the CPU.")] = 2,
) -> None:
    """Run the benchmark."""
    console = Console()
    where = machine()
    workspace = Workspace(load_settings())
    rows = []
    for size in items or [10_000, 100_000, 1_000_000]:
        with (
            console.status(f"{size:,} items"),
            ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart,
        ):
            encoder = workspace.settings.encoder_name
            rows.append(apart.submit(measure, size, users, threads, encoder).result())
    report = {
        "users": users,
        "threads": threads,
        "rows": rows,
    }
    folder = leave(workspace, "trm_scale", report, where=where)
    table = Table("items", "seconds in all", "examples/s", "peak memory, GiB", "of it texts, GiB")
    for row in rows:
        table.add_row(
            f"{row['items']:,}",
            f"{row['seconds']:.0f}",
            f"{row['examples_per_second']:,.0f}",
            f"{row['peak_gib']:.1f}",
            f"{row['text_gib']:.1f}",
        )
    console.print(table)
    console.print(f"Written to {folder}", soft_wrap=True)


if __name__ == "__main__":
    run_benchmark(main)
