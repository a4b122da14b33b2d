"""What a user told the agent, kept over threads in a LangGraph store: likes, dislikes, rejections.

Notes of one user are never seen by another. Item ids are those of one catalog: give each catalog a
store of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from ..tools.titles import sanitise

if TYPE_CHECKING:
    from langgraph.store.base import BaseStore

NoteKind = Literal["like", "dislike", "rejected"]

_PAGE = 100
_MAX_CHARS = 200


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


def namespace(user_id: str) -> tuple[str, ...]:
    """Where a store keeps a user's notes, and nobody else's; its labels hold no periods."""
    return ("deeprec", "memory", quote(user_id, safe="").replace(".", "%2E"))


class Memory:
    """The notes of one user. Its calls block: use them in a thread where an event loop runs."""

    def __init__(self, store: BaseStore, user_id: str) -> None:
        self._store = store
        self._namespace = namespace(user_id)

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

    def forget(self, *notes: Note) -> None:
        """Delete these notes, as `notes` gave them."""
        for note in notes:
            self._store.delete(self._namespace, _key(note))


def _key(note: Note) -> str:
    """A user has one opinion of a thing: a later one takes the place of an earlier one."""
    return f"id:{note.item}" if note.item is not None else f"words:{note.about.casefold()}"
