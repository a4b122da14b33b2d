"""DeepRec as one tool of a LangChain agent.

    python examples/create_agent.py "Toy Story" "Babe" "Aladdin"

The calling model is scripted here; any chat model that calls tools can take its place.
"""

from __future__ import annotations

import argparse

from langchain.agents import create_agent
from scripted_caller import ScriptedCaller

from deeprec.graph import recommendation_tool
from deeprec.graph.app import graph

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("titles", nargs="*", default=["Toy Story", "Babe", "Aladdin"])
    parser.add_argument("-k", type=int, default=5)
    given = parser.parse_args()

    tool = recommendation_tool(graph())
    caller = ScriptedCaller(arguments={"history": given.titles, "k": given.k})
    agent = create_agent(caller, [tool], system_prompt="You help people to find films.")
    answer = agent.invoke({"messages": [("user", f"I liked {', '.join(given.titles)}.")]})
    print(answer["messages"][-1].text)
