"""The agent over test users: is every list valid, does it obey the protocol, how good, how fast.

Reads a prepared workspace (`make demo` makes one). Writes agent-<decoding>.json and .md into the
workspace's folder `bench`. Every user counts: a run that fails is a failure in the table.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from ...configuration import write_text
from ...errors import RequestError
from ...graph.app import load_graph, run_settings
from ...graph.fusion import reciprocal_rank_fusion
from ...graph.requests import parse_request
from ...graph.state import Failure, RecommendationResponse, Usage
from ...settings import load_settings
from ...tools.retriever import RetrievalRequest
from ...tools.trm.scoring import ndcg
from ...tools.workspace import Workspace
from ..agent_figures import is_strict
from .command import leave, run_benchmark

if TYPE_CHECKING:
    from langgraph.graph.state import CompiledStateGraph

_NOWHERE = 1_000_000
_TOLD_EVERY = 5  # users, where no bar can be drawn


def measure(
    responses: Mapping[str, RecommendationResponse],
    histories: Mapping[str, Sequence[str]],
    known: frozenset[str],
    *,
    k: int,
    seconds: float,
) -> dict[str, Any]:
    """Figures over all users; a list counts as valid when it holds K distinct catalog items,
    none of them from the history. Invented are answer lines that name nothing retrieved, strict
    are runs that end by themselves and break no format rule.
    """

    def valid(user: str, response: RecommendationResponse) -> bool:
        ids = {line.id for line in response.recommendations}
        return len(response.recommendations) == len(ids) == k and not (
            ids & set(histories[user]) or ids - known
        )

    every = list(responses.values())
    tokens = sum(r.usage.written_tokens for r in every)
    named = [line for r in every for line in r.answer]
    broken = Counter(rule for r in every for rule in r.violations)
    return {
        "users": len(every),
        "valid_lists": mean(valid(user, response) for user, response in responses.items()),
        "strict_format": mean(is_strict(r) for r in every),
        "failures": sum(r.failure is not None for r in every),
        "retrievals_mean": mean(r.usage.retrievals for r in every),
        "retrievals_min": min(r.usage.retrievals for r in every),
        "answer_lines": len(named),
        "invented_titles": named.count(None),
        "repeated_lines": sum(_repeated(r.answer) for r in every),
        "broken_rules": dict(sorted(broken.items())),
        "lines_by_source": _counted(line.source for r in every for line in r.recommendations),
        "stop_reasons": _counted(r.stop_reason for r in every),
        "seconds": round(seconds, 1),
        "llm_tokens_per_second": round(tokens / seconds, 1),
        "llm_tokens_per_user": round(tokens / len(every), 1),
    }


def ranks(
    lists: Mapping[str, Sequence[str | None]], targets: Mapping[str, str]
) -> NDArray[np.int64]:
    """Zero-based rank of each user's target in the user's list; far beyond it where absent."""
    shown = {user: list(lists[user]) for user in targets}
    return np.array(
        [
            shown[user].index(target) if target in shown[user] else _NOWHERE
            for user, target in targets.items()
        ],
        dtype=np.int64,
    )


def judge(
    responses: Mapping[str, RecommendationResponse],
    alone: Mapping[str, Sequence[str]],
    targets: Mapping[str, str],
    k: int,
) -> dict[str, float]:
    """NDCG at k of the answers as written (strict), as served, of the agent's retrieved lists
    fused, and of the TRM alone; and the share of targets that any of its lists held.
    """
    strict = {user: r.answer if is_strict(r) else [] for user, r in responses.items()}
    served = {user: [line.id for line in r.recommendations] for user, r in responses.items()}
    lists = {
        user: [[item.id for item in turn.retrieved] for turn in r.turns]
        for user, r in responses.items()
    }
    fused = {user: reciprocal_rank_fusion(found) for user, found in lists.items()}
    named: dict[str, Mapping[str, Sequence[str | None]]]
    named = {"strict": strict, "served": served, "fused_lists": fused, "trm_alone": alone}
    return {
        **{f"ndcg@{k}_{name}": ndcg(ranks(shown, targets), k) for name, shown in named.items()},
        "target_retrieved": mean(targets[user] in found for user, found in fused.items()),
    }


def _repeated(answer: Sequence[str | None]) -> int:
    found = [item for item in answer if item is not None]
    return len(found) - len(set(found))


def _counted(values: Any) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


async def run_users(
    graph: CompiledStateGraph[Any, Any, Any, Any],
    users: Sequence[str],
    concurrency: int,
    console: Console,
) -> dict[str, RecommendationResponse]:
    """Recommend for every user, at most `concurrency` at the same time."""
    gate = asyncio.Semaphore(concurrency)
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as bars:
        task = bars.add_task("Users", total=len(users))

        async def one(user: str) -> RecommendationResponse:
            async with gate:
                try:
                    answer = await graph.ainvoke(parse_request(user_id=user))
                    response = RecommendationResponse.model_validate(answer)
                except RequestError as error:
                    response = _unanswered(str(error))
            bars.advance(task)
            state = bars.tasks[0]
            if not console.is_terminal and state.completed % _TOLD_EVERY == 0:
                minutes = (state.elapsed or 0) / 60
                console.print(f"{state.completed:.0f} of {len(users)} users, {minutes:.1f} minutes")
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
    concurrency: Annotated[
        int, typer.Option(min=1, help="Runs at the same time. The KV cache should hold them all.")
    ] = 16,
    decoding: Annotated[str | None, typer.Option(help="guided or free.")] = None,
    answer_form: Annotated[str | None, typer.Option(help="titles or numbers.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature; 0 is greedy.")
    ] = None,
    retrieve_n: Annotated[int | None, typer.Option(help="Items that one search returns.")] = None,
    history_length: Annotated[int | None, typer.Option(help="History that the LLM reads.")] = None,
    max_retrievals: Annotated[int | None, typer.Option(help="Most searches of a run.")] = None,
) -> None:
    """Run the benchmark on the workspace of the settings.

    What is not given comes from the adapter in use, or is guided, titles, temperature 0.7, lists
    and histories of 10.
    """
    console = Console()
    workspace = Workspace(load_settings())
    settings = run_settings(
        workspace.settings,
        {"temperature": 0.7, "retrieve_n": 10, "history_length": 10, "thought_tokens": 48},
        decoding=decoding,
        answer_form=answer_form,
        temperature=temperature,
        retrieve_n=retrieve_n,
        history_length=history_length,
        seed=0,
        limits={} if max_retrievals is None else {"max_retrievals": max_retrievals},
    )
    with console.status("Loading"):
        graph = load_graph(workspace, settings, hold_out=True)
    histories = workspace.histories(hold_out=True)
    split, data = workspace.split, workspace.data
    targets = {
        name: data.items[int(split.test[at])].id
        for at, name in enumerate(data.user_ids)
        if split.test[at] >= 0
    }
    targets = dict(list(targets.items())[:users])
    started = time.monotonic()
    responses = asyncio.run(run_users(graph, list(targets), concurrency, console))
    seconds = time.monotonic() - started
    known = frozenset(workspace.catalog.ids)
    figures = measure(responses, histories, known, k=settings.k, seconds=seconds)
    figures |= judge(
        responses, _alone(workspace, histories, targets, settings.k), targets, settings.k
    )
    report = {
        "model": workspace.settings.model_name.rpartition("/")[2],
        "adapter": workspace.settings.adapter and _two_names(workspace.settings.adapter),
        "settings": settings.model_dump(mode="json"),
        "concurrency": concurrency,
        "figures": figures,
    }
    rows = [f"| {name} | {_shown(value)} |" for name, value in figures.items()]
    table = "\n".join(["| figure | value |", "| --- | --- |", *rows])
    folder = leave(workspace, f"agent-{settings.decoding}", report)
    write_text(folder / f"agent-{settings.decoding}.md", table + "\n")
    for name, value in figures.items():
        console.print(f"{name:<24}{_shown(value)}", highlight=False)
    console.print(f"Written to {folder}", soft_wrap=True)


def _alone(
    workspace: Workspace,
    histories: Mapping[str, Sequence[str]],
    targets: Mapping[str, str],
    k: int,
) -> dict[str, list[str]]:
    """The TRM's own lists of k, without a preference."""
    requests = [
        RetrievalRequest(
            history=tuple(histories[user]), k=k, exclude=frozenset(histories[user]) - {target}
        )
        for user, target in targets.items()
    ]
    found = workspace.retriever.retrieve(requests)
    return {user: [item.id for item in items] for user, items in zip(targets, found, strict=True)}


def _two_names(folder: Path) -> str:
    """Last two names of an adapter's folder: the last alone is mostly `final`."""
    return "/".join(folder.resolve().parts[-2:])


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_benchmark(main)
