"""Who trains in which stage: users whose target the TRM alone ranks within reach.

Histories and targets come from the training part of the split (`training_part`), so that no
validation or test item is ever seen. A target that stands far down in the TRM's own ranking
can't be brought in by any preference; those in its top 100 can (METHOD.md §5, "top0_100").
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..configuration import write_json
from ..errors import DataError, SettingsError
from ..tools.interactions import InteractionData, Split, leave_one_out

if TYPE_CHECKING:
    from ..tools.trm.model import TRM

_BATCH = 256


class SelectionConfig(BaseModel):
    """How users are chosen and shared out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = 0
    # A target is within reach if the TRM alone ranks it among this many.
    top: int = Field(100, ge=1)
    # The latest interactions of a user's training part that may be targets, one example each.
    targets_per_user: int = Field(1, ge=1)
    # Least items of an example's history.
    min_history: int = Field(3, ge=1)
    # Share of the users that are within reach, by stage; no user serves two stages.
    shares: dict[str, float] = {"cold_start": 0.2, "recommendation": 0.8}

    @field_validator("shares")
    @classmethod
    def _shares(cls, shares: dict[str, float]) -> dict[str, float]:
        if not shares or any(not 0 < share <= 1 for share in shares.values()):
            raise ValueError(f"shares {shares}: name at least one stage, each above 0 and up to 1")
        if sum(shares.values()) > 1 + 1e-9:
            raise ValueError(f"shares {shares} sum to {sum(shares.values()):g}: take at most 1")
        return shares


class Selected(BaseModel):
    """One example: the target is the item at `position` (from 0) of the user's training part, the
    history all before it. `rank` is the target's zero-based place in the TRM's own ranking.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    user: str
    position: int = Field(ge=1)
    target: str
    rank: int = Field(ge=0)


class Counts(BaseModel):
    """How many were looked at, and what became of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    users: int  # of the data set
    candidates: int  # examples that were ranked
    within_reach: int  # of them in the top
    stages: dict[str, int]  # examples by stage


class Selection(BaseModel):
    """Examples by stage, and all that they follow from; what the file holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["deeprec.selection"] = "deeprec.selection"
    schema_version: Literal[1] = 1
    config: SelectionConfig
    dataset: str  # fingerprint of the data set
    trm: str  # SHA-256 (hex) of the TRM's weights
    # Whether the TRM was fitted without the targets, so that their ranks are those of new items.
    targets_unseen_by_trm: bool
    counts: Counts
    stages: dict[str, list[Selected]]

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises DataError."""
        try:
            write_json(Path(path), self.model_dump(mode="json"))
        except SettingsError as error:
            raise DataError(f"can't write the selection to {path}: {error}") from error

    @classmethod
    def load(cls, path: Path, data: InteractionData) -> Selection:
        """Read a selection of `data`. Raises DataError: missing, damaged, of other data."""
        try:
            selection = cls.model_validate_json(Path(path).read_text("utf-8"))
        except (OSError, ValueError, ValidationError) as error:
            raise DataError(
                f"{path} is no selection of users, or a damaged one: {error}. Select again."
            ) from error
        if selection.dataset != data.fingerprint:
            raise DataError(
                f"{path} was selected from another data set (fingerprint {selection.dataset}, "
                f"this one has {data.fingerprint}): select again"
            )
        return selection

    def examples(self, stage: str, data: InteractionData) -> list[Example]:
        """Histories and targets of a stage, in the file's order. Raises DataError."""
        if stage not in self.stages:
            raise DataError(
                f"the selection has no stage {stage!r}; it has {', '.join(self.stages)}"
            )
        split = leave_one_out(data)
        return [_example(chosen, data, split) for chosen in self.stages[stage]]


@dataclass(frozen=True)
class Example:
    """What one training run starts from: item ids, the history oldest first."""

    user: str
    history: tuple[str, ...]
    target: str


@dataclass(frozen=True)
class Candidate:
    """An example before it is ranked; user and items by index."""

    user: int
    position: int
    history: NDArray[np.int32]
    target: int


def training_part(data: InteractionData) -> InteractionData:
    """Return `data` without the validation and test interactions; users and items stay.

    A TRM that is fitted on it, with its own leave-one-out, has not seen each user's last two
    interactions of the training part: to it they are as new as test items are to the served TRM.
    """
    lengths = np.bincount(data.users)
    from_end = np.cumsum(lengths)[data.users] - np.arange(len(data.users))
    held_out = (from_end <= 2) & (lengths[data.users] >= 3)
    return InteractionData(
        name=data.name,
        items=data.items,
        user_ids=data.user_ids,
        users=data.users[~held_out],
        item_indices=data.item_indices[~held_out],
        times=data.times[~held_out],
    )


def candidates(split: Split, config: SelectionConfig) -> list[Candidate]:
    """Return every example that the training part offers, user by user, the latest first.

    Left out: histories that are too short; a target that stands in its own history (the
    retriever never returns it); and whatever repeats the user's validation or test item.
    """
    found = []
    for user, sequence in enumerate(split.train):
        held_out = np.isin(sequence, (split.valid[user], split.test[user]))
        first = {item: at for at, item in reversed(list(enumerate(sequence.tolist())))}
        for position in range(len(sequence) - 1, config.min_history - 1, -1):
            if len(sequence) - position > config.targets_per_user:
                break
            history, target = sequence[:position], int(sequence[position])
            if first[target] < position or held_out[: position + 1].any():
                continue
            found.append(Candidate(user, position, history, target))
    return found


def trm_ranks(
    model: TRM, data: InteractionData, text: NDArray[np.float32], given: Sequence[Candidate]
) -> NDArray[np.int64]:
    """Zero-based rank of each target by the TRM without a preference, the history excluded.

    `text` float32 [items, text_dim] are the passage embeddings of `data.items`.
    """
    from ..tools.trm.cold import known_rows
    from ..tools.trm.scoring import catalog_vectors, exclude, history_vectors, target_ranks

    known = known_rows(model, data)
    items = catalog_vectors(model, text, known)
    ranks = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(given), _BATCH):
        batch = given[start : start + _BATCH]
        histories = [candidate.history.astype(np.int64) for candidate in batch]
        targets = np.array([candidate.target for candidate in batch])
        scores = history_vectors(model, histories, text, known=known) @ items.T
        ranks.append(target_ranks(exclude(scores, histories, targets), targets))
    return np.concatenate(ranks)


def share_out(
    given: Sequence[Candidate], ranks: NDArray[np.int64], config: SelectionConfig
) -> dict[str, list[int]]:
    """Return positions in `given` by stage: those within reach, their users dealt by the seed.

    Raises DataError where a stage gets none.
    """
    reach: dict[int, list[int]] = {}
    for at, (candidate, rank) in enumerate(zip(given, ranks, strict=True)):
        if rank < config.top:
            reach.setdefault(candidate.user, []).append(at)
    users = np.random.default_rng(config.seed).permutation(sorted(reach)).tolist()
    ends = np.rint(np.cumsum(list(config.shares.values())) * len(users)).astype(int).tolist()
    stages = {
        stage: [at for user in users[start:end] for at in reach[user]]
        for stage, start, end in zip(config.shares, [0, *ends], ends, strict=False)
    }
    empty = [stage for stage, chosen in stages.items() if not chosen]
    if empty:
        raise DataError(
            f"no user is left for stage {empty[0]!r}: of {len(given)} examples the TRM ranks the "
            f"target of {sum(map(len, reach.values()))} in its top {config.top}, and shares "
            f"{config.shares} deal out {len(users)} users. Raise top or targets_per_user, or "
            "train a better TRM."
        )
    return stages


def select(
    data: InteractionData, model: TRM, text: NDArray[np.float32], config: SelectionConfig
) -> Selection:
    """Choose the examples of every stage by the ranks of `model`. Raises DataError if it is empty.

    Give a TRM that was fitted on `training_part(data)`: one that has seen the targets ranks them
    too high.
    """
    split = leave_one_out(data)
    given = candidates(split, config)
    ranks = trm_ranks(model, data, text, given)
    stages = {
        stage: [
            Selected(
                user=data.user_ids[given[at].user],
                position=given[at].position,
                target=data.items[given[at].target].id,
                rank=int(ranks[at]),
            )
            for at in chosen
        ]
        for stage, chosen in share_out(given, ranks, config).items()
    }
    fitted_on = model.config.dataset_fingerprint
    unseen = fitted_on == training_part(data).fingerprint and config.targets_per_user <= 2
    return Selection(
        config=config,
        dataset=data.fingerprint,
        trm=trm_fingerprint(model),
        targets_unseen_by_trm=unseen,
        counts=Counts(
            users=len(data.user_ids),
            candidates=len(given),
            within_reach=int((ranks < config.top).sum()),
            stages={stage: len(chosen) for stage, chosen in stages.items()},
        ),
        stages=stages,
    )


def _example(chosen: Selected, data: InteractionData, split: Split) -> Example:
    user = data.user_index.get(chosen.user)
    sequence = split.train[user] if user is not None else ()
    ids = [data.items[index].id for index in sequence]
    if chosen.position >= len(ids) or ids[chosen.position] != chosen.target:
        raise DataError(
            f"user {chosen.user!r} has no item {chosen.target!r} at position {chosen.position} of "
            "the training part: the selection was changed by hand; select again"
        )
    return Example(chosen.user, tuple(ids[: chosen.position]), chosen.target)


def trm_fingerprint(model: TRM) -> str:
    """SHA-256 (hex) of a TRM's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
