"""The recommendation model alone as a tool, for an agent that brings its own reasoning.

    python examples/retrieve_items.py "Toy Story" "Babe" "Aladdin" --preference "comedy; 1990s"

Loads no LLM of DeepRec's. The calling model is scripted here; any that calls tools can take its
place.
"""

from __future__ import annotations

import argparse

from langchain.agents import create_agent
from scripted_caller import ScriptedCaller

from deeprec.settings import load_settings
from deeprec.tools.retrieve_items import retrieve_items_tool
from deeprec.tools.workspace import Workspace

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("titles", nargs="*", default=["Toy Story", "Babe", "Aladdin"])
    parser.add_argument("--preference", help="what to look for")
    parser.add_argument("-k", type=int, default=5)
    given = parser.parse_args()

    workspace = Workspace(load_settings())
    tool = retrieve_items_tool(workspace.retriever, workspace.catalog)
    caller = ScriptedCaller(
        arguments={"history": given.titles, "preference": given.preference, "k": given.k}
    )
    agent = create_agent(caller, [tool], system_prompt="You help people to find films.")
    answer = agent.invoke({"messages": [("user", f"I liked {', '.join(given.titles)}.")]})
    print(answer["messages"][-1].text)
