"""Our TRM: late fusion of history, item-to-item transitions and preference.

A score is a sum of inner products in separate blocks of the vectors: what the sequence says, what
usually follows the last items, and what the preference asks for. Without a preference its block is
zero, so that learning to follow one can't disturb the rest.
"""

import math

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.linalg import svds
from torch import Tensor, nn
from torch.nn import functional

from .config import DeepRecConfig


class CausalLayer(nn.Module):
    """A pre-norm transformer layer; attention knows distance (a learned bias), not position."""

    def __init__(self, dim: int, heads: int, inner: int, length: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.bias = nn.Parameter(torch.zeros(heads, length))
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.inner = nn.Linear(dim, inner)
        self.outer = nn.Linear(inner, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, dim]` to the same; position t reads positions 0..t."""
        length = x.shape[1]
        lag = torch.arange(length, device=x.device)
        lag = lag[:, None] - lag[None]
        bias = self.bias[:, lag.clamp_min(0)].masked_fill(lag < 0, float("-inf"))
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        p = self.dropout.p if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        fed: Tensor = self.dropout(self.outer(functional.gelu(self.inner(self.norm2(x)))))
        return fed + x


def _mlp(inputs: int, inner: int, outputs: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, inner), nn.GELU(), nn.Dropout(dropout), nn.Linear(inner, outputs)
    )


class DeepRecNet(nn.Module):
    """User and item vectors in four blocks: history, transitions, popularity, preference."""

    causal = True  # every position's state may be trained on

    def __init__(self, config: DeepRecConfig, n_items: int):
        super().__init__()
        self.config = config
        d, t, p = config.dim, config.transition_dim, config.preference_dim
        self.blocks = (d, t, p)
        self.dim = d + t + 1 + p  # the single coordinate is the item's popularity
        # Input side: what was consumed.
        self.item_embedding = nn.Embedding(n_items, d)
        self.text_in = nn.Linear(config.text_dim, d)
        self.encoder = nn.ModuleList(
            CausalLayer(d, config.heads, config.inner, config.history_length, config.dropout)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(d)
        self.dropout = nn.Dropout(config.dropout)
        self.source = nn.Embedding(n_items, t)
        self.lag = nn.Parameter(-0.2 * torch.arange(config.history_length).float()[:, None])
        # Output side: what may come next. Each block is a text part plus an ID part.
        self.text_history = _mlp(config.text_dim, 2 * d, d + t + 1, 0.1)
        self.text_preference = _mlp(config.text_dim, 4 * p, p, 0.1)
        self.target = nn.Embedding(n_items, self.dim)
        for table in (self.item_embedding, self.source, self.target):
            nn.init.normal_(table.weight, std=0.05)
        self.tables = (self.item_embedding, self.source, self.target)
        # Preference side.
        self.query = _mlp(config.text_dim, 4 * p, p, 0.1)
        self.profile = nn.Linear(config.text_dim, p)
        self.gate = _mlp(4 * p + d, p, p + 3, 0.1)
        # The gate starts neutral.
        for parameter in self.gate[-1].parameters():
            nn.init.zeros_(parameter)

    def start_from_transitions(self, lift: csr_array) -> None:
        """Let the transition block begin as a truncated SVD of counted transitions `[items,
        items]`: on small data, counting beats learning from nothing. Where nothing informative
        was counted it stays as it is.
        """
        d, t, _ = self.blocks
        rank = min(t, min(lift.shape) - 1)
        if rank < 1 or not lift.count_nonzero():
            return
        left, strength, right = svds(lift, k=rank, rng=0)
        root = np.sqrt(strength)
        with torch.no_grad():
            self.source.weight[:, :rank] = torch.as_tensor(left * root)
            self.target.weight[:, d : d + rank] = torch.as_tensor(right.T * root)
            self.lag.add_(math.log(self.config.transition_start))

    def text_features(self, text: Tensor) -> Tensor:
        """What the history side reads of an item's text: `[…, dim + preference_dim]`."""
        return torch.cat([self.text_in(text), self.profile(text)], dim=-1)

    def item_vectors(self, index: Tensor, text: Tensor) -> Tensor:
        """`[m, dim]`; an item without an ID embedding has its text part alone."""
        own: Tensor = self.target(index.clamp_min(0)) * (index >= 0)[:, None]
        if self.training:
            keep = torch.rand(len(index), 1, device=index.device) >= self.config.item_dropout
            own = own * keep
        # Nobody's behaviour speaks for an item without an ID embedding, so its text answers a
        # preference the louder.
        louder = torch.where(index >= 0, 1.0, 1.0 + self.config.cold_preference)[:, None]
        asked = self.text_preference(text) * louder
        return own + torch.cat([self.text_history(text), asked], dim=-1)

    def apart(self, states: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """States and item vectors as the loss under a preference sees them: what they say of the
        history is given, so that learning to follow a preference can't disturb it.
        """
        d, t, _ = self.blocks
        told = [states[..., : d + t].detach(), states[..., d + t :]]
        known = [items[:, : d + t + 1].detach(), items[:, d + t + 1 :]]
        return torch.cat(told, dim=-1), torch.cat(known, dim=-1)

    def states(self, history: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
        """`[B, L]` items and their `text_features` to states `[B, L, …]`: what the sequence says,
        what follows its last items, and the mean of its texts.
        """
        d = self.config.dim
        length = history.shape[1]
        valid = torch.arange(length, device=history.device)[None] < lengths[:, None]
        has_id = (valid & (history >= 0))[..., None]
        known = history.clamp_min(0)
        x = self.dropout(self.item_embedding(known) * has_id + text[..., :d])
        for layer in self.encoder:
            x = layer(x)
        h = self.norm(x)
        lag = torch.arange(length, device=history.device)
        lag = lag[:, None] - lag[None]
        kernel = self.lag.exp()[lag.clamp_min(0), 0] * (lag >= 0)
        moved = kernel @ self.dropout(self.source(known) * has_id)
        seen = (text[..., d:] * valid[..., None]).cumsum(1)
        count = valid.cumsum(1).clamp_min(1)[..., None]
        return torch.cat([h, moved, seen / count], dim=-1)

    def fuse(self, state: Tensor, preference: Tensor | None, has: Tensor | None) -> Tensor:
        """States `[n, …]` and preference embeddings `[n, text_dim]` to user vectors."""
        p = self.config.preference_dim
        h, moved, profile = torch.split(state, list(self.blocks), dim=-1)
        ones = state.new_ones(len(state), 1)
        if preference is None:
            return torch.cat([h, moved, ones, state.new_zeros(len(state), p)], dim=-1)
        query = self.query(preference)
        gate = self.gate(torch.cat([query, profile, query * profile, query - profile, h], dim=-1))
        asked = (query + gate[:, :p]) * gate[:, p : p + 1].exp()
        keep, bias = gate[:, p + 1 : p + 2].exp(), gate[:, p + 2 :].exp()
        if has is not None:
            on = has[:, None]
            asked, keep, bias = asked * on, torch.where(on, keep, 1.0), torch.where(on, bias, 1.0)
        return torch.cat([h * keep, moved * keep, ones * bias, asked], dim=-1)
