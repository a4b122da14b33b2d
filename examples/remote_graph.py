"""DeepRec on a LangGraph server, used like a local graph.

    make studio    # starts the server
    python examples/remote_graph.py "Toy Story" "Babe" "Aladdin" --url http://127.0.0.1:2024

A RemoteGraph can also be a node of your own graph.
"""

from __future__ import annotations

import argparse

from langgraph.pregel.remote import RemoteGraph

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("titles", nargs="*", default=["Toy Story", "Babe", "Aladdin"])
    parser.add_argument("-k", type=int, default=5)
    parser.add_argument("--url", default="http://127.0.0.1:2024")
    given = parser.parse_args()

    agent = RemoteGraph("deeprec", url=given.url)
    answer = agent.invoke({"history": given.titles, "k": given.k})
    for line in answer["recommendations"]:
        print(f"{line['rank']}. {line['title']} [{line['id']}]")
