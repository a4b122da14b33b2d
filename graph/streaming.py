"""What the policy writes, told to those who watch a run while it writes.

LangGraph's `custom` stream gets {"thought": piece}, {"preference": …}, {"retrieved": [titles]},
{"refused": why} and {"answer": piece}; its `messages` stream gets the thoughts as the chunks of a
chat model, with the preference as a call of the tool `call_trm`. Nothing of the run depends on it,
and where nobody watches nothing is streamed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import BaseCallbackManager
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.chat_models import agenerate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langgraph.config import get_config, get_stream_writer

from . import protocol
from .messages import answer_message, list_messages, thought_message
from .transcript import Transcript

if TYPE_CHECKING:
    from .engine.base import Engine, Generation, GenerationRequest
    from .state import State

Node = Callable[[Any, "State"], Awaitable[dict[str, Any]]]
Tell = Callable[[dict[str, Any]], None]

_listener: ContextVar[_Listener | None] = ContextVar("deeprec_listener", default=None)


async def generate(engine: Engine, request: GenerationRequest) -> Generation:
    """Await one generation, heard by whoever watches the node that asks. Raises EngineError."""
    listener = _listener.get()
    if listener is None:
        return await engine.generate(request)
    return await listener.generate(engine, request)


class _Listener:
    """Follows the text that one node adds to a transcript of `known` tokens.

    `read` is what is to be told of all the text so far, and never takes back what it gave before;
    `tell` gets its growth.
    """

    def __init__(
        self, known: int, *, read: Callable[[str], str], tell: Callable[[str], None]
    ) -> None:
        self._known = known
        self._read = read
        self._tell = tell
        self._text = ""
        self.told = ""

    async def generate(self, engine: Engine, request: GenerationRequest) -> Generation:
        """Await a generation, and follow it; the environment's words before it come first."""
        tokenizer = engine.tokenizer
        before = self._text + str(tokenizer.decode(list(request.prompt_ids[self._known :])))
        self._grow(before)
        loop, context = asyncio.get_running_loop(), copy_context()

        def on_text(text: str) -> None:
            text = text.replace(str(tokenizer.eos_token), "")
            loop.call_soon_threadsafe(self._add, text, context=context)

        result = await engine.generate(replace(request, on_text=on_text))
        self._known = len(request.prompt_ids) + len(result.ids)
        eos = tokenizer.eos_token_id
        said = [token for token in result.ids if token != eos]
        self._grow(before + str(tokenizer.decode(said)))
        return result

    def _add(self, text: str) -> None:
        self._grow(self._text + text)

    def _grow(self, text: str) -> None:
        self._text = text
        read = self._read(text)
        if len(read) > len(self.told):
            new, self.told = read[len(self.told) :], read
            self._tell(new)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Hear what is generated inside."""
        token = _listener.set(self)
        try:
            yield
        finally:
            _listener.reset(token)


class _Voice(BaseChatModel):
    """Says the chunks of a queue as a chat model: LangChain tells its callbacks of those."""

    chunks: Any  # asyncio.Queue of AIMessageChunk, None at the end

    async def _astream(self, *_: Any, **__: Any) -> AsyncIterator[ChatGenerationChunk]:
        while (chunk := await self.chunks.get()) is not None:
            yield ChatGenerationChunk(message=chunk)

    async def _agenerate(self, *_: Any, **__: Any) -> ChatResult:
        return await agenerate_from_stream(self._astream())

    def _generate(self, *_: Any, **__: Any) -> ChatResult:
        raise NotImplementedError

    @property
    def _llm_type(self) -> str:
        return "deeprec"


def _writer() -> Tell | None:
    """Who writes the `custom` stream, where one was asked for."""
    writer = get_stream_writer()
    # LangGraph hands out a function in any case; unasked, one that has nothing to write to.
    return writer if getattr(writer, "__closure__", ()) is not None else None


def _has_callbacks() -> bool:
    callbacks = get_config().get("callbacks")
    return bool(callbacks.handlers if isinstance(callbacks, BaseCallbackManager) else callbacks)


def tell_thoughts(think: Node) -> Node:
    """Wrap `think`: its thought is told while it grows, then its preference."""

    async def run(resources: Any, state: State) -> dict[str, Any]:
        write, as_chat = _writer(), _has_callbacks()
        if write is None and not as_chat:
            update = await think(resources, state)
            return {**update, "messages": [thought_message(state, update)]}
        chunks: asyncio.Queue[AIMessageChunk | None] = asyncio.Queue()

        def tell(text: str) -> None:
            chunks.put_nowait(AIMessageChunk(content=text))
            if write is not None:
                write({"thought": text})

        listener = _Listener(
            len(Transcript(state["segments"])), read=protocol.thought_so_far, tell=tell
        )
        voice = asyncio.create_task(_Voice(chunks=chunks).ainvoke([])) if as_chat else None
        try:
            with listener.at_work():
                update = await think(resources, state)
        except BaseException:
            if voice is not None:
                voice.cancel()
            raise
        message = thought_message(state, update)
        chunks.put_nowait(_rest(message, listener.told))
        chunks.put_nowait(None)
        if voice is not None:
            message.id = (await voice).id  # the same message: the chunks are not to be repeated
        if write is not None and update["pending"] is not None:
            write({"preference": update["pending"]["preference"]})
        return {**update, "messages": [message]}

    return run


def _rest(message: AIMessage, told: str) -> AIMessageChunk:
    """What completes the chunks `told` to `message`: the end of the thought, and the tool call."""
    text = str(message.content)
    calls = [
        tool_call_chunk(name=call["name"], args=json.dumps(call["args"]), id=call["id"], index=0)
        for call in message.tool_calls
    ]
    end = text[len(told) :] if text.startswith(told) else ""
    return AIMessageChunk(content=end, tool_call_chunks=calls)


def tell_lists(call_trm: Node) -> Node:
    """Wrap `call_trm`: the titles that it found are told, or why it found none."""

    async def run(resources: Any, state: State) -> dict[str, Any]:
        update = await call_trm(resources, state)
        write = _writer()
        if write is not None and not update.get("stop_reason"):
            (turn,) = update["turns"]
            titles = [item["title"] for item in turn["retrieved"]]
            write({"refused": turn["refused"]} if turn["refused"] else {"retrieved": titles})
        return {**update, "messages": list_messages(state, update)}

    return run


def tell_answer(rank: Node) -> Node:
    """Wrap `rank`: the policy's own lines are told to the custom stream while it writes them.

    The message is the list that is answered, filled lines included.
    """

    async def run(resources: Any, state: State) -> dict[str, Any]:
        write = _writer()
        if write is None:
            update = await rank(resources, state)
        else:
            listener = _Listener(
                len(Transcript(state["segments"])),
                read=protocol.answer_so_far,
                tell=lambda text: write({"answer": text}),
            )
            with listener.at_work():
                update = await rank(resources, state)
        return {**update, "messages": [answer_message(update)]}

    return run
