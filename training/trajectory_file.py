"""Files and folders of trajectories, in Parquet.

A file appears whole or not at all. Its footer, which Parquet writes last, names the schema version
and seals the file: it holds the SHA-256 of all bytes, the footer's own among them (with zeros in
the digest's place), so that a torn or rotten file is told from a whole one. A run folder holds one
file per part (a training step, a batch of an evaluation); a part that is made again after a crash
replaces its first version, so that nothing is lost or doubled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from ..errors import TrajectoryError
from .trajectories import Rewards, Trajectory

if TYPE_CHECKING:
    from datasets import Dataset

SCHEMA_VERSION = 2
PARTS = "trajectories"
"""Name of the folder of parts inside a run folder."""

_READABLE = (1, SCHEMA_VERSION)  # version 1 knew neither people in the loop nor explanations
_FORMAT = "deeprec.trajectories"
_ROW_GROUP = 64
_BLOCK = 1 << 20
_UNSEALED = "0" * 64
_SEAL = b'"sha256": "'
_PART_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _required(**columns: pa.DataType) -> list[pa.Field]:
    return [pa.field(name, type_, nullable=False) for name, type_ in columns.items()]


def _list(type_: pa.DataType, *, nullable: bool = False) -> pa.ListType:
    return pa.list_(pa.field("element", type_, nullable=nullable))


_TEXT = pa.string()
_ITEM = _required(id=_TEXT, title=_TEXT, score=pa.float64())
_TURN = [
    *_required(thought=_TEXT),
    pa.field("preference", _TEXT),
    *_required(retrieved=_list(pa.struct(_ITEM))),
    pa.field("refused", _TEXT),
    *_required(asked_by=_TEXT),
]
_LINE = [
    *_required(id=_TEXT, title=_TEXT, rank=pa.int32(), source=_TEXT),
    pa.field("score", pa.float64()),
    pa.field("turn", pa.int32()),
    pa.field("preference", _TEXT),
    pa.field("reason", _TEXT),
]
_COUNTS = (
    "prompt_tokens",
    "policy_tokens",
    "guided_tokens",
    "chat_tokens",
    "forced_tokens",
    "environment_tokens",
    "generations",
    "retrievals",
)
SCHEMA = pa.schema(
    [
        *_required(
            id=_TEXT,
            model=_TEXT,
            model_fingerprint=_TEXT,
            settings=_TEXT,  # JSON of RunSettings
            settings_fingerprint=_TEXT,
            history_ids=_list(_TEXT),
        ),
        pa.field("target", _TEXT),
        *_required(
            prompt_ids=_list(pa.int32()),
            completion_ids=_list(pa.int32()),
            logprobs=_list(pa.float32()),
            env_mask=_list(pa.int8()),
            authors=_list(_TEXT),
            pieces=_list(pa.struct(_required(author=_TEXT, text=_TEXT, tokens=pa.int32()))),
            turns=_list(pa.struct(_TURN)),
            recommendations=_list(pa.struct(_LINE)),
            answer=_list(_TEXT, nullable=True),
            violations=_list(_TEXT),
            stop_reason=_TEXT,
        ),
        pa.field("failure", pa.struct(_required(reason=_TEXT, detail=_TEXT))),
        *_required(
            usage=pa.struct(_required(**dict.fromkeys(_COUNTS, pa.int32()), seconds=pa.float64())),
            rewards=pa.struct([pa.field(name, pa.float64()) for name in Rewards.model_fields]),
        ),
    ]
)
"""Columns of a file. Tokens and their authors, logprobs and mask are aligned lists."""


def write_trajectories(path: Path, trajectories: Iterable[Trajectory]) -> int:
    """Write a file, and return how many trajectories it holds.

    An older file of trajectories there is replaced. Raises TrajectoryError for two trajectories
    of one id, for a place that holds something else, and where the file can't be written.
    """
    path = Path(path)
    if path.exists():
        _open(path).close()  # something else is not overwritten
    seen: set[str] = set()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w+b") as file:
                with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
                    for chunk in _chunks(trajectories):
                        _check_ids(chunk, seen, path)
                        rows = [_row(trajectory) for trajectory in chunk]
                        writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                    about = {"schema": SCHEMA_VERSION, "sha256": _UNSEALED}
                    writer.add_key_value_metadata({_FORMAT: json.dumps(about)})
                at = _seal_position(file)
                digest = _digest(file, at)
                file.seek(at)
                file.write(digest)
                file.flush()
                os.fsync(file.fileno())  # else a power cut may leave a named file without content
            Path(beside).chmod(0o644)
            os.replace(beside, path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise TrajectoryError(
            f"can't write trajectories to {path}: {error}. Free disk space or choose another place."
        ) from error
    return len(seen)


def write_part(folder: Path, name: str, trajectories: Iterable[Trajectory]) -> Path:
    """Write one part of a run folder, in place of an earlier part of this name; gives its path."""
    if not _PART_NAME.fullmatch(name):
        raise ValueError(f"part name {name!r}: letters, digits, '.', '_' and '-' only")
    path = Path(folder) / PARTS / f"{name}.parquet"
    write_trajectories(path, trajectories)
    return path


def iter_trajectories(source: Path) -> Iterator[Trajectory]:
    """Read a file, or a run folder part by part in the order of their names.

    Raises TrajectoryError for what is missing, torn, damaged, of another schema, or holds one
    trajectory twice.
    """
    source = Path(source)
    seen: set[str] = set()
    for path in _parts(source) if source.is_dir() else [source]:
        for trajectory in _read(path):
            _check_ids([trajectory], seen, source)
            yield trajectory


def read_trajectories(source: Path) -> list[Trajectory]:
    """Read all of `iter_trajectories`."""
    return list(iter_trajectories(source))


def load_dataset(path: Path) -> Dataset:
    """Read a file as a `datasets.Dataset` with the columns of `SCHEMA`. Raises TrajectoryError."""
    try:
        from datasets import Dataset
    except ImportError as error:
        raise TrajectoryError(
            "a datasets.Dataset needs the package `datasets`: install deeprec-agent[train]"
        ) from error
    with _open(Path(path)) as file:
        return Dataset(_guarded(Path(path), file.read))


def _parts(folder: Path) -> list[Path]:
    parts = sorted((folder / PARTS).glob("*.parquet"))
    if not parts:
        raise TrajectoryError(
            f"{folder} is no run folder: it holds no {PARTS}/*.parquet. Give the folder of a run, "
            "or a file of trajectories."
        )
    return parts


def _chunks(trajectories: Iterable[Trajectory]) -> Iterator[list[Trajectory]]:
    rest = iter(trajectories)
    while chunk := list(islice(rest, _ROW_GROUP)):
        yield chunk


def _check_ids(trajectories: Iterable[Trajectory], seen: set[str], where: Path) -> None:
    for trajectory in trajectories:
        if trajectory.id in seen:
            raise TrajectoryError(
                f"{where}: two trajectories have the id {trajectory.id!r}. Give every run its own."
            )
        seen.add(trajectory.id)


def _row(trajectory: Trajectory) -> dict[str, Any]:
    return {
        **trajectory.model_dump(),
        "settings": trajectory.settings.model_dump_json(),
        "settings_fingerprint": trajectory.settings_fingerprint,
        "env_mask": trajectory.env_mask,
    }


def _read(path: Path) -> Iterator[Trajectory]:
    with _open(path) as file:
        for group in range(file.num_row_groups):
            table = _guarded(path, partial(file.read_row_group, group))
            for row in table.to_pylist():
                yield _trajectory(path, row)


def _trajectory(path: Path, row: dict[str, Any]) -> Trajectory:
    for derived in ("env_mask", "settings_fingerprint"):
        del row[derived]
    try:
        row["settings"] = json.loads(row["settings"])
        return Trajectory.model_validate(row)
    except ValidationError as error:
        raise TrajectoryError(
            f"{path}: trajectory {row['id']!r} was written by another version of deeprec: {error}. "
            "Export it again."
        ) from error


def _open(path: Path) -> pq.ParquetFile:
    """Open a file and check that it is whole, ours and of this schema."""
    if not path.is_file():
        raise TrajectoryError(f"no file of trajectories at {path}. Check the path.")
    file = _guarded(path, lambda: pq.ParquetFile(path))
    raw = (file.metadata.metadata or {}).get(_FORMAT.encode())
    if raw is None:
        raise TrajectoryError(f"{path} is no file of trajectories (another kind of Parquet file).")
    about: dict[str, Any] = _guarded(path, lambda: json.loads(raw))
    if about.get("schema") not in _READABLE:
        raise TrajectoryError(
            f"{path} has schema version {about.get('schema')}; this version of deeprec reads "
            f"{' and '.join(map(str, _READABLE))}. Export the runs again, or use the deeprec that "
            "wrote it."
        )
    with path.open("rb") as content:
        digest = _digest(content, _seal_position(content))
    if about.get("sha256") != digest.decode():
        raise TrajectoryError(
            f"{path} is torn or damaged, or was changed by hand: its content is not what was "
            "sealed. Export the runs again."
        )
    return file


def _seal_position(file: IO[bytes]) -> int:
    """Where in an open Parquet file the 64 digits of its seal stand; -1 if they don't."""
    file.seek(-8, os.SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    start = file.seek(-8 - length, os.SEEK_END)
    at = file.read(length).find(_SEAL)
    return -1 if at < 0 else start + at + len(_SEAL)


def _digest(file: IO[bytes], seal: int) -> bytes:
    """SHA-256 (64 hex digits) of an open file with the digits at `seal` taken for zeros."""
    digest = hashlib.sha256()
    file.seek(0)
    left = max(0, seal)
    while left and (block := file.read(min(left, _BLOCK))):
        digest.update(block)
        left -= len(block)
    digest.update(_UNSEALED.encode())
    file.seek(len(_UNSEALED), os.SEEK_CUR)
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest().encode()


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise TrajectoryError(
            f"{path} is torn or damaged, or no Parquet file: {error}. Export the runs again."
        ) from error
