"""Threads and memory in a real Postgres, started on the spot: the setting is all that changes."""

import asyncio
import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from deeprec.errors import RequestError, SettingsError
from deeprec.graph import server
from deeprec.graph.memory import Memory, forget_notes, list_notes
from deeprec.graph.persistence import open_checkpointer
from deeprec.tools.retriever import Retriever

from .test_server import check_that_threads_outlive_the_process

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("psycopg") is None, reason="needs the extra `postgres`"
    ),
]


def _program(name: str) -> str | None:
    places = [str(place) for place in Path("/usr/lib/postgresql").glob("*/bin")]
    return shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *places]))


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """Address of an empty database."""
    initdb, program = _program("initdb"), _program("postgres")
    if initdb is None or program is None:
        pytest.skip("Postgres is not installed (Debian: apt-get install postgresql)")
    as_user: dict[str, str] = {}
    if os.geteuid() == 0:  # Postgres refuses to be run by root
        try:
            shutil.chown(folder := tempfile.mkdtemp(), "postgres")
        except LookupError:
            pytest.skip("run by root, and there is no user postgres to run Postgres")
        as_user = {"user": "postgres"}
    else:
        folder = tempfile.mkdtemp()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    make = [initdb, "--pgdata", f"{folder}/data", "--auth", "trust", "--username", "me"]
    subprocess.run(make, check=True, capture_output=True, cwd=folder, **as_user)  # type: ignore[call-overload]
    serve = [program, "-D", f"{folder}/data", "-p", str(port), "-h", "127.0.0.1", "-k", folder]
    process = subprocess.Popen(
        serve,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        **as_user,  # type: ignore[arg-type]
    )
    try:
        yield f"postgresql://me@127.0.0.1:{port}/postgres"
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder)


async def test_threads_outlive_the_process(postgres: str, retriever: Retriever) -> None:
    await check_that_threads_outlive_the_process(postgres, retriever)


def test_memory_is_the_servers_and_the_commands(
    postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPREC_MEMORY", postgres)

    async def tell() -> None:
        async with server.store() as store:
            add = partial(Memory(store, "a.b/c").add, "dislike")
            await asyncio.to_thread(add, "gore")
            await asyncio.to_thread(add, "trains")

    asyncio.run(tell())
    assert list_notes(postgres) == ["a.b/c"]
    assert [line[12:] for line in list_notes(postgres, "a.b/c")] == [
        "dislike  gore",
        "dislike  trains",
    ]
    with pytest.raises(RequestError, match="about 'boredom'"):
        forget_notes(postgres, "a.b/c", ["gore", "boredom"])
    assert forget_notes(postgres, "a.b/c", ["Gore"]) == 1
    assert [line[12:] for line in list_notes(postgres, "a.b/c")] == ["dislike  trains"]


async def test_a_database_that_is_not_there_is_told_without_its_password(postgres: str) -> None:
    address = postgres.replace("me@", "me:secret@").replace("/postgres", "/none")
    with pytest.raises(SettingsError, match="DEEPREC_CHECKPOINTS") as told:
        async with open_checkpointer(address):
            pass
    assert "the database none at 127.0.0.1" in str(told.value)
    assert "secret" not in str(told.value)
