"""A chat model that follows a script, so that the examples need no account with a provider.

It calls the one tool that it is bound to, and then reads out what came back. In your own agent, put
a real model in its place: `create_agent("openai:gpt-5", tools)`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult


class ScriptedCaller(BaseChatModel):
    """Calls its tool with `arguments`, then lists the items of the answer."""

    arguments: dict[str, Any]
    tool: str = ""

    @property
    def _llm_type(self) -> str:
        return "scripted-caller"

    def bind_tools(self, tools: Sequence[Any], **_: Any) -> ScriptedCaller:
        """Take the one tool that the script calls."""
        return self.model_copy(update={"tool": tools[0].name})

    def _generate(self, messages: list[BaseMessage], *_: Any, **__: Any) -> ChatResult:
        last = messages[-1]
        if isinstance(last, ToolMessage):
            said = AIMessage(last.text if last.status == "error" else _read_out(last.text))
        else:
            call = {"name": self.tool, "args": self.arguments, "id": "call-1"}
            said = AIMessage("", tool_calls=[call])
        return ChatResult(generations=[ChatGeneration(message=said)])


def _read_out(content: str) -> str:
    answer = json.loads(content)
    items = answer["recommendations"] if isinstance(answer, dict) else answer
    return "\n".join(f"{n}. {item['title']} [{item['id']}]" for n, item in enumerate(items, 1))
