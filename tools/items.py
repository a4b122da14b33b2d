"""What can be recommended, and the text that stands for it where text is embedded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import DataError

MAX_DESCRIPTION_CHARS = 500
"""`item_text` cuts a description at the last word that ends within this many characters."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that can be recommended. Raises DataError on an empty id or title.

    `attributes` maps a name to its values, e.g. {"genres": ("Comedy",), "year": ("1995",)}.
    The text is as it came: whoever renders it neutralises markers and control characters.
    """

    id: str
    title: str
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    description: str = ""

    def __post_init__(self) -> None:
        if not self.id or not self.title:
            raise DataError(
                f"item with id {self.id!r} and title {self.title!r}: both must hold text. "
                "Give the id as title where there is none."
            )
        check_encodable(f"item {self.id!r}", self.id, self.title, self.description)
        for name, values in self.attributes.items():
            check_encodable(f"item {self.id!r}", name, *values)


def item_text(item: Item) -> str:
    """The text that stands for an item where text is embedded.

    Title, attributes in the order of their names, then the description, cut at
    MAX_DESCRIPTION_CHARS: "Toy Story. genres: Animation, Comedy. year: 1995. A boy's toys…".
    """
    sentences = [_one_line(item.title)]
    sentences += [
        f"{name}: {_one_line(', '.join(item.attributes[name]))}"
        for name in sorted(item.attributes)
        if item.attributes[name]
    ]
    parts = [text if text.endswith((".", "!", "?")) else f"{text}." for text in sentences]
    description = _one_line(item.description)
    if len(description) > MAX_DESCRIPTION_CHARS:
        whole_words = description[: MAX_DESCRIPTION_CHARS + 1].rpartition(" ")[0]
        description = whole_words or description[:MAX_DESCRIPTION_CHARS]
    return " ".join([*parts, description]).rstrip()


def check_encodable(what: str, *texts: str) -> None:
    """Raise DataError where one of the texts can't be written as UTF-8."""
    try:
        "\n".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds {error.object[error.start]!r}, half of a surrogate pair, which no "
            "file or tokenizer can hold. Repair the text in the source."
        ) from error


def _one_line(text: str) -> str:
    return " ".join(text.split())
