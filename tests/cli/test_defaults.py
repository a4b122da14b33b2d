"""What a newcomer's servers listen to, as the Makefile and the commands start them."""

import inspect
from pathlib import Path

from deeprec import cli

ROOT = Path(__file__).parents[2]


def test_servers_listen_to_this_machine_by_default() -> None:
    started = [
        line for line in (ROOT / "Makefile").read_text().splitlines() if "langgraph dev" in line
    ]
    assert len(started) == 1
    assert "--host 127.0.0.1 " in started[0]
    assert inspect.signature(cli.serve_llm).parameters["host"].default == "127.0.0.1"
