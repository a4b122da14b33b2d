"""Runs of several variants and seeds: what was fitted, how good it is, the table and the card.

A run's folder holds `<variant>/seed-<n>/` checkpoints, each with a fit.json beside its weights.
`evaluate_run` needs nothing else, so the table can be made again at any time.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, pstdev

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.table import Table

from ...errors import TRMError
from ..interactions import InteractionData
from .cold import cold_rows
from .config import FitConfig, TRMConfig
from .evaluate import Judge, Row
from .model import TRM

_RECORD = "fit.json"
_MEASURED = {"prepare_seconds", "fit_seconds", "examples"}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FitRecord(_Frozen):
    """What one checkpoint was fitted with, and what that took."""

    variant: str
    seed: int
    dataset: str  # fingerprint of the whole data set
    encoder: str  # fingerprint
    cold_share: float
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
            raise TRMError(
                f"{path} is damaged: {error}. Remove {folder} and run again."
            ) from error

    def write(self, folder: Path) -> None:
        """Mark the checkpoint in `folder` as finished."""
        beside = folder / f"{_RECORD}.part"
        beside.write_text(self.model_dump_json(indent=2) + "\n")
        os.replace(beside, folder / _RECORD)

    def differences(self, other: "FitRecord") -> list[str]:
        """Names of the fields that differ, other than what was measured or set by the fit."""
        mine, theirs = (_flat(r.model_dump(exclude=_MEASURED)) for r in (self, other))
        given_by_fit = {"model.text_dim", "model.encoder_fingerprint", "model.dataset_fingerprint"}
        keys = (mine.keys() | theirs.keys()) - given_by_fit
        return sorted(key for key in keys if mine.get(key) != theirs.get(key))


class Line(_Frozen):
    """A row of the table over seeds: mean and standard deviation (0 for one seed)."""

    variant: str
    row: str
    seeds: int
    users: float
    ndcg10: tuple[float, float]
    recall10: tuple[float, float]
    recall20: tuple[float, float]


class RunResults(_Frozen):
    """What a run's folder was measured to be worth."""

    dataset: str
    statistics: dict[str, float]
    lines: tuple[Line, ...]
    fit_seconds: dict[str, tuple[float, float]]  # variant -> mean, standard deviation
    examples_per_second: dict[str, tuple[float, float]]


def statistics(data: InteractionData) -> dict[str, float]:
    """Users, items, interactions, interactions per user, density."""
    users, items, n = len(data.user_ids), len(data.items), len(data.users)
    return {
        "users": users,
        "items": items,
        "interactions": n,
        "interactions per user": round(n / users, 1),
        "density": round(n / (users * items), 5),
    }


def evaluate_run(
    folder: Path, judge: Judge, *, progress: Callable[[str], None] | None = None
) -> RunResults:
    """Judge every finished checkpoint of a run. `progress` is told what is judged next.

    Raises TRMError if there is no checkpoint, or one of another data set."""
    records: list[tuple[Path, FitRecord]] = []
    for path in sorted(Path(folder).glob(f"*/seed-*/{_RECORD}")):
        record = FitRecord.read(path.parent)
        assert record is not None
        if record.dataset != judge.data.fingerprint:
            raise TRMError(
                f"the checkpoint in {path.parent} belongs to another data set: it was trained on "
                f"{record.dataset}, this one has {judge.data.fingerprint}. Evaluate it on the "
                "data that it was trained on, or train again."
            )
        records.append((path.parent, record))
    if not records:
        raise TRMError(
            f"no finished TRM run in {folder}. Make one with "
            "`python training/run_trm.py --config training/configs/trm_ml100k.yaml`."
        )
    table: dict[tuple[str, str], list[Row]] = {}
    for name, row in judge.baselines().items():
        table["baseline", name] = [row]
    for path, record in records:
        if progress is not None:
            progress(f"{record.variant}, seed {record.seed}")
        model = TRM.from_pretrained(path, encoder_fingerprint=record.encoder)
        if record.cold_share:
            rows = cold_rows(model, judge)
        elif record.training.preferences:
            rows = judge.rows(model)
        else:
            rows = {"absent": judge.row(model, None)}
        for name, row in rows.items():
            table.setdefault((record.variant, name), []).append(row)
    by_variant: dict[str, list[FitRecord]] = {}
    for _, record in records:
        by_variant.setdefault(record.variant, []).append(record)
    return RunResults(
        dataset=judge.data.name,
        statistics=statistics(judge.data),
        lines=tuple(
            Line(
                variant=variant,
                row=name,
                seeds=len(rows),
                users=fmean(row.users for row in rows),
                ndcg10=_spread([row.ndcg10 for row in rows]),
                recall10=_spread([row.recall10 for row in rows]),
                recall20=_spread([row.recall20 for row in rows]),
            )
            for (variant, name), rows in table.items()
        ),
        fit_seconds={v: _spread([r.fit_seconds for r in rs]) for v, rs in by_variant.items()},
        examples_per_second={
            v: _spread([r.examples / r.fit_seconds for r in rs if r.fit_seconds])
            for v, rs in by_variant.items()
        },
    )


def print_table(results: RunResults, console: Console) -> None:
    """The table for people."""
    facts = ", ".join(f"{value:g} {name}" for name, value in results.statistics.items())
    console.print(f"[bold]{results.dataset}[/bold]: {facts}")
    table = Table("variant", "preference", "users", "NDCG@10", "Recall@10", "Recall@20")
    for line in results.lines:
        numbers = [_show(value, line.seeds) for value in (line.ndcg10, line.recall10, line.recall20)]
        table.add_row(line.variant, line.row, f"{line.users:.0f}", *numbers)
    console.print(table)
    for variant, (seconds, _) in results.fit_seconds.items():
        speed = results.examples_per_second[variant][0]
        console.print(f"{variant}: fitted in {seconds:.0f} s, {speed:.0f} examples a second")


def markdown_table(results: RunResults) -> str:
    """The same table for a README."""
    rows = ["| variant | preference | NDCG@10 | Recall@10 | Recall@20 |", "| --- " * 5 + "|"]
    for line in results.lines:
        numbers = [_show(value, line.seeds) for value in (line.ndcg10, line.recall10, line.recall20)]
        rows.append(f"| {line.variant} | {line.row} | {' | '.join(numbers)} |")
    return "\n".join(rows) + "\n"


def model_card(record: FitRecord, data: InteractionData) -> str:
    """README.md of a checkpoint, with the hub's metadata at its head."""
    facts = ", ".join(f"{value:g} {name}" for name, value in statistics(data).items())
    speed = record.examples / record.fit_seconds if record.fit_seconds else 0.0
    return f"""---
library_name: deeprec
tags: [recommendation, sequential-recommendation, retrieval]
---
# Preference-aware recommendation model, `{record.model.name}`

Given a history and a preference in words, it retrieves items by the inner product of a user
vector and an item vector. Items that were not in training are found by their text.

- Data: {data.name} ({facts}), fingerprint `{record.dataset}`.
- Sentence encoder: fingerprint `{record.encoder}`, {record.model.text_dim} wide.
- Variant `{record.variant}`, seed {record.seed}; {record.cold_share:.0%} of the items held out.
- Fitted on {record.examples} targets in {record.fit_seconds:.0f} s ({speed:.0f} a second).

```python
from deeprec.tools.trm.model import TRM

model = TRM.from_pretrained("this folder or repository")
```

It knows the tastes of the people in its data, no others. Popular items are recommended more often
than their share. A preference that contradicts the history is followed.

Configuration of the fit:
```json
{json.dumps(record.training.model_dump(), indent=2)}
```
"""


def _spread(values: list[float]) -> tuple[float, float]:
    return (fmean(values), pstdev(values)) if values else (0.0, 0.0)


def _show(value: tuple[float, float], seeds: int) -> str:
    return f"{value[0]:.3f}" + (f" ± {value[1]:.3f}" if seeds > 1 else "")


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, inner in value.items():
        flat.update(_flat(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat
