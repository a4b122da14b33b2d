"""People in the loop: the interrupts before a search and after the answer, and what they answer.

Both are asked for by RunSettings and need a checkpointer. An interrupt's value is a dict that says
what is asked, its `answer_schema` the JSON schema of what may be answered with
`Command(resume=…)`: a dict of one of the models below. Anything else is asked again, with the
complaint in the value.

LangGraph runs an interrupted node again from its start: nothing before an interrupt costs anything
or leaves a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from langchain_core.messages import HumanMessage
from langgraph._internal._constants import CONFIG_KEY_CHECKPOINTER  # no public name tells it
from langgraph.config import get_config
from langgraph.types import interrupt
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from ..errors import CatalogError, RequestError
from ..tools.titles import sanitise
from . import protocol
from .memory import Memory
from .messages import stopped_message
from .nodes import refusal, this_round
from .requests import check_eligible, explain
from .resources import Resources
from .state import MAX_K, MAX_WISHES, RunSettings, State, Turn, Wish
from .transcript import Transcript, segment
from .wishes import read_wishes

if TYPE_CHECKING:
    from langgraph.store.base import BaseStore
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")
_Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
_ANSWER = "(answer)"  # stands for what the policy wrote where a chat template is asked


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AcceptSearch(_Answer):
    """Search for the preference as it is."""

    action: Literal["accept"]


class EditSearch(_Answer):
    """Search for another preference."""

    action: Literal["edit"]
    preference: _Words = Field(description="Short phrases joined by ;", examples=["quiet; 1990s"])


class StopSearching(_Answer):
    """No search any more: give the list."""

    action: Literal["stop"]


class AcceptAnswer(_Answer):
    """The run is over."""

    action: Literal["accept"]


class RejectedItem(_Answer):
    """An item that the user doesn't want."""

    item: _Words = Field(description="Its id or title.")
    reason: _Words | None = Field(None, description="Why, in a few words.")


class RejectItems(_Answer):
    """Leave these out, from now on, and recommend again."""

    action: Literal["reject"]
    items: list[RejectedItem] = Field(min_length=1, max_length=MAX_K)
    wishes: list[Wish] = Field(default_factory=list, max_length=MAX_WISHES)


class AskForMore(_Answer):
    """Recommend others than those just listed."""

    action: Literal["more"]
    wishes: list[Wish] = Field(default_factory=list, max_length=MAX_WISHES)


SearchReview = Annotated[AcceptSearch | EditSearch | StopSearching, Field(discriminator="action")]
AnswerReview = Annotated[AcceptAnswer | RejectItems | AskForMore, Field(discriminator="action")]

_SEARCH_REVIEW: TypeAdapter[AcceptSearch | EditSearch | StopSearching] = TypeAdapter(SearchReview)
_ANSWER_REVIEW: TypeAdapter[AcceptAnswer | RejectItems | AskForMore] = TypeAdapter(AnswerReview)


def review_search(state: State) -> dict[str, Any]:
    """Ask the user about the search that the policy wants to make."""
    pending = state["pending"] or {}
    question = {
        "question": "The agent wants to search. Accept, edit the preference, or stop searching?",
        "thought": pending["thought"],
        "preference": pending["preference"],
        "searches_so_far": len(this_round(state)),
    }

    def accepted(answer: AcceptSearch | EditSearch | StopSearching) -> dict[str, Any]:
        if isinstance(answer, StopSearching):
            turn = Turn(thought=pending["thought"])
            turns = [turn.model_dump()] if turn.thought else []
            return {
                "pending": None,
                "turns": turns,
                "stop_reason": "stopped_by_user",
                "messages": [stopped_message(state)],
            }
        if isinstance(answer, EditSearch):
            preference = protocol.normalise_preference(sanitise(answer.preference))
            refused = refusal(preference or None, this_round(state))
            if refused is not None:
                raise RequestError(f"preference {answer.preference!r}: {refused}")
            return {"pending": {**pending, "preference": preference}}
        return {}

    return _ask(question, _SEARCH_REVIEW, accepted)


def review_answer(resources: Resources, state: State, store: BaseStore | None) -> dict[str, Any]:
    """Ask the user about the answer; what they say opens a new round, unless they accept."""
    question = {
        "question": "Accept the list, reject some of its items, or ask for others?",
        "recommendations": state["recommendations"],
    }

    def accepted(answer: AcceptAnswer | RejectItems | AskForMore) -> dict[str, Any]:
        if isinstance(answer, AcceptAnswer):
            return {}
        return _next_round(resources, state, answer, store)

    return _ask(question, _ANSWER_REVIEW, accepted)


def _ask(
    question: dict[str, Any], answers: TypeAdapter[_T], accepted: Callable[[_T], dict[str, Any]]
) -> dict[str, Any]:
    """Interrupt until an answer is accepted; returns the update that it means."""
    schema = answers.json_schema()
    complaint: str | None = None
    while True:
        value = {**question, "complaint": complaint, "answer_schema": schema}
        reply = interrupt(value, response_schema=schema)
        try:
            return accepted(answers.validate_python(reply))
        except ValidationError as error:
            complaint = f"malformed answer: {explain(error)}"
        except (RequestError, CatalogError) as error:
            complaint = str(error)


def _next_round(
    resources: Resources, state: State, said: RejectItems | AskForMore, store: BaseStore | None
) -> dict[str, Any]:
    """Take down what the user said. Raises RequestError where it leaves too little to recommend."""
    catalog = resources.catalog
    listed = [line["id"] for line in state["recommendations"]]
    rejected: dict[str, str | None] = {}
    if isinstance(said, RejectItems):
        rejected = {catalog.resolve(line.item): line.reason for line in said.items}
    wishes = read_wishes(said.wishes, catalog)
    gone = dict.fromkeys([*state["excluded"], *(rejected or listed), *wishes.named])
    wishes.where[:0] = state["where"]
    understood = [wish.model_dump() for wish in wishes.understood]
    settings = RunSettings.model_validate(state["run"])
    check_eligible(settings.k, catalog, {*state["history_ids"], *gone}, wishes)
    titles = {item: catalog.display_title(item) for item in rejected}
    if memory := Memory.of(store, state["user"]):
        for item, reason in rejected.items():
            memory.add("rejected", titles[item], item=item, reason=reason or "")
        memory.add_tastes(wishes.tastes)
    words = protocol.render_review(
        [(titles[item], sanitise(reason or "")) for item, reason in rejected.items()],
        wishes.words,
        k=settings.k,
    )
    before = Transcript(state["segments"]).ids
    return {
        "where": wishes.where,
        "leanings": [*state["leanings"], *map(asdict, wishes.leanings)],
        "excluded": list(gone),
        "understood_wishes": [*state["understood_wishes"], *understood],
        "segments": [segment("user", chat_turn(resources.engine.tokenizer, words, before))],
        "messages": [HumanMessage(words)],
        "round_began": {"turns": len(state["turns"]), "seconds": state["counts"]["seconds"]},
        "stop_reason": None,
        "failure": None,
    }


def chat_turn(tokenizer: PreTrainedTokenizerBase, words: str, before: Sequence[int]) -> list[int]:
    """Token ids that close the policy's message, say `words` as the user, and open its next one.

    They are what the chat template puts there; `before` are the ids of the transcript so far.
    """
    roles = ("user", "assistant", "user")
    messages = [
        {"role": role, "content": text}
        for role, text in zip(roles, ("(request)", _ANSWER, words), strict=True)
    ]
    text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    ids = list(tokenizer.encode(text.rpartition(_ANSWER)[2], add_special_tokens=False))
    closed = bool(before) and before[-1] == tokenizer.eos_token_id == ids[0]
    return ids[1:] if closed else ids


def check_can_ask(settings: RunSettings) -> None:
    """Raise RequestError, within a node, where a run that is to be interrupted could not go on."""
    asks = settings.ask_before_search or settings.ask_after_ranking
    if asks and get_config()["configurable"].get(CONFIG_KEY_CHECKPOINTER) is None:
        raise RequestError(
            "ask_before_search and ask_after_ranking interrupt a run, which then goes on from its "
            "checkpoint, and there is no checkpointer: give build_graph one and each run a "
            "thread_id, or switch them off"
        )
