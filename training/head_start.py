"""A start for the recommendation head: projections fitted over states of the LLM as it is.

The source trains both heads by reward at once. A head over raw states has nothing to be rewarded
for, and on two cores an LLM can't be trained from there; so the two projections are fitted first,
supervised and in closed form. The LLM isn't changed: its states are computed once, and the fit
takes seconds. Each reading of a user gives a state at its end, which is to predict the target, and
one at the end of each line of the history, which is to predict the next line.
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
from ..graph.r2ec.readings import user_ids
from ..graph.resources import listed_item
from ..tools.trm.vocabulary import Vocabulary, history_preference

if TYPE_CHECKING:
    from ..graph.r2ec.backbone import Backbone
    from ..tools.catalog import Catalog
    from ..tools.interactions import InteractionData, Split

_PART = 128  # readings of one file, so that a kill costs no more
_HELD_OUT = 0.1  # share of the users by whom ridge and scale are chosen
_RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # of the mean variance of a user's state
_SCALES = (1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 30.0)
_SHRINK = 0.01  # of the items' mean variance, added before whitening


class HeadStart(BaseModel):
    """How the head is fitted before the LLM is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    readings: int = Field(2000, ge=20)  # of users
    # Latest interactions of each user's training part that are left for training by reward.
    left_per_user: int = Field(2, ge=0)
    thoughts: float = Field(0.5, ge=0, le=1)  # share of the readings with a thought in them


@dataclass(frozen=True)
class Reading:
    """A user's reading: token ids, and which of them predict which item."""

    user: int  # index
    ids: list[int]
    places: list[int]  # tokens whose states predict; the last one is the reading's end
    targets: list[int]  # item index of each


def readings_of(
    data: InteractionData,
    split: Split,
    catalog: Catalog,
    backbone: Backbone,
    config: HeadStart,
    *,
    history_length: int,
    seed: int,
) -> list[Reading]:
    """Draw readings from the training part, users and positions alike by the seed."""
    rng = np.random.default_rng([seed, 17])
    vocabulary = Vocabulary.build(data.items)
    ends = [
        (user, at)
        for user, sequence in enumerate(split.train)
        for at in range(1, len(sequence) - config.left_per_user)
    ]
    drawn = rng.permutation(len(ends))[: config.readings]
    found = []
    for place in drawn:
        user, at = ends[place]
        window = split.train[user][max(0, at - history_length) : at + 1].tolist()
        thought = ""
        if rng.random() < config.thoughts:
            preference = history_preference(vocabulary, split.train[user][:at].tolist())
            thought = f"This user seems to like {preference}." if preference else ""
        found.append(_reading(user, data, catalog, backbone, window, thought))
    return found


def _reading(
    user: int,
    data: InteractionData,
    catalog: Catalog,
    backbone: Backbone,
    window: Sequence[int],
    thought: str,
) -> Reading:
    tokenizer = backbone.tokenizer
    listed = [listed_item(catalog, data.items[item].id) for item in window[:-1]]
    ids = user_ids(listed, thought, tokenizer)
    text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    places, targets, start = [], [], 0
    # Where decoding and encoding again give other tokens, only the reading's end predicts.
    if encoded["input_ids"] == ids:
        for rank, item in enumerate(listed, 1):
            line = protocol.render_item(f"{rank}.", protocol.ListedItem(item.id, item.title))
            start = text.index(line, start) + len(line)
            places.append(next(at for at, end in enumerate(ends) if end >= start))
            targets.append(window[rank])
        places, targets = places[:-1], targets[:-1]  # the last line's next item is the target
    return Reading(user, ids, [*places, len(ids) - 1], [*targets, window[-1]])


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
    return rows


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
