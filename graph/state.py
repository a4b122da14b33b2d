"""What goes into a run, what comes out of it, and what the nodes hand on to each other.

Requests, responses and settings are pydantic models: validated, described, drawn as a form in
LangGraph Studio. The internal state is plain data, since LangGraph stores it at every step.
"""

from __future__ import annotations

import operator
from typing import Annotated, Any, Literal, TypedDict

from langchain_core.messages import AnyMessage
from langgraph.channels import EphemeralValue
from langgraph.graph.message import add_messages
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from .format_rules import Violation
from .protocol import AnswerForm
from .transcript import Segment

Decoding = Literal["free", "guided"]
Source = Literal["policy", "guided", "head", "fused", "trm"]
"""Who put a line into the answer: the policy writing freely; the policy under a grammar; the
recommendation head; the fused retrieved lists; the TRM alone. The last two are filled lines, not
the policy's."""

FILLED: frozenset[Source] = frozenset({"fused", "trm"})

StopReason = Literal[
    "answered",
    "no_answer",
    "max_retrievals",
    "generation_length",
    "trajectory_length",
    "time_budget",
    "engine_failure",
    "retrieval_failure",
    "stopped_by_user",
]
"""How the thinking ended. answered: the policy closed it itself. no_answer: it ended the run
without a list. stopped_by_user: the user wants the list now. The others name the limit that was
hit, or the part that failed."""

OUTAGES: frozenset[StopReason] = frozenset({"engine_failure", "retrieval_failure"})
"""Ends that are not the policy's doing: such a run says nothing about it."""


MAX_K = 100
"""The most recommendations that one run may be asked for."""

MAX_RETRIEVALS = 64
"""The most searches that any run may be allowed."""


MAX_WISHES = 8
"""The most wishes that one request may state."""

MAX_HISTORY = 1000
"""The most items that the history of one request may hold."""

MAX_NAME_CHARS = 1000
"""The longest id or title that a request may name."""

MAX_TOKENS = 2**20
"""The most tokens that any run may be allowed; an engine holds fewer."""

MAX_SECONDS = 86_400.0
"""The longest time that a run may be allowed."""

_Name = Annotated[str, StringConstraints(max_length=MAX_NAME_CHARS)]

Wish = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
"""One wish of the user, in a few words."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(_Model):
    """Bounds of one run; the environment enforces them.

    A user who sends the answer back opens a new round: searches and seconds are counted anew,
    the tokens of all rounds together.
    """

    max_retrievals: int = Field(
        8, ge=1, le=MAX_RETRIEVALS, description="Searches per run, refused ones included."
    )
    min_retrievals: int = Field(
        2,
        ge=0,
        le=MAX_RETRIEVALS,
        description="Guided decoding offers to stop only after this many searches.",
    )
    max_new_tokens: int = Field(
        2048,
        ge=16,
        le=MAX_TOKENS,
        description="Tokens of one generation; guided searches and lists have their own.",
    )
    max_total_tokens: int = Field(
        16384,
        ge=256,
        le=MAX_TOKENS,
        description="Tokens of a run, prompt included; the engine may hold fewer.",
    )
    time_budget_s: float | None = Field(
        None,
        gt=0,
        le=MAX_SECONDS,
        description="Seconds for a run; then the answer is made of what was found.",
    )


class RunSettings(_Model):
    """How a run is made. The same for training, evaluation and serving; only values differ."""

    k: int = Field(10, ge=1, le=MAX_K, description="Recommendations wanted.")
    filters: dict[str, Any] = Field(
        default_factory=dict,
        description="Only items whose attributes match, beside the request's own filters.",
        examples=[{"genres": ["Comedy", "Drama"]}],
    )
    retrieve_n: int = Field(20, ge=1, le=200, description="Items that one search returns.")
    history_length: int = Field(
        20, ge=1, le=200, description="Latest history items that the policy reads."
    )
    decoding: Decoding = Field(
        "guided",
        description="free: the policy writes everything (training, strict evaluation). guided: a "
        "grammar keeps preferences, the choice to stop and the list valid (serving).",
    )
    list_attributes: bool = Field(
        True,
        description="Retrieved lists show attributes, not only titles (half of a run's tokens).",
    )
    answer_form: AnswerForm = Field("titles", description="Answer lines name titles or numbers.")
    rank: Literal["generate", "head"] = Field(
        "generate",
        description="generate: the policy writes the list. head: the recommendation head ranks "
        "what was retrieved, and nothing is written (DEEPREC_HEAD names one).",
    )
    reasoning: bool = Field(
        True, description="R2ec writes a thought before it ranks; DeepRec always thinks."
    )
    temperature: float = Field(0.0, ge=0, le=2, description="Sampling temperature; 0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling.")
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="Sampling seed; none draws anew each run."
    )
    thought_tokens: int = Field(
        96,
        ge=1,
        le=MAX_TOKENS,
        description="Tokens of one thought at most, in guided decoding and of R2ec.",
    )
    on_limit: Literal["answer", "fail"] = Field(
        "answer",
        description="answer: a run that hits a limit is closed and answered (serving). fail: it "
        "ends without a list (training).",
    )
    fill: bool = Field(True, description="Fill lines that the policy left open; they are flagged.")
    explain: bool = Field(False, description="Say of each recommendation why it is there.")
    ask_before_search: bool = Field(
        False, description="Interrupt before each search: accept the preference, edit it, or stop."
    )
    ask_after_ranking: bool = Field(
        False, description="Interrupt after the answer: accept it, reject items, or ask for more."
    )
    limits: Limits = Field(default_factory=Limits, description="Bounds of a run.")


class RecommendationRequest(_Model):
    """What a caller asks. Give `history` or `user_id`, not both."""

    history: list[_Name] | None = Field(
        None,
        max_length=MAX_HISTORY,
        description="Items the user liked, oldest first: catalog ids or titles.",
        examples=[["Toy Story", "Babe", "Aladdin"]],
    )
    user_id: _Name | None = Field(
        None, description="A user whose history is known.", examples=["196"]
    )
    k: int | None = Field(
        None, ge=1, le=MAX_K, description="Recommendations wanted; overrides settings."
    )
    filters: dict[str, Any] = Field(
        default_factory=dict,
        description='Only items whose attributes match, e.g. {"genres": ["Comedy"]}.',
        examples=[{"genres": ["Comedy", "Drama"]}],
    )
    wishes: list[Wish] = Field(
        default_factory=list,
        max_length=MAX_WISHES,
        description="What the user asks for in their own words. The policy reads it; what is "
        "certain, such as 'only from the 1990s', acts on every search too.",
        examples=[["something light", "only from the 1990s"]],
    )
    limits: Limits | None = Field(
        None, description="Bounds of this run; those that are given override the settings'."
    )


class RetrievedItem(_Model):
    """One item of a retrieved list."""

    id: str
    title: str
    score: float


class Turn(_Model):
    """One turn: a thought, the preference it led to, and what came back.

    `preference` is None in the last turn, which argues the ranking. `refused` says why a
    preference was not searched for. `asked_by` is user where another preference was searched for
    than the policy wrote.
    """

    thought: str
    preference: str | None = None
    retrieved: list[RetrievedItem] = Field(default_factory=list)
    refused: str | None = None
    asked_by: Literal["policy", "user"] = "policy"


class Recommendation(_Model):
    """One line of the answer. `score` is the item's best TRM score of the run, if any; R2ec's is
    its head's.

    With RunSettings.explain: `turn` (from 1) and `preference` of the search that first brought
    the item in, None where none did, and `reason`, one sentence of facts.
    """

    id: str
    title: str
    rank: int = Field(ge=1)
    source: Source
    score: float | None = None
    turn: int | None = Field(None, ge=1)
    preference: str | None = None
    reason: str | None = None

    @property
    def filled(self) -> bool:
        """Whether the line is not the policy's own."""
        return self.source in FILLED


class Failure(_Model):
    """Why a run has no (own) answer."""

    reason: StopReason
    detail: str


class UnderstoodWish(_Model):
    """A wish that acts on the run by itself; `means` says how."""

    wish: str
    means: str


class Usage(_Model):
    """What a run cost. Tokens by author (see graph/transcript.py), calls, seconds in nodes.

    The user's words of later rounds count as the environment's.
    """

    prompt_tokens: int = 0
    policy_tokens: int = 0
    guided_tokens: int = 0
    chat_tokens: int = 0
    forced_tokens: int = 0
    environment_tokens: int = 0
    generations: int = 0
    retrievals: int = 0
    seconds: float = 0.0

    @property
    def written_tokens(self) -> int:
        """Tokens that the LLM wrote, freely or not."""
        return self.policy_tokens + self.guided_tokens + self.chat_tokens


class RecommendationResponse(_Model):
    """The answer: K distinct items best first, how they were found, and what it cost.

    `answer` holds the policy's own lines as written, resolved to item ids (None: not among the
    retrieved); strict evaluation reads it and `violations`, serving reads `recommendations`.
    `understood_wishes` act on every search; all other wishes only the policy has read.
    """

    recommendations: list[Recommendation]
    turns: list[Turn]
    answer: list[str | None]
    violations: list[Violation]
    stop_reason: StopReason
    failure: Failure | None
    usage: Usage
    understood_wishes: list[UnderstoodWish] = Field(default_factory=list)


def add_counts(left: dict[str, float], right: dict[str, float]) -> dict[str, float]:
    """Reducer: sum counters key by key."""
    return {name: left.get(name, 0.0) + right.get(name, 0.0) for name in left | right}


class Routing(TypedDict, total=False):
    """Of the state what decides where a run goes next."""

    run: dict[str, Any]  # RunSettings of this run, dumped; made by read_request
    next_node: Literal["call_trm", "rank"]
    stop_reason: StopReason | None


class State(Routing, total=False):
    """What nodes hand on. Plain data only; see Segment for how tokens are kept."""

    # the request, as RecommendationRequest names it; gone after read_request, so that a second
    # run on one thread doesn't inherit the first one's
    history: Annotated[list[str] | None, EphemeralValue]
    user_id: Annotated[str | None, EphemeralValue]
    k: Annotated[int | None, EphemeralValue]
    filters: Annotated[dict[str, Any], EphemeralValue]
    wishes: Annotated[list[str], EphemeralValue]
    limits: Annotated[Limits | None, EphemeralValue]
    # made by read_request
    model: str  # name of the engine's model
    user: str | None  # the known user, whose memory is kept
    history_ids: list[str]
    # what holds for every search; what the user says after an answer adds to it
    where: list[dict[str, Any]]  # filters that must all hold
    leanings: list[dict[str, Any]]  # Leaning, dumped
    excluded: list[str]  # item ids that the user doesn't want
    understood_wishes: list[dict[str, Any]]
    # the run as people read it (messages.py); no node reads it
    messages: Annotated[list[AnyMessage], add_messages]
    # made by the loop
    round_began: dict[str, float]  # turns and seconds before the answer that the user sent back
    segments: Annotated[list[Segment], operator.add]
    turns: Annotated[list[dict[str, Any]], operator.add]  # Turn, dumped
    counts: Annotated[dict[str, float], add_counts]  # generations, seconds
    pending: dict[str, Any] | None  # thought and preference that call_trm is to answer
    failure: dict[str, Any] | None
    # made by rank, as RecommendationResponse names it
    recommendations: list[dict[str, Any]]
    answer: list[str | None]
    violations: list[Violation]
    usage: dict[str, Any]


RUN_KEYS = (
    "run",
    "history_ids",
    "segments",
    "turns",
    "recommendations",
    "answer",
    "violations",
    "stop_reason",
    "failure",
    "usage",
)
"""What a record of a run is read from: `output_keys` for the graph's `ainvoke`, whose output
otherwise leaves the transcript out."""
