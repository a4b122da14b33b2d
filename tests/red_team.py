"""Texts that a hostile catalog, user or policy would try (red_team.json), as a test reads them."""

import json
from pathlib import Path


def _text(entry: str | dict[str, str | int]) -> str:
    return entry if isinstance(entry, str) else str(entry["text"]) * int(entry["times"])


TEXTS = tuple(
    _text(entry)
    for entries in json.loads(Path(__file__).with_suffix(".json").read_text("utf-8")).values()
    for entry in entries
)


def whole(text: str) -> str:
    """As a file holds it: without halves of surrogate pairs, which tools/items.py refuses."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
