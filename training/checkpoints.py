"""Checkpoints that are known to be whole.

TRL writes a checkpoint's files one after another; a run that is killed meanwhile leaves a torn
folder, which Transformers would take for the newest checkpoint. The seal is written last: what has
none, or another size than it says, is removed and made again.

Weights are safetensors. Beside them Transformers keeps what it goes on from (optimizer.pt,
scheduler.pt, rng_state.pth): pickles, which it reads with weights_only, so that they hold numbers
and run nothing. training_args.bin is a pickle that nobody reads.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..configuration import write_json
from ..errors import SettingsError

_SEAL = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class Sealer(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Seals each checkpoint that the trainer saves."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Called by the trainer when a checkpoint's files are written."""
        if state.is_world_process_zero:
            seal(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")


class SafeSaving:
    """Mixed into a trainer: a checkpoint that can't be written ends the run in words."""

    args: Any  # of the trainer

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with writing(Path(str(self.args.output_dir))):
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]  # the trainer's


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Around what writes into a run's folder. Raises SettingsError for whatever goes wrong there.

    A run that is started again goes on from its newest whole checkpoint.
    """
    try:
        yield
    except Exception as error:  # the boundary: of a full disk each writer tells by another error
        raise SettingsError(
            f"can't write weights to {folder}: {error}. Free disk space and start the same run "
            "again: it goes on from its newest whole checkpoint."
        ) from error


def seal(checkpoint: Path) -> None:
    """Write down which files a checkpoint holds, and their sizes in bytes."""
    write_json(checkpoint / _SEAL, _sizes(checkpoint))


def newest_whole(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in `folder`; torn ones beyond it are removed."""
    found = [
        (int(match[1]), path) for path in _entries(folder) if (match := _NAME.fullmatch(path.name))
    ]
    for _, path in sorted(found, reverse=True):
        if _is_whole(path):
            return path
        shutil.rmtree(path)
    return None


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / _SEAL).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return bool(sizes == _sizes(checkpoint))


def _sizes(checkpoint: Path) -> dict[str, int]:
    return {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != _SEAL
    }
