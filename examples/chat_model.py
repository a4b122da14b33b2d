"""DeepRec's loop over any chat model, here over an OpenAI-compatible server.

    deeprec serve-llm    # or any other such server
    python examples/chat_model.py "Toy Story" "Babe" "Aladdin" --url http://127.0.0.1:8000/v1

A hosted model takes the place of ChatOpenAI by `langchain.chat_models.init_chat_model`. Runs over a
chat model can't be trained on: it gives text, not the tokens that it sampled.
"""

from __future__ import annotations

import argparse

import httpx
from langchain_openai import ChatOpenAI

from deeprec.graph.app import load_graph, run_settings
from deeprec.graph.engine.chat_model import VLLM_PREFILL, ChatModelEngine
from deeprec.settings import load_settings
from deeprec.tools.workspace import Workspace

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("titles", nargs="*", default=["Toy Story", "Babe", "Aladdin"])
    parser.add_argument("-k", type=int, default=5)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--decoding", choices=["free", "guided"], default="free")
    parser.add_argument(
        "--prefill", action="store_true", help="the server is vLLM's and goes on with a reply"
    )
    given = parser.parse_args()

    workspace = Workspace(load_settings())
    served = httpx.get(f"{given.url}/models").json()["data"][0]["id"]
    engine = ChatModelEngine(
        ChatOpenAI(base_url=given.url, api_key="none", model=served, temperature=0),
        tokenizer=workspace.settings.model_name,
        max_model_len=workspace.settings.engine.max_model_len,
        prefill=VLLM_PREFILL if given.prefill else None,
    )
    settings = run_settings(workspace.settings, decoding=given.decoding)
    agent = load_graph(workspace, settings, engine=engine)
    answer = agent.invoke({"history": given.titles, "k": given.k})
    for line in answer["recommendations"]:
        print(f"{line['rank']}. {line['title']} [{line['id']}] ({line['source']})")
    engine.close()
