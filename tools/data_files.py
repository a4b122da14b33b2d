"""Rows out of data files, each refused by file and row number where it can't be right.

Text is read line by line here and as a table in columns.py; plain or gzip is told from the content,
not the name. A row number counts records from 1: every line of a line-by-line file, the header
but no blank lines of a CSV, the rows alone of a Parquet file.
"""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import sys
import time
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

import numpy as np

from ..errors import DataError
from .interactions import InteractionData, Item, some_rows

logger = logging.getLogger(__name__)

MAX_ROW_BYTES = 8 * 2**20
"""A longer row of a text file is refused."""
MAX_FIELD_CHARS = 100_000
"""A longer id, title, attribute or description is refused."""
MAX_VALUES = 10_000
"""An item with more attribute values is refused."""

MEND_ROW = "Mend or remove the row."


def fail(path: Path, row: int, problem: str, remedy: str = MEND_ROW) -> NoReturn:
    """Raise the DataError for one row."""
    raise DataError(f"{path}, row {row}: {problem}. {remedy}")


def check_file(path: Path) -> None:
    """Raise DataError unless `path` is a regular file (or a link to one) that is not empty."""
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise DataError(f"{path} {what}. Check the path.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty. Get it again from its source.")


def inside(path: Path, folder: Path) -> Path:
    """`path`, which was found in `folder` and not named by anyone.

    Raises DataError where it is a link that leads out of the folder: what is unpacked from an
    archive may point at any file of this machine.
    """
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(os.path.realpath(folder)):
        raise DataError(
            f"{path} is a link to {target}, outside {folder}. Put a copy of the file in its place, "
            "or name the file itself."
        )
    return path


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Row number and content of each line that is not blank; never the whole file at once."""
    check_file(path)
    row = found = 0
    try:
        with open_data(path) as file:
            while line := file.readline(MAX_ROW_BYTES + 1):
                row += 1
                if len(line) > MAX_ROW_BYTES:
                    fail(path, row, f"the row is longer than {MAX_ROW_BYTES} bytes")
                line = (line.removeprefix(b"\xef\xbb\xbf") if row == 1 else line).strip(b"\r\n")
                if line.strip():
                    found += 1
                    yield row, line
    except (OSError, EOFError, zlib.error) as error:
        fail(path, row + 1, f"can't be read: {error}", "Get the file again from its source.")
    if not found:
        raise DataError(f"{path} holds no rows. Get it again from its source.")


def json_records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Row number and object of each line of a JSON lines file in UTF-8."""
    for row, line in lines(path):
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            fail(path, row, f"not a JSON object in UTF-8 ({error})")
        if not isinstance(record, dict):
            fail(path, row, f"a JSON object is wanted, not {str(record)[:40]!r}")
        yield row, record


def make_item(
    path: Path,
    row: int,
    id_: str,
    title: str,
    attributes: Mapping[str, Sequence[str]],
    description: str = "",
) -> Item:
    """An item from a file: white space tidied, doubled and empty values dropped."""
    id_ = id_.strip()
    if not id_:
        fail(path, row, "the item has no id")
    texts = chain((id_, title, description), *attributes.values())
    if any(len(text) > MAX_FIELD_CHARS for text in texts):
        fail(path, row, f"a field is longer than {MAX_FIELD_CHARS} characters")
    if sum(map(len, attributes.values())) > MAX_VALUES:
        fail(path, row, f"the item has more than {MAX_VALUES} attribute values")
    tidied = {
        name: tuple(dict.fromkeys(text for value in values if (text := " ".join(value.split()))))
        for name, values in attributes.items()
    }
    return Item(
        id=id_,
        title=" ".join(title.split()) or id_,
        attributes={name: values for name, values in tidied.items() if values},
        description=" ".join(description.split()),
    )


def items_by_id(items: Iterable[tuple[int, Item]], path: Path) -> dict[str, Item]:
    """Items of a file, given with their row numbers, by id.

    Of those that come twice the first is kept; the rows of the others are logged.
    """
    found: dict[str, Item] = {}
    doubled = [row for row, item in items if found.setdefault(item.id, item) is not item]
    if doubled:
        told = len(doubled), some_rows(doubled)
        logger.warning("%s: %d items came twice (%s); the first was kept", path, *told)
    return found


def only(candidates: Sequence[Path], folder: Path, what: str, remedy: str) -> Path:
    """The one candidate; DataError if there is none or a choice, or it leads out of `folder`."""
    if len(candidates) != 1:
        found = ", ".join(path.name for path in candidates) or "none"
        raise DataError(f"{folder} must hold one file of {what}; found: {found}. {remedy}")
    return inside(candidates[0], folder)


@dataclass
class Rows:
    """Interactions gathered one by one; ids are kept once, however often they occur."""

    path: Path
    min_rating: float | None = None
    per_second: int = 1
    user_codes: dict[str, int] = field(default_factory=dict)
    item_codes: dict[str, int] = field(default_factory=dict)
    users: array[int] = field(default_factory=lambda: array("i"))
    items: array[int] = field(default_factory=lambda: array("i"))
    times: array[float] = field(default_factory=lambda: array("d"))
    numbers: array[int] = field(default_factory=lambda: array("q"))  # of the rows

    def __post_init__(self) -> None:
        self._latest = latest_time(self.per_second)

    def add(self, row: int, user: str, item: str, time: float, rating: float | None) -> None:
        """Add an interaction, unless it is rated below `min_rating`."""
        user, item = user.strip(), item.strip()
        if not user or not item or max(len(user), len(item)) > MAX_FIELD_CHARS:
            fail(self.path, row, "user or item id is empty or too long")
        if not 0 <= time <= self._latest:
            fail(self.path, row, time_problem(time))
        if self.min_rating is not None:
            # Comparing holds for NaN, infinities and whole numbers beyond any float.
            if rating is None or not abs(rating) <= sys.float_info.max:
                shown = str(rating)[:40]
                fail(self.path, row, f"rating {shown} is no finite number, and min_rating is set")
            if rating < self.min_rating:
                return
        self.users.append(self.user_codes.setdefault(user, len(self.user_codes)))
        self.items.append(self.item_codes.setdefault(item, len(self.item_codes)))
        self.times.append(time)
        self.numbers.append(row)

    def build(self, name: str, metadata: Mapping[str, Item]) -> InteractionData:
        """What was gathered, as a data set."""
        if not self.users:
            raise nothing_left(self.path, self.min_rating)
        return InteractionData.from_rows(
            name,
            user_ids=list(self.user_codes),
            item_ids=list(self.item_codes),
            users=np.frombuffer(self.users, dtype=np.int32),
            items=np.frombuffer(self.items, dtype=np.int32),
            times=np.frombuffer(self.times, dtype=np.float64),
            metadata=metadata,
            per_second=self.per_second,
            numbers=np.frombuffer(self.numbers, dtype=np.int64),
        )


def nothing_left(path: Path, min_rating: float | None) -> DataError:
    """The error for a file in which no interaction reaches the minimum rating."""
    return DataError(f"{path}: no interaction is rated {min_rating} or more. Lower min_rating.")


def open_data(path: Path) -> BinaryIO:
    """A file's bytes, unpacked where it is gzip by its content."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path, "rb")) if packed else path.open("rb")


def latest_time(per_second: int) -> float:
    """The latest time that an interaction may have, in 1/`per_second` seconds."""
    # A day of grace: clocks differ, and a date without a zone may be ahead of ours.
    return (time.time() + 86_400) * per_second


def time_problem(value: float) -> str:
    """What is wrong with a time that is none, before 1970 or too late."""
    shown = str(value)[:40]
    if value < 0:
        return f"time {shown} is before 1970"
    if value > 0 and value != math.inf:
        return f"time {shown} lies in the future of this machine's clock"
    return f"time {shown} is not a finite number"
