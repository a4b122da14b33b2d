"""What an evaluation may be asked for: the configuration file of run_eval.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..graph.state import MAX_K
from .metrics import parse_metric
from .recbole.peer import PYTHON, RecBoleModel

Past = Literal["excluded", "included"]
"""Whether what a user has had may be recommended again."""

WishKind = Literal["only", "without", "more_like"]
"""Only X: a main attribute value; no Y (YAML reads a bare `no` as false): likewise; more like Z: an
item of the past."""

Way = Literal["words", "preference", "filter"]
"""How a wish is told: as people say it, as the text that the TRM reads, or as a hard filter."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PopularityEntry(_Part):
    """The items that occur most often in the training part."""

    kind: Literal["popularity"]


class MarkovEntry(_Part):
    """Decayed item-to-item transitions (tools/trm/baselines.py)."""

    kind: Literal["markov"]


class TRMEntry(_Part):
    """The workspace's TRM, asked once."""

    kind: Literal["trm"]
    # history: the commonest attribute values of the user's latest items, in words.
    preference: Literal["none", "history"] = "none"


class AgentEntry(_Part):
    """The agent: the same compiled graph that serves and trains.

    Each of its runs is judged as it was written (free decoding alone), as it is served (open
    lines filled), and by its retrieved lists fused. One search at most makes it retrieve-then-rank.
    A blind agent's TRM ignores the preferences that it is asked for. R2ec (graph/r2ec) has one
    list, its head's; its LLM is the one that the head reads.
    """

    kind: Literal["agent", "blind_agent", "r2ec"]
    model: str | None = None  # hub name or folder of the LLM; none: the settings'
    adapter: Path | None = None  # folder of a LoRA adapter; none: the LLM as it is
    head: Path | None = None  # folder of a recommendation head; for r2ec, and for rank: head
    # Fields of RunSettings that differ from what the adapter was trained with, else the defaults.
    settings: dict[str, Any] = Field(default_factory=dict)

    @field_validator("settings")
    @classmethod
    def _ours(cls, settings: dict[str, Any]) -> dict[str, Any]:
        for name in ("k", "seed"):
            if name in settings:
                raise ValueError(f"{name} is set for all recommenders at once: drop it here")
        return settings

    @model_validator(mode="after")
    def _has_its_head(self) -> AgentEntry:
        ranks = self.kind == "r2ec" or self.settings.get("rank") == "head"
        if ranks and self.head is None:
            raise ValueError("head is missing: name the folder of the recommendation head")
        if self.head is not None and not ranks:
            raise ValueError("head is named and nothing ranks by it: set rank: head, or drop it")
        return self


class RecBoleEntry(_Part):
    """A sequential model of RecBole, fitted for this run in an environment of its own."""

    kind: Literal["recbole"]
    model: RecBoleModel
    epochs: int = Field(50, ge=1)  # at most; RecBole stops early on validation
    threads: int = Field(2, ge=1)  # of the CPU
    python: Path = PYTHON  # of RecBole's environment (`make recbole`)
    options: dict[str, Any] = Field(default_factory=dict)  # of RecBole's configuration


Entry = Annotated[
    PopularityEntry | MarkovEntry | TRMEntry | RecBoleEntry | AgentEntry,
    Field(discriminator="kind"),
]
"""A recommender to judge. A new kind is one more class here, and a case in recommenders.py."""


class Price(_Part):
    """What the machine costs that agents run on; without it only what they take is told."""

    per_hour: float = Field(gt=0)
    currency: str = Field(min_length=1, max_length=10)


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._+-]*$", max_length=60)]


class EvalRun(BaseModel):
    """The configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: Path  # rankings, tables and report; a run that was cut off goes on here
    workspace: str = "ml-100k"  # data set, TRM and catalog, of the settings' home
    # Test users, a fixed random sample; none: all.
    users: int | None = Field(None, ge=1)
    k: int = Field(10, ge=1, le=MAX_K)  # places of a list that are judged
    # Places that baselines fill: enough to stand against all that an agent retrieves.
    depth: int = Field(200, ge=1)
    metrics: tuple[str, ...] = Field(
        ("recall@1", "recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr"), min_length=1
    )
    compare_by: str = "ndcg@10"  # names the best baseline, and what is tested against it
    past: tuple[Past, ...] = Field(("excluded", "included"), min_length=1)  # of baselines
    seed: int = Field(0, ge=0)  # of the users' sample, of sampling, of resampling
    resamples: int = Field(5000, ge=100)  # of bootstraps and of permutation tests
    concurrency: int = Field(16, ge=1, le=1024)  # runs of an agent at the same time
    traces: int = Field(3, ge=0)  # runs of an agent that the report tells, of each outcome
    # Wishes that users state to the TRM and to agents, each in a pass of its own over all users.
    steering: tuple[WishKind, ...] = ()
    cost: Price | None = None
    recommenders: dict[Name, Entry] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> EvalRun:
        for name in (*self.metrics, self.compare_by):
            parse_metric(name, self.k)
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"a metric is given twice: {', '.join(self.metrics)}")
        if self.compare_by not in self.metrics:
            raise ValueError(f"compare_by {self.compare_by!r} is not among the metrics: add it")
        if self.steering and not any(
            isinstance(entry, TRMEntry | AgentEntry) for entry in self.recommenders.values()
        ):
            raise ValueError("steering: no recommender takes a wish: add a trm or an agent")
        if self.steering and "excluded" not in self.past:
            raise ValueError("steering compares lists without the past: add excluded to past")
        if self.depth < self.k:
            raise ValueError(f"depth {self.depth} is below k = {self.k}: raise it")
        if len({name.casefold() for name in self.recommenders}) < len(self.recommenders):
            raise ValueError("two recommenders differ in upper and lower case alone: rename one")
        return self
