"""The transcript: append-only token segments that know who wrote them.

Its invariant: the ids of all segments, in order, are exactly what the engine was given plus what
it returned. A segment is appended when its tokens come to be, and nothing is ever rebuilt from
text; prompt_ids, completion_ids, logprobs and env_mask are read off.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Author = Literal["prompt", "policy", "guided", "chat", "forced", "environment", "user"]
"""Who wrote a segment.

prompt: the request, before the policy's first token. policy: sampled freely, trainable.
guided: sampled under a constraint, so its logprobs are those after the mask. chat: text of a chat
model, tokenised afterwards: not the tokens that it sampled, so never to be trained on. forced: the
policy's part, written by the environment (a marker, a closed thought). environment: retrieved
lists and refusals. user: what the user said after an answer, which opens a new round.
"""

HEARD: frozenset[Author] = frozenset({"environment", "user"})
"""Who speaks to the policy during a run."""

T = TypeVar("T")

_IDS = np.dtype("<i4")
_LOGPROBS = np.dtype("<f4")


class Segment(TypedDict):
    """One author's tokens, compact enough to be kept in graph state.

    `ids` are little-endian int32 and `logprobs` little-endian float32 bytes, one per token;
    tokens that nobody sampled have logprob 0.
    """

    author: Author
    ids: bytes
    logprobs: bytes


def segment(author: Author, ids: Sequence[int], logprobs: Sequence[float] | None = None) -> Segment:
    """Pack one segment. `logprobs` must be given for sampled tokens, and only for those.

    Raises ValueError where the two lengths differ or a sampled segment has no logprobs.
    """
    sampled = author in ("policy", "guided")
    if sampled != (logprobs is not None):
        raise ValueError(f"author {author!r} {'needs' if sampled else 'has no'} logprobs")
    values = np.zeros(len(ids), _LOGPROBS) if logprobs is None else np.asarray(logprobs, _LOGPROBS)
    if len(values) != len(ids):
        raise ValueError(f"{len(ids)} token ids came with {len(values)} logprobs")
    return Segment(author=author, ids=np.asarray(ids, _IDS).tobytes(), logprobs=values.tobytes())


def segment_ids(item: Segment) -> NDArray[np.int32]:
    """Token ids of one segment, int32 [tokens]."""
    return np.frombuffer(item["ids"], _IDS)


class Transcript:
    """Read-only view of segments: the prompt, then everything after it (the completion)."""

    def __init__(self, segments: Iterable[Segment]) -> None:
        self.segments = tuple(segments)
        authors = [item["author"] for item in self.segments]
        if "prompt" in authors[1:]:
            raise ValueError("only the first segment of a transcript may be the prompt")

    @property
    def ids(self) -> list[int]:
        """All token ids, prompt first: what the engine is given to go on."""
        return self._join(self.segments)

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids before the policy's first one."""
        return self._join(item for item in self.segments if item["author"] == "prompt")

    @property
    def completion_ids(self) -> list[int]:
        """Token ids after the prompt, whoever wrote them."""
        return self._join(self._completion())

    @property
    def logprobs(self) -> list[float]:
        """Natural-log probabilities aligned with `completion_ids`; 0 where nobody sampled."""
        parts = [np.frombuffer(item["logprobs"], _LOGPROBS) for item in self._completion()]
        return [float(value) for part in parts for value in part]

    @property
    def env_mask(self) -> list[int]:
        """1 for tokens that the policy sampled freely, else 0; aligned with `completion_ids`."""
        mask: list[int] = []
        for item in self._completion():
            mask += [int(item["author"] == "policy")] * self._length(item)
        return mask

    @property
    def authors(self) -> list[Author]:
        """Author of each token of `completion_ids`."""
        return [item["author"] for item in self._completion() for _ in range(self._length(item))]

    def count(self, *authors: Author) -> int:
        """Number of tokens that these authors wrote."""
        return sum(self._length(item) for item in self.segments if item["author"] in authors)

    def __len__(self) -> int:
        """Return the number of tokens, prompt included."""
        return sum(self._length(item) for item in self.segments)

    def _completion(self) -> Iterable[Segment]:
        return (item for item in self.segments if item["author"] != "prompt")

    @staticmethod
    def _length(item: Segment) -> int:
        return len(item["ids"]) // _IDS.itemsize

    @staticmethod
    def _join(segments: Iterable[Segment]) -> list[int]:
        parts = [segment_ids(item) for item in segments]
        return np.concatenate(parts).tolist() if parts else []


def pieces(
    transcript: Transcript, tokenizer: PreTrainedTokenizerBase, *, since_list: bool = False
) -> list[tuple[Author, str]]:
    """Text of the completion, piece by piece with its author, without end-of-sequence.

    For people and parsers only. `since_list` leaves out everything up to the last thing that the
    environment or the user wrote.
    """
    segments: Sequence[Segment] = [s for s in transcript.segments if s["author"] != "prompt"]
    if since_list:
        segments = _after_last(HEARD, segments, [item["author"] for item in segments])
    joined: list[tuple[Author, list[int]]] = []
    eos = tokenizer.eos_token_id  # looked up at each asking, which takes long
    for item in segments:
        # Neighbours of one author are decoded together: a character may span two of them.
        ids = [token for token in segment_ids(item).tolist() if token != eos]
        if joined and joined[-1][0] == item["author"]:
            joined[-1][1].extend(ids)
        else:
            joined.append((item["author"], ids))
    return [
        (
            author,
            str(
                tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            ),
        )
        for author, ids in joined
    ]


def said_last(pieces: Sequence[tuple[Author, str]]) -> str:
    """Text of the pieces after the last that the environment or the user wrote."""
    said = _after_last(HEARD, pieces, [author for author, _ in pieces])
    return "".join(text for _, text in said)


def last_round(pieces: Sequence[tuple[Author, str]]) -> Sequence[tuple[Author, str]]:
    """Pieces since the user last sent an answer back; all where that never happened."""
    return _after_last({"user"}, pieces, [author for author, _ in pieces])


def _after_last(
    who: Collection[Author], said: Sequence[T], authors: Sequence[Author]
) -> Sequence[T]:
    """What came after the last of `who`; all where none of them spoke. `authors` are of `said`."""
    marks = [at for at, author in enumerate(authors) if author in who]
    return said[marks[-1] + 1 :] if marks else said
