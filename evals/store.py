"""What recommenders answered, as JSON lines that grow user by user and outlive a kill.

The user of a line that a kill tore is asked again. Anything else that can't be read is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import EvaluationError
from ..graph.state import OUTAGES, RecommendationResponse
from .json_lines import JSONLines


class Ranking(BaseModel):
    """What one user got: item ids, best first; an agent's whole run with it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    user: str
    items: tuple[str, ...]
    failure: str | None = None  # why there is no list; counts as a miss
    run: RecommendationResponse | None = None
    # Of an agent: since the answer before it, so that the sum is the time that all took together.
    seconds: float | None = None

    @property
    def is_outage(self) -> bool:
        """Whether the engine or the catalog failed, which says nothing about the recommender."""
        failed = None if self.run is None else self.run.failure
        return failed is not None and failed.reason in OUTAGES


class Store:
    """The file of one recommender. Use it in a `with` block to append."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = JSONLines(path)

    def read(self, users: Iterable[str]) -> dict[str, Ranking]:
        """What is stored, by user, in the order of `users`.

        A later line of a user replaces one that an outage ended. Raises EvaluationError for a
        damaged line, a user who is not asked about, and one who is there twice.
        """
        wanted = dict.fromkeys(users)
        found: dict[str, Ranking] = {}
        for number, line in enumerate(self._lines.read(), 1):
            try:
                ranking = Ranking.model_validate_json(line)
            except ValidationError as error:
                raise EvaluationError(
                    f"{self.path}, line {number} is damaged: {error.errors()[0]['msg']}. Remove "
                    "the line; its user is then asked again."
                ) from error
            if ranking.user not in wanted:
                raise EvaluationError(
                    f"{self.path}, line {number}: user {ranking.user!r} is not among the "
                    f"{len(wanted)} test users. Give another output."
                )
            earlier = found.get(ranking.user)
            if earlier is not None and not earlier.is_outage:
                raise EvaluationError(
                    f"{self.path}, line {number}: user {ranking.user!r} is there twice. Remove "
                    "one of the lines."
                )
            found[ranking.user] = ranking
        return {user: found[user] for user in wanted if user in found}

    def append(self, ranking: Ranking) -> None:
        """Add one user. Raises EvaluationError where the disk is full."""
        self._lines.append(ranking.model_dump_json())

    def __enter__(self) -> Store:
        self._lines.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lines.close()
