"""The LLM without its language head: token ids in, the state of each sequence's last token out.

vLLM's generations come without hidden states, so this is a second copy of the weights, in
transformers: at SmolLM2-135M 0.27 GB in bfloat16, 0.54 GB in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ...errors import HeadError
from ..engine.limits import check_model_folder, cpu_dtype
from ..engine.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

_BATCH_TOKENS = 4096  # of one forward pass, padding included


class Backbone:
    """A model's body and its tokenizer.

    Args:
        body: module that gives `last_hidden_state` for input_ids and attention_mask.
        tokenizer: the model's own.
        autocast: compute in bfloat16 over weights that are kept in float32.

    """

    def __init__(
        self, body: nn.Module, tokenizer: PreTrainedTokenizerBase, *, autocast: bool = False
    ) -> None:
        self.body = body
        self.tokenizer = tokenizer
        self.autocast = autocast

    @classmethod
    def load(cls, model: str, *, dtype: str = "auto") -> Backbone:
        """Load a hub name or folder, on a GPU where torch finds one.

        `dtype` is the engine's: "auto", "bfloat16" or "float32". Raises EngineError, HeadError.
        """
        import torch
        from transformers import AutoModel

        check_model_folder(model)
        gpu = torch.cuda.is_available()
        try:
            body = AutoModel.from_pretrained(
                model, dtype=dtype if gpu else cpu_dtype(dtype), use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise HeadError(f"model {model!r} can't be read for its states: {error}") from error
        return cls(body.to("cuda" if gpu else "cpu").eval(), load_tokenizer(model))

    @property
    def dim(self) -> int:
        """Width of a state."""
        config: Any = self.body.config
        return int(config.get_text_config().hidden_size)

    def states(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """State of each sequence's last token, float32 [n, dim] on the CPU; without gradient."""
        import torch

        found = torch.empty(len(sequences), self.dim)
        with torch.inference_mode():
            for rows in batches([len(sequence) for sequence in sequences]):
                batch = [sequences[row] for row in rows]
                hidden = self.hidden(batch)
                last = torch.tensor([len(sequence) - 1 for sequence in batch])
                found[rows] = hidden[torch.arange(len(batch)), last].float().cpu()
        return found

    def hidden(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """States of all tokens [n, longest, dim] in one pass, padded on the right.

        With gradient where the caller lets it be.
        """
        import torch

        if any(not sequence for sequence in sequences):
            raise ValueError("a sequence is empty: it has no last token")
        device = next(self.body.parameters()).device
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask = torch.zeros(len(sequences), longest, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        same = bool(mask.all())
        rounding = torch.autocast(device.type, torch.bfloat16) if self.autocast else nullcontext()
        with rounding:
            out = self.body(
                input_ids=ids.to(device),
                attention_mask=None if same else mask.to(device),
                use_cache=False,
            )
        hidden: Tensor = out.last_hidden_state
        return hidden


def batches(lengths: Sequence[int], most: int = _BATCH_TOKENS) -> Iterator[list[int]]:
    """Places of sequences, those of like length together, at most `most` tokens a batch."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        if batch and lengths[row] * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
