"""DeepRec as a tool of LangGraph's server, called by an MCP client.

    make studio    # starts the server
    python examples/mcp_client.py "Toy Story" "Babe" "Aladdin" --url http://127.0.0.1:2024

The server names the tool after the graph, and takes its arguments from RecommendationRequest.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
from typing import Any

from mcp import Client


async def recommend(url: str, request: dict[str, Any]) -> dict[str, Any]:
    """Call the tool `deeprec` of the server."""
    async with Client(f"{url}/mcp") as client:
        result = await client.call_tool("deeprec", request)
    text = result.content[0].text
    if result.is_error:
        raise SystemExit(f"the server answered: {text}")
    # The server writes the answer as Python would, not as JSON. This reads literals, runs nothing.
    answer: dict[str, Any] = ast.literal_eval(text)
    return answer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("titles", nargs="*", default=["Toy Story", "Babe", "Aladdin"])
    parser.add_argument("-k", type=int, default=5)
    parser.add_argument("--url", default="http://127.0.0.1:2024")
    given = parser.parse_args()

    answer = asyncio.run(recommend(given.url, {"history": given.titles, "k": given.k}))
    for line in answer["recommendations"]:
        print(f"{line['rank']}. {line['title']} [{line['id']}]")
