"""A start for the recommendation head: projections fitted over states of the LLM as it is.

The source trains both heads by reward at once. A head over raw states has nothing to be rewarded
for; so the two projections are fitted first, supervised and in closed form. The LLM isn't changed:
its states are computed once, and the fit takes seconds. Each reading of a user gives a state at its
end, which is to predict the target, and one at the end of each line of the history, which is to
predict the next line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from ..configuration import replacing
from ..graph import protocol
from ..graph.r2ec.backbone import batches
from ..graph.r2ec.head import RecommendationHead
from ..graph.r2ec.readings import OPENING, user_ids
from ..graph.resources import listed_item
from ..tools.trm.vocabulary import Vocabulary, history_preference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..graph.r2ec.backbone import Backbone
    from ..tools.catalog import Catalog
    from ..tools.interactions import InteractionData, Split

_PART = 128  # readings of one file, so that a kill costs no more
_HELD_OUT = 0.1  # share of the users by whom ridge and scale are chosen
_RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # of the mean variance of a user's state
_SCALES = (1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 30.0)
_SHRINK = 0.01  # of the items' mean variance, added before whitening
_FOLLOW = 0.001  # ridge of `follow`, of the items' mean variance


class HeadStart(BaseModel):
    """How the head is fitted before the LLM is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    readings: int = Field(2000, ge=20)  # of users
    # Latest interactions of each user's training part that are left for training by reward.
    left_per_user: int = Field(2, ge=0)
    thoughts: float = Field(0.5, ge=0, le=1)  # share of the readings with a thought in them


@dataclass(frozen=True)
class Reading:
    """A user's reading: token ids, which of them predict which item, and what the LLM writes."""

    user: int  # index
    ids: list[int]
    places: list[int]  # tokens whose states predict; the last one is the reading's end
    targets: list[int]  # item index of each
    spoken: list[int]  # places of the thought's tokens and of the marker that ends it


@dataclass(frozen=True)
class Reader:
    """Makes readings of users' training parts."""

    data: InteractionData
    split: Split
    catalog: Catalog
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    history_length: int

    def read(self, user: int, at: int, *, thought: bool) -> Reading:
        """The reading whose target is `at` in the user's training part.

        With a `thought` it says the commonest attributes of what came before, where there are any.
        """
        sequence = self.split.train[user].tolist()
        said = ""
        if thought:
            preference = history_preference(self.vocabulary, sequence[:at])
            said = f"This user seems to like {preference}." if preference else ""
        return self._reading(user, sequence[max(0, at - self.history_length) : at + 1], said)

    def ids_of(self, history: Sequence[int]) -> list[int]:
        """Token ids of a reading of these items, without a thought."""
        return user_ids(self._listed(history), "", self.tokenizer)

    def _listed(self, history: Sequence[int]) -> list[protocol.ListedItem]:
        return [listed_item(self.catalog, self.data.items[item].id) for item in history]

    def _reading(self, user: int, window: Sequence[int], thought: str) -> Reading:
        listed = self._listed(window[:-1])
        ids = user_ids(listed, thought, self.tokenizer)
        text = str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if encoded["input_ids"] != ids:
            # Where decoding and encoding again give other tokens, only the reading's end predicts.
            return Reading(user, ids, [len(ids) - 1], [window[-1]], [])
        offsets = encoded["offset_mapping"]
        places, start = [], 0
        for rank, item in enumerate(listed, 1):
            line = protocol.render_item(f"{rank}.", protocol.ListedItem(item.id, item.title))
            start = text.index(line, start) + len(line)
            places.append(next(at for at, (_, end) in enumerate(offsets) if end >= start))
        places[-1] = len(ids) - 1  # what comes after the last line is the reading's target
        spoken: list[int] = []
        if thought:
            begin = text.rindex(OPENING) + len(OPENING)
            end = text.rindex(protocol.END_THINK) + len(protocol.END_THINK)
            spoken = [at for at, (a, b) in enumerate(offsets) if a >= begin and b <= end]
        return Reading(user, ids, places, [*window[1:]], spoken)


def readings_of(reader: Reader, config: HeadStart, *, seed: int) -> list[Reading]:
    """Draw readings from the training part, users and positions alike by the seed."""
    rng = np.random.default_rng([seed, 17])
    ends = [
        (user, at)
        for user, sequence in enumerate(reader.split.train)
        for at in range(1, len(sequence) - config.left_per_user)
    ]
    drawn = rng.permutation(len(ends))[: config.readings]
    return [reader.read(*ends[at], thought=rng.random() < config.thoughts) for at in drawn]


def states_of(
    readings: Sequence[Reading],
    backbone: Backbone,
    folder: Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """States [rows, dim] of all predicting tokens, item index of each, and the user it is of.

    Kept part by part in `folder`, where a run that was cut off goes on.
    """
    parts = []
    for start in range(0, len(readings), _PART):
        path = folder / f"states-{start:06d}.safetensors"
        some = readings[start : start + _PART]
        if not path.exists():
            with replacing(path) as beside:
                save_file({"states": _states(some, backbone)}, beside)
        parts.append(load_file(path)["states"].float())
        progress(start + len(some), len(readings))
    targets = torch.tensor([item for reading in readings for item in reading.targets])
    owners = torch.tensor([reading.user for reading in readings for _ in reading.targets])
    return torch.cat(parts), targets, owners


def _states(readings: Sequence[Reading], backbone: Backbone) -> Tensor:
    found: dict[int, Tensor] = {}
    with torch.inference_mode():
        for rows in batches([len(reading.ids) for reading in readings]):
            hidden = backbone.hidden([readings[row].ids for row in rows])
            for at, row in enumerate(rows):
                found[row] = hidden[at, readings[row].places].to(torch.bfloat16).cpu()
    return torch.cat([found[row] for row in range(len(readings))])


def fit_head(
    head: RecommendationHead,
    users: Tensor,
    targets: Tensor,
    owners: Tensor,
    items: Tensor,
    *,
    seed: int,
) -> list[dict[str, float]]:
    """Fit the projections in closed form; gives a row for each strength of the ridge.

    Items' states are whitened, and users' states regressed onto the unit vector of their target.
    Strength and scale are those of the least cross-entropy over the whole catalog for users who
    were held out; the projections are then fitted on all. Users, since readings of one overlap.

    Args:
        head: fitted in place.
        users: states [rows, dim].
        targets: index of each row's item in `items`.
        owners: user of each row; one of ten is held out.
        items: states [items, dim].
        seed: of what is held out.

    """
    generator = torch.Generator().manual_seed(seed)
    people = torch.tensor(sorted(set(owners.tolist())))
    count = max(1, round(_HELD_OUT * len(people)))
    held = torch.isin(owners, people[torch.randperm(len(people), generator=generator)[:count]])
    _whiten(head, items)
    wanted = head.items(items).detach()
    rows = []
    for ridge in _RIDGES:
        _regress(head, users[~held], wanted[targets[~held]], ridge)
        with torch.no_grad():
            cosines = functional.normalize(head.user(users[held]), dim=-1) @ wanted.T
        aims = targets[held]
        losses = {scale: functional.cross_entropy(cosines * scale, aims) for scale in _SCALES}
        scale = min(losses, key=lambda scale: float(losses[scale]))
        ranks = (cosines > cosines.gather(1, aims[:, None])).sum(dim=1)
        top = float((1 / (ranks + 2.0).log2()).where(ranks < 10, 0).mean())
        rows.append({
            "ridge": ridge, "scale": scale, "valid_loss": float(losses[scale]), "ndcg@10": top,
        })  # fmt: skip
    best = min(rows, key=lambda row: row["valid_loss"])
    _regress(head, users, wanted[targets], best["ridge"])
    with torch.no_grad():
        head.log_scale.fill_(math.log(best["scale"]))
        # Scores don't change with its length, but how far a step of training turns it does. It is
        # made as long as the untrained one; the items' is long, and what whitens is better left.
        longer = math.sqrt(head.dim) / head.user.weight.norm()
        head.user.weight.mul_(longer)
        head.user.bias.mul_(longer)
    return rows


@torch.no_grad()
def follow(head: RecommendationHead, before: Tensor, after: Tensor) -> float:
    """Refit the items' projection so that items keep their vectors though their states moved.

    Whitening makes much of what varies little, so that a small move of all states would throw all
    vectors one way. What the projection made of the states `before` [items, dim] is regressed onto
    those `after`, drawn by a ridge to the weights that it has. Gives the items' mean cosine of old
    and new vectors.
    """
    wanted = head.items(before)
    missing = head.item(before) - head.item(after)
    mean, aim = after.mean(dim=0), missing.mean(dim=0)
    centred = (after - mean).double()
    covariance = centred.T @ centred / len(after)
    covariance += _FOLLOW * covariance.diagonal().mean() * torch.eye(len(covariance)).double()
    change = torch.linalg.solve(covariance, centred.T @ (missing - aim).double() / len(after))
    weight = change.T.float()
    head.item.weight.add_(weight)
    head.item.bias.add_(aim - weight @ mean)
    return float((wanted * head.items(after)).sum(dim=1).mean())


@torch.no_grad()
def _whiten(head: RecommendationHead, items: Tensor) -> None:
    mean = items.mean(dim=0)
    centred = (items - mean).double()
    values, axes = torch.linalg.eigh(centred.T @ centred / len(items))
    values = values.clamp_min(0)
    weight = axes @ torch.diag((values + _SHRINK * values.mean()) ** -0.5) @ axes.T
    head.item.weight.copy_(weight.float())
    head.item.bias.copy_(-(weight.float() @ mean))


@torch.no_grad()
def _regress(head: RecommendationHead, users: Tensor, wanted: Tensor, ridge: float) -> None:
    mean, aim = users.mean(dim=0), wanted.mean(dim=0)
    centred = (users - mean).double()
    covariance = centred.T @ centred / len(users)
    covariance += ridge * covariance.diagonal().mean() * torch.eye(len(covariance)).double()
    across = centred.T @ (wanted - aim).double() / len(users)
    weight = torch.linalg.solve(covariance, across).T.float()
    head.user.weight.copy_(weight)
    head.user.bias.copy_(aim - weight @ mean)
