"""Rows out of data files, each refused by file and row number where it can't be right.

Text is read line by line or as a table by Arrow; plain or gzip is told from the content, not
the name. A row number counts records from 1: every line of a line-by-line file, the header
but no blank lines of a CSV, the rows alone of a Parquet file.
"""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import re
import sys
import time
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..errors import DataError
from .interactions import InteractionData, Item, some_rows

logger = logging.getLogger(__name__)

MAX_ROW_BYTES = 8 * 2**20
"""A longer row of a text file is refused."""
MAX_FIELD_CHARS = 100_000
"""A longer id, title, attribute or description is refused."""
MAX_VALUES = 10_000
"""An item with more attribute values is refused."""

TIME_UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000}
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_ROW = "Mend or remove the row."


def fail(path: Path, row: int, problem: str, remedy: str = _ROW) -> NoReturn:
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
        with _open(path) as file:
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
        self._latest = _latest_time(self.per_second)

    def add(self, row: int, user: str, item: str, time: float, rating: float | None) -> None:
        """Add an interaction, unless it is rated below `min_rating`."""
        user, item = user.strip(), item.strip()
        if not user or not item or max(len(user), len(item)) > MAX_FIELD_CHARS:
            fail(self.path, row, "user or item id is empty or too long")
        if not 0 <= time <= self._latest:
            fail(self.path, row, _time_problem(time))
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


@dataclass(frozen=True)
class Table:
    """Columns of a table file. Text columns of a text file are still text, numbers included."""

    path: Path
    data: pa.Table
    first_row: int

    def fail(self, index: int, problem: str, remedy: str = _ROW) -> NoReturn:
        """Raise the DataError for the row at this position."""
        fail(self.path, self.first_row + index, problem, remedy)

    def column(self, name: str) -> pa.ChunkedArray:
        """A column by its name; DataError names those that exist."""
        _require([name], self.data.column_names, self.path)
        return self.data[name]

    def _cast(self, name: str, type_: pa.DataType) -> pa.ChunkedArray:
        """A column as text or lists of it, which Arrow otherwise takes for UTF-8 on trust."""
        column = self.column(name)
        try:
            text = column.cast(type_)
            text.validate(full=True)
        except pa.ArrowException as error:
            problem = f"is {column.type} and can't be read as {type_}: {str(error)[:200]}"
            raise DataError(
                f"{self.path}: column {name!r} {problem}. Convert it to text in UTF-8."
            ) from error
        return text

    def ids(self, name: str) -> tuple[NDArray[np.int32], list[str]]:
        """A column of ids (text or whole numbers): codes by row, and the id of each code."""
        column = self.column(name)
        if not (_is_text(column.type) or pa.types.is_integer(column.type)):
            raise DataError(
                f"{self.path}: column {name!r} holds {column.type}; ids must be text or integers. "
                "Convert the column."
            )
        text = pc.utf8_trim_whitespace(self._cast(name, pa.string()))
        encoded = text.dictionary_encode(null_encoding="encode").combine_chunks()
        codes, ids = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
        for code, id_ in enumerate(ids):
            if not id_ or len(id_) > MAX_FIELD_CHARS:
                first = int(np.argmax(codes == code))
                self.fail(first, f"column {name!r} is {'too long' if id_ else 'empty'}")
        return codes, ids

    def texts(self, name: str) -> list[str]:
        """A column as text; nothing where a value is missing."""
        column = self.column(name)
        if pa.types.is_nested(column.type):
            raise DataError(
                f"{self.path}: column {name!r} holds {column.type}, not text. Convert the column."
            )
        return cast(list[str], pc.fill_null(self._cast(name, pa.string()), "").to_pylist())

    def lists(self, name: str, separator: str | None) -> list[list[str]]:
        """A column of lists; text is split at `separator` (None: it is one value)."""
        column = self.column(name)
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            texts = self._cast(name, pa.list_(pa.string())).to_pylist()
            return [[value for value in values or [] if value] for values in texts]
        return [text.split(separator) if separator else [text] for text in self.texts(name)]

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A column of numbers; DataError at the first that is missing, no number or not finite."""
        column = self.column(name)
        if _is_text(column.type):
            column = pc.utf8_trim_whitespace(self._cast(name, pa.string()))
            fits = pc.fill_null(pc.match_substring_regex(column, _NUMBER), False).to_numpy()
            if not fits.all():
                index = int(np.argmin(fits))
                self.fail(index, f"{name} {str(column[index])[:40]!r} is no number")
        elif not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            raise DataError(
                f"{self.path}: column {name!r} holds {column.type}, not numbers. Convert it."
            )
        if column.null_count:
            self.fail(int(np.argmax(column.is_null().to_numpy())), f"{name} is missing")
        values = cast(NDArray[np.float64], column.cast(pa.float64(), safe=False).to_numpy())
        if not np.isfinite(values).all():
            index = int(np.argmin(np.isfinite(values)))
            self.fail(index, f"{name} {values[index]} is not finite")
        return values

    def times(self, name: str, unit: str) -> tuple[NDArray[np.float64], int]:
        """A column of times, and how many of its units make a second.

        `unit` is a key of TIME_UNITS, or "iso" for dates as text; a column of timestamps
        carries its own unit.
        """
        column = self.column(name)
        if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
            per_second = TIME_UNITS["us"]
            micros = column.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
            values = Table(self.path, pa.table({name: micros}), self.first_row).numbers(name)
        elif unit == "iso":
            per_second = 1
            values = np.array([self._iso(i, text) for i, text in enumerate(self.texts(name))])
        elif unit in TIME_UNITS:
            per_second = TIME_UNITS[unit]
            values = self.numbers(name)
        else:
            raise DataError(f"unknown time unit {unit!r}. Known: {', '.join(TIME_UNITS)}, iso.")
        wrong = (values < 0) | (values > _latest_time(per_second))
        if wrong.any():
            index = int(np.argmax(wrong))
            finer = "If times are in milliseconds or microseconds, say so by time_unit. "
            remedy = (finer if values[index] > 0 and per_second < 1_000_000 else "") + _ROW
            self.fail(index, _time_problem(values[index]), remedy)
        return values, per_second

    def _iso(self, index: int, text: str) -> float:
        try:
            moment = datetime.fromisoformat(text.strip())
        except ValueError:
            self.fail(index, f"time {text[:40]!r} is not like 2024-12-31T23:59:59")
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def read_parquet(path: Path, columns: Sequence[str]) -> Table:
    """The named columns of a Parquet file."""
    check_file(path)
    try:
        _require(columns, pq.read_schema(path).names, path)
        data = pq.read_table(path, columns=list(dict.fromkeys(columns)))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is no Parquet file, or damaged: {error}.") from error
    return _filled(Table(path, data, first_row=1))


def read_delimited(
    path: Path,
    columns: Sequence[str] | None,
    *,
    delimiter: str,
    quoted: bool = True,
    encoding: str = "utf-8",
) -> Table:
    """The named columns (None: all) of a text table with a header, as text.

    `quoted`: a field may be put in double quotes and then hold delimiters and line breaks.
    """
    check_file(path)
    read = pacsv.ReadOptions(use_threads=False, block_size=MAX_ROW_BYTES, encoding=encoding)
    parse = pacsv.ParseOptions(
        delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted
    )
    try:
        # One thread: only then does Arrow know the number of a row that it refuses.
        with _open(path) as file, pacsv.open_csv(file, read, parse) as reader:
            header = reader.schema.names
        doubled = [name for name in header if header.count(name) > 1]
        if doubled:
            raise DataError(f"{path} has two columns {doubled[0]!r}. Rename one in its header.")
        _require(columns or [], header, path)
        wanted = list(dict.fromkeys(columns or header))
        convert = pacsv.ConvertOptions(
            include_columns=wanted, column_types={name: pa.string() for name in wanted}
        )
        with _open(path) as file:
            data = pacsv.read_csv(file, read, parse, convert)
    except LookupError as error:
        raise DataError(f"{path}: {error}. Name an encoding that Python knows.") from error
    except (OSError, EOFError, zlib.error, UnicodeError, pa.ArrowException) as error:
        raise _unreadable(path, error, encoding) from error
    return _filled(Table(path, data, first_row=2))


def nothing_left(path: Path, min_rating: float | None) -> DataError:
    """The error for a file in which no interaction reaches the minimum rating."""
    return DataError(f"{path}: no interaction is rated {min_rating} or more. Lower min_rating.")


def _unreadable(path: Path, error: Exception, encoding: str) -> DataError:
    problem = str(error)
    if "straddling" in problem:  # Arrow's word for a row longer than a block
        for _ in lines(path):  # names the row
            pass
    if isinstance(error, UnicodeError):  # of a file that is no UTF-8 Arrow names no row
        problem = _first_undecodable(path, encoding) or problem
    place = re.search(r"Row #(\d+): (.*)", problem)
    where = f"{path}, row {place[1]}: {place[2][:200]}" if place else f"{path}: {problem[:200]}"
    return DataError(
        f"{where} (read as {encoding}). Mend the row, or name the file's right encoding."
    )


def _first_undecodable(path: Path, encoding: str) -> str | None:
    for row, (_, line) in enumerate(lines(path), 1):
        try:
            line.decode(encoding)
        except UnicodeError as error:
            return f"Row #{row}: {error}"
    return None


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path, "rb")) if packed else path.open("rb")


def _require(columns: Sequence[str], existing: Sequence[str], path: Path) -> None:
    for name in columns:
        if name not in existing:
            raise DataError(
                f"{path} has no column {name!r} but {', '.join(map(repr, existing))}. "
                "Name the right one by an option."
            )


def _filled(table: Table) -> Table:
    if table.data.num_rows == 0:
        raise DataError(f"{table.path} holds no rows below its header. Get it again.")
    return table


def _is_text(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))


def _latest_time(per_second: int) -> float:
    # A day of grace: clocks differ, and a date without a zone may be ahead of ours.
    return (time.time() + 86_400) * per_second


def _time_problem(value: float) -> str:
    shown = str(value)[:40]
    if value < 0:
        return f"time {shown} is before 1970"
    if value > 0 and value != math.inf:
        return f"time {shown} lies in the future of this machine's clock"
    return f"time {shown} is not a finite number"
