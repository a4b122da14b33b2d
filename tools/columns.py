"""Tables of text or Parquet, read by Arrow: columns checked, each refused by file and row number.

Rows are counted as data_files.py says.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..errors import DataError
from . import data_files
from .data_files import MEND_ROW, check_file, fail, latest_time, lines, open_data, time_problem

TIME_UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000}
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"


@dataclass(frozen=True)
class Table:
    """Columns of a table file. Text columns of a text file are still text, numbers included."""

    path: Path
    data: pa.Table
    first_row: int

    def fail(self, index: int, problem: str, remedy: str = MEND_ROW) -> NoReturn:
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
            if not id_ or len(id_) > data_files.MAX_FIELD_CHARS:
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
        wrong = (values < 0) | (values > latest_time(per_second))
        if wrong.any():
            index = int(np.argmax(wrong))
            finer = "If times are in milliseconds or microseconds, say so by time_unit. "
            remedy = (finer if values[index] > 0 and per_second < 1_000_000 else "") + MEND_ROW
            self.fail(index, time_problem(values[index]), remedy)
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
    read = pacsv.ReadOptions(
        use_threads=False, block_size=data_files.MAX_ROW_BYTES, encoding=encoding
    )
    parse = pacsv.ParseOptions(
        delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted
    )
    try:
        # One thread: only then does Arrow know the number of a row that it refuses.
        with open_data(path) as file, pacsv.open_csv(file, read, parse) as reader:
            header = reader.schema.names
        doubled = [name for name in header if header.count(name) > 1]
        if doubled:
            raise DataError(f"{path} has two columns {doubled[0]!r}. Rename one in its header.")
        _require(columns or [], header, path)
        wanted = list(dict.fromkeys(columns or header))
        convert = pacsv.ConvertOptions(
            include_columns=wanted, column_types={name: pa.string() for name in wanted}
        )
        with open_data(path) as file:
            data = pacsv.read_csv(file, read, parse, convert)
    except LookupError as error:
        raise DataError(f"{path}: {error}. Name an encoding that Python knows.") from error
    except (OSError, EOFError, zlib.error, UnicodeError, pa.ArrowException) as error:
        raise _unreadable(path, error, encoding) from error
    return _filled(Table(path, data, first_row=2))


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
