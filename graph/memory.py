"""What a user told the agent, kept over threads in a LangGraph store: likes, dislikes, rejections.

Notes of one user are never seen by another. Item ids are those of one catalog: give each catalog a
store of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar
from urllib.parse import quote, unquote

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from ..errors import RequestError
from ..tools.titles import sanitise
from .persistence import is_postgres, open_store

if TYPE_CHECKING:
    from langgraph.store.base import BaseStore

NoteKind = Literal["like", "dislike", "rejected"]

_T = TypeVar("_T")
_ROOT = ("deeprec", "memory")
_PAGE = 100
_MAX_CHARS = 200
_TICK = timedelta(microseconds=1)
_NEVER = datetime.min.replace(tzinfo=UTC)


class Note(BaseModel):
    """One thing that a user told.

    `about` is the user's words, or the title of `item` where a catalog item is meant.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: NoteKind
    about: str = Field(min_length=1)
    item: str | None = None
    reason: str | None = None
    at: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))

    def __str__(self) -> str:
        """One line for people."""
        item = f" [{self.item}]" if self.item is not None else ""
        why = f": {self.reason}" if self.reason else ""
        return f"{self.at:%Y-%m-%d}  {self.kind}  {self.about}{item}{why}"


def namespace(user_id: str) -> tuple[str, ...]:
    """Where a store keeps a user's notes, and nobody else's; its labels hold no periods."""
    return (*_ROOT, quote(user_id, safe="").replace(".", "%2E"))


class Memory:
    """The notes of one user. Its calls block: use them in a thread where an event loop runs."""

    def __init__(self, store: BaseStore, user_id: str) -> None:
        self._store = store
        self._namespace = namespace(user_id)
        self._newest: datetime | None = None

    @classmethod
    def of(cls, store: BaseStore | None, user_id: str | None) -> Memory | None:
        """The memory of a known user where there is a store, else None."""
        return None if store is None or user_id is None else cls(store, user_id)

    def add(
        self, kind: NoteKind, about: str, *, item: str | None = None, reason: str = ""
    ) -> Note | None:
        """Keep a note, in place of one about the same; None where its text holds nothing visible.

        `item` is the id of the catalog item that is meant, `about` then its title.
        """
        about = sanitise(about, limit=_MAX_CHARS)
        if not about:
            return None
        kept = sanitise(reason, limit=_MAX_CHARS) or None
        note = Note(kind=kind, about=about, item=item, reason=kept)
        if self._newest is None:
            self._newest = max((earlier.at for earlier in self.notes()), default=_NEVER)
        if note.at <= self._newest:  # the clock went back, and notes are read in their order
            note = note.model_copy(update={"at": self._newest + _TICK})
        self._newest = note.at
        self._store.put(self._namespace, _key(note), note.model_dump(mode="json"), index=False)
        return note

    def add_tastes(self, tastes: Iterable[tuple[Literal["like", "dislike"], str]]) -> None:
        """Keep what a user said to like or dislike (wishes.Wishes)."""
        for kind, about in tastes:
            self.add(kind, about)

    def notes(self, *kinds: NoteKind) -> list[Note]:
        """All notes of these kinds, oldest first; of every kind where none is named."""
        found: list[Note] = []
        while page := self._store.search(self._namespace, limit=_PAGE, offset=len(found)):
            found += [Note.model_validate(kept.value) for kept in page]
        return sorted(
            (note for note in found if not kinds or note.kind in kinds), key=lambda note: note.at
        )

    def about(self, what: str) -> list[Note]:
        """Notes about a thing: an item's id or title, or the words of a taste."""
        plain = sanitise(what, limit=_MAX_CHARS).casefold()
        return [n for n in self.notes() if what == n.item or plain == n.about.casefold()]

    @staticmethod
    def users(store: BaseStore) -> list[str]:
        """Ids of the users of whom anything is kept, in order."""
        found: list[tuple[str, ...]] = []
        while page := store.list_namespaces(prefix=_ROOT, limit=_PAGE, offset=len(found)):
            found += page
        return sorted(unquote(names[len(_ROOT)]) for names in found)

    def forget(self, *notes: Note) -> None:
        """Delete these notes, as `notes` gave them."""
        for note in notes:
            self._store.delete(self._namespace, _key(note))


def list_notes(source: str, user: str | None = None) -> list[str]:
    """Lines that tell what is kept of a user in a SQLite file or a Postgres database; none: the
    users of whom anything is kept. Raises SettingsError where the source can't be opened.
    """
    return _in_store(
        source,
        lambda store: (
            [str(note) for note in Memory(store, user).notes()]
            if user is not None
            else Memory.users(store)
        ),
        nothing=[],
    )


def forget_notes(source: str, user: str, about: Iterable[str] | None = None) -> int:
    """Delete a user's notes about these things, or all; returns how many.

    Raises RequestError, before anything is deleted, where nothing is kept about one of them;
    SettingsError where the source can't be opened.
    """

    def forget(store: BaseStore) -> int:
        memory = Memory(store, user)
        gone: list[Note] = []
        for what in about or ():
            found = memory.about(what)
            if not found:
                raise RequestError(
                    f"nothing is remembered of user {user!r} about {what!r}: see "
                    f"`deeprec memory list {user}`"
                )
            gone += found
        gone = gone if about is not None else memory.notes()
        memory.forget(*gone)
        return len(gone)

    return _in_store(source, forget, nothing=0)


def _in_store(source: str, ask: Callable[[BaseStore], _T], *, nothing: _T) -> _T:
    """What `ask` finds in a store, `nothing` where no file is there yet."""
    if not is_postgres(source) and not Path(source).exists():
        return nothing

    async def run() -> _T:
        async with open_store(source) as store:
            return await asyncio.to_thread(ask, store)

    return asyncio.run(run())


def _key(note: Note) -> str:
    """A user has one opinion of a thing: a later one takes the place of an earlier one."""
    return f"id:{note.item}" if note.item is not None else f"words:{note.about.casefold()}"
