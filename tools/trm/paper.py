"""The preference-aware TRM of the paper (arXiv 2505.16810): UniSRec-style, early fusion.

Text passes a mixture-of-experts adaptor, is fused with ID embeddings in the frequency domain and
read by a bidirectional transformer; the preference is added to the last state.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import PaperConfig


class ExpertAdaptor(nn.Module):
    """Mixture of linear experts, gated by a softmax that is noisy in training:
    `[…, text_dim]` to `[…, dim]`.
    """

    def __init__(self, text_dim: int, dim: int, experts: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.experts = nn.Linear(text_dim, experts * dim)
        self.gate = nn.Parameter(torch.zeros(text_dim, experts))
        self.noise = nn.Parameter(torch.zeros(text_dim, experts))
        self.shape = (experts, dim)

    def forward(self, text: Tensor) -> Tensor:
        """Each text by its own mixture of experts."""
        logits = text @ self.gate
        if self.training:
            spread = functional.softplus(text @ self.noise) + 1e-2
            logits = logits + torch.randn_like(logits) * spread
        mixed = self.experts(self.dropout(text)).unflatten(-1, self.shape)
        return torch.einsum("...e,...ed->...d", logits.softmax(-1), mixed)


class ContextualConvolution(nn.Module):
    """Fuses ID and text embeddings `[B, L, dim]` by convolution along the whole sequence, done as
    products of their spectra; L is fixed.
    """

    def __init__(self, length: int, dim: int):
        super().__init__()
        self.length = length
        self.filter = nn.Parameter(torch.randn(length // 2 + 1, dim, 2) * 0.02)
        self.id_gate = nn.Linear(dim, dim)
        self.text_gate = nn.Linear(dim, dim)

    def forward(self, ids: Tensor, text: Tensor) -> Tensor:
        """Both streams, each through a gate of its own, as one `[B, L, dim]`."""
        id_spectrum = torch.fft.rfft(ids, dim=1, norm="ortho")
        text_spectrum = torch.fft.rfft(text, dim=1, norm="ortho")
        filtered = id_spectrum * torch.view_as_complex(self.filter)
        a = torch.fft.irfft(filtered, n=self.length, dim=1, norm="ortho")
        b = torch.fft.irfft(text_spectrum * id_spectrum, n=self.length, dim=1, norm="ortho")
        gated: Tensor = a * torch.sigmoid(self.id_gate(a)) + b * torch.sigmoid(self.text_gate(b))
        return 2 * gated


class PaperNet(nn.Module):
    """The inner product of a user and an item vector is the paper's cosine over a temperature."""

    causal = False  # only the last position's state may be trained on: the others see it

    def __init__(self, config: PaperConfig, n_items: int):
        super().__init__()
        self.config = config
        dim = config.dim
        self.dim = dim
        self.item_embedding = nn.Embedding(n_items, dim)
        nn.init.normal_(self.item_embedding.weight, std=0.02)
        self.tables = (self.item_embedding,)
        self.adaptor = ExpertAdaptor(config.text_dim, dim, config.experts, config.expert_dropout)
        self.fusion = ContextualConvolution(config.history_length, dim)
        self.position = nn.Embedding(config.history_length, dim)
        nn.init.normal_(self.position.weight, std=0.02)
        self.input_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)
        layer = nn.TransformerEncoderLayer(
            dim, config.heads, config.inner, config.dropout, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.user_norm = nn.LayerNorm(dim)

    def text_features(self, text: Tensor) -> Tensor:
        """Adapted texts `[…, dim]`."""
        adapted: Tensor = self.adaptor(text)
        return adapted

    def item_vectors(self, index: Tensor, text: Tensor) -> Tensor:
        """An item without an ID embedding is stood in for by its adapted text."""
        known = self.item_embedding(index.clamp_min(0))
        unknown = index < 0
        if bool(unknown.any()):
            known = torch.where(unknown[:, None], self.text_features(text), known)
        return functional.normalize(known, dim=-1)

    def states(self, history: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
        """`[B, L]` items and their `text_features` to states `[B, L, dim]`."""
        length = self.config.history_length
        short = length - history.shape[1]
        history = functional.pad(history, (0, short), value=-1)
        text = functional.pad(text, (0, 0, 0, short))
        valid = torch.arange(length, device=history.device)[None] < lengths[:, None]
        has_id = (valid & (history >= 0))[..., None]
        ids = self.item_embedding(history.clamp_min(0)) * has_id
        x = self.fusion(ids, text * valid[..., None]) + self.position.weight
        x = self.dropout(self.input_norm(x))
        read: Tensor = self.encoder(x, src_key_padding_mask=~valid)
        return read

    def apart(self, states: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Here history and preference are learned together."""
        return states, items

    def fuse(self, state: Tensor, preference: Tensor | None, has: Tensor | None) -> Tensor:
        """States `[n, dim]` and preference embeddings `[n, text_dim]` to user vectors."""
        if preference is not None:
            query = self.text_features(preference)
            state = state + (query if has is None else query * has[:, None])
        return functional.normalize(self.user_norm(state), dim=-1) / self.config.temperature
