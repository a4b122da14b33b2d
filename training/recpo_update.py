"""One update of RecPO: the gradient of a step's runs, group by group, into both heads.

The chains of a group go through the LLM in one row behind one prompt: each sees the prompt and
itself. With prompts three times as long as chains that is less than half of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .recpo import RecPO, clipped_loss, share_clipped

if TYPE_CHECKING:
    from ..graph.r2ec.backbone import Backbone
    from ..graph.r2ec.head import RecommendationHead


@dataclass
class Chain:
    """One run as it is trained on.

    `mask` is 1 for tokens that the policy sampled, `old` their logprobs when they were; both are
    aligned with `ids`. `reading` holds the token ids that the head read; None: prompt and ids.
    """

    ids: list[int]
    mask: list[int]
    old: list[float]
    advantage: float
    reading: list[int] | None = None


@dataclass
class Group:
    """Chains of one prompt. `best` is the one that the item loss is of, `target` the place of its
    item among the items of the update, `old_item` the item's old logprob, once it is known.
    """

    prompt: list[int]
    chains: list[Chain]
    best: int
    target: int
    item_advantage: float
    old_item: float | None = None


@dataclass
class Figures:
    """What an update logs; gradients are norms before clipping them."""

    token_loss: float = 0.0
    item_loss: float = 0.0
    clipped_tokens: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)  # |logprob - old| of tokens, a mean a group


def accumulate(
    llm: nn.Module,
    backbone: Backbone,
    head: RecommendationHead,
    groups: Sequence[Group],
    fresh: Sequence[Sequence[int]],
    kept: Tensor,
    config: RecPO,
) -> Figures:
    """Add the gradient of a step to `llm` and `head`; the optimiser's step is the caller's.

    Args:
        llm: the causal LM, with its language head.
        backbone: of the same LLM.
        head: the recommendation head.
        groups: of the step; `old_item` is set where it is None.
        fresh: readings of the items that are targets, each once, which `Group.target` counts.
        kept: states [negatives, dim] of further items, without gradient into the LLM.
        config: of the objective.

    """
    figures = Figures()
    tokens = sum(sum(chain.mask) for group in groups for chain in group.chains)
    learns_items = config.item_weight > 0
    leaves = torch.zeros(0)
    states = torch.zeros(0)
    if learns_items:
        # Items are read once; each group's gradient reaches their states, and the LLM at the end.
        states = last_states(backbone, fresh)
        leaves = states.detach().requires_grad_()
    for group in groups:
        hidden, ends = chains_hidden(backbone, group)
        loss = torch.zeros(())
        picked = [_token_logprobs(llm, hidden, group, at) for at in range(len(group.chains))]
        logprobs = torch.cat(picked)
        if len(logprobs):
            old = torch.tensor([
                value
                for chain in group.chains
                for value, own in zip(chain.old, chain.mask, strict=True)
                if own
            ])  # fmt: skip
            advantage = torch.cat([
                torch.full((len(found),), chain.advantage)
                for found, chain in zip(picked, group.chains, strict=True)
            ])  # fmt: skip
            token_loss = clipped_loss(logprobs, old, advantage, config).sum() / tokens
            loss = loss + token_loss
            figures.token_loss += float(token_loss.detach())
            figures.clipped_tokens.append(share_clipped(logprobs.detach(), old, advantage, config))
            figures.gap.append(float((logprobs.detach() - old).abs().mean()))
        if learns_items:
            chain = group.chains[group.best]
            user = (
                hidden[ends[group.best]][None].float().cpu()
                if chain.reading is None
                else last_states(backbone, [chain.reading])
            )
            vectors = torch.cat([head.items(leaves), head.items(kept)])
            found = (head.users(user) @ vectors.T).log_softmax(dim=-1)[0, group.target]
            if group.old_item is None:
                group.old_item = float(found.detach())
            item_loss = clipped_loss(
                found, torch.tensor(group.old_item), torch.tensor(group.item_advantage), config
            )
            item_loss = config.item_weight * item_loss / len(groups)
            loss = loss + item_loss
            figures.item_loss += float(item_loss.detach())
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
    if learns_items and leaves.grad is not None:
        states.backward(leaves.grad)  # type: ignore[no-untyped-call]
    return figures


def last_states(backbone: Backbone, sequences: Sequence[Sequence[int]]) -> Tensor:
    """States [n, dim] of the sequences' last tokens, with gradient, in one pass."""
    hidden = backbone.hidden(sequences)
    last = torch.tensor([len(sequence) - 1 for sequence in sequences])
    return hidden[torch.arange(len(sequences)), last].float().cpu()


def chains_hidden(backbone: Backbone, group: Group) -> tuple[Tensor, list[int]]:
    """States [tokens, dim] of the prompt and then of all chains, and the place of each one's end.

    A chain's tokens see the prompt and what stands before them in the chain, at the positions that
    they had.
    """
    prompt = len(group.prompt)
    ids = list(group.prompt)
    positions = list(range(prompt))
    owner = [-1] * prompt
    ends = []
    for at, chain in enumerate(group.chains):
        ids += chain.ids
        positions += range(prompt, prompt + len(chain.ids))
        owner += [at] * len(chain.ids)
        ends.append(len(ids) - 1)
    of = torch.tensor(owner)
    before = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    sees = before & ((of[None, :] == -1) | (of[:, None] == of[None, :]))
    body: Any = backbone.body
    device = next(body.parameters()).device
    rounding = torch.autocast(device.type, torch.bfloat16) if backbone.autocast else nullcontext()
    with rounding:
        out = body(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            attention_mask=sees[None, None].to(device),
            use_cache=False,
        )
    return out.last_hidden_state[0], ends


def _token_logprobs(llm: Any, hidden: Tensor, group: Group, at: int) -> Tensor:
    """Logprobs of the tokens of a chain that the policy sampled, at temperature 1."""
    chain = group.chains[at]
    start = len(group.prompt) + sum(len(other.ids) for other in group.chains[:at])
    own = [place for place, mask in enumerate(chain.mask) if mask]
    if not own:
        return torch.zeros(0)
    # The token before a chain's first one is the prompt's last.
    before = [start + place - 1 if place else len(group.prompt) - 1 for place in own]
    wanted = torch.tensor([chain.ids[place] for place in own], device=hidden.device)
    scored = functional.linear(hidden[before].float(), llm.get_output_embeddings().weight.float())
    return scored.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0].cpu()
