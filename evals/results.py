"""What an evaluation found: the models behind results.json, and their file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ..configuration import write_text
from ..errors import EvaluationError
from .config import Past, Way, WishKind
from .significance import Interval

RESULTS = "results.json"

ListName = Literal["ranked", "strict", "served", "fused"]
"""ranked: as the recommender ranked. Of an agent's runs, strict: as the policy wrote it, nothing
where the run broke a format rule or didn't end by itself; served: with open lines filled; fused:
reciprocal rank fusion of its retrieved lists, which needs no answer."""


class _Found(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Group(_Found):
    """Metrics over some of the users."""

    users: int
    metrics: dict[str, Interval]


class Versus(_Found):
    """The mean difference to the best baseline by one metric, over the same users."""

    baseline: str
    metric: str
    difference: Interval
    p: float  # paired randomisation test, two-sided
    p_adjusted: float  # for the number of rows (Benjamini and Hochberg)


class Row(_Found):
    """One list of one recommender over all test users; a user without a list is a miss."""

    recommender: str
    list: ListName
    past: Past
    users: int
    failures: int  # users without a list of the recommender's own
    short: int  # lists with fewer than k places
    duplicates: int  # places that repeat an id
    unknown: int  # places that name no item of the data set
    from_past: int  # places that name what the user has had, where that was to be left out
    examples: tuple[str, ...]  # some of these faults in words
    metrics: dict[str, Interval]
    groups: dict[str, Group]
    coverage: float
    novelty: float  # bits
    diversity: float
    versus: Versus | None  # none for the best baseline itself

    @property
    def label(self) -> str:
        """What the row is called."""
        told = {"ranked": "", "strict": ", strict", "served": ", served", "fused": ", lists fused"}
        again = ", past included" if self.past == "included" else ""
        return f"{self.recommender}{told[self.list]}{again}"


class TurnPoint(_Found):
    """After so many searches: is the target among what was retrieved?"""

    searches: int
    runs: int  # that searched so often
    candidates: float  # distinct items so far, mean over users
    found: Interval
    longer: Interval | None  # the TRM's own list, each user's as long as the candidates


class Cost(_Found):
    """What 1,000 users take, by the mean of those who were asked."""

    tokens_read: float  # of prompts and of the environment, each counted once
    tokens_generated: float
    machine_seconds: float | None  # of the whole machine; none where runs were kept without times
    price: float | None  # of these seconds, where the configuration says what an hour costs
    currency: str | None


class AgentFigures(_Found):
    """An agent's runs; shares and means are over all users."""

    recommender: str
    settings: dict[str, Any]  # RunSettings
    users: int
    failures: dict[str, int]  # by reason
    stop_reasons: dict[str, int]
    searches: dict[int, int]  # searches of a run → runs
    candidates: Interval  # distinct retrieved items of a run
    candidate_counts: tuple[int, ...]  # of each run
    found: Interval  # target among the candidates
    longer: Interval | None  # target in the TRM's own list of as many items
    found_versus_longer_p: float | None
    turns: tuple[TurnPoint, ...]
    strict: Interval | None  # share of runs in strict format; none under a grammar
    broken_rules: dict[str, int]
    answer_lines: int
    invented_lines: int
    repeated_lines: int
    lines_by_source: dict[str, int]
    filled_lines: Interval  # of a list
    tokens: dict[str, float]  # of a run, by author
    generations: float
    seconds: dict[str, float]  # of a run, with others beside it: mean, median, 95th percentile
    cost: Cost | None = None  # none in results of earlier versions


class Steered(_Found):
    """How far lists follow a wish, over the users who stated one, and what it costs."""

    recommender: str
    wish: WishKind
    way: Way
    example: str  # one user's wish in words
    users: int
    failures: int
    fit_before: Interval  # share of the places that fulfil it (more like: mean cosine), unasked
    fit_after: Interval
    fit_change: Interval
    metric_before: Interval  # the leading metric
    metric_after: Interval
    metric_change: Interval


class Outcome(_Found):
    """A recommender's list for one user, as told in a trace."""

    title: str
    source: str
    hit: bool


class TracedItem(_Found):
    """A retrieved item; `number` is what the policy calls it where answers name numbers."""

    title: str
    score: float
    hit: bool
    number: int | None = None


class TracedTurn(_Found):
    """One turn of a told run."""

    thought: str
    preference: str | None
    refused: str | None
    retrieved: tuple[TracedItem, ...]


class Trace(_Found):
    """A run that the report tells."""

    recommender: str
    user: str
    outcome: str
    history: tuple[str, ...]
    target: str
    turns: tuple[TracedTurn, ...]
    list: tuple[Outcome, ...]
    stop_reason: str
    broken_rules: tuple[str, ...]
    failure: str | None
    tokens: int
    seconds: float


class Results(_Found):
    """All that tables and reports are made of."""

    schema_version: Literal[1] = 1
    name: str  # of the run's folder
    dataset: str
    fingerprint: str  # of the data set
    users: int
    items: int
    repeated_targets: int  # users whose target is in their past
    k: int
    metrics: tuple[str, ...]
    compare_by: str
    made_with: dict[str, str]  # versions, machine, fingerprints
    rows: tuple[Row, ...]
    agents: tuple[AgentFigures, ...]
    traces: tuple[Trace, ...]
    steering: tuple[Steered, ...] = ()

    @property
    def leading(self) -> tuple[str, ...]:
        """The metrics that stand for all: the one that compares, and the longest recall."""
        recalls = [name for name in self.metrics if name.startswith("recall@")]
        return tuple(dict.fromkeys([self.compare_by, *recalls[-1:]]))

    def write(self, folder: Path) -> None:
        """Keep it in a run's folder, whole or not at all. Raises SettingsError."""
        write_text(folder / RESULTS, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Results of a finished evaluation. Raises EvaluationError where there are none."""
        path = Path(folder) / RESULTS
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise EvaluationError(
                f"{folder} holds no finished evaluation: {error}. Run `deeprec eval` first."
            ) from error
        except ValidationError as error:
            raise EvaluationError(
                f"{path} is damaged or of another version of deeprec: "
                f"{error.errors()[0]['msg']}. Run its `deeprec eval` again; rankings are kept."
            ) from error
