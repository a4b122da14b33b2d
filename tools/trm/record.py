"""What a run leaves beside the weights: the record of each fit, where it came from, its card.

A run's folder holds run.json and `<variant>/seed-<n>/` checkpoints, each with a fit.json.
"""

import json
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ...errors import TRMError
from ..interactions import InteractionData
from .config import FitConfig, TRMConfig

_RECORD, _SOURCE = "fit.json", "run.json"
_MEASURED = {"prepare_seconds", "fit_seconds", "examples"}
_SET_BY_FIT = {"model.text_dim", "model.encoder_fingerprint", "model.dataset_fingerprint"}


class Frozen(BaseModel):
    """JSON that a run writes and reads back."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RunSource(Frozen):
    """What a run was made from, so that it can be evaluated again by its folder alone."""

    data: Path  # a prepared data set
    encoder: str  # sentence-transformers hub name or folder

    @classmethod
    def read(cls, folder: Path) -> "RunSource":
        """Raises TRMError if `folder` holds no run."""
        path = folder / _SOURCE
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, ValidationError) as error:
            raise TRMError(
                f"no TRM run in {folder} ({error}). Make one with "
                "`python training/run_trm.py --config training/configs/trm_ml100k.yaml`."
            ) from error

    def write(self, folder: Path) -> None:
        """Keep it in `folder`, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _SOURCE, self.model_dump_json(indent=2) + "\n")


class FitRecord(Frozen):
    """What one checkpoint was fitted with, and what that took."""

    variant: str
    seed: int
    dataset: str  # fingerprint of the whole data set
    encoder: str  # fingerprint
    cold_share: float = 0.0
    model: TRMConfig
    training: FitConfig
    prepare_seconds: float = 0.0  # embedding the preference texts; 0 where an earlier fit's served
    fit_seconds: float = 0.0  # training and validation
    examples: int = 0  # targets learned

    @classmethod
    def read(cls, folder: Path) -> "FitRecord | None":
        """The record of a finished fit; None if there is none. Raises TRMError on a damaged one."""
        path = folder / _RECORD
        if not path.is_file():
            return None
        try:
            return cls.model_validate_json(path.read_text())
        except ValidationError as error:
            raise TRMError(f"{path} is damaged: {error}. Remove {folder} and run again.") from error

    @classmethod
    def read_all(cls, folder: Path) -> "list[tuple[Path, FitRecord]]":
        """All finished fits of a run, with their folders."""
        paths = sorted(path.parent for path in folder.glob(f"*/seed-*/{_RECORD}"))
        found = [(path, cls.read(path)) for path in paths]
        return [(path, record) for path, record in found if record is not None]

    def write(self, folder: Path) -> None:
        """Mark the checkpoint in `folder` as finished."""
        write_text(folder / _RECORD, self.model_dump_json(indent=2) + "\n")

    def differences(self, other: "FitRecord") -> list[str]:
        """Names of the fields that differ, other than what was measured or set by the fit."""
        mine, theirs = (_flat(r.model_dump(exclude=_MEASURED)) for r in (self, other))
        keys = (mine.keys() | theirs.keys()) - _SET_BY_FIT
        return sorted(key for key in keys if mine.get(key) != theirs.get(key))


def model_card(record: FitRecord, data: InteractionData, encoder: str, results: str = "") -> str:
    """README.md of a checkpoint, with the hub's metadata at its head.

    `data` is what it was fitted on, `encoder` the sentence encoder's name or folder, `results` a
    Markdown table.
    """
    name = Path(encoder).name if Path(encoder).is_absolute() else encoder
    held = f" {record.cold_share:.0%} of its items were held out." if record.cold_share else ""
    speed = record.examples / record.fit_seconds if record.fit_seconds else 0.0
    base = f"base_model: {name}\n" if "/" in name else ""
    mode = "with" if record.training.preferences else "without"
    measured = f"## Results\n\nOn held-out test items.\n\n{results}\n" if results else ""
    return f"""---
library_name: deeprec
tags: [recommendation, sequential-recommendation, retrieval]
{base}---
# A preference-aware recommender, `{record.model.name}`, trained on {data.name}

Given a history of items and a preference in words ("a light comedy; from the 1980s"), it
retrieves items by the inner product of a user vector and an item vector. Without a preference the
history alone decides. Items that were not in training are found by their text.

## Use

```python
from deeprec.tools.interactions import item_text
from deeprec.tools.text_encoder import TextEncoder
from deeprec.tools.trm.model import TRM
from deeprec.tools.trm.preferences import embed_preferences

trm = TRM.from_pretrained("this folder or repository")
encoder = TextEncoder("{name}")
```

`trm.item_vectors` and `trm.user_vectors` say what they take; `deeprec index` and
`deeprec recommend` do it all. It reads the last {record.model.history_length} items of a history.

{measured}## Training

- Data: {data.name}, {len(data.user_ids):,} users, {len(data.items):,} items,
  {len(data.users):,} interactions; fingerprint `{record.dataset[:16]}`.{held}
- Each user's last item was kept for testing, the one before for early stopping.
- Sentence encoder: {name} (frozen, {record.model.text_dim} wide), fingerprint
  `{record.encoder[:16]}`.
- Variant `{record.variant}`, seed {record.seed}, fitted {mode} preferences on
  {record.examples:,} targets in {record.fit_seconds:.0f} s ({speed:,.0f} a second).

```json
{json.dumps(record.training.model_dump(), indent=2)}
```

## Limits

It knows the tastes of the people in its data and no others, and recommends popular items more
often than their share. Preferences in training were made from item attributes and titles: it
follows what items are called and labelled; moods it knows from the sentence encoder alone, and
"not …" it was never taught. A preference that contradicts the history is followed.
"""


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole."""
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(text)
    os.replace(beside, path)


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, inner in value.items():
        flat.update(_flat(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat
