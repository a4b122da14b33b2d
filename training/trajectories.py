"""Trajectories: finished graph runs as records that learning, judging and people read.

A trajectory is read off the state that a run left, wherever the run was made: a rollout, an
evaluation, the CLI, or a thread in a LangGraph checkpointer. Its token ids, logprobs and authors
are those of the transcript, byte for byte; its text is decoded from them for people and parsers,
and never turned into tokens again. Files of trajectories: training/trajectory_file.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import TrajectoryError
from ..graph import protocol
from ..graph.format_rules import Violation
from ..graph.state import RUN_KEYS, Failure, Recommendation, RunSettings, StopReason, Turn, Usage
from ..graph.transcript import HEARD, Author, Transcript

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HASHED_FILES = (".safetensors", ".json", ".jinja", ".txt")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Piece(_Model):
    """Text of neighbouring tokens of one author, end-of-sequence left out, and their number."""

    author: Author
    text: str
    tokens: int = Field(ge=0)


class Rewards(_Model):
    """Rewards of a run by name (METHOD.md §4), and their weighted sum in its stage.

    None: it can't be computed (no target is known, the engine failed), or nobody asked for it.
    """

    format: float | None = None
    invocation: float | None = None
    diversity: float | None = None
    hit: float | None = None
    rank: float | None = None
    point: float | None = None
    total: float | None = None


class Trajectory(_Model):
    """One finished run.

    `completion_ids`, `logprobs` (natural log, 0 where nobody sampled), `authors` and `env_mask`
    have one entry per token after the prompt. `answer` holds the policy's own lines, resolved to
    item ids. `model` names the policy, `model_fingerprint` its weights ("" where unknown).
    """

    id: str = Field(min_length=1)
    model: str
    model_fingerprint: str = ""
    settings: RunSettings
    history_ids: list[str]
    target: str | None = None
    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    authors: list[Author]
    pieces: list[Piece]
    turns: list[Turn]
    recommendations: list[Recommendation]
    answer: list[str | None]
    violations: list[Violation]
    stop_reason: StopReason
    failure: Failure | None = None
    usage: Usage
    rewards: Rewards = Rewards()

    @model_validator(mode="after")
    def _aligned(self) -> Trajectory:
        lengths = {len(self.completion_ids), len(self.logprobs), len(self.authors)}
        if len(lengths) > 1:
            raise ValueError("completion_ids, logprobs and authors differ in length")
        if sum(piece.tokens for piece in self.pieces) != len(self.prompt_ids) + len(self.authors):
            raise ValueError("the pieces do not add up to the tokens")
        if any(math.isnan(value) for value in self.logprobs):
            raise ValueError("a logprob is not a number")
        return self

    @property
    def env_mask(self) -> list[int]:
        """1 for tokens that the policy sampled freely, else 0: what the loss is taken on."""
        return [int(author == "policy") for author in self.authors]

    @property
    def with_people(self) -> bool:
        """Whether a user changed the run's course, so that it is not the policy's alone.

        They did where they edited a preference, stopped the searching, or sent an answer back.
        """
        edited = any(turn.asked_by == "user" for turn in self.turns)
        return edited or self.stop_reason == "stopped_by_user" or "user" in self.authors

    @property
    def settings_fingerprint(self) -> str:
        """SHA-256 (hex) of the run's settings."""
        return hashlib.sha256(self.settings.model_dump_json().encode()).hexdigest()

    @property
    def entries(self) -> list[str]:
        """Answer lines as the policy wrote them."""
        said: list[str] = []
        for piece in self.pieces:
            # What it wrote before the last list is no answer, and the prompt shows an example.
            heard = piece.author == "prompt" or piece.author in HEARD
            said = [] if heard else [*said, piece.text]
        return protocol.parse_answer("".join(said)) or []

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        *,
        id: str,
        model: str,
        model_fingerprint: str = "",
        target: str | None = None,
    ) -> Trajectory:
        """Make the record of a run from the last state of its graph.

        Args:
            state: the state's values, `RUN_KEYS` among them.
            tokenizer: the policy's; it only decodes.
            id: tells the run from all others of a file.
            model: name of the policy.
            model_fingerprint: of its weights (`model_fingerprint`).
            target: item id that the run should have found, where one is known.

        Raises TrajectoryError where the run has not finished or the state is none of a run.

        """
        missing = [key for key in RUN_KEYS if key not in state]
        if missing:
            raise TrajectoryError(
                f"run {id!r} can't be made a trajectory: its state lacks {', '.join(missing)}. "
                "Give the state of a finished run (invoke the graph with output_keys=RUN_KEYS)."
            )
        try:
            transcript = Transcript(state["segments"])
            return cls(
                id=id,
                model=model,
                model_fingerprint=model_fingerprint,
                settings=RunSettings.model_validate(state["run"]),
                target=target,
                prompt_ids=transcript.prompt_ids,
                completion_ids=transcript.completion_ids,
                logprobs=transcript.logprobs,
                authors=transcript.authors,
                pieces=_pieces(transcript, tokenizer),
                **{key: state[key] for key in RUN_KEYS if key not in ("run", "segments")},
            )
        except (ValidationError, ValueError) as error:
            raise TrajectoryError(
                f"run {id!r} can't be made a trajectory: {error}. Its state was made by another "
                "version of the graph, or changed by hand."
            ) from error


def model_fingerprint(model: str) -> str:
    """SHA-256 (hex) of the model's weights, configuration and tokenizer.

    `model` is a local folder or the name of a hub model that was downloaded before. Raises
    TrajectoryError where it is neither.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError) as error:
            raise TrajectoryError(
                f"no model {model!r}: it is neither a folder nor a hub model that was downloaded"
            ) from error
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _HASHED_FILES:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256")
            digest.update(f"{path.name} {content.hexdigest()}\n".encode())
    return digest.hexdigest()


def _pieces(transcript: Transcript, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Decode neighbours of one author together: a character may span two segments."""
    authors: list[Author] = ["prompt" for _ in transcript.prompt_ids]
    authors += transcript.authors
    eos = tokenizer.eos_token_id
    pieces = []
    for author, run in groupby(zip(authors, transcript.ids, strict=True), key=lambda at: at[0]):
        ids = [token for _, token in run]
        # The chat template's own end-of-turn marks belong to the prompt's text.
        shown = ids if author == "prompt" else [token for token in ids if token != eos]
        text = tokenizer.decode(
            shown, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        pieces.append(Piece(author=author, text=str(text), tokens=len(ids)))
    return pieces
