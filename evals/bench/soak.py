"""Soak: thousands of guided runs on the real engine, some of them broken on purpose.

Is every run ended once, with its list or a reason? Does nothing hang, nothing leak? Reads a
prepared workspace (`make demo` makes one). Each run is a line of bench/soak/runs.jsonl in its
folder: a killed soak goes on with the runs that are missing. Writes soak.json and soak.md there.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import psutil
import typer
from pydantic import BaseModel, ConfigDict
from rich.console import Console

from ...configuration import keep_config, write_text
from ...errors import DeepRecError, EngineError
from ...graph.app import load_engine
from ...graph.build import build_graph
from ...graph.requests import parse_request
from ...graph.state import Limits, RecommendationRequest, RecommendationResponse, RunSettings
from ...settings import load_settings
from ...tools.workspace import Workspace
from .command import leave, machine, run_benchmark
from .soak_faults import (
    FAULTS,
    BreakableEncoder,
    Fault,
    Watched,
    WatchedEngine,
    WatchedRetriever,
    at_work,
)
from .soak_report import Ended, Journal, Memory, judge, report

if TYPE_CHECKING:
    from langgraph.graph.state import CompiledStateGraph

_SAMPLED_EVERY = 100  # runs
_HANGS_AFTER_S = 300.0
_LOST_AFTER_S = 20.0  # time budget of a run whose generation never ends
_MIB = 2**20

_SHORT = RunSettings(
    k=3,
    retrieve_n=4,
    history_length=2,
    list_attributes=False,
    answer_form="numbers",
    temperature=0.7,
    thought_tokens=4,
    limits=Limits(max_retrievals=1, min_retrievals=1),
)


class SoakConfig(BaseModel):
    """What a soak's folder was made with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runs: int
    concurrency: int
    fault_every: int
    model: str
    settings: RunSettings


def sample(process: int, runs: int) -> Memory:
    """Measure this process and its children now."""
    own = psutil.Process(os.getpid())
    children = sum(child.memory_info().rss for child in own.children(recursive=True))
    return Memory(
        process=process,
        runs=runs,
        own_mib=round(own.memory_info().rss / _MIB, 1),
        children_mib=round(children / _MIB, 1),
    )


def fault_of(run: int, every: int) -> Fault | None:
    """The last run of every `every` is broken, by each fault in turn."""
    return FAULTS[run // every % len(FAULTS)] if run % every == every - 1 else None


@dataclass
class Player:
    """Plays one run after another on a graph over watched parts."""

    graph: CompiledStateGraph[Any, Any, Any, Any]
    users: Sequence[str]
    histories: Mapping[str, Sequence[str]]
    every: int
    process: int
    hangs_after_s: float = _HANGS_AFTER_S

    async def play(self, run: int) -> Ended:
        """Play a run, and say how it ended. An error that is not DeepRec's is raised."""
        fault = fault_of(run, self.every)
        watched = Watched(fault)
        user = self.users[run % len(self.users)]
        at_work.set(watched)  # the task's own context: each worker plays one run at a time
        started = time.monotonic()
        answer: RecommendationResponse | None = None
        ended, why = "", None
        try:
            async with asyncio.timeout(self.hangs_after_s):
                answer = await self._answer(run, user, watched)
        except DeepRecError as error:
            ended, why = type(error).__name__, str(error)
        except asyncio.CancelledError:
            if fault != "cancelled":
                raise
            ended, why = "cancelled", "its caller went away"
        except TimeoutError:
            ended, why = "hang", f"it had not ended after {self.hangs_after_s:g} s"
        sound = accounted = True
        if answer is not None:
            failure = answer.failure
            ended, why = answer.stop_reason, failure.detail if failure else None
            listed = {line.id for line in answer.recommendations}
            seen = listed & set(self.histories[user])
            whole = len(answer.recommendations) == len(listed) == _SHORT.k and not seen
            sound = whole or (failure is not None and not answer.recommendations)
            got = (watched.generations, watched.retrievals)
            accounted = fault is not None or got == (
                answer.usage.generations,
                answer.usage.retrievals,
            )
        return Ended(
            run=run,
            process=self.process,
            user=user,
            fault=fault,
            ended=ended,
            why=why,
            sound=sound,
            accounted=accounted,
            seconds=round(time.monotonic() - started, 2),
        )

    async def _answer(self, run: int, user: str, watched: Watched) -> RecommendationResponse:
        request = _request(user, watched.fault)
        settings = _SHORT.model_copy(update={"seed": run})
        task = asyncio.create_task(self.graph.ainvoke(request, context=settings))
        if watched.fault == "cancelled":
            await watched.at_work.wait()
            await asyncio.sleep(0.2)  # vLLM has begun
            task.cancel()
        return RecommendationResponse.model_validate(await task)


def _request(user: str, fault: Fault | None) -> RecommendationRequest:
    if fault == "unknown_user":
        return parse_request(user_id=f"nobody-{user}")
    limits = {
        "hurried": {"time_budget_s": 0.2},
        "lost": {"time_budget_s": _LOST_AFTER_S},
        "no_room": {"max_total_tokens": 256},
    }
    given = limits.get(fault or "")
    return parse_request(user_id=user, limits=given) if given else parse_request(user_id=user)


async def play_all(
    player: Player,
    runs: Sequence[int],
    concurrency: int,
    add: Callable[[Ended | Memory], None],
) -> None:
    """Play these runs, `concurrency` at a time; memory is measured before, and every 100 runs."""
    left: Iterator[int] = iter(runs)
    done = 0
    add(sample(player.process, 0))

    async def work() -> None:
        nonlocal done
        for run in left:
            add(await player.play(run))
            done += 1
            if done % _SAMPLED_EVERY == 0:
                add(sample(player.process, done))

    await asyncio.gather(*(work() for _ in range(concurrency)))


class Busy(Protocol):
    """An engine that tells how much it is working on."""

    def unfinished(self) -> int:
        """Generations under way."""


def settled(engine: Busy, within_s: float = 30.0) -> int:
    """Generations that are still under way when the engine had time to drop those cancelled."""
    ends = time.monotonic() + within_s
    while (left := engine.unfinished()) and time.monotonic() < ends:
        time.sleep(0.2)
    return left


def main(
    runs: Annotated[int, typer.Option(min=1, help="Runs in all.")] = 2000,
    concurrency: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 32,
    fault_every: Annotated[int, typer.Option(min=2, help="Every how many runs one breaks.")] = 100,
    warm_up: Annotated[
        int,
        typer.Option(
            min=0,
            help="Runs of a process before its memory is compared. A CPU's KV cache is taken up as "
            "it is first used; a GiB of it is after some 500 runs.",
        ),
    ] = 600,
) -> None:
    """Soak the workspace of the settings; exits with 1 where a check fails."""
    console = Console()
    where = machine()
    workspace = Workspace(load_settings())
    folder = workspace.folder / "bench" / "soak"
    model = workspace.settings.model_name.rpartition("/")[2]
    config = SoakConfig(
        runs=runs,
        concurrency=concurrency,
        fault_every=fault_every,
        model=model,
        settings=_SHORT,
    )
    keep_config(config, folder, free=frozenset({"runs"}))
    journal = Journal(folder / "runs.jsonl")
    ended = {run.run for run in journal.runs}
    left = [run for run in range(runs) if run not in ended]
    if left:
        _soak(workspace, journal, left, concurrency, fault_every, console)
    checks = judge(journal.runs, journal.memory, wanted=runs, warm_up=warm_up)
    found = {
        **config.model_dump(mode="json"),
        "warm_up": warm_up,
        "checks": {name: {"found": said, "passed": ok} for name, (said, ok) in checks.items()},
        "memory": [each.model_dump() for each in journal.memory],
    }
    written = report(journal.runs, journal.memory, checks)
    write_text(leave(workspace, "soak", found, where=where) / "soak.md", written)
    console.print(written, markup=False, highlight=False, soft_wrap=True)
    if not all(ok for _, ok in checks.values()):
        raise typer.Exit(1)


def _soak(
    workspace: Workspace,
    journal: Journal,
    left: Sequence[int],
    concurrency: int,
    every: int,
    console: Console,
) -> None:
    """Play what is left, and keep how many generations are under way when all have ended."""
    encoder = BreakableEncoder(workspace.settings.encoder_name)
    histories = workspace.histories(hold_out=False)
    engine = load_engine(workspace.settings)
    if not hasattr(engine, "unfinished"):
        raise EngineError("a soak needs vLLM in process: set DEEPREC_ENGINE__KIND to vllm")
    with WatchedRetriever(workspace.trm, encoder, workspace.catalog) as retriever:
        graph = build_graph(WatchedEngine(engine), retriever, histories=histories)
        player = Player(graph, list(histories), histories, every, journal.process)
        began, before = time.monotonic(), len(journal.runs)

        def add(line: Ended | Memory) -> None:
            journal.add(line)
            if isinstance(line, Memory):
                minutes = (time.monotonic() - began) / 60
                ended = len(journal.runs) - before
                console.print(
                    f"{ended} of {len(left)} runs, {minutes:.1f} minutes, {line.total:.0f} MiB"
                )

        asyncio.run(play_all(player, left, concurrency, add))
        last = sample(journal.process, len(journal.runs) - before)
        journal.add(last.model_copy(update={"unfinished": settled(engine)}))
    engine.close()


if __name__ == "__main__":
    run_benchmark(main)
