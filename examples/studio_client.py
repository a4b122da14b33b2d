"""Use a running DeepRec server as any client would, with langgraph-sdk alone.

    make studio                                   # in another terminal
    python examples/studio_client.py              # --url http://127.0.0.1:2024

It shows what the server asks for, watches a run while it thinks and searches, goes back to its
first search, puts another preference in its place, and reads the list that this leads to.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from langgraph_sdk import get_client

GRAPH = "deeprec"


@dataclass
class Watched:
    """What a client saw of one run."""

    first_token_s: float | None = None
    thoughts: str = ""
    preferences: list[str] = field(default_factory=list)
    retrieved: list[list[str]] = field(default_factory=list)
    tools: list[str] = field(default_factory=list)
    final: dict[str, Any] = field(default_factory=dict)


async def show_schemas(client: Any) -> dict[str, Any]:
    """Print what a run takes: names, descriptions and defaults."""
    (assistant,) = await client.assistants.search(graph_id=GRAPH)
    schemas: dict[str, Any] = await client.assistants.get_schemas(assistant["assistant_id"])
    for part in ("input_schema", "context_schema"):
        print(f"{part}:")
        for name, said in schemas[part]["properties"].items():
            default = f" [{said['default']}]" if said.get("default") is not None else ""
            print(f"  {name}{default}: {said.get('description', '')}")
    return schemas


async def watch(client: Any, thread: str, **run: Any) -> Watched:
    """Start a run and print it while it goes on: thoughts by the token, searches, lists."""
    seen = Watched()
    started = time.perf_counter()
    stream = client.runs.stream(
        thread, GRAPH, stream_mode=["custom", "messages-tuple", "values"], **run
    )
    async for part in stream:
        if part.event == "custom" and "thought" in part.data:
            seen.first_token_s = seen.first_token_s or time.perf_counter() - started
            seen.thoughts += part.data["thought"]
            print(part.data["thought"], end="", flush=True)
        elif part.event == "custom" and "preference" in part.data:
            seen.preferences.append(part.data["preference"])
            print(f"\n  → searches for: {part.data['preference']}")
        elif part.event == "custom" and "retrieved" in part.data:
            seen.retrieved.append(part.data["retrieved"])
            print(f"  ← {' · '.join(part.data['retrieved'][:5])} …")
        elif part.event == "messages":
            message, _ = part.data
            seen.tools += [call["name"] for call in message.get("tool_calls", [])]
            if message["type"] == "tool":
                seen.tools.append("list")
        elif part.event == "values":
            seen.final = part.data
        elif part.event == "error":
            raise RuntimeError(part.data)
    print()
    return seen


async def first_search(client: Any, thread: str) -> dict[str, Any]:
    """Return the state in which the run was about to search for the first time."""
    states = await client.threads.get_history(thread, limit=100)
    return next(state for state in reversed(states) if state["next"] == ["call_trm"])


def show_list(final: dict[str, Any]) -> None:
    """Print the recommendations of a finished run."""
    for line in final["recommendations"]:
        print(f"{line['rank']:>3}. {line['title']} ({line['source']})")


async def main(url: str, titles: Sequence[str], preference: str, k: int) -> tuple[Watched, Watched]:
    """Run it all; returns what was seen of the run and of its fork."""
    client = get_client(url=url)
    await show_schemas(client)
    thread = (await client.threads.create())["thread_id"]
    context = {"k": k, "limits": {"max_retrievals": 2}}
    print(f"\nRecommendations after {', '.join(titles)}:\n")
    seen = await watch(client, thread, input={"history": list(titles)}, context=context)
    show_list(seen.final)

    before = await first_search(client, thread)
    pending = {**before["values"]["pending"], "preference": preference}
    fork = await client.threads.update_state(
        thread, {"pending": pending}, as_node="think", checkpoint=before["checkpoint"]
    )
    print(f"\nAnd had the first search been for {preference!r}:\n")
    forked = await watch(client, thread, input=None, checkpoint=fork["checkpoint"], context=context)
    show_list(forked.final)
    return seen, forked


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("titles", nargs="*", default=["Toy Story", "Babe", "Aladdin"])
    parser.add_argument("--url", default="http://127.0.0.1:2024")
    parser.add_argument("--preference", default="dark science fiction")
    parser.add_argument("-k", type=int, default=5)
    given = parser.parse_args()
    asyncio.run(main(given.url, given.titles, given.preference, given.k))
