"""`deeprec demo`: the whole set-up and the main job, told as it happens.

Each step is skipped where an earlier run left its result, so a second demo is quick.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from .errors import DeepRecError
from .graph.app import load_engine, load_graph, run_settings
from .graph.display import history_lines, recommendation_table, summary_line, turn_lines
from .graph.requests import parse_request
from .graph.state import RecommendationResponse, Turn
from .terminal import visible
from .tools.assets import ensure_assets
from .tools.progress import counted, trm_progress
from .tools.retriever import RetrievalRequest
from .tools.workspace import Workspace

SHIPPED_ADAPTER = Path(__file__).parent / "training" / "adapters" / "stage2_ml100k"
"""Teaches the demo's LLM the protocol: its runs need no grammar."""

_SETTINGS = {
    "retrieve_n": 8,
    "temperature": 0.7,
    "thought_tokens": 32,
    "limits": {"max_retrievals": 4},
}


def run_demo(workspace: Workspace, console: Console, *, users: int, seed: int) -> None:
    """Prepare what is missing, then recommend for the first `users` test users.

    The demo's own LLM comes with the shipped adapter; another LLM is guided by a grammar.
    Raises DeepRecError where a step can't be done.
    """
    workspace = _with_adapter(workspace)
    with ThreadPoolExecutor(max_workers=1) as beside:
        # With nothing to train, the LLM can load while the other parts do.
        early = workspace.is_complete()
        loading = beside.submit(load_engine, workspace.settings) if early else None
        set_up(workspace, console)
        with console.status("Loading the LLM in vLLM (about a minute on a CPU)"):
            engine = loading.result() if loading else load_engine(workspace.settings)
    settings = run_settings(workspace.settings, _SETTINGS, seed=seed)
    graph = load_graph(workspace, settings, hold_out=True, engine=engine)
    split = workspace.split
    data = workspace.data
    tested = [user for user in range(len(data.user_ids)) if split.test[user] >= 0][:users]
    _head(
        console,
        f"\n4. The agent recommends for {len(tested)} test users",
        "(their last item is held out; "
        + (
            "the LLM was shown how to search and rank, and writes everything by itself)"
            if settings.decoding == "free"
            else "the LLM is untuned, so its searches and its list are kept valid by a grammar)"
        ),
    )
    asyncio.run(_show(graph, workspace, console, tested))
    _what_next(workspace, console)


def _with_adapter(workspace: Workspace) -> Workspace:
    settings = workspace.settings
    own = settings.model is None and settings.engine.kind != "server"
    if not own or settings.adapter is not None:
        return workspace
    return Workspace(settings.model_copy(update={"adapter": SHIPPED_ADAPTER}))


def set_up(workspace: Workspace, console: Console) -> None:
    """Make the demo's data, TRM and catalog where they are missing."""
    from .tools.trm.config import DeepRecConfig, FitConfig

    _head(console, "1. Models and data", f"(kept in {workspace.settings.home})")
    ensure_assets(
        workspace.settings.assets_dir,
        notify=lambda message: console.print(f"  {message}", style="dim"),
    )
    if not workspace.dataset_dir.exists():
        workspace.prepare(workspace.settings.assets_dir / "ml-100k", format="recbole")
    data = workspace.data
    console.print(
        f"  {visible(data.name)}, 5-core: {len(data.user_ids)} users, {len(data.items)} items, "
        f"{len(data.users):,} interactions",
        style="dim",
    )
    _head(console, "2. The recommendation model")
    if workspace.trm_dir.exists():
        console.print("  trained by an earlier run", style="dim")
    else:
        with counted(console, "embedding items") as embedded:
            workspace.embed_items(progress=embedded)
        with trm_progress(console) as progress:
            workspace.train_trm(DeepRecConfig(), FitConfig(), progress=progress)
    _head(console, "3. The catalog in Chroma")
    if workspace.has_catalog():
        console.print("  filled by an earlier run", style="dim")
    else:
        with counted(console, "filling the catalog") as progress:
            workspace.index(progress=progress)
        console.print(f"  {len(data.items)} items with text, attributes and vectors", style="dim")


def _head(console: Console, title: str, more: str = "") -> None:
    console.print(Text.assemble((title, "bold"), " ", more))


async def _show(
    graph: Any, workspace: Workspace, console: Console, tested: list[int]
) -> list[RecommendationResponse]:
    """Run all users at once, and tell them one after another, each turn as it comes."""
    queues: list[asyncio.Queue[dict[str, Any] | None]] = [asyncio.Queue() for _ in tested]

    async def run(user: int, queue: asyncio.Queue[dict[str, Any] | None]) -> None:
        try:
            request = parse_request(user_id=workspace.data.user_ids[user])
            async for update in graph.astream(request, stream_mode="updates"):
                await queue.put(update)
        finally:
            await queue.put(None)

    try:
        async with asyncio.TaskGroup() as group:
            for user, queue in zip(tested, queues, strict=True):
                group.create_task(run(user, queue))
            told = [
                await _tell(workspace, console, user, queue)
                for user, queue in zip(tested, queues, strict=True)
            ]
    except* DeepRecError as errors:
        raise _first(errors) from errors
    return [response for response in told if response is not None]


def _first(errors: BaseExceptionGroup[DeepRecError]) -> DeepRecError:
    inner = errors.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


async def _tell(
    workspace: Workspace,
    console: Console,
    user: int,
    queue: asyncio.Queue[dict[str, Any] | None],
) -> RecommendationResponse | None:
    """Print a run as it comes; None where it ends without a response."""
    data = workspace.data
    target = data.items[int(workspace.split.test[user])].id
    shown = workspace.catalog.display_title
    history = [shown(data.items[index].id) for index in workspace.split.test_history(user)]
    console.rule(Text(f"User {visible(data.user_ids[user])}"), align="left")
    console.print(history_lines(history))
    turns: list[Turn] = []
    response: RecommendationResponse | None = None
    update = await queue.get()
    while update is not None:
        update.pop("read_request", None)
        for values in update.values():
            for raw in values.get("turns", ()):
                turns.append(Turn.model_validate(raw))
                console.print(turn_lines(turns[-1], len(turns), target=target))
            if "recommendations" in values:
                fields = {key: values[key] for key in _RESPONSE_FIELDS if key in values}
                response = RecommendationResponse.model_validate(fields | {"turns": turns})
        update = await queue.get()
    if response is None:
        return None
    console.print(recommendation_table(response.recommendations, target=target))
    console.print(summary_line(response))
    console.print(_where_it_stands(workspace, response, user, target))
    return response


_RESPONSE_FIELDS = tuple(RecommendationResponse.model_fields)


def _where_it_stands(
    workspace: Workspace, response: RecommendationResponse, user: int, target: str
) -> Text:
    """Where the held-out item is: in the list, among the retrieved, and for the TRM alone."""
    title = workspace.catalog.display_title(target)
    listed = [line.rank for line in response.recommendations if line.id == target]
    found = [
        number
        for number, turn in enumerate(response.turns, 1)
        if any(item.id == target for item in turn.retrieved)
    ]
    alone = _rank_alone(workspace, user, target)
    text = Text("Held out: ").append(title, "bold")
    text.append(f" is {f'number {listed[0]}' if listed else 'not'} in the list; ")
    text.append(f"{f'found in turn {found[0]}' if found else 'found in no turn'}; ")
    return text.append(f"the TRM alone, without any preference, ranks it {alone}.\n")


def _rank_alone(workspace: Workspace, user: int, target: str) -> int:
    """Place of the held-out item in the TRM's list of all eligible items, without preference."""
    ids = [workspace.data.items[index].id for index in workspace.split.test_history(user)]
    seen = frozenset(ids) - {target}
    eligible = workspace.catalog.snapshot.allowed(seen).count
    request = RetrievalRequest(history=tuple(ids), preference=None, k=eligible, exclude=seen)
    (ranked,) = workspace.retriever.retrieve([request])
    return [item.id for item in ranked].index(target) + 1


def _what_next(workspace: Workspace, console: Console) -> None:
    console.rule("What to try next", align="left")
    adapter = workspace.settings.adapter
    served = (
        f"  export DEEPREC_ADAPTER={adapter}    # for the LLM as shown above\n" if adapter else ""
    )
    console.print(
        '  .venv/bin/deeprec recommend "Toy Story" "Babe" "Aladdin" --trace\n'
        '  .venv/bin/deeprec recommend --user 1 --filters \'{"genres": ["Comedy"]}\' --json\n'
        "  make studio     # watch the loop in LangGraph Studio\n"
        f"{served}"
        f"  rm -r {workspace.settings.home}    # forget everything that the demo made",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
