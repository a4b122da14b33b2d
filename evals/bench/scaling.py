"""What many users and large catalogs need, by arithmetic: docs/scaling.md shows and explains it.

A roofline: a decoding step reads weights and KV cache from memory and computes products, whatever
takes longer, and never takes less than the engine's own work of a step; reading prompts and
retrieved lists is bound by products. Memory and products reach a share of what the datasheet
promises (`efficiency`). Nothing here was measured but the tokens of a run and the CPU time beside
it: estimates to plan by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .command import run_benchmark

_DAY = 86_400  # seconds
_CACHE_SHARE = 0.9  # of a GPU's memory that weights and KV cache may take
_MOST_ROWS = 256  # sequences that vLLM decodes at once by default
_BUSY = 0.7  # of its throughput that a replica is planned for at the peak
_VECTOR, _TEXT, _FLOAT = 193, 384, 4  # numbers of a TRM vector, of a text embedding; bytes of one


@dataclass(frozen=True)
class Accelerator:
    """Datasheet figures: bytes/s of memory, dense 16-bit operations/s, bytes."""

    name: str
    bandwidth: float
    flops: float
    memory: float


@dataclass(frozen=True)
class Model:
    """A decoder-only LLM in 16 bits: what its weights and its KV cache take."""

    name: str
    parameters: float
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def weights(self) -> float:
        """Bytes."""
        return 2 * self.parameters

    @property
    def kv(self) -> float:
        """Bytes of cache that a token takes."""
        return 2 * 2.0 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Run:
    """Tokens of one run: read before the first one is written, written, read in between."""

    prompt: float
    written: float
    environment: float


H100 = Accelerator("H100 SXM", 3.35e12, 989e12, 80e9)
MODELS = (
    Model("SmolLM2-135M", 0.135e9, 30, 3, 64),
    Model("Qwen2.5-3B", 3.1e9, 36, 2, 128),
    Model("Qwen3-8B", 8.2e9, 36, 8, 128),
)


def rows_at_once(model: Model, run: Run, gpu: Accelerator) -> int:
    """How many runs a replica decodes together."""
    free = _CACHE_SHARE * gpu.memory - model.weights
    whole = run.prompt + run.written + run.environment
    return max(0, min(_MOST_ROWS, int(free / (model.kv * whole))))


def runs_per_second(
    model: Model, run: Run, gpu: Accelerator, efficiency: float, step_floor: float
) -> float:
    """What one replica does when it is full; 0 where the model does not fit.

    `step_floor` is the least time of a decoding step, in seconds.
    """
    rows = rows_at_once(model, run, gpu)
    if rows == 0:
        return 0.0
    context = run.prompt + (run.written + run.environment) / 2
    moved = (model.weights + rows * context * model.kv) / gpu.bandwidth
    computed = rows * 2 * model.parameters / gpu.flops
    step = max(max(moved, computed) / efficiency, step_floor)
    read = 2 * model.parameters * (run.prompt + run.environment) / (gpu.flops * efficiency)
    return 1 / (run.written * step / rows + read)


def replicas(users_a_day: float, per_second: float, peak: float) -> int:
    """Replicas for that many runs a day, `peak` times as many a second at the busiest hour."""
    return max(1, math.ceil(users_a_day / _DAY * peak / (per_second * _BUSY)))


def search_seconds(items: float, memory_bandwidth: float) -> float:
    """Seconds of one exact search: every vector is read once."""
    return items * _VECTOR * _FLOAT / memory_bandwidth


def main(
    prompt: Annotated[float, typer.Option(help="Tokens of a prompt.")] = 376,
    written: Annotated[float, typer.Option(help="Tokens that a run's LLM writes.")] = 216,
    environment: Annotated[float, typer.Option(help="Tokens of its retrieved lists.")] = 275,
    efficiency: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the datasheet's figures.")
    ] = 0.3,
    step_floor: Annotated[
        float, typer.Option(min=0, help="Least seconds of a decoding step of 256 rows.")
    ] = 0.01,
    cpu: Annotated[
        float, typer.Option(help="CPU seconds of a run in the graph's process, vLLM's front too.")
    ] = 0.09,
    price: Annotated[float, typer.Option(help="Of a GPU hour, dollars.")] = 3.0,
    peak: Annotated[float, typer.Option(min=1, help="Busiest hour over the mean.")] = 3.0,
    host_bandwidth: Annotated[
        float, typer.Option(help="Bytes/s that a host reads from memory.")
    ] = 100e9,
) -> None:
    """Print what GPUs serve and what users need."""
    console = Console()
    run = Run(prompt, written, environment)
    console.print(f"\n{H100.name}, {efficiency:.0%} of its datasheet, runs of {run}\n")
    gpus, users = (1, 8, 64), (1e4, 1e6, 1e8)
    served = Table(
        *("LLM", "runs at once", "runs/s a GPU", "cores beside it"),
        *(f"users a day, {n}" for n in gpus),
    )
    needed = Table("LLM", *(f"{n:.0e} users a day" for n in users))
    for model in MODELS:
        per_second = runs_per_second(model, run, H100, efficiency, step_floor)
        if per_second == 0:
            served.add_row(model.name, "such a run does not fit")
            continue
        a_day = per_second * _BUSY * _DAY / peak
        counts = [replicas(n, per_second, peak) for n in users]
        costs = [c * price * 24 / n * 1000 for c, n in zip(counts, users, strict=True)]
        served.add_row(
            model.name,
            str(rows_at_once(model, run, H100)),
            f"{per_second:.1f}",
            f"{per_second * cpu:.1f}",
            *(f"{n * a_day:.1e}" for n in gpus),
        )
        needed.add_row(
            model.name,
            *(f"{c} GPU, ${d:.3g} per 1,000" for c, d in zip(counts, costs, strict=True)),
        )
    catalog = Table("items", "vectors, GiB", "text embeddings, GiB", "an exact search, ms")
    for items in (1e4, 1e6, 1e8):
        catalog.add_row(
            f"{items:.0e}",
            f"{items * _VECTOR * _FLOAT / 2**30:.2f}",
            f"{items * _TEXT * _FLOAT / 2**30:.2f}",
            f"{1000 * search_seconds(items, host_bandwidth):.3g}",
        )
    for table in (served, needed, catalog):
        console.print(table)


if __name__ == "__main__":
    run_benchmark(main)
