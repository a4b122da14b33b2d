"""A run as chat messages, for people: the request, thoughts with their searches, lists, the answer.

They are read off what the nodes hand on, and nothing in the loop reads them back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, ToolCall, ToolMessage

from .state import FILLED, RecommendationRequest, State

TOOL = "call_trm"
_LATEST = 8  # titles of a history that are shown


def request_message(
    request: RecommendationRequest,
    *,
    run: Mapping[str, Any],
    history: Sequence[str],
    title: Callable[[str], str],
) -> HumanMessage:
    """Say what is asked for. `run` are the run's settings, dumped; `history` are item ids, oldest
    first, and `title` gives an item's title.
    """
    more = f"… {len(history) - _LATEST} more, then " if len(history) > _LATEST else ""
    liked = ", ".join(title(item) for item in history[-_LATEST:])
    said = [f"Recommend {run['k']} items to a user who liked {more}{liked}."]
    said += [
        f"Only {json.dumps(filters, ensure_ascii=False, default=str)}."
        for filters in (run["filters"], request.filters)
        if filters
    ]
    if request.wishes:
        said.append(f"They ask for: {'; '.join(request.wishes)}.")
    return HumanMessage(" ".join(said))


def thought_message(state: State, update: Mapping[str, Any]) -> AIMessage:
    """Say what `think` thought, and what it searches for, if anything, as a call of a tool."""
    pending = update["pending"]
    if pending is None:
        return AIMessage("".join(turn["thought"] for turn in update["turns"]))
    call = ToolCall(
        name=TOOL, args={"preference": pending["preference"]}, id=_call_id(state.get("turns", []))
    )
    return AIMessage(pending["thought"], tool_calls=[call])


def list_messages(state: State, update: Mapping[str, Any]) -> list[AIMessage | ToolMessage]:
    """Say what `call_trm` found, or why it searched for nothing.

    Where the preference was edited since, the message that asked for it is told anew.
    """
    turns = state.get("turns", [])
    if update.get("stop_reason"):
        failure = update["failure"] or {"detail": update["stop_reason"]}
        text, status = failure["detail"], "error"
    else:
        (turn,) = update["turns"]
        lines = (f"{rank}. {item['title']}" for rank, item in enumerate(turn["retrieved"], 1))
        text = turn["refused"] or "\n".join(lines)
        status = "error" if turn["refused"] else "success"
    call_id = _call_id(turns)
    found = ToolMessage(text, name=TOOL, tool_call_id=call_id, status=status)
    return [*_asked_otherwise(state, call_id), found]


def stopped_message(state: State) -> ToolMessage:
    """Answer the call that a user stopped: a chat with a call that nothing answers is none."""
    call_id = _call_id(state.get("turns", []))
    return ToolMessage("stopped by the user", name=TOOL, tool_call_id=call_id, status="error")


def _asked_otherwise(state: State, call_id: str) -> list[AIMessage]:
    args = {"preference": (state["pending"] or {}).get("preference")}
    said = [message for message in state.get("messages", []) if isinstance(message, AIMessage)]
    for message in said:
        for call in message.tool_calls:
            if call["id"] == call_id and call["args"] != args:
                return [message.model_copy(update={"tool_calls": [{**call, "args": args}]})]
    return []


def answer_message(update: Mapping[str, Any]) -> AIMessage:
    """Say the list, or why there is none; lines that are not the policy's own are marked."""
    lines = [
        f"{line['rank']}. {line['title']}{' (filled)' if line['source'] in FILLED else ''}"
        for line in update["recommendations"]
    ]
    failure = update["failure"]
    return AIMessage("\n".join(lines) or (failure["detail"] if failure else "No item was found."))


def _call_id(turns: Sequence[object]) -> str:
    return f"search-{len(turns) + 1}"
