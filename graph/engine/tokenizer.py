"""The model's own tokenizer, the same for every engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a hub name or local folder. Raises EngineError without one or its template."""
    from transformers import AutoTokenizer

    try:
        # Left out, it is asked for on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise EngineError(f"no tokenizer can be loaded from {model!r}: {error}") from error
    if not tokenizer.chat_template:
        raise EngineError(
            f"the tokenizer of {model!r} has no chat template: use an instruction-tuned model"
        )
    if tokenizer.eos_token_id is None:
        raise EngineError(f"the tokenizer of {model!r} names no end-of-sequence token")
    return tokenizer
