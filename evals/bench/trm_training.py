"""Training speed of the TRM beside RecBole's SASRec: the same data, width and batch, in turns.

Reads a prepared workspace (`make demo` makes one) and RecBole's environment (`make recbole`). An
example is a target that is learned; RecBole learns each from the history, the TRM from the history
and again from history and preference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console

from ...settings import load_settings
from ...tools.trm.config import DeepRecConfig, FitConfig
from ...tools.trm.fit import fit
from ...tools.trm.preferences import PreferencePool
from ...tools.workspace import Workspace
from ..recbole.peer import PYTHON, run_recbole
from .command import OUTPUT, Figure, machine, run_benchmark, tell
from .pace import Pace

_PEER = "RecBole SASRec"
_DIM, _BATCH, _LENGTH, _LAYERS, _HEADS = 64, 1024, 20, 2, 2


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Epochs of each, in turns.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Of the CPU.")] = 2,
    python: Annotated[Path, typer.Option(help="Python of RecBole's environment.")] = PYTHON,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = OUTPUT,
) -> None:
    """Run the benchmark on the workspace of the settings."""
    console = Console()
    where = machine()
    workspace = Workspace(load_settings())
    data, split, text = workspace.data, workspace.split, workspace.item_embeddings
    torch.set_num_threads(threads)
    config = DeepRecConfig(dim=_DIM, history_length=_LENGTH, layers=_LAYERS, heads=_HEADS)
    with console.status("Embedding preferences"):
        pool = PreferencePool(
            data.items, text, split.train, workspace.encoder, history_length=_LENGTH
        )

    def ours(seed: int, *, preferences: bool) -> float:
        pace = Pace()
        fit(
            data,
            split,
            text,
            workspace.encoder,
            config,
            FitConfig(epochs=1, batch_size=_BATCH, preferences=preferences),
            seed=seed,
            pool=pool,
            progress=pace,
        )
        return pace.examples_per_second

    def theirs(seed: int) -> float:
        result = run_recbole(
            data,
            "SASRec",
            epochs=1,
            seed=seed,
            threads=threads,
            python=python,
            options={
                "hidden_size": _DIM,
                "inner_size": 4 * _DIM,
                "n_layers": _LAYERS,
                "n_heads": _HEADS,
                "MAX_ITEM_LIST_LENGTH": _LENGTH,
                "train_batch_size": _BATCH,
                "eval_batch_size": _BATCH,
            },
        )
        return result.examples / result.epoch_seconds[0]

    measures: dict[str, Callable[[int], float]] = {
        _PEER: theirs,
        "TRM without preferences": partial(ours, preferences=False),
        "TRM": partial(ours, preferences=True),
    }
    paces: dict[str, list[float]] = {name: [] for name in measures}
    for nth in range(rounds):
        for name, measure in measures.items():
            with console.status(f"Round {nth + 1} of {rounds}: {name}"):
                paces[name].append(measure(nth))
    details = {
        "workspace": workspace.settings.workspace,
        "threads": threads,
        "dim": _DIM,
        "batch_size": _BATCH,
        "examples_per_second": paces,
    }
    tell(console, output, "trm_training", figures(paces), where=where, details=details)


def figures(paces: Mapping[str, Sequence[float]]) -> list[Figure]:
    """The examples a second of each round, as medians, and to those of SASRec in the same round."""
    ratios = {
        name: [own / peer for own, peer in zip(values, paces[_PEER], strict=True)]
        for name, values in paces.items()
    }
    return [
        *(Figure(name, median(values), "examples/s") for name, values in paces.items()),
        *(
            Figure(f"{name} to SASRec", median(ratios[name]), at_least=2 if name == "TRM" else None)
            for name in paces
            if name != _PEER
        ),
    ]


if __name__ == "__main__":
    run_benchmark(main)
