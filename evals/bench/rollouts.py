"""Runs of the graph beside the same runs without LangGraph, and beside the lock-step schedule.

Reads a prepared workspace (`make demo` makes one); the policy is the shipped adapter, or the
settings' adapter. All play the same prompts with the same sampling seeds and limits, in turns and
with an empty prefix cache; turn lengths are those that the policy writes. Lock-step is played in
batches of runs, each to its end, and with all runs at once, where generations of one turn wait for
each other's places; the graph has as many runs, or generations, under way. What the graph adds to a
run is measured with an engine that says at once what was recorded, in CPU time of this process (the
LLM computes in another). Prefix reuse is what vLLM tells of each generation.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console

from ...errors import DeepRecError
from ...graph.app import run_settings, tuned_model
from ...graph.build import build_graph
from ...graph.engine.base import Engine
from ...graph.engine.vllm_inprocess import VLLMEngine
from ...graph.resources import Resources
from ...graph.state import RUN_KEYS, RunSettings
from ...graph.transcript import Segment, Transcript
from ...settings import load_settings
from ...tools.loading import keep_loaded
from ...tools.retriever import Retriever
from ...tools.workspace import Workspace
from .bare_loop import play, play_in_lock_step
from .command import OUTPUT, TRAINED, Figure, machine, run_benchmark, tell
from .idle_graph import idle_graph
from .replay import Call, Gate, Recorder, Replay

_GROUP, _GROUPS = 8, 4  # runs of one prompt; prompts

Run = tuple[Sequence[str], RunSettings]
Segments = list[list[Segment]]
Schedule = Callable[[Sequence[Run]], Coroutine[Any, Any, Segments]]


async def in_graph(graph: Any, runs: Sequence[Run], *, at_once: int | None = None) -> Segments:
    """Play runs in a compiled graph, all at once or `at_once` of them: as one ends one begins."""
    free = asyncio.Semaphore(at_once or len(runs))

    async def one(run: Run) -> list[Segment]:
        async with free:
            state = await _invoke(graph, run)
        return list(state["segments"])

    return list(await asyncio.gather(*(one(run) for run in runs)))


async def _invoke(graph: Any, run: Run, **given: Any) -> dict[str, Any]:
    history, settings = run
    state: dict[str, Any] = await graph.ainvoke(
        {"history": [f"id:{item}" for item in history], **given},
        context=settings,
        output_keys=list(RUN_KEYS),
    )
    return state


async def in_bare_loop(resources: Resources, runs: Sequence[Run]) -> Segments:
    """Play all runs at once without LangGraph."""
    played = await asyncio.gather(*(play(resources, *run) for run in runs))
    return [each.segments for each in played]


async def in_lock_step(
    resources: Resources, runs: Sequence[Run], *, at_once: int | None = None
) -> Segments:
    """Play runs turn by turn, all of them or in batches of `at_once`, one after the other."""
    played: Segments = []
    width = at_once or len(runs)
    for start in range(0, len(runs), width):
        histories, settings = zip(*runs[start : start + width], strict=True)
        ended = await play_in_lock_step(resources, histories, settings)
        played += [each.segments for each in ended]
    return played


def schedules(
    engine: Engine, retriever: Retriever, *, at_once: int | None = None
) -> dict[str, Schedule]:
    """All over one engine. What serves all runs, such as the compiled graph, is made here.

    With `at_once` no more runs than that are under way in the graph and in lock-step.
    """
    resources = Resources(engine, retriever.catalog, {}, retriever=retriever)
    return {
        "graph": partial(in_graph, build_graph(engine, retriever), at_once=at_once),
        "bare loop": partial(in_bare_loop, resources),
        "lock-step": partial(in_lock_step, resources, at_once=at_once),
    }


def timed(
    names: Sequence[str],
    engine: VLLMEngine,
    retriever: Retriever,
    runs: Sequence[Run],
    rounds: int,
    console: Console,
    *,
    at_once: int,
    whole_runs: bool = False,
) -> tuple[dict[str, list[dict[str, float]]], dict[str, Recorder]]:
    """For each named schedule what each of its rounds took, every other round in the other order,
    with at most `at_once` generations (or `whole_runs`) at a time; and what its last generated.
    """
    took: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    records: dict[str, Recorder] = {}
    for nth in range(rounds):
        for name in names[:: -1 if nth % 2 else 1]:
            records[name] = Recorder(engine)
            engine.forget_prefixes()
            play_all = (
                schedules(records[name], retriever, at_once=at_once)
                if whole_runs
                else schedules(Gate(records[name], at_once), retriever)
            )[name]
            began, cpu = time.perf_counter(), time.process_time()
            played = asyncio.run(play_all(runs))
            seconds = time.perf_counter() - began
            written = sum(Transcript(segments).count("policy") for segments in played)
            took[name].append(
                {
                    "seconds": seconds,
                    "trajectories_per_second": len(runs) / seconds,
                    "under_way": records[name].seconds / seconds,
                    "policy_tokens": written,
                    "tokens_per_second": written / seconds,
                    "cpu_ms_a_run": 1000 * (time.process_time() - cpu) / len(runs),
                }
            )
            console.print(f"  {name}, round {nth + 1}: {seconds:.1f} s", highlight=False)
    return took, records


def faster(
    took: Mapping[str, list[dict[str, float]]],
    one: str,
    other: str,
    *,
    by: str = "trajectories_per_second",
) -> float:
    """How many times as fast `one` is: the median over rounds, each against its neighbour."""
    pairs = zip(took[one], took[other], strict=True)
    return median(a[by] / b[by] for a, b in pairs)


def against_lock_step(
    took: Mapping[str, list[dict[str, float]]], how: str, bar: float
) -> list[Figure]:
    """What `timed` says of graph and lock-step; `how` tells what is under way at a time."""
    return [
        Figure(f"graph to lock-step, {how}", faster(took, "graph", "lock-step"), at_least=bar),
        Figure(
            "the same by tokens, as what is drawn depends on who shares a batch",
            faster(took, "graph", "lock-step", by="tokens_per_second"),
        ),
        *(
            Figure(
                f"generations under way on average, {name}",
                median(each["under_way"] for each in of_name),
            )
            for name, of_name in took.items()
        ),
    ]


def added_cpu(
    recorder: Recorder, retriever: Retriever, runs: Sequence[Run], rounds: int
) -> dict[str, float]:
    """Milliseconds of CPU a run, in the graph and without it, where the engine answers at once.

    "idle graph" is the graph's number of steps with nothing to do in them. Raises DeepRecError
    where graph and bare loop don't ask for the same generations, or write otherwise.
    """
    by_name = schedules(Replay(recorder), retriever)
    thoughts = [
        1 + sum(part["author"] == "environment" for part in segments)
        for segments in asyncio.run(by_name["graph"](runs))
    ]
    idle = idle_graph()

    async def in_idle_graph(runs: Sequence[Run]) -> None:
        await asyncio.gather(
            *(_invoke(idle, run, k=k) for run, k in zip(runs, thoughts, strict=True))
        )

    players = {
        "graph": by_name["graph"],
        "bare loop": by_name["bare loop"],
        "idle graph": in_idle_graph,
    }
    spent: dict[str, list[float]] = {name: [] for name in players}
    for _ in range(rounds + 1):
        written: dict[str, object] = {}
        for name, play_all in players.items():
            began = time.process_time()
            written[name] = asyncio.run(play_all(runs))
            spent[name].append(1000 * (time.process_time() - began) / len(runs))
        if written["graph"] != written["bare loop"]:
            raise DeepRecError("graph and bare loop wrote different transcripts")
    return {name: median(values[1:]) for name, values in spent.items()}  # the first warms up


def prefix_reuse(calls: Sequence[Call]) -> dict[str, float]:
    """How much of the prompts that go on from earlier generations was in the prefix cache.

    `of_prompts` is the share of all their tokens, `of_seen` that of the tokens which the engine had
    read or written before: a list that was just retrieved can't be there yet.
    """
    before = {(*call.request.prompt_ids, *call.said.ids) for call in calls}
    lengths = sorted({len(ids) for ids in before}, reverse=True)
    prompt = seen = cached = later = 0
    for call in calls:
        ids = tuple(call.request.prompt_ids)
        known = next((n for n in lengths if n <= len(ids) and ids[:n] in before), 0)
        if known:
            later += 1
            prompt, seen = prompt + len(ids), seen + known
            cached += call.said.cached_tokens or 0
    return {
        "generations": later,
        "prompt_tokens": prompt,
        "of_prompts": cached / prompt,
        "of_seen": cached / seen,
    }


def shared_prefill(calls: Sequence[Call]) -> float:
    """Share of the prompts' tokens, the first of each prompt left out, that was not read anew."""
    longest: dict[tuple[int, ...], list[Call]] = {}
    for call in calls:
        longest.setdefault(tuple(call.request.prompt_ids), []).append(call)
    groups = [group for group in longest.values() if len(group) == _GROUP]
    read = sum(len(ids) for ids, group in longest.items() if len(group) == _GROUP) * (_GROUP - 1)
    missed = sum(
        len(call.request.prompt_ids) - (call.said.cached_tokens or 0)
        for group in groups
        for call in group
    ) - sum(len(group[0].request.prompt_ids) for group in groups)
    return 1 - missed / read


def main(
    users: Annotated[int, typer.Option(min=2, help="Runs beside lock-step.")] = 96,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Of them, runs or generations at a time.")
    ] = 32,
    at_once: Annotated[int, typer.Option(min=2, help="Runs beside the bare loop.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Of each, in turns.")] = 2,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=16, help="Of one generation.")] = 160,
    lock_step_bar: Annotated[
        float, typer.Option(help="1.2 for 96 users on a CPU; 1.5 for 512 on a GPU.")
    ] = 1.2,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = OUTPUT,
) -> None:
    """Run the benchmark on the workspace of the settings."""
    console = Console()
    where = machine()
    settings = load_settings()
    settings = settings.model_copy(update={"adapter": settings.adapter or TRAINED})
    chosen = run_settings(
        settings,
        on_limit="fail",
        fill=False,
        temperature=temperature,
        limits={"max_new_tokens": max_new_tokens},
    )
    workspace = Workspace(settings)
    retriever = workspace.retriever
    histories = list(workspace.histories(hold_out=True).values())
    runs: list[Run] = [
        (history, chosen.model_copy(update={"seed": nth}))
        for nth, history in enumerate(histories[: max(users, at_once)])
    ]
    with console.status("Loading the LLM"):
        engine = VLLMEngine(
            tuned_model(settings),
            max_model_len=settings.engine.max_model_len,
            dtype=settings.engine.dtype,
            kv_cache_gib=settings.engine.kv_cache_gib,
            gpu_memory_utilization=settings.engine.gpu_memory_utilization,
            max_num_seqs=max(concurrency, at_once),
        )
    keep_loaded()  # as training does
    try:
        first = schedules(engine, retriever)["graph"](runs[:4])
        asyncio.run(first)  # the first generations are slow
        side, records = timed(
            ["graph", "bare loop"],
            engine,
            retriever,
            runs[:at_once],
            rounds,
            console,
            at_once=at_once,
        )
        cpu = added_cpu(records["graph"], retriever, runs[:at_once], 4 * rounds)
        groups = Recorder(engine)
        engine.forget_prefixes()
        same = [
            (history, chosen.model_copy(update={"seed": 1000 * nth + member}))
            for nth, (history, _) in enumerate(runs[:_GROUPS])
            for member in range(_GROUP)
        ]
        asyncio.run(schedules(groups, retriever)["graph"](same))
        beside_lock_step = partial(
            timed,
            ["graph", "lock-step"],
            engine,
            retriever,
            runs[:users],
            rounds,
            console,
            at_once=concurrency,
        )
        by_runs, _ = beside_lock_step(whole_runs=True)
        compared = {f"{users} runs, {concurrency} of them at a time": by_runs}
        if concurrency < users:
            by_generations, _ = beside_lock_step()
            compared[f"{users} runs at once, {concurrency} generations at a time"] = by_generations
    finally:
        engine.close()
        retriever.close()
    reuse = prefix_reuse(records["graph"].calls)
    pace = median(each["trajectories_per_second"] for each in side["graph"])
    tokens = median(each["tokens_per_second"] for each in side["graph"])
    figures = [
        Figure(f"graph, {at_once} runs at once", pace, "trajectories/s"),
        Figure("the same, tokens of the policy", tokens, "tokens/s"),
        Figure(
            f"graph to bare loop, {at_once} runs at once",
            faster(side, "graph", "bare loop"),
            at_least=0.97,
        ),
        *(
            figure
            for how, took in compared.items()
            for figure in against_lock_step(took, how, lock_step_bar)
        ),
        Figure("CPU of a run in the bare loop, engine apart", cpu["bare loop"], "ms"),
        Figure(
            "CPU that the graph adds to a run", cpu["graph"] - cpu["bare loop"], "ms", at_most=3
        ),
        Figure("LangGraph's own: as many steps that do nothing", cpu["idle graph"], "ms"),
        Figure(
            "prompt tokens after the first turn from the prefix cache",
            100 * reuse["of_prompts"],
            "%",
        ),
        Figure(
            "the same, of those that the engine had seen", 100 * reuse["of_seen"], "%", at_least=95
        ),
        Figure(
            f"prompts of groups of {_GROUP}, all but one from the cache",
            100 * shared_prefill(groups.calls),
            "%",
            at_least=95,
        ),
    ]
    details = {
        "settings": chosen.model_dump(mode="json"),
        "beside the bare loop": side,
        "beside lock-step": compared,
        "prefix reuse": reuse,
        "cpu_ms_a_run": cpu,
    }
    tell(console, output, "rollouts", figures, where=where, details=details)


if __name__ == "__main__":
    run_benchmark(main)
