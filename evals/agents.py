"""The agent as a recommender: the compiled graph, over the engine that its entry names."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EngineError, RequestError, SettingsError
from ..graph.app import load_engine, load_graph, run_settings
from ..graph.engine.adapter import ADAPTER_WEIGHTS
from ..graph.requests import parse_request
from ..graph.state import RecommendationResponse, RunSettings
from ..settings import Settings
from ..tools.workspace import Workspace
from .config import AgentEntry, EvalRun
from .store import Ranking
from .task import User

if TYPE_CHECKING:
    from langgraph.graph.state import CompiledStateGraph

    from ..graph.engine.base import Engine


class Agent:
    """Runs of a graph, at most `concurrency` at the same time; `graph` is asked for once."""

    def __init__(
        self, graph: Callable[[], CompiledStateGraph[Any, Any, Any, Any]], concurrency: int
    ) -> None:
        self._graph = graph
        self._concurrency = concurrency

    def recommend(self, users: Sequence[User]) -> Iterator[Ranking]:
        """See Recommender."""
        graph = self._graph()

        async def one(user: User) -> Ranking:
            try:
                answer = await graph.ainvoke(parse_request(user_id=user.id))
            except RequestError as error:
                return Ranking(user=user.id, items=(), failure=str(error))
            run = RecommendationResponse.model_validate(answer)
            return Ranking(
                user=user.id,
                items=tuple(line.id for line in run.recommendations),
                failure=run.failure.detail if run.failure else None,
                run=run,
            )

        return _as_finished(one, users, self._concurrency)


def agent_settings(settings: Settings, entry: AgentEntry, config: EvalRun) -> RunSettings:
    """How the entry's runs are made, in full.

    Raises RequestError for a malformed field, EngineError for an adapter that can't be read, and
    SettingsError where a run may retrieve more items than baselines list.
    """
    chosen = run_settings(_own(settings, entry), k=config.k, seed=config.seed, **entry.settings)
    most = chosen.limits.max_retrievals * chosen.retrieve_n
    if most > config.depth:
        raise SettingsError(
            f"a run may retrieve {most} items ({chosen.limits.max_retrievals} searches of "
            f"{chosen.retrieve_n}), and baselines list {config.depth}, too few to stand against "
            f"them: raise depth to {most}, or lower max_retrievals or retrieve_n"
        )
    return chosen


def policy_digest(settings: Settings, entry: AgentEntry) -> str:
    """Which LLM plays: its name, and the content of its adapter. Raises EngineError."""
    own = _own(settings, entry)
    if own.engine.kind == "chat":
        return own.engine.chat_model
    if own.adapter is None:
        return own.model_name
    try:
        with (own.adapter / ADAPTER_WEIGHTS).open("rb") as weights:
            digest = hashlib.file_digest(weights, "sha256").hexdigest()
    except OSError as error:
        raise EngineError(
            f"the adapter {own.adapter} can't be read: {error}. Give the `final` folder of a run "
            "with lora."
        ) from error
    return f"{own.model_name} + {digest}"


class Engines:
    """The engine in use: agents of one LLM share it, another one's takes its place."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._of: tuple[str, Path | None] | None = None
        self._engine: Engine | None = None

    def graph(
        self, entry: AgentEntry, settings: RunSettings
    ) -> CompiledStateGraph[Any, Any, Any, Any]:
        """Load what the entry's agent needs. Raises DeepRecError where a part is missing."""
        own = _own(self._workspace.settings, entry)
        wanted = (own.model_name, own.adapter)
        if self._engine is None or wanted != self._of:
            self.close()
            self._engine, self._of = load_engine(own), wanted
        return load_graph(self._workspace, settings, hold_out=True, engine=self._engine)

    def close(self) -> None:
        """Release the engine, if there is one."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def _own(settings: Settings, entry: AgentEntry) -> Settings:
    """The entry's LLM in the settings' place; an adapter of the settings' is not taken over."""
    return settings.model_copy(
        update={"model": entry.model or settings.model, "adapter": entry.adapter}
    )


def _as_finished(
    work: Callable[[User], Awaitable[Ranking]], users: Sequence[User], limit: int
) -> Iterator[Ranking]:
    """Results as they come, `limit` at work. What is left is cancelled when nobody asks on."""
    waiting = iter(users)
    running: set[asyncio.Future[Ranking]] = set()
    with asyncio.Runner() as runner:
        while True:
            for user in waiting:
                running.add(asyncio.ensure_future(work(user), loop=runner.get_loop()))
                if len(running) == limit:
                    break
            if not running:
                return
            done, running = runner.run(asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))
            for task in done:
                yield task.result()
