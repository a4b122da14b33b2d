"""Files that people have, read into InteractionData.

RecBole's atomic files, MovieLens-1M, Amazon Reviews of 2018 and 2023, and any CSV or Parquet
table with named columns. Data that can't be right (a missing id, a time that is no time) is
refused with file and row, never repaired in silence. Items without interactions are left out.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from pydantic import TypeAdapter, ValidationError

from ..errors import DataError
from .amazon_reviews import detect_amazon, load_amazon_2018, load_amazon_2023
from .columns import Table, read_delimited, read_parquet
from .data_files import (
    Rows,
    fail,
    inside,
    items_by_id,
    lines,
    make_item,
    nothing_left,
    only,
)
from .interactions import MANIFEST, InteractionData, Item

logger = logging.getLogger(__name__)

_RECBOLE_TYPES = ("token", "token_seq", "float", "float_seq")
_RECBOLE_NAMES = {"class": "genres", "genre": "genres", "release_year": "year"}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def load(
    path: Path | str,
    format: str = "auto",
    *,
    name: str | None = None,
    options: Mapping[str, object] | None = None,
) -> InteractionData:
    """Read a data set. `format` is a key of FORMATS, or "auto" to tell it from the files.

    `options` are those of the format's own function, also as text, as a command line gives them
    (a sequence as "a,b"); `name` defaults to the file's or folder's.
    Raises DataError with file, row and remedy for whatever can't be read.
    """
    path, options = Path(path), options or {}
    _check_exists(path)
    format = detect_format(path) if format == "auto" else format
    if format not in FORMATS:
        raise DataError(f"unknown data format {format!r}. Known: {', '.join(FORMATS)}, auto.")
    loader = FORMATS[format]
    known = [p for p in inspect.signature(loader).parameters if p not in ("path", "name")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise DataError(
            f"format {format} has no option {unknown[0]!r}. Its options: {', '.join(known)}."
        )
    hints = get_type_hints(loader)
    typed = {option: _typed(option, value, hints[option]) for option, value in options.items()}
    data = loader(path, name=name, **typed)
    counts = len(data.user_ids), len(data.items), len(data.users)
    logger.info("%s: %d users, %d items, %d interactions", data.name, *counts)
    return data


def _typed(option: str, value: object, hint: Any) -> object:
    """An option's value as its loader wants it. Raises DataError."""
    wants_sequence = "Sequence" in str(hint)
    if isinstance(value, str) and wants_sequence:
        value = [part.strip() for part in value.split(",")]
    try:
        typed: object = TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise DataError(f"option {option}: {error.errors()[0]['msg']} (got {value!r}).") from error
    return typed


def detect_format(path: Path | str) -> str:
    """The format of a file or folder, where its names leave no doubt; DataError otherwise."""
    path = Path(path)
    _check_exists(path)
    if (path / MANIFEST).is_file():
        raise DataError(f"{path} is already a prepared data set. Use it as it is.")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = []
    if any(file.suffix == ".inter" for file in files):
        found.append("recbole")
    if {"ratings.dat", "movies.dat"} <= {file.name for file in files}:
        found.append("movielens-1m")
    if path.is_file() and path.name.removesuffix(".gz").endswith((".parquet", *_DELIMITERS)):
        found.append("table")
    if not found:  # the others go by names; this one looks into the files
        found = detect_amazon(files)
    if len(found) != 1:
        raise DataError(
            f"can't tell the format of {path} ({' or '.join(found) or 'none fits'}). "
            f"Name it: {', '.join(FORMATS)}. A table is named by its file, not its folder."
        )
    return found[0]


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path} does not exist. Name a data file or the folder that holds it.")


def load_recbole(
    path: Path | str,
    *,
    name: str | None = None,
    user_field: str = "user_id",
    item_field: str = "item_id",
    time_field: str = "timestamp",
    rating_field: str = "rating",
    min_rating: float | None = None,
    title_field: str | None = None,
    attributes: Sequence[str] | None = None,
    seq_separator: str = " ",
) -> InteractionData:
    """RecBole's atomic files: `path` is NAME.inter or a folder that holds just one.

    NAME.item beside it gives titles and attributes; without it, titles are ids. The title is
    `title_field`, by default the only field with "title", else "name", in its name; a field
    called description is the description; `attributes` names the fields to take, by default
    every other token and token_seq. `class` and `genre` are called genres, `release_year` year.
    """
    path = Path(path)
    if path.is_dir():
        path = only(
            sorted(path.glob("*.inter")), path, "interactions (.inter)", "Name the file itself."
        )
    interactions, _ = _read_recbole(path)
    metadata: dict[str, Item] = {}
    item_path = path.with_suffix(".item")
    if item_path.exists():
        table, types = _read_recbole(inside(item_path, path.parent))
        texts = [f for f, type_ in types.items() if type_.startswith("token") and f != item_field]
        title = title_field or _guess_title(texts, item_path)
        description = "description" if "description" in texts else None
        if attributes is None:
            attributes = [f for f in texts if f not in (title, description)]
        names = {f: _RECBOLE_NAMES.get(f, f) for f in attributes}
        separators = {f: seq_separator if types.get(f) == "token_seq" else None for f in names}
        metadata = _items(table, item_field, title, description, names, separators)
    columns = _Columns(user_field, item_field, time_field, rating_field)
    return _interactions(name or path.stem, interactions, columns, "s", min_rating, metadata)


def load_movielens_1m(
    path: Path | str, *, name: str | None = None, min_rating: float | None = None
) -> InteractionData:
    """MovieLens-1M: a folder with ratings.dat and movies.dat, fields separated by `::`.

    Items carry genres and year, which is taken off the end of the title.
    """
    folder = Path(path)
    movies = inside(folder / "movies.dat", folder)
    metadata = items_by_id(_movies(movies), movies)
    rows = Rows(inside(folder / "ratings.dat", folder), min_rating)
    for row, (user, item, rating, seconds) in _double_colon(rows.path, 4):
        try:
            rows.add(row, user, item, float(seconds), float(rating))
        except ValueError:
            fail(rows.path, row, f"rating {rating[:40]!r} or time {seconds[:40]!r} is no number")
    return rows.build(name or folder.resolve().name, metadata)


def load_table(
    path: Path | str,
    *,
    name: str | None = None,
    user: str = "user_id",
    item: str = "item_id",
    time: str = "timestamp",
    time_unit: str = "s",
    rating: str = "rating",
    min_rating: float | None = None,
    items: Path | str | None = None,
    item_key: str | None = None,
    title: str = "title",
    description: str | None = None,
    attributes: Sequence[str] = (),
    list_separator: str = "|",
    encoding: str = "utf-8",
) -> InteractionData:
    """A .parquet, .csv or .tsv file (text also as .gz) with a row for each interaction.

    `user`, `item`, `time` and, with `min_rating`, `rating` name its columns. `time_unit` is s,
    ms, us or iso (dates as text; UTC where no zone is given); Parquet timestamps need none.
    `items` is a table of items whose columns are named by `item_key` (default: `item`),
    `title`, `description` and `attributes`; text there is split at `list_separator`.
    """
    path = Path(path)
    needed = [user, item, time] + ([rating] if min_rating is not None else [])
    interactions = _read_table(path, needed, encoding)
    metadata: dict[str, Item] = {}
    if items is not None:
        key = item_key or item
        needed = [key, title, *([description] if description else []), *attributes]
        table = _read_table(Path(items), needed, encoding)
        names = {attribute: attribute for attribute in attributes}
        separators = dict.fromkeys(attributes, list_separator)
        metadata = _items(table, key, title, description, names, separators)
    columns = _Columns(user, item, time, rating)
    name = name or path.name.partition(".")[0]
    return _interactions(name, interactions, columns, time_unit, min_rating, metadata)


FORMATS: Mapping[str, Callable[..., InteractionData]] = {
    "recbole": load_recbole,
    "movielens-1m": load_movielens_1m,
    "amazon-2018": load_amazon_2018,
    "amazon-2023": load_amazon_2023,
    "table": load_table,
}


@dataclass(frozen=True)
class _Columns:
    user: str
    item: str
    time: str
    rating: str


def _interactions(
    name: str,
    table: Table,
    columns: _Columns,
    time_unit: str,
    min_rating: float | None,
    metadata: Mapping[str, Item],
) -> InteractionData:
    users, user_ids = table.ids(columns.user)
    items, item_ids = table.ids(columns.item)
    times, per_second = table.times(columns.time, time_unit)
    numbers = table.first_row + np.arange(len(times))
    if min_rating is not None:
        kept = table.numbers(columns.rating) >= min_rating
        if not kept.any():
            raise nothing_left(table.path, min_rating)
        users, items, times, numbers = users[kept], items[kept], times[kept], numbers[kept]
    return InteractionData.from_rows(
        name,
        user_ids=user_ids,
        item_ids=item_ids,
        users=users,
        items=items,
        times=times,
        metadata=metadata,
        per_second=per_second,
        numbers=numbers,
    )


def _items(
    table: Table,
    key: str,
    title: str,
    description: str | None,
    names: Mapping[str, str],
    separators: Mapping[str, str | None],
) -> dict[str, Item]:
    """Items by id. `names` maps a column to its attribute; two columns may feed the same."""
    codes, ids = table.ids(key)
    titles = table.texts(title)
    descriptions = table.texts(description) if description else [""] * len(codes)
    lists = {column: table.lists(column, separators[column]) for column in names}

    def rows() -> Iterator[tuple[int, Item]]:
        for index, code in enumerate(codes):
            attributes: dict[str, list[str]] = {}
            for column, values in lists.items():
                attributes.setdefault(names[column], []).extend(values[index])
            row = table.first_row + index
            text = titles[index], attributes, descriptions[index]
            yield row, make_item(table.path, row, ids[code], *text)

    return items_by_id(rows(), table.path)


def _read_table(path: Path, columns: Sequence[str], encoding: str) -> Table:
    if path.suffix == ".parquet":
        return read_parquet(path, columns)
    delimiter = _DELIMITERS.get(Path(path.name.removesuffix(".gz")).suffix)
    if delimiter is None:
        raise DataError(f"{path} must end in .parquet, .csv, .tsv, .csv.gz or .tsv.gz. Rename it.")
    return read_delimited(path, columns, delimiter=delimiter, encoding=encoding)


def _read_recbole(path: Path) -> tuple[Table, dict[str, str]]:
    """An atomic file with its bare field names, and the type of each."""
    table = read_delimited(path, None, delimiter="\t", quoted=False)
    types: dict[str, str] = {}
    for column in table.data.column_names:
        field, _, type_ = column.rpartition(":")
        if not field or type_ not in _RECBOLE_TYPES or field in types:
            raise DataError(
                f"{path}: header field {column!r} is not like user_id:token (or occurs twice). "
                f"Known types: {', '.join(_RECBOLE_TYPES)}."
            )
        types[field] = type_
    return Table(path, table.data.rename_columns(list(types)), table.first_row), types


def _guess_title(fields: Sequence[str], path: Path) -> str:
    for word in ("title", "name"):
        fitting = [f for f in fields if f == word] or [f for f in fields if word in f]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            break
    raise DataError(
        f"{path}: can't tell which of {', '.join(fields) or 'no text fields'} is the title. "
        "Name it by title_field."
    )


def _double_colon(path: Path, width: int) -> Iterator[tuple[int, list[str]]]:
    for row, line in lines(path):
        try:
            text = line.decode("utf-8")  # some copies were converted
        except UnicodeDecodeError:
            text = line.decode("latin-1")  # as GroupLens ships it
        fields = text.split("::")
        if len(fields) != width:
            fail(path, row, f"{width} fields separated by :: are wanted, not {text[:80]!r}")
        yield row, fields


def _movies(path: Path) -> Iterator[tuple[int, Item]]:
    for row, (id_, text, genres) in _double_colon(path, 3):
        dated = re.fullmatch(r"\s*(.*\S)\s*\((\d{4})\)\s*", text)
        title, year = (dated[1], [dated[2]]) if dated else (text, [])
        yield row, make_item(path, row, id_, title, {"genres": genres.split("|"), "year": year})
