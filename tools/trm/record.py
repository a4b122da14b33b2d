"""What a run leaves beside the weights: the record of each fit, and where it came from.

A run's folder holds run.json and `<variant>/seed-<n>/` checkpoints, each with a fit.json.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ...configuration import flat, write_text
from ...errors import TRMError
from .config import FitConfig, TRMConfig

RECORD, _SOURCE = "fit.json", "run.json"
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
            return cls.model_validate_json(path.read_bytes())
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
    # Embedding the preference texts; nothing in the file of a fit that an earlier one's served.
    prepare_seconds: float = 0.0
    fit_seconds: float = 0.0  # training and validation
    examples: int = 0  # targets learned

    @classmethod
    def read(cls, folder: Path) -> "FitRecord | None":
        """The record of a finished fit; None if there is none. Raises TRMError on a damaged one."""
        path = folder / RECORD
        if not path.is_file():
            return None
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise TRMError(f"{path} is damaged: {error}. Remove {folder} and run again.") from error

    @classmethod
    def read_all(cls, folder: Path) -> "list[tuple[Path, FitRecord]]":
        """All finished fits of a run, with their folders.

        Fits that shared preference texts all have the seconds that embedding them took: that is
        what each would have taken alone.
        """
        paths = sorted(path.parent for path in folder.glob(f"*/seed-*/{RECORD}"))
        found = [(path, record) for path in paths if (record := cls.read(path)) is not None]
        took: dict[tuple[str, int, int], float] = {}
        for _, record in found:
            took[record._texts] = max(record.prepare_seconds, took.get(record._texts, 0.0))
        return [
            (path, record.model_copy(update={"prepare_seconds": took[record._texts]}))
            if record.training.preferences
            else (path, record)
            for path, record in found
        ]

    @property
    def _texts(self) -> tuple[str, int, int]:
        """Fits that agree in this share their preference texts."""
        model = self.model
        return model.dataset_fingerprint, self.training.pool, model.history_length

    def write(self, folder: Path) -> None:
        """Mark the checkpoint in `folder` as finished."""
        write_text(folder / RECORD, self.model_dump_json(indent=2) + "\n")

    def differences(self, other: "FitRecord") -> list[str]:
        """Names of the fields that differ, other than what was measured or set by the fit."""
        mine, theirs = (flat(r.model_dump(exclude=_MEASURED)) for r in (self, other))
        keys = (mine.keys() | theirs.keys()) - _SET_BY_FIT
        return sorted(key for key in keys if mine.get(key) != theirs.get(key))
