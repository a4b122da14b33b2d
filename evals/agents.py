"""The agent as a recommender: the compiled graph, over the engine that its entry names."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EngineError, RequestError, SettingsError
from ..graph.app import load_engine, run_settings
from ..graph.build import build_graph
from ..graph.engine.adapter import ADAPTER_WEIGHTS
from ..graph.r2ec.build import build_r2ec_graph, r2ec_settings
from ..graph.r2ec.head import head_digest, model_of_head
from ..graph.r2ec.ranker import HeadRanker
from ..graph.requests import parse_request
from ..graph.state import RecommendationResponse, RunSettings
from ..settings import Settings
from ..tools.retriever import RetrievalRequest, Retriever, ScoredItem
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
            wishes = [user.wish.words] if user.wish.words else []
            try:
                answer = await graph.ainvoke(parse_request(user_id=user.id, wishes=wishes))
            except RequestError as error:
                return Ranking(user=user.id, items=(), failure=str(error))
            run = RecommendationResponse.model_validate(answer)
            return Ranking(
                user=user.id,
                items=() if run.failure else tuple(line.id for line in run.recommendations),
                failure=run.failure.detail if run.failure else None,
                run=run,
            )

        before = time.monotonic()  # the engine is loaded
        with closing(_as_finished(one, users, self._concurrency)) as answers:
            for ranking in answers:
                now = time.monotonic()
                yield ranking.model_copy(update={"seconds": now - before})
                before = now


def agent_settings(settings: Settings, entry: AgentEntry, config: EvalRun) -> RunSettings:
    """How the entry's runs are made, in full.

    Raises RequestError for a malformed field, EngineError for an adapter that can't be read, and
    SettingsError where a run may retrieve more items than baselines list.
    """
    own = _own(settings, entry)
    given = {"k": config.k, "seed": config.seed, **entry.settings}
    if entry.kind == "r2ec":
        return r2ec_settings(own, **given)
    chosen = run_settings(own, **given)
    most = chosen.limits.max_retrievals * chosen.retrieve_n
    if most > config.depth:
        raise SettingsError(
            f"a run may retrieve {most} items ({chosen.limits.max_retrievals} searches of "
            f"{chosen.retrieve_n}), and baselines list {config.depth}, too few to stand against "
            f"them: raise depth to {most}, or lower max_retrievals or retrieve_n"
        )
    return chosen


def check_one_llm(settings: Settings, entries: Iterable[AgentEntry]) -> None:
    """Raise SettingsError where entries name several LLMs and the engine has but one, whichever
    they name.
    """
    kind = settings.engine.kind
    if kind not in ("server", "chat"):
        return
    named = {(own.model_name, own.adapter) for own in (_llm(settings, each) for each in entries)}
    if len(named) > 1:
        raise SettingsError(
            f"the agents name {len(named)} LLMs, by model, adapter or head, and an engine of kind "
            f"{kind!r} plays the one that it has: evaluate each by a configuration and an output "
            "of its own, or set DEEPREC_ENGINE__KIND to vllm"
        )


def policy_digest(settings: Settings, entry: AgentEntry) -> str:
    """Which LLM plays, and which head ranks: names, and the content of adapter and head. A server
    says itself what it plays.

    Raises EngineError, HeadError.
    """
    own = _own(settings, entry)
    if entry.head is not None:
        llm = policy_digest(settings, entry.model_copy(update={"head": None}))
        return f"{llm}, head {head_digest(entry.head)}"
    if own.engine.kind == "chat":
        return own.engine.chat_model
    if own.engine.kind == "server":
        from ..graph.engine.vllm_server import served_model

        return served_model(own.engine.url, api_key=own.engine.api_key or None).name
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


class BlindRetriever(Retriever):
    """Searches by the history alone, whatever preference it is given."""

    def submit(self, request: RetrievalRequest) -> Future[list[ScoredItem]]:
        """See Retriever."""
        return super().submit(replace(request, preference=None))


class Engines:
    """The engine in use: agents of one LLM share it, another one's takes its place."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._of: tuple[str, Path | None] | None = None
        self._engine: Engine | None = None
        self._ranker: HeadRanker | None = None

    def graph(
        self, entry: AgentEntry, settings: RunSettings
    ) -> CompiledStateGraph[Any, Any, Any, Any]:
        """Load what the entry's agent needs, and have it answer once: what it costs afterwards is
        the same at every place of the configuration. Raises DeepRecError where a part is missing.
        """
        agent, engine = self._loaded(entry, settings)
        user = next(iter(self._workspace.histories(hold_out=True)))
        with suppress(RequestError):  # a user who can't be served is a miss when asked for, no more
            asyncio.run(agent.ainvoke(parse_request(user_id=user)))  # the first run is a slow one
        engine.forget_prefixes()  # of this run, and of the agents before
        return agent

    def _loaded(
        self, entry: AgentEntry, settings: RunSettings
    ) -> tuple[CompiledStateGraph[Any, Any, Any, Any], Engine]:
        workspace = self._workspace
        self._release_ranker()
        if entry.head is not None:
            own = _own(workspace.settings, entry)
            self._ranker = HeadRanker.load(own, entry.head, workspace.catalog)
        own = _llm(workspace.settings, entry)
        wanted = (own.model_name, own.adapter)
        if self._engine is None or wanted != self._of:
            self._release()
            self._engine, self._of = load_engine(own), wanted
        histories = workspace.histories(hold_out=True)
        if entry.kind == "r2ec" and self._ranker is not None:
            agent = build_r2ec_graph(
                self._engine, self._ranker, histories=histories, settings=settings
            )
            return agent, self._engine
        retriever = self._blind if entry.kind == "blind_agent" else workspace.retriever
        agent = build_graph(
            self._engine,
            retriever,
            histories=histories,
            settings=settings,
            ranker=self._ranker,
        )
        return agent, self._engine

    @cached_property
    def _blind(self) -> BlindRetriever:
        workspace = self._workspace
        return BlindRetriever(workspace.trm, workspace.encoder, workspace.catalog)

    def close(self) -> None:
        """Release what was loaded here."""
        self._release_ranker()
        self._release()
        if "_blind" in self.__dict__:
            self._blind.close()

    def _release_ranker(self) -> None:
        if self._ranker is not None:
            self._ranker.close()
            self._ranker = None

    def _release(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def _own(settings: Settings, entry: AgentEntry) -> Settings:
    """The entry's LLM in the settings' place; an adapter of the settings' is not taken over."""
    return settings.model_copy(
        update={
            "model": entry.model or settings.model,
            "adapter": entry.adapter,
            "head": entry.head,
        }
    )


def _llm(settings: Settings, entry: AgentEntry) -> Settings:
    """Settings whose LLM is the one that plays: R2ec's is the one that its head reads."""
    own = _own(settings, entry)
    if entry.kind == "r2ec" and entry.head is not None:
        return model_of_head(own, entry.head)
    return own


def _as_finished(
    work: Callable[[User], Awaitable[Ranking]], users: Sequence[User], limit: int
) -> Generator[Ranking]:
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
