"""How Chroma is reached: settings, bounded waits for locks and servers, errors in our words."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import chromadb
import httpx
from chromadb.api.client import Client
from chromadb.config import Settings
from chromadb.errors import ChromaError

from ..errors import CatalogError

DATABASE = "chroma.sqlite3"
REBUILD = "Build it again with `deeprec index`"
_FULL = ("disk is full", "No space left", "disk I/O error")  # in SQLite's words and the system's
# Chroma waits for a locked database about a minute and stops the whole process meanwhile, so
# the lock is tried first. In a process of its own: closing a second handle here would drop the
# locks that Chroma holds.
_TRY_LOCK = """
import sqlite3, sys, urllib.parse
uri = "file:" + urllib.parse.quote(sys.argv[1]) + "?mode=rw"
try:
    database = sqlite3.connect(uri, uri=True, timeout=float(sys.argv[2]))
    database.execute("BEGIN IMMEDIATE")
    database.execute("ROLLBACK")
except sqlite3.Error as error:
    sys.exit(str(error))
"""
_T = TypeVar("_T")


@dataclass(frozen=True)
class CatalogSettings:
    """Where a catalog is and how it is searched: a `folder`, or a Chroma server (`host`).

    Raises CatalogError unless exactly one of the two is given.
    """

    folder: Path | None = None
    host: str | None = None
    port: int = 8000
    ssl: bool = False
    collection: str = "deeprec"  # name on the server; two catalogs need two names
    search: Literal["exact", "hnsw"] = "exact"
    # HNSW: with more of each it misses less (evals/bench/hnsw_recall.py) and takes longer.
    max_neighbors: int = 32
    ef_construction: int = 200
    ef_search: int = 400
    timeout_s: float = 10.0  # longest wait for a locked database or an answer of the server

    def __post_init__(self) -> None:
        if (self.folder is None) == (self.host is None):
            raise CatalogError(
                f"catalog settings with folder {self.folder} and host {self.host}: give one of both"
            )

    @property
    def where(self) -> str:
        """The place, for error texts."""
        if self.folder is not None:
            return str(self.folder)
        return f"{self.collection!r} on the Chroma server {self.host}:{self.port}"


def connect(settings: CatalogSettings) -> Client:
    """Open the folder or reach the server. Raises CatalogError within the time limit."""
    with explained(settings):
        if settings.folder is not None:
            check_lock(settings, settings.folder)
            return embedded(settings.folder)
        host = str(settings.host)
        return call(
            settings,
            lambda: chromadb.HttpClient(
                host, settings.port, ssl=settings.ssl, settings=Settings(anonymized_telemetry=False)
            ),
        )


def embedded(folder: Path) -> Client:
    """Open or make the database in a folder."""
    return chromadb.PersistentClient(folder, settings=Settings(anonymized_telemetry=False))


def check_lock(settings: CatalogSettings, folder: Path) -> None:
    """Raise CatalogError if the folder's database stays locked, or is none."""
    wait = settings.timeout_s
    tried = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _TRY_LOCK, str(folder / DATABASE), str(wait)],
        capture_output=True,
        text=True,
        timeout=wait + 20,
        check=False,
    )
    if tried.returncode and "locked" in tried.stderr:
        raise CatalogError(
            f"the catalog at {settings.where} is locked by another process since {wait:g} s. "
            "Wait until that has finished, or end it."
        )
    if tried.returncode:
        raise CatalogError(
            f"the catalog at {settings.where} can't be opened: {tried.stderr.strip()}. {REBUILD}."
        )


def call(settings: CatalogSettings, function: Callable[[], _T]) -> _T:
    """The function's result; for a server within the time limit (Chroma's client has none)."""
    if settings.folder is not None:
        return function()
    outcome: list[_T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True, name="deeprec-chroma")
    thread.start()
    thread.join(settings.timeout_s)
    if failure:
        raise failure[0]
    if not outcome:
        raise CatalogError(
            f"the catalog {settings.where} did not answer within {settings.timeout_s:g} s. "
            "Look after the server, or raise timeout_s."
        )
    return outcome[0]


@contextmanager
def explained(settings: CatalogSettings) -> Iterator[None]:
    """Chroma's failures as CatalogError."""
    try:
        yield
    except (ChromaError, httpx.HTTPError, OSError, ValueError) as error:
        if any(sign in str(error) for sign in _FULL):
            remedy = "Free disk space and try again"
        elif settings.folder is None:
            remedy = "Start it with `chroma run`, or check host and port"
        else:
            remedy = REBUILD
        raise CatalogError(
            f"the catalog at {settings.where} can't be read or written: {error}. {remedy}."
        ) from error
