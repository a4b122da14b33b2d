"""Configuration files of runs: read, checked before anything is loaded, and kept.

A run's folder holds the configuration that it was started with; going on with another one is
refused.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from .errors import SettingsError

ConfigT = TypeVar("ConfigT", bound=BaseModel)

_KEPT = "config.json"
_ORIGIN = "made_of.json"


def load_config(path: Path, model: type[ConfigT], **changes: object) -> ConfigT:
    """Return the validated configuration; `changes` that are not None replace its fields.

    Raises SettingsError that names the file and the field.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"can't read the configuration {path}: {error}.") from error
    if not isinstance(raw, dict):
        raise SettingsError(f"{path} is not a configuration: it holds no fields.")
    raw.update({key: value for key, value in changes.items() if value is not None})
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
            for problem in error.errors()
        )
        raise SettingsError(f"{path}: {problems}") from error


class RunArguments(argparse.ArgumentParser, Generic[ConfigT]):
    """A command line of a run: its configuration file, and options that replace single fields.

    `--config` and `--output` are every run's; add_argument adds others, named as their fields.
    """

    def __init__(self, description: str | None, model: type[ConfigT]) -> None:
        super().__init__(description=description, formatter_class=argparse.RawTextHelpFormatter)
        self._model = model
        file = f"YAML file, see {model.__name__}"
        self.add_argument("--config", type=Path, required=True, help=file)
        self.replaces("output", type=Path)

    def replaces(self, field: str, *, otherwise: str = "", **options: Any) -> None:
        """Add an option for a field; argparse's `options` say how it is read.

        `otherwise` tells in the help where the field comes from if the file has none.
        """
        default = f" or {otherwise}" if otherwise else ""
        self.add_argument(f"--{field}", help=f"instead of the file's {field}{default}", **options)

    def configuration(self, arguments: Sequence[str] | None) -> ConfigT:
        """Read the command line (None: the process's own) and the file that it names.

        Raises SettingsError as load_config does.
        """
        given = vars(self.parse_args(arguments))
        return load_config(given.pop("config"), self._model, **given)


def keep_config(config: BaseModel, folder: Path, *, free: frozenset[str] = frozenset()) -> None:
    """Write the configuration into a run's folder, or compare it with the one that is there.

    Fields in `free` may change. Raises SettingsError that names the keys that differ.
    """
    path = Path(folder) / _KEPT
    wanted = config.model_dump(mode="json")
    if path.exists():
        try:
            kept = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise SettingsError(f"can't read {path}: {error}. Give another output.") from error
        before, now = flat(kept), flat(wanted)
        changed = [
            key
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and key.split(".")[0] not in free
        ]
        if changed:
            raise SettingsError(
                f"{folder} holds a run of another configuration; these keys differ: "
                f"{', '.join(changed)}. Give another output, or the configuration it had."
            )
    write_json(path, wanted)


def keep_origin(parts: Mapping[str, str], folder: Path) -> None:
    """Write fingerprints of what a run is made of into its folder, or compare them with those that
    are there. Raises SettingsError that names the part that is another.
    """
    path = Path(folder) / _ORIGIN
    kept: dict[str, str] = {}
    if path.exists():
        try:
            kept = dict(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise SettingsError(f"can't read {path}: {error}. Give another output.") from error
    for part, found in parts.items():
        if kept.get(part, found) != found:
            raise SettingsError(
                f"{folder} holds a run over another {part} (fingerprint {kept[part]}, this one has "
                f"{found}). Give another output, or the {part} that it was made with."
            )
    write_json(path, {**kept, **parts})


def write_json(path: Path, content: object) -> None:
    """Write JSON into a file, whole or not at all. Raises SettingsError."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises SettingsError."""
    with replacing(path) as beside:
        beside.write_text(text, "utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a place beside `path`; the file that the block writes there becomes `path` at its end.

    A block that fails leaves `path` as it was. Raises SettingsError where it can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        os.close(handle)
        beside = Path(name)
        try:
            yield beside
            beside.chmod(0o644)
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise SettingsError(f"can't write {path}: {error}. Give another output.") from error


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give the innermost values of nested mappings by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
