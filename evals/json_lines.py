"""Files of JSON lines that grow line by line and outlive a kill.

A line is written whole or is torn: a last line without its end is dropped.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import EvaluationError


class JSONLines:
    """One such file. It can be read at any time, and appended to between `open` and `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def read(self) -> list[bytes]:
        """All whole lines."""
        return self._content()[: self._whole()].splitlines()

    def open(self) -> None:
        """Make the file where it is missing, and cut a torn line off. Raises EvaluationError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(self._handle, self._whole())
        except OSError as error:
            raise self._unwritable(str(error)) from error

    def append(self, text: str) -> None:
        """Add a line, which a kill of this process can't take away again.

        Raises EvaluationError where the disk is full.
        """
        if self._handle is None:
            raise RuntimeError("append needs an open file")
        line = text.encode() + b"\n"
        try:
            written = os.write(self._handle, line)
        except OSError as error:
            raise self._unwritable(str(error)) from error
        if written < len(line):
            raise self._unwritable(f"{written} of {len(line)} bytes were written")

    def close(self) -> None:
        """Hand everything to the disk; idempotent."""
        if self._handle is not None:
            os.fsync(self._handle)
            os.close(self._handle)
            self._handle = None

    def _unwritable(self, why: str) -> EvaluationError:
        return EvaluationError(
            f"can't write {self.path}: {why}. Free disk space, or give another output; what is "
            "written already stays."
        )

    def _content(self) -> bytes:
        return self.path.read_bytes() if self.path.exists() else b""

    def _whole(self) -> int:
        """Bytes up to the end of the last whole line."""
        return self._content().rfind(b"\n") + 1
