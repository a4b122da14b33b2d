"""What langgraph.json names beside the graph: the app around LangGraph's server, and its threads.

The app loads and warms the agent before the server answers, and refuses malformed runs at the door.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse

from ..errors import RequestError, shown
from ..settings import load_settings
from . import app as agent
from .persistence import open_checkpointer, open_store
from .requests import parse_request, parse_settings

if TYPE_CHECKING:
    from langgraph.checkpoint.base import BaseCheckpointSaver
    from langgraph.store.base import BaseStore
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# LangGraph's dev server answers these to anybody, whatever its authentication says: any thread as
# it is kept, the loss of all threads, and a deployment of this folder to a cloud.
_BACK_DOORS = re.compile(r"/(internal|deploy)(/.*)?", re.DOTALL)
_REFUSED = re.compile(
    r"<class 'deeprec\.errors\.(RequestError|AmbiguousTitleError)'>\(.*\)", re.DOTALL
)
_RUNS = re.compile(r"(/threads/[^/]+)?/runs(/stream|/wait|/batch)?")


@asynccontextmanager
async def checkpointer() -> AsyncIterator[BaseCheckpointSaver[Any]]:
    """Where the server keeps its threads, as the settings say.

    It forgets a thread in the background. The dev server looks for a thread's place in its list,
    awaits this, and then removes what stands at that place: another thread, where runs without one
    end at the same time, and whoever waits for that thread's run waits for ever (read and seen in
    langgraph-runtime-inmem 0.36.7).
    """
    async with open_checkpointer(load_settings().checkpoints_at) as saver:
        forget = saver.adelete_thread
        at_work: set[asyncio.Task[None]] = set()

        async def adelete_thread(thread_id: str) -> None:
            task = asyncio.create_task(forget(thread_id))
            at_work.add(task)
            task.add_done_callback(at_work.discard)

        saver.adelete_thread = adelete_thread  # type: ignore[method-assign]
        try:
            yield saver
        finally:
            await asyncio.gather(*at_work)


@asynccontextmanager
async def store() -> AsyncIterator[BaseStore]:
    """Where the server keeps what users told, as the settings say."""
    async with open_store(load_settings().memory_at) as opened:
        yield opened


class Discreet(logging.Filter):
    """Keeps what people said out of LangGraph's logs: the words of a refused request, which name
    titles and users and are told to the client, and query strings, which name notes in a store.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass, some of them shortened."""
        said: object = record.msg  # structlog's: a dict of the event and all that belongs to it
        if isinstance(said, dict):
            event = str(said.get("event"))
            if _REFUSED.search(event):
                said["event"] = _REFUSED.sub(r"\1 (told to the client)", event)
                said.pop("exception", None)
            if said.get("query_string"):
                said["query_string"] = "(not logged)"
        return True


_discreet = Discreet()


@asynccontextmanager
async def _lifespan(_: Starlette) -> AsyncIterator[None]:
    for name in ("langgraph_api.worker", "langgraph_api.server"):
        logging.getLogger(name).addFilter(_discreet)
    await asyncio.to_thread(agent.warm)
    yield


class CloseBackDoors:
    """Answers HTTP 404 where the dev server would show or delete any thread, or deploy itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on everything else as it came."""
        if scope["type"] == "http" and _BACK_DOORS.fullmatch(scope["path"]):
            await JSONResponse({"detail": "Not Found"}, 404)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class RefuseMalformed:
    """Answers the start of a run with HTTP 422 where its input or its context is malformed.

    LangGraph's server takes any input, and the run would fail later. 413 answers a request that is
    too long, 429 one while too many runs are waited for (settings.ServerSettings).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._bounds = load_settings().server
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on everything else as it came."""
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or not _RUNS.fullmatch(scope["path"])
        ):
            await self._app(scope, receive, send)
            return
        if self._open >= self._bounds.max_open_runs:
            said = f"{self._open} runs are waited for already: try again when some have ended"
            await JSONResponse({"detail": said}, 429)(scope, receive, send)
            return
        self._open += 1
        try:
            await self._admit(scope, receive, send)
        finally:
            self._open -= 1

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        received, most = bytearray(), self._bounds.max_body_bytes
        async for chunk in Request(scope, receive).stream():
            received += chunk
            if len(received) > most:
                said = f"the request is longer than {most} bytes: start fewer runs by it"
                await JSONResponse({"detail": said}, 413)(scope, receive, send)
                return
        body = bytes(received)
        try:
            await asyncio.to_thread(_check, body, self._bounds.max_open_runs)
        except RequestError as error:
            await JSONResponse({"detail": str(error)}, 422)(scope, receive, send)
            return
        unread = [body]

        async def again() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        await self._app(scope, again, send)


def _check(body: bytes, most: int) -> None:
    """Raise RequestError where a run can't be what its caller meant."""
    try:
        payload = json.loads(body)
    except ValueError:
        return  # the server says what is wrong with it
    except RecursionError as error:
        raise RequestError("malformed request: its JSON is nested too deeply") from error
    if isinstance(payload, list) and len(payload) > most:
        raise RequestError(f"{len(payload)} runs in one batch; at most {most} are allowed")
    for run in payload if isinstance(payload, list) else [payload]:
        if not isinstance(run, Mapping):
            return
        given, context, command = run.get("input"), run.get("context"), run.get("command")
        if (
            isinstance(command, Mapping)
            and command
            and all(said is None for said in command.values())
        ):
            raise RequestError(
                "malformed request: command.resume: null answers no question (got None): give what "
                "the interrupt's answer_schema describes"
            )
        if isinstance(context, Mapping):
            agent.check_filters(parse_settings(**context).filters)
        if given is None:  # a run that goes on
            continue
        if not isinstance(given, Mapping):
            raise RequestError(f"malformed request: input: not an object (got {shown(given)})")
        agent.check_filters(parse_request(**given).filters)


app = Starlette(
    lifespan=_lifespan, middleware=[Middleware(CloseBackDoors), Middleware(RefuseMalformed)]
)
