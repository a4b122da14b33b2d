"""RecBole's sequential models as peers, run in an environment of their own.

`make recbole` makes that environment. The data goes over as RecBole's atomic file, k-core filtered
already; the split is RecBole's leave-one-out by time, which is ours. worker.py is the other side.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import EvaluationError
from ...tools.interactions import InteractionData

PYTHON = Path(".venv-recbole/bin/python")
"""Where `make recbole` puts the environment, from the project's root."""

INSTALLED = PYTHON.parents[1] / ".installed"
"""What `make recbole` leaves once that environment is whole."""

RecBoleModel = Literal["SASRec", "GRU4Rec"]

_WORKER = Path(__file__).with_name("worker.py")
_DATASET = "peer"


class Ranking(BaseModel):
    """A test user's best items by RecBole's model, best first."""

    model_config = ConfigDict(extra="forbid")

    user: str
    target: str
    past_included: list[str]
    past_excluded: list[str]  # the user's past left out; so is a target that is in it


class PeerResult(BaseModel):
    """What RecBole measured."""

    model_config = ConfigDict(extra="forbid")

    recbole: str  # version
    torch: str  # version
    threads: int
    users: int
    items: int
    interactions: int
    examples: int  # training rows of an epoch
    epoch_seconds: list[float]  # of training alone
    valid_ndcg_10: float
    report: dict[str, float]  # its own test metrics, past included: "ndcg@10", "recall@10" …
    rankings: list[Ranking] = Field(default=[])

    @classmethod
    def read(cls, path: Path, users: Iterable[str]) -> PeerResult:
        """What was kept in a file. Raises EvaluationError where it can't be read, or ranks nothing
        for one of `users`.
        """
        try:
            kept = cls.model_validate_json(path.read_bytes())
            missing = sorted(set(users) - {ranking.user for ranking in kept.rankings})
            why = f"user {missing[0]!r} has no ranking in it" if missing else None
        except OSError as error:
            why = str(error)
        except ValidationError as error:
            why = error.errors()[0]["msg"]
        if why:
            raise EvaluationError(
                f"{path} is damaged: {why}. Remove the file; RecBole's model is then fitted again."
            )
        return kept


def run_recbole(
    data: InteractionData,
    model: RecBoleModel,
    *,
    epochs: int,
    seed: int = 0,
    threads: int = 2,
    top: int = 0,
    options: Mapping[str, Any] | None = None,
    python: Path = PYTHON,
) -> PeerResult:
    """Fit and test a model of RecBole on `data`; with `top` > 0 each user's best items come along.

    `options` go into RecBole's configuration. Raises EvaluationError where the environment is
    missing, RecBole fails, or it read other data than it was given.
    """
    if not python.exists():
        raise EvaluationError(
            f"{python} does not exist: make RecBole's environment by `make recbole`, or name the "
            "Python of yours"
        )
    with TemporaryDirectory(prefix="deeprec-recbole-") as place:
        folder = Path(place)
        _write_atomic(data, folder / _DATASET)
        job = {
            "model": model,
            "dataset": _DATASET,
            "seed": seed,
            "epochs": epochs,
            "threads": threads,
            "top": top,
            "options": dict(options or {}),
        }
        (folder / "job.json").write_text(json.dumps(job), "utf-8")
        done = subprocess.run(
            [str(python.absolute()), str(_WORKER), str(folder / "job.json")],
            cwd=folder,  # RecBole writes logs where it stands
            env={"PATH": "/usr/bin:/bin", "HOME": place, "OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise EvaluationError(f"RecBole's {model} failed: {done.stderr.strip()[-800:]}")
        result = PeerResult.model_validate_json((folder / "result.json").read_text("utf-8"))
        if top:
            lines = (folder / "rankings.jsonl").read_text("utf-8").splitlines()
            result.rankings = [Ranking.model_validate_json(line) for line in lines]
    found = (result.users, result.items, result.interactions)
    given = (len(data.user_ids), len(data.items), len(data.users))
    if found != given:
        raise EvaluationError(
            f"RecBole read {found} users, items and interactions of {given}: prepare the data set "
            "so that each item has an interaction"
        )
    return result


def _write_atomic(data: InteractionData, folder: Path) -> None:
    """RecBole's .inter file. Tabs and line breaks are refused: they part its fields.

    RecBole sorts by time alone, so a time here is the place in the user's sequence.
    """
    for kind, names in (("user", data.user_ids), ("item", [item.id for item in data.items])):
        for name in names:
            if set(name) & set("\t\r\n"):
                raise EvaluationError(
                    f"{kind} id {name!r} holds a tab or a line break, which part RecBole's fields"
                )
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for at, user in enumerate(data.user_ids):
        lines += [
            f"{user}\t{data.items[int(item)].id}\t{place}"
            for place, item in enumerate(data.sequence(at))
        ]
    folder.mkdir()
    (folder / f"{folder.name}.inter").write_text("\n".join(lines) + "\n", "utf-8")
