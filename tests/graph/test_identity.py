"""Whose memory and history a run may touch, told by what LangGraph's server knows of who asks."""

from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.store.memory import InMemoryStore
from langgraph.types import Command

from deeprec.errors import RequestError
from deeprec.graph.build import build_graph
from deeprec.graph.identity import ANY_USER
from deeprec.graph.memory import Memory
from deeprec.graph.state import RunSettings
from deeprec.tools.retriever import Retriever

from .conftest import ScriptedEngine
from .test_streaming import SCRIPT

HISTORIES = {"ada": ["0", "1", "2"], "bob": ["20", "21"]}


class User:
    """As LangGraph's server hands one to the graph."""

    def __init__(self, identity: str, *permissions: str) -> None:
        self.identity = identity
        self.permissions = list(permissions)


def config(user: User | None) -> Any:
    signed = {} if user is None else {"langgraph_auth_user": user}
    return {"configurable": {"thread_id": "t", "graph_id": "deeprec", **signed}}


@pytest.fixture
def agent(retriever: Retriever) -> Any:
    store = InMemoryStore()
    Memory(store, "ada").add("dislike", "clowns")
    settings = RunSettings(decoding="free", k=2, retrieve_n=4, ask_after_ranking=True)
    return build_graph(
        ScriptedEngine(SCRIPT, 8192),
        retriever,
        histories=HISTORIES,
        settings=settings,
        checkpointer=InMemorySaver(),
        store=store,
    )


@pytest.mark.parametrize(
    "user", [None, User(""), User("ada"), User("shop", ANY_USER)], ids=["none", "", "own", "any"]
)
def test_who_may_ask_for_a_user(agent: Any, user: User | None) -> None:
    agent.invoke({"user_id": "ada"}, config(user))
    assert agent.get_state(config(user)).values["user"] == "ada"


@pytest.mark.parametrize("given", [{"user_id": "ada"}, {"user_id": "nobody"}])
def test_nobody_asks_in_anothers_name(agent: Any, given: dict[str, str]) -> None:
    with pytest.raises(RequestError, match="the key of the request is that of user 'bob'"):
        agent.invoke(given, config(User("bob", "other")))


def test_a_history_of_titles_needs_no_name(agent: Any) -> None:
    agent.invoke({"history": ["Film 3"]}, config(User("bob")))
    assert agent.get_state(config(None)).values["user"] is None


def test_a_state_that_names_another_user_writes_no_memory(agent: Any) -> None:
    """A client may edit its own thread's state, and go on from there."""
    agent.invoke({"user_id": "bob"}, config(User("bob")))
    agent.update_state(config(None), {"user": "ada"}, as_node="rank")
    answer = Command(resume={"action": "more", "wishes": ["I hate rain"]})
    with pytest.raises(RequestError, match="user 'ada' is asked about"):
        agent.invoke(answer, config(User("bob")))
