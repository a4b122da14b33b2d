"""Engine over any LangChain chat model, hosted or local: text in, text out.

A chat model gives text, not the tokens that it sampled. What it writes is tokenised here, so that
the run can be bounded, parsed and shown like any other; those tokens belong to the author "chat"
(graph/transcript.py), and no run over this engine can be trained on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from ...errors import EngineError
from .base import Constraint, Engine, Generation, GenerationRequest, LoopThread
from .tokenizer import load_tokenizer

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

VLLM_PREFILL: Mapping[str, Any] = {
    "extra_body": {"continue_final_message": True, "add_generation_prompt": False}
}
"""`prefill` for ChatOpenAI over vLLM's server."""

# The prompt as the engine's own tokenizer writes it, so that it can be read back. No catalog text
# spells these marks: tools/titles.py leaves no angle brackets.
_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{% endfor %}"
    "{{ '<|assistant|>\\n' }}"  # a template's own last line break would be dropped
)
_ROLE = re.compile(r"<\|(system|user|assistant)\|>\n")
_MESSAGES = {"system": SystemMessage, "user": HumanMessage, "assistant": AIMessage}
_SAMPLE = [{"role": "system", "content": "A  b."}, {"role": "user", "content": "1. Ça\n\n<think>"}]
_CHARS = 8  # of a token at most, for all that one can expect
_GO_ON = "Go on exactly where that stopped, as if nobody had interrupted. Repeat nothing of it."
_CHOOSE = "Go on with exactly one of these lines, and write nothing else:\n"
_MATCH = "Go on with one line that matches this regular expression, and write nothing else:\n"


class ChatModelEngine(Engine):
    """Engine over a LangChain chat model. Its runs can't be trained on.

    How the model samples is its own matter: set temperature, seed and the like on `model`; those of
    a request are not heeded. The model needs no stop sequences, since a provider does not say which
    of them it met: the reply is streamed and given up at the first stop string, or cut there where
    it comes in one piece. Nor does it need grammars: a constraint is put in words, the reply is
    checked, and asked for once more; where that one doesn't fit either, the generation is empty.

    Args:
        model: the chat model, e.g. `langchain.chat_models.init_chat_model("openai:gpt-5")`.
        tokenizer: hub name or folder of a tokenizer to count and keep the text by; the model's own
            if it is known.
        max_model_len: the most tokens of a run, prompt included, in that tokenizer's count.
        prefill: keyword arguments of a call with which the model goes on with a last message of its
            own, `{}` where it does so by itself; None: it can't, and is asked to in words.

    Raises:
        EngineError: no such tokenizer, or one that does not give text back as it was.

    """

    trainable = False

    def __init__(
        self,
        model: BaseChatModel,
        *,
        tokenizer: str,
        max_model_len: int = 8192,
        prefill: Mapping[str, Any] | None = None,
    ) -> None:
        names = (getattr(model, name, None) for name in ("model_name", "model"))
        self.name = str(next(filter(None, names), type(model).__name__))
        self.max_model_len = max_model_len
        self.tokenizer = load_tokenizer(tokenizer)
        self.tokenizer.chat_template = _TEMPLATE
        ids = self.tokenizer.apply_chat_template(_SAMPLE, return_dict=False)
        if self._text(ids) != "<|system|>\nA  b.<|user|>\n1. Ça\n\n<think><|assistant|>\n":
            raise EngineError(
                f"the tokenizer of {tokenizer!r} does not give text back as it was: name another, "
                "such as that of Qwen/Qwen2.5-0.5B-Instruct"
            )
        self._model = model
        self._prefill = prefill
        self._loop = LoopThread("deeprec-chat-model")
        self._closed = False

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        """See Engine.submit."""
        return self._loop.submit(self._generate(request))

    async def _generate(self, request: GenerationRequest) -> Generation:
        messages = self._messages(request.prompt_ids)
        if request.constraint is not None:
            said = await self._constrained(messages, request.constraint, request)
        elif isinstance(messages[-1], HumanMessage):
            said = await self._reply(messages, request, request.stop)
        elif self._prefill is not None:
            said = await self._reply(messages, request, request.stop, self._prefill)
        else:
            asked = [*messages, HumanMessage(_GO_ON)]
            said = _joined(messages[-1].text, await self._reply(asked, request, request.stop))
        return self._generation(said, request)

    def _messages(self, prompt_ids: Sequence[int]) -> list[BaseMessage]:
        """Request, what was written since, if anything was, and what the user said to that."""
        _, *parts = _ROLE.split(self._text(prompt_ids))
        said = zip(parts[::2], parts[1::2], strict=True)
        messages: list[BaseMessage] = [_MESSAGES[role](text) for role, text in said]
        return messages if messages[-1].text else messages[:-1]

    def _text(self, ids: Sequence[int]) -> str:
        as_it_was = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(ids, **as_it_was))

    async def _constrained(
        self, messages: Sequence[BaseMessage], constraint: Constraint, request: GenerationRequest
    ) -> str | None:
        """What the model wrote under a constraint; None where nothing fitted."""
        ask = _in_words(constraint)
        said = await self._reply([*messages, HumanMessage(ask)], request, ("\n",))
        found = _fitting(said, constraint, request.stop)
        if found is None:
            again = HumanMessage(f"{ask}\n\nThis was not it: {said[:200]!r}")
            said = await self._reply([*messages, again], request, ("\n",))
            found = _fitting(said, constraint, request.stop)
        return found

    async def _reply(
        self,
        messages: Sequence[BaseMessage],
        request: GenerationRequest,
        stops: Sequence[str],
        prefill: Mapping[str, Any] | None = None,
    ) -> str:
        """Read a reply until a stop string is in it, or it is longer than what was asked for."""
        text = ""
        try:
            reply: Any = self._model.astream(list(messages), **(prefill or {}))
            async with aclosing(reply):
                async for chunk in reply:
                    text += chunk.text
                    if prefill is None:
                        text = text.lstrip()  # a reply of its own says nothing by it
                    if len(text) > _CHARS * request.max_tokens or any(s in text for s in stops):
                        break
        except Exception as error:  # providers' errors share no base
            raise EngineError(f"the chat model {self.name!r} gave no reply: {error!r}") from error
        return text

    def _generation(self, said: str | None, request: GenerationRequest) -> Generation:
        """Cut and tokenise a reply. The end of one is not a token of it."""
        ends = {said.find(stop) + len(stop): stop for stop in request.stop if said and stop in said}
        end = min(ends, default=None)
        text = (said or "")[:end]
        # Split, so that no text of the model's turns into a special token.
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        unknown = float("nan")
        if said is None or len(ids) > request.max_tokens:
            kept = tuple(ids[: request.max_tokens])
            return Generation(kept, (unknown,) * len(kept), "length")
        logprobs = (unknown,) * len(ids)
        if end is not None:
            return Generation(tuple(ids), logprobs, "stop", ends[end])
        return Generation(tuple(ids), logprobs, "stop" if request.constraint else "eos")

    def close(self) -> None:
        """End the loop; the model goes on."""
        if not self._closed:
            self._closed = True
            self._loop.close()


def load_chat_model(name: str) -> BaseChatModel:
    """Chat model by LangChain's name for it, "provider:model". Raises EngineError."""
    try:
        from langchain.chat_models import init_chat_model

        if not name:  # LangChain would make one that is named at each call
            raise ValueError("no name is set")
        return init_chat_model(name)
    except Exception as error:  # providers' errors share no base
        raise EngineError(
            f"no chat model can be made of {name!r}: {error}. Set DEEPREC_ENGINE__CHAT_MODEL to "
            "provider:model, install deeprec-agent[agents] and the provider's package, and set the "
            "provider's own variable for its key."
        ) from error


def _joined(written: str, said: str) -> str:
    """Chat models open a reply without the space that parts it from what was written before."""
    return f" {said}" if said[:1].isalnum() and not written[-1:].isspace() else said


def _in_words(constraint: Constraint) -> str:
    if constraint.choices:
        return _CHOOSE + "\n".join(choice.strip() for choice in constraint.choices)
    return _MATCH + constraint.regex


def _fitting(said: str, constraint: Constraint, stops: Sequence[str]) -> str | None:
    """Constrained text that the first line of a reply stands for, or None."""
    line = " ".join(said.partition("\n")[0].split())
    if constraint.choices:
        return next((choice for choice in constraint.choices if _key(choice) == _key(line)), None)
    forms = (line, f" {line}", *(f" {line} {stop}" for stop in stops))
    return next((form for form in forms if re.fullmatch(constraint.regex, form)), None)


def _key(text: str) -> str:
    return " ".join(text.strip("-*\"' \n").split()).casefold()
