"""What the LLM reads before its recommendation head: a user, or an item, each up to one mark.

The state of the mark's last token is what the head scores. Both readings end with the same tokens,
so that they are compared at the same place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1
"""Of how readings are written; a head of another version reads what it was not trained on."""

MARK = "<item>"
"""Ends every reading. Titles can't spell it: their angle brackets are replaced."""

OPENING = f"{protocol.BEGIN_THINK}\n"
CLOSING = f"\n{protocol.END_THINK}\n{MARK}"

_SYSTEM = "You recommend items from a catalog."
_TASK = (
    f"Between {protocol.BEGIN_THINK} and {protocol.END_THINK}, say in a few words what this user "
    "may want next. Then comes the item."
)


def build_messages(
    history: Sequence[protocol.ListedItem],
    *,
    k: int,
    answer_form: protocol.AnswerForm,
    wishes: Sequence[str] = (),
    likes: Sequence[str] = (),
    dislikes: Sequence[str] = (),
) -> list[dict[str, str]]:
    """Chat messages of a request, in the place of protocol.build_messages.

    Titles alone: the model knows attributes from the items' readings. `k` and `answer_form` are
    not told, since no list is written.
    """
    del k, answer_form
    titles = [protocol.ListedItem(item.id, item.title) for item in history]
    parts = protocol.request_parts(titles, wishes=wishes, likes=likes, dislikes=dislikes)
    return [
        {"role": "system", "content": _SYSTEM},
        {"role": "user", "content": "\n\n".join([*parts, _TASK])},
    ]


def item_ids(item: protocol.ListedItem, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of an item's reading: its title and attributes, then the mark."""
    text = f"{protocol.render_item('Item:', item)}\n{MARK}"
    return list(tokenizer.encode(text, add_special_tokens=False))


def user_ids(
    history: Sequence[protocol.ListedItem], thought: str, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Token ids of a user's reading with a thought that was had elsewhere; "" for none."""
    messages = build_messages(history, k=1, answer_form="titles")
    prompt: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    said = OPENING + thought + CLOSING if thought else without_thought()
    return [*prompt, *tokenizer.encode(said, add_special_tokens=False)]


def without_thought() -> str:
    """What stands in the place of a chain that is not written."""
    return OPENING.rstrip("\n") + CLOSING
