"""A data set as users' interactions with items over time, and what is cut from it.

Users and items carry their own ids (text) outside and dense indices inside: index = position in
`user_ids` and `items`. tools/loaders.py reads files into this form; everything above works on it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel

from ..errors import DataError
from .items import MAX_DESCRIPTION_CHARS, Item, check_encodable, item_text
from .splits import Split, leave_one_out, statistics

__all__ = [
    "MANIFEST",
    "MAX_DESCRIPTION_CHARS",
    "InteractionData",
    "Item",
    "Split",
    "item_text",
    "leave_one_out",
    "some_rows",
    "statistics",
]

logger = logging.getLogger(__name__)

_YEAR_10000 = 253_402_300_800
_NAMED_ROWS = 5
_ITEMS, _INTERACTIONS, MANIFEST = "items.parquet", "interactions.parquet", "dataset.json"


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, type_, nullable=False) for name, type_ in columns.items()])


_VALUES = pa.list_(pa.field("element", pa.string(), nullable=False))
_ITEMS_SCHEMA = _schema(
    id=pa.string(),
    title=pa.string(),
    attributes=pa.map_(pa.string(), pa.field("value", _VALUES, nullable=False)),
    description=pa.string(),
)
_INTERACTIONS_SCHEMA = _schema(user_id=pa.string(), item_id=pa.string(), time=pa.int64())


@dataclass(frozen=True, eq=False)
class InteractionData:
    """Interactions sorted by user, then time; ties keep the order of the source.

    Every user has at least one interaction; an item may have none. The arrays are read-only
    copies of what was given. Raises DataError if the parts don't fit together. Two objects
    hold the same data when their fingerprints are equal.
    """

    name: str
    items: tuple[Item, ...]
    user_ids: tuple[str, ...]
    users: NDArray[np.int32]  # [n] user index
    item_indices: NDArray[np.int32]  # [n] item index
    times: NDArray[np.int64]  # [n] seconds since 1970

    def __post_init__(self) -> None:
        for attribute, dtype in (
            ("users", np.int32),
            ("item_indices", np.int32),
            ("times", np.int64),
        ):
            given = np.asarray(getattr(self, attribute))
            if given.ndim != 1 or given.dtype.kind not in "iu":
                raise DataError(
                    f"data set {self.name!r}: {attribute} must be a flat array of integers, "
                    f"not {given.ndim}-dimensional {given.dtype}."
                )
            array = np.array(given, dtype=dtype)
            array.flags.writeable = False
            object.__setattr__(self, attribute, array)
        problem = self._inconsistency()
        if problem:
            raise DataError(f"data set {self.name!r}: {problem}.")

    def _inconsistency(self) -> str:
        users, items, times = self.users, self.item_indices, self.times
        if not len(users) == len(items) == len(times):
            return f"{len(users)} users, {len(items)} items and {len(times)} times do not match"
        if len(users) == 0:
            return "it holds no interactions"
        if len(self.item_index) != len(self.items):
            return "two items have the same id"
        if len(self.user_index) != len(self.user_ids) or "" in self.user_index:
            return "two users have the same id, or one has an empty id"
        check_encodable(f"data set {self.name!r}", *self.user_ids)
        if items.min() < 0 or items.max() >= len(self.items):
            return f"an item index lies outside 0 to {len(self.items) - 1}"
        steps = np.diff(users)
        last = len(self.user_ids) - 1
        if users[0] != 0 or users[-1] != last or ((steps != 0) & (steps != 1)).any():
            return f"users must be sorted and hold every index from 0 to {last}"
        if times.min() < 0 or times.max() >= _YEAR_10000:
            return f"times {times.min()} to {times.max()} must lie between 1970 and 9999 (seconds)"
        if (np.diff(times)[steps == 0] < 0).any():
            return "a user's interactions must be sorted by time"
        return ""

    @classmethod
    def from_rows(
        cls,
        name: str,
        *,
        user_ids: Sequence[str],
        item_ids: Sequence[str],
        users: NDArray[np.integer],
        items: NDArray[np.integer],
        times: NDArray[np.float64],
        metadata: Mapping[str, Item],
        per_second: int = 1,
        numbers: NDArray[np.integer] | None = None,
    ) -> InteractionData:
        """Interactions in the order of a source file, as a data set.

        `users` and `items` are positions in `user_ids` and `item_ids`; ids that no row names
        are left out. `times` counts 1/`per_second` seconds and orders by that precision. Rows
        equal in user, item and time are kept once. An item without metadata is titled by its
        id. How many rows and items that were is logged, with the rows' `numbers` in the file.
        """
        order = np.lexsort((items, times, users))  # stable: equal rows keep their order
        equal = np.zeros(len(order), dtype=bool)
        equal[1:] = np.all([np.diff(x[order]) == 0 for x in (users, items, times)], axis=0)
        if equal.any():
            told = f" ({some_rows(numbers[np.sort(order[equal])])})" if numbers is not None else ""
            logger.warning("%s: %d duplicate rows were dropped%s", name, equal.sum(), told)
        rows = np.sort(order[~equal])
        rows = rows[np.lexsort((times[rows], users[rows]))]
        new_users, kept_users = _compact(users[rows], len(user_ids))
        new_items, kept_items = _compact(items[rows], len(item_ids))
        kept_ids = [item_ids[i] for i in kept_items]
        unknown = sum(id_ not in metadata for id_ in kept_ids)
        if unknown:
            logger.warning(
                "%s: %d of %d items lack metadata: id = title", name, unknown, len(kept_ids)
            )
        return cls(
            name=name,
            items=tuple(metadata.get(id_) or Item(id=id_, title=id_) for id_ in kept_ids),
            user_ids=tuple(user_ids[u] for u in kept_users),
            users=new_users,
            item_indices=new_items,
            times=np.floor_divide(times[rows], per_second).astype(np.int64),
        )

    @cached_property
    def item_index(self) -> dict[str, int]:
        """Item id → item index."""
        return {item.id: index for index, item in enumerate(self.items)}

    @cached_property
    def user_index(self) -> dict[str, int]:
        """User id → user index."""
        return {id_: index for index, id_ in enumerate(self.user_ids)}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of items, user ids and interactions in their order; not of the name."""
        digest = hashlib.sha256(b"deeprec.interactions 1\n")
        for record in self._records():
            digest.update(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        for array, little_endian in (
            (self.users, "<i4"),
            (self.item_indices, "<i4"),
            (self.times, "<i8"),
        ):
            digest.update(array.astype(little_endian).tobytes())
        return digest.hexdigest()

    def _records(self) -> Iterator[object]:
        yield len(self.items), len(self.user_ids), len(self.users)
        for item in self.items:
            yield item.id, item.title, sorted(item.attributes.items()), item.description
        yield from self.user_ids

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """Where each user's rows start; one entry more than users."""
        lengths = np.bincount(self.users, minlength=len(self.user_ids))
        return np.concatenate(([0], np.cumsum(lengths)))

    def sequence(self, user_index: int) -> NDArray[np.int32]:
        """Item indices of one user, oldest to newest (a read-only view)."""
        if not 0 <= user_index < len(self.user_ids):
            raise IndexError(f"user index {user_index} is not in 0 to {len(self.user_ids) - 1}")
        return self.item_indices[self._starts[user_index] : self._starts[user_index + 1]]

    def k_core(self, k: int) -> InteractionData:
        """The largest part in which every user and every item has at least k interactions.

        Users and items that fall away (items without interactions among them) are left out,
        the others keep their order. Raises DataError if k < 1 or nothing is left.
        """
        if k < 1:
            raise DataError(f"k-core with k = {k}: k must be at least 1 (1 keeps everyone).")
        rows = np.arange(len(self.users))
        while len(rows):
            users, items = self.users[rows], self.item_indices[rows]
            enough = (np.bincount(users)[users] >= k) & (np.bincount(items)[items] >= k)
            if enough.all():
                break
            rows = rows[enough]
        if len(rows) == 0:
            raise DataError(
                f"data set {self.name!r}: its {k}-core is empty: no group of users and items "
                f"has {k} interactions each. Take a smaller k or more data."
            )
        users, kept_users = _compact(users, len(self.user_ids))
        items, kept_items = _compact(items, len(self.items))
        return InteractionData(
            name=self.name,
            items=tuple(self.items[i] for i in kept_items),
            user_ids=tuple(self.user_ids[u] for u in kept_users),
            users=users,
            item_indices=items,
            times=self.times[rows],
        )

    def save(self, folder: Path | str) -> None:
        """Write the data set as a folder of two Parquet files and dataset.json.

        The folder appears complete or not at all. One that exists is replaced if it is empty
        or holds a saved data set and nothing else; anything else is refused with a DataError.
        """
        target = Path(folder).resolve()
        _check_replaceable(target)
        fresh = target.with_name(f".{target.name}.{uuid4().hex}")
        retired = fresh.with_suffix(".old")
        try:
            fresh.mkdir(parents=True)
            self._write(fresh)
            if target.exists():
                os.replace(target, retired)
            try:
                os.replace(fresh, target)
            except OSError:
                if retired.exists():
                    os.replace(retired, target)
                raise
            shutil.rmtree(retired, ignore_errors=True)
        except OSError as error:
            raise DataError(
                f"can't write data set {self.name!r} to {target}: {error}. "
                "Free disk space or choose a folder that you may write to."
            ) from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _write(self, folder: Path) -> None:
        items = pa.table(
            [
                [item.id for item in self.items],
                [item.title for item in self.items],
                [sorted(item.attributes.items()) for item in self.items],
                [item.description for item in self.items],
            ],
            schema=_ITEMS_SCHEMA,
        )
        interactions = pa.table(
            [
                pa.array(self.user_ids, pa.string()).take(pa.array(self.users)),
                items["id"].take(pa.array(self.item_indices)),
                pa.array(self.times),
            ],
            schema=_INTERACTIONS_SCHEMA,
        )
        manifest = _Manifest(
            name=self.name,
            users=len(self.user_ids),
            items=len(self.items),
            interactions=len(self.users),
            fingerprint=self.fingerprint,
        )
        pq.write_table(items, folder / _ITEMS)
        pq.write_table(interactions, folder / _INTERACTIONS)
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> InteractionData:
        """A saved data set. Raises DataError if it is none, damaged or of another schema."""
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise DataError(
                f"{folder} holds no prepared data set (no {MANIFEST} in it). "
                "Prepare the data first, or name the folder that it was prepared in."
            )
        try:
            manifest = _Manifest.model_validate_json((folder / MANIFEST).read_bytes())
            items = pq.read_table(folder / _ITEMS)
            interactions = pq.read_table(folder / _INTERACTIONS)
            data = cls._from_tables(manifest.name, items, interactions)
        except (OSError, ValueError, pa.ArrowException, DataError) as error:
            raise _damaged(folder, str(error)) from error
        if data.fingerprint != manifest.fingerprint:
            raise _damaged(
                folder,
                f"its content has fingerprint {data.fingerprint}, "
                f"{MANIFEST} says {manifest.fingerprint}",
            )
        return data

    @classmethod
    def _from_tables(cls, name: str, items: pa.Table, interactions: pa.Table) -> InteractionData:
        if (items.schema, interactions.schema) != (_ITEMS_SCHEMA, _INTERACTIONS_SCHEMA):
            raise DataError("its files do not have the columns of this version")
        users = interactions["user_id"].dictionary_encode().combine_chunks()
        indices = pc.index_in(interactions["item_id"], value_set=items["id"]).combine_chunks()
        if indices.null_count:
            raise DataError("an interaction names an item that does not exist")
        return cls(
            name=name,
            items=tuple(
                Item(id_, title, {key: tuple(values) for key, values in attributes}, description)
                for id_, title, attributes, description in zip(
                    *(items[c].to_pylist() for c in ("id", "title", "attributes", "description")),
                    strict=True,
                )
            ),
            user_ids=tuple(users.dictionary.to_pylist()),
            users=users.indices.to_numpy(),
            item_indices=indices.to_numpy(),
            times=interactions["time"].to_numpy(),
        )


class _Manifest(BaseModel):
    """dataset.json."""

    format: Literal["deeprec.interactions"] = "deeprec.interactions"
    schema_version: Literal[1] = 1
    name: str
    users: int
    items: int
    interactions: int
    fingerprint: str


def some_rows(numbers: Sequence[int] | NDArray[np.integer]) -> str:
    """The first few row numbers, for a message."""
    more = " …" if len(numbers) > _NAMED_ROWS else ""
    return f"rows {', '.join(map(str, numbers[:_NAMED_ROWS]))}{more}"


def _compact(codes: NDArray[np.integer], count: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Codes renumbered without gaps, and the old code of each new one."""
    used = np.bincount(codes, minlength=count) > 0
    return (np.cumsum(used) - 1)[codes].astype(np.int32), np.flatnonzero(used)


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError(f"{folder} is a file. Name a folder to save the data set in.")
    found = {path.name for path in folder.iterdir()}
    foreign = sorted(found - {_ITEMS, _INTERACTIONS, MANIFEST})
    if foreign or (found and MANIFEST not in found):
        raise DataError(
            f"{folder} is not a saved data set alone (it holds {(foreign or sorted(found))[0]!r}) "
            "and is not overwritten. Name a new folder or move its content away."
        )


def _damaged(folder: Path, why: str) -> DataError:
    return DataError(
        f"the data set in {folder} is damaged or was written by another version: {why}. "
        "Prepare it again from its source."
    )
