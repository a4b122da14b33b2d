"""The values that were used last."""

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)
ValueT = TypeVar("ValueT")


class Lru(Generic[KeyT, ValueT]):
    """The values used last, at most `size`; for one thread."""

    def __init__(self, size: int):
        self._size = size
        self._values: OrderedDict[KeyT, ValueT] = OrderedDict()

    def take(self, keys: Iterable[KeyT]) -> tuple[dict[KeyT, ValueT], list[KeyT]]:
        """What is held of `keys`, and the keys that are not."""
        found: dict[KeyT, ValueT] = {}
        missing: list[KeyT] = []
        for key in keys:
            if key in self._values:
                self._values.move_to_end(key)
                found[key] = self._values[key]
            else:
                missing.append(key)
        return found, missing

    def put(self, pairs: Iterable[tuple[KeyT, ValueT]]) -> None:
        """Hold these, and drop what was used longest ago."""
        self._values.update(pairs)
        while len(self._values) > self._size:
            self._values.popitem(last=False)

    def clear(self) -> None:
        """Drop all."""
        self._values.clear()
