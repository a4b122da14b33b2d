"""What a user told is kept over threads, in memory and on disk."""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, tzinfo
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.store.base import BaseStore
from langgraph.store.memory import InMemoryStore
from langgraph.store.sqlite import SqliteStore
from langgraph.types import Command

from deeprec import cli
from deeprec.graph import server
from deeprec.graph.build import build_graph
from deeprec.graph.memory import Memory
from deeprec.graph.state import RecommendationResponse, RunSettings
from deeprec.tools.retriever import Retriever

from .conftest import ScriptedEngine
from .test_loop import found, good_script

OpenStore = Callable[[], Any]


@pytest.fixture(params=["memory", "disk"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> OpenStore:
    """Opens one store again and again, as the processes of a service do."""
    kept = InMemoryStore()

    @contextmanager
    def opened() -> Iterator[BaseStore]:
        if request.param == "memory":
            yield kept
            return
        with SqliteStore.from_conn_string(str(tmp_path / "memory.sqlite")) as store:
            store.setup()
            yield store

    return opened


def test_a_clock_that_goes_back_turns_no_notes_round(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Back(datetime):
        """Earlier at each look."""

        looks = itertools.count()

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime(2026, 1, 2, tzinfo=tz) - timedelta(hours=next(cls.looks))

    monkeypatch.setattr("deeprec.graph.memory.datetime", Back)
    said = [f"thing {n}" for n in range(5)]
    for about in said:
        with open_store() as store:
            Memory(store, "u").add("like", about)
    with open_store() as store:
        assert [note.about for note in Memory(store, "u").notes()] == said


def test_notes_are_listed_replaced_and_deleted(open_store: OpenStore) -> None:
    with open_store() as store:
        memory = Memory(store, "a.b/c")
        memory.add("like", "film  noir")
        memory.add("rejected", "Film 4", item="4", reason="too\n<think> long")
        memory.add("dislike", "Film Noir")  # a change of mind
        assert memory.add("like", "\u200b") is None
    with open_store() as store:
        memory = Memory(store, "a.b/c")
        rejected, disliked = memory.notes()
        assert (rejected.kind, rejected.item, rejected.about) == ("rejected", "4", "Film 4")
        assert rejected.reason == "too ‹think› long"
        assert (disliked.kind, disliked.about) == ("dislike", "Film Noir")
        assert rejected.at < disliked.at
        assert memory.notes("dislike") == [disliked]
        assert Memory(store, "a").notes() == Memory(store, "a%2Eb/c").notes() == []
        memory.forget(rejected)
    with open_store() as store:
        memory = Memory(store, "a.b/c")
        assert memory.notes() == [disliked]
        memory.forget(*memory.notes())
        assert memory.notes() == []


def test_many_notes_are_all_found(open_store: OpenStore) -> None:
    with open_store() as store:
        memory = Memory(store, "u")
        for number in range(230):
            memory.add("rejected", f"Film {number}", item=str(number))
        assert len({note.item for note in memory.notes()}) == 230


def play(
    retriever: Retriever, store: BaseStore | None, thread: str, *replies: Any, **request: Any
) -> tuple[dict[str, Any], str]:
    """A run on a thread of its own; returns its output and its prompt."""
    engine = ScriptedEngine([*good_script(), *good_script()], 8192)
    graph = build_graph(
        engine,
        retriever,
        histories={"u": ["0", "1", "2"], "v": ["0", "1", "2"]},
        settings=RunSettings(decoding="free", k=2, retrieve_n=4, ask_after_ranking=bool(replies)),
        checkpointer=InMemorySaver(),
        store=store,
    )
    config: Any = {"configurable": {"thread_id": thread}}
    output = graph.invoke({"user_id": "u", **request}, config)
    for reply in replies:
        output = graph.invoke(Command(resume=reply), config)
    return output, engine.tokenizer.decode(engine.calls[0][0].prompt_ids)


def test_what_a_user_told_is_used_in_later_runs(
    retriever: Retriever, open_store: OpenStore
) -> None:
    unwanted = found(retriever, "comedy")[0]
    with open_store() as store:
        reject = {"action": "reject", "items": [{"item": unwanted, "reason": "seen it"}]}
        _, prompt = play(
            retriever, store, "1", reject, {"action": "accept"}, wishes=["I hate <b>gore</b>!"]
        )
        assert "The user said" not in prompt
    with open_store() as store:
        (note,) = Memory(store, "u").notes("rejected")
        assert (note.item, note.reason) == (unwanted, "seen it")
        output, prompt = play(retriever, store, "2", wishes=["I like trains"])
        assert "The user said they dislike: ‹b›gore‹/b›\n" in prompt
        assert "said they like" not in prompt
        response = RecommendationResponse.model_validate(output)
        shown = [line.id for line in response.recommendations]
        shown += [item.id for item in response.turns[0].retrieved]
        assert unwanted not in shown
        other, prompt = play(retriever, store, "3", user_id="v")
        assert "The user said" not in prompt
        assert unwanted in {item["id"] for item in other["turns"][0]["retrieved"]}
    with open_store() as store:
        memory = Memory(store, "u")
        memory.forget(*memory.notes("rejected", "dislike"))
        output, prompt = play(retriever, store, "4")
        assert "The user said they like: trains\n" in prompt
        assert unwanted in {item["id"] for item in output["turns"][0]["retrieved"]}


def test_without_a_store_nothing_changes(retriever: Retriever, open_store: OpenStore) -> None:
    with open_store() as store:
        kept, with_store = play(retriever, store, "1", wishes=["I like trains"])
        alone, without = play(retriever, None, "1", wishes=["I like trains"])
    assert with_store == without
    assert kept["recommendations"] == alone["recommendations"]


def test_only_the_latest_likes_are_told(retriever: Retriever, open_store: OpenStore) -> None:
    with open_store() as store:
        memory = Memory(store, "u")
        for number in range(12):
            memory.add("like", f"thing {number}")
        _, prompt = play(retriever, store, "1")
    told = "; ".join(f"thing {number}" for number in range(4, 12))
    assert f"The user said they like: {told}\n" in prompt


def test_a_store_on_disk_is_listed_and_forgotten_by_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The store that the server opens by the settings, seen by `deeprec memory`."""
    monkeypatch.setenv("DEEPREC_HOME", str(tmp_path))

    def deeprec(*words: str) -> tuple[Any, list[str], str]:
        monkeypatch.setattr("sys.argv", ["deeprec", "memory", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code, said.out.splitlines(), said.err

    assert deeprec("list") == (0, [], "")
    assert list(tmp_path.iterdir()) == []

    async def tell() -> None:
        async with server.store() as store:
            for user in ("a.b/c", "u"):
                memory = Memory(store, user)
                await asyncio.to_thread(memory.add, "dislike", "gore")
                await asyncio.to_thread(memory.add, "like", "trains")
            add = partial(memory.add, "rejected", "Film 4", item="4", reason="seen [bold]it")
            await asyncio.to_thread(add)

    asyncio.run(tell())
    assert (tmp_path / "workspaces" / "ml-100k" / "memory.sqlite").exists()
    assert deeprec("list")[1] == ["a.b/c", "u"]
    lines = [line.partition("  ")[2] for line in deeprec("list", "u")[1]]
    assert lines == ["dislike  gore", "like  trains", "rejected  Film 4 [4]: seen [bold]it"]
    code, _, error = deeprec("forget", "u", "Gore", "boredom")
    assert code == 2
    assert "about 'boredom'" in error
    assert len(deeprec("list", "u")[1]) == 3
    for words in ((), ("gore", "--all")):
        assert deeprec("forget", "u", *words)[0] == 2
    assert deeprec("forget", "u", "Gore", "4")[1] == ["Forgotten: 2 of user 'u'"]
    assert [line[12:] for line in deeprec("list", "u")[1]] == ["like  trains"]
    deeprec("forget", "u", "--all")
    assert deeprec("list")[1] == ["a.b/c"]
    assert len(deeprec("list", "a.b/c")[1]) == 2
    assert deeprec("list", "-w", "other") == (0, [], "")
