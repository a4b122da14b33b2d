"""Amazon Reviews of 2018 and 2023: JSON lines of reviews and of item metadata.

Both files are streamed, plain or gzip; metadata is kept for reviewed items only. Titles come
with HTML entities, which are resolved. tools/loaders.py offers these beside the other formats.
"""

from __future__ import annotations

import html
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .data_files import Rows, fail, items_by_id, json_records, make_item, only
from .interactions import InteractionData, Item

_FORMAT = "Mend or remove the row, or name the right format."


@dataclass(frozen=True)
class _Layout:
    user: str
    item: str  # in reviews and in metadata
    time: str
    per_second: int
    rating: str
    attributes: Mapping[str, str]  # field of the metadata → attribute


_LAYOUTS = {
    "amazon-2018": _Layout(
        user="reviewerID",
        item="asin",
        time="unixReviewTime",
        per_second=1,
        rating="overall",
        attributes={"category": "category", "brand": "brand"},
    ),
    "amazon-2023": _Layout(
        user="user_id",
        item="parent_asin",
        time="timestamp",
        per_second=1_000,
        rating="rating",
        attributes={
            "categories": "category",
            "main_category": "main_category",
            "store": "store",
        },
    ),
}


def load_amazon_2018(
    path: Path | str,
    *,
    name: str | None = None,
    metadata: Path | str | None = None,
    min_rating: float | None = None,
) -> InteractionData:
    """Amazon Reviews 2018.

    `path` is the file of reviews or a folder that holds one; `metadata` is by default the
    meta_… file beside it. Items carry category and brand.
    """
    return _load(_LAYOUTS["amazon-2018"], Path(path), name, metadata, min_rating)


def load_amazon_2023(
    path: Path | str,
    *,
    name: str | None = None,
    metadata: Path | str | None = None,
    min_rating: float | None = None,
) -> InteractionData:
    """Amazon Reviews 2023; paths as in `load_amazon_2018`.

    Items are parent products and carry category, main_category and store.
    """
    return _load(_LAYOUTS["amazon-2023"], Path(path), name, metadata, min_rating)


def detect_amazon(files: Sequence[Path]) -> list[str]:
    """The formats that the first file of reviews among these may have."""
    reviews = [f for f in files if _is_json_lines(f) and not f.name.startswith("meta_")]
    if not reviews:
        return []
    _, first = next(json_records(reviews[0]))
    return [name for name, layout in _LAYOUTS.items() if {layout.user, layout.item} <= set(first)]


def _load(
    layout: _Layout,
    path: Path,
    name: str | None,
    metadata: Path | str | None,
    min_rating: float | None,
) -> InteractionData:
    reviews, metadata = _find_files(path, Path(metadata) if metadata else None)
    rows = Rows(reviews, min_rating, layout.per_second)
    for row, record in json_records(reviews):
        rows.add(
            row,
            _id(reviews, row, record, layout.user),
            _id(reviews, row, record, layout.item),
            _number(reviews, row, record, layout.time),
            None if min_rating is None else _number(reviews, row, record, layout.rating),
        )
    items = items_by_id(_items(layout, metadata, rows.item_codes), metadata)
    return rows.build(name or reviews.name.partition(".")[0], items)


def _items(layout: _Layout, path: Path, wanted: Container[str]) -> Iterator[tuple[int, Item]]:
    for row, record in json_records(path):
        id_ = _id(path, row, record, layout.item).strip()
        if id_ not in wanted:
            continue
        title = " ".join(_texts(path, row, record, "title"))
        if "getTime" in title:  # some 2018 titles are a script of the shop's page
            title = ""
        attributes = {to: _texts(path, row, record, key) for key, to in layout.attributes.items()}
        description = " ".join(_texts(path, row, record, "description"))
        yield row, make_item(path, row, id_, title, attributes, description)


def _find_files(path: Path, metadata: Path | None) -> tuple[Path, Path]:
    """The file of reviews and the file of metadata."""
    folder = path if path.is_dir() else path.parent
    files = sorted(file for file in folder.glob("*") if _is_json_lines(file))
    described = [file for file in files if file.name.startswith("meta_")]
    if path.is_dir():
        rest = [file for file in files if file not in described and file != metadata]
        path = only(rest, folder, "reviews", "Name the file of reviews itself.")
    if metadata is None:
        # Video_Games_5 is the part of Video_Games with five reviews for each user and item.
        category = path.name.partition(".")[0].removesuffix("_5")
        described = [file for file in described if file.name.startswith(f"meta_{category}.")]
        metadata = only(described, folder, f"metadata (meta_{category}.…)", "Name it by metadata.")
    return path, metadata


def _is_json_lines(path: Path) -> bool:
    return path.is_file() and path.name.removesuffix(".gz").endswith((".json", ".jsonl"))


def _id(path: Path, row: int, record: Mapping[str, object], field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.isascii():
        fail(path, row, f"{field} is {str(value)[:40]!r}, not an id of plain letters", _FORMAT)
    return value


def _number(path: Path, row: int, record: Mapping[str, object], field: str) -> float:
    value = record.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float):
        fail(path, row, f"{field} is {str(value)[:40]!r}, not a number", _FORMAT)
    return value


def _texts(path: Path, row: int, record: Mapping[str, object], field: str) -> list[str]:
    """A text or a list of texts, as a list; nothing where it is missing."""
    value = record.get(field)
    values = value if isinstance(value, list) else [] if value is None else [value]
    texts = []
    for text in values:
        if not isinstance(text, str):
            fail(path, row, f"{field} is {str(value)[:40]!r}, not text or a list of it", _FORMAT)
        # JSON may hold half of a surrogate pair, which no file or tokenizer can.
        whole = html.unescape(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        # Brands of 2018 were cut out of a page together with the line before: "by".
        texts.append(re.sub(r"^by\s*\n\s*", "", whole))
    return texts
