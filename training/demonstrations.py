"""Demonstrations: runs of the real graph in which a script plays the policy.

A small model never finds the protocol by sampling, so it is shown what runs look like. For each
training example the demonstrator first searches by the history alone, then tries preferences that
the history suggests, keeps some that bring the target in and differ from each other, and ranks by
fusing what came back. The graph itself then plays that script, so every list, limit, token boundary
and rule is the real one. Some runs ask for the same thing again, are refused, and go on: a model
that was never refused repeats itself to the limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from ..errors import EngineError
from ..graph import protocol
from ..graph.build import build_graph
from ..graph.fusion import reciprocal_rank_fusion
from ..graph.state import RUN_KEYS, RunSettings
from ..tools.retriever import RetrievalRequest, Retriever
from ..tools.trm.preferences import embed_preferences
from ..tools.trm.vocabulary import Vocabulary
from .scripted_policy import ScriptedPolicy
from .selection import Example
from .trajectories import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..tools.interactions import Item
    from ..tools.text_encoder import TextEncoder

_CHUNK = 32
_RECENT = 3
_OPENINGS = (
    "The history is mostly {values}.",
    "{title} and what came before it point to {values}.",
    "{values} come up again and again.",
    "Recent choices such as {title} lean towards {values}.",
    "This user keeps coming back to {values}.",
)
_INTENTS = (
    "First a look at anything.",
    "I start with anything that fits the history.",
    "Before I search for more, anything.",
)
# Whether to search again is one word: a choice that is spread over a sentence is hard to learn, by
# imitation and by reward. K is said again where it is needed.
_NEXT = (
    "Next from another side: {wish}. {found} fits.",
    "Next: {found} came back, so what about {wish}?",
    "Next I try {wish}, since the list holds {found}.",
    "Next, another side of this user: {wish}.",
)
_REFUSED = (
    "Next another side, as I had searched for that already: {wish}.",
    "Next {wish}, since that brings nothing new.",
)
_AGAIN = (
    "Enough: {again} came up in several searches and lead the {k}.",
    "Enough: the searches agree on {again}, which lead the {k}.",
    "Enough: found more than once, {again} come first of the {k}.",
)
_ONCE = (
    "Enough: the searches have little in common, so the first list leads the {k}.",
    "Enough: each search found something else; the {k} begin with the first list's best.",
)


class Variation(BaseModel):
    """Values of run settings, one of which is drawn for each demonstration; none: the run's own.

    What never varies in training is not read: shown lists of ten alone, a model writes ten lines
    whatever the prompt asks for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    k: tuple[PositiveInt, ...] = ()
    retrieve_n: tuple[PositiveInt, ...] = ()
    history_length: tuple[PositiveInt, ...] = ()
    answer_form: tuple[protocol.AnswerForm, ...] = ()

    def draw(self, settings: RunSettings, rng: Generator) -> RunSettings:
        """Settings with each of these fields drawn anew."""
        drawn = {
            name: values[int(rng.integers(len(values)))] for name, values in self if len(values)
        }
        return settings.model_copy(update=drawn)


class DemonstrationConfig(BaseModel):
    """How demonstrations are made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Share of runs with two, three and four searches; the first is for anything.
    searches: tuple[float, float, float] = (0.25, 0.5, 0.25)
    # Preferences that are tried for each example.
    candidates: int = Field(16, ge=4)
    # How much more the first list, which no preference narrows, counts than each of the others.
    first_weight: float = Field(4.0, gt=0)
    # The c of 1 / (c + rank), rank from 1, by which lists are fused.
    fusion_constant: float = Field(2.0, ge=0)
    # Share of the examples whose answer misses the target that are kept all the same.
    keep_misses: float = Field(0.25, ge=0, le=1)
    # Share of runs in which a search is repeated and refused. What is repeated is not learnt.
    repeats: float = Field(0.1, ge=0, le=1)
    # Times that the examples are gone through, with everything drawn anew.
    passes: PositiveInt = 1
    vary: Variation = Variation()


@dataclass(frozen=True)
class Script:
    """What the demonstrator says in one run: a text per generation, and the list it ends with."""

    settings: RunSettings
    texts: tuple[str, ...]
    answer: tuple[str, ...]  # item ids


class Demonstrator:
    """Plans scripts for examples over a retriever that has not seen their targets.

    Args:
        retriever: the TRM and its catalog.
        encoder: the TRM's, to tell preferences apart.
        settings: of the runs that will play the scripts.
        config: how to choose.

    """

    def __init__(
        self,
        retriever: Retriever,
        encoder: TextEncoder,
        settings: RunSettings,
        config: DemonstrationConfig,
    ) -> None:
        self._retriever = retriever
        self._encoder = encoder
        self._settings = settings
        self._config = config
        self._catalog = retriever.catalog
        items: Sequence[Item] = self._catalog.snapshot.items
        self._vocabulary = Vocabulary.build(items)
        self._row = {item.id: row for row, item in enumerate(items)}

    def scripts(
        self, examples: Sequence[Example], seed: int
    ) -> Iterator[tuple[int, Example, Script]]:
        """Pass, example and script, for those that have one."""
        rng = np.random.default_rng(seed)
        for at in range(self._config.passes):
            for start in range(0, len(examples), _CHUNK):
                chunk = examples[start : start + _CHUNK]
                for example, script in zip(chunk, self.plan(chunk, rng), strict=True):
                    if script is not None:
                        yield at, example, script

    def plan(self, examples: Sequence[Example], rng: Generator) -> list[Script | None]:
        """Scripts for examples; None where the answer misses and the example is left out."""
        settings = [self._config.vary.draw(self._settings, rng) for _ in examples]
        wishes = [
            [protocol.ANYTHING, *self._suggestions(example, own.history_length, rng)]
            for example, own in zip(examples, settings, strict=True)
        ]
        requests = [
            RetrievalRequest(
                history=example.history,
                preference=protocol.searched_preference(wish),
                k=own.retrieve_n,
                exclude=frozenset(example.history),
            )
            for example, own, of_example in zip(examples, settings, wishes, strict=True)
            for wish in of_example
        ]
        found = iter(self._retriever.retrieve(requests))
        texts = [wish for of_example in wishes for wish in of_example]
        vectors = iter(embed_preferences(self._encoder, texts))
        scripts = []
        for example, own, of_example in zip(examples, settings, wishes, strict=True):
            lists = [[item.id for item in next(found)] for _ in of_example]
            embedded = np.stack([next(vectors) for _ in of_example])
            scripts.append(self._script(example, own, of_example, lists, embedded, rng))
        return scripts

    def _suggestions(self, example: Example, length: int, rng: Generator) -> list[str]:
        """Preferences that a reader of the last items could come to, distinct, in random order."""
        read = [self._row[item] for item in example.history[-length:]]
        items, extras = self._vocabulary.items, self._vocabulary.extras
        main = self._commonest([items[row] for row in read], 3)
        rest = self._commonest([extras[row] for row in read], 1)
        latest = self._commonest([items[read[-1]]], 3)
        beside = self._commonest([extras[read[-1]]], 1)
        titles = [
            self._catalog.display_title(item) for item in example.history[-min(_RECENT, length) :]
        ]
        sets = [latest, [*latest, *beside], main, [*main[:1], *rest]]
        sets += [list(pair) for pair in combinations(main, 2)]
        wishes = [*main, *("; ".join(values) for values in sets if values)]
        wishes += [f"similar to {title}" for title in titles]
        wishes += [f"{value}; similar to {titles[-1]}" for value in main[:2]]
        # A semicolon inside a title would read as two phrases.
        named = {protocol.preference_key(wish): wish for wish in wishes}
        chosen = rng.permutation(sorted(named.values()))[: self._config.candidates]
        return [str(wish) for wish in chosen]

    def _commonest(self, rows: Sequence[Sequence[int]], count: int) -> list[str]:
        """The terms that most rows hold, in words; ties keep the order of first appearance."""
        terms = Counter(term for row in rows for term in row)
        return self._vocabulary.phrases([term for term, _ in terms.most_common(count)])

    def _script(
        self,
        example: Example,
        settings: RunSettings,
        wishes: Sequence[str],
        lists: Sequence[Sequence[str]],
        vectors: NDArray[np.float32],
        rng: Generator,
    ) -> Script | None:
        count = min(2 + int(rng.choice(3, p=self._config.searches)), len(wishes))
        chosen = _choose(example.target, lists[1:], vectors[1:], count - 1)
        order = [0, *(1 + int(at) for at in rng.permutation(chosen))]
        k = settings.k
        fused = reciprocal_rank_fusion(
            [lists[at] for at in order],
            first_weight=self._config.first_weight,
            constant=self._config.fusion_constant,
        )[:k]
        missed = example.target not in fused
        if len(fused) < k or (missed and rng.random() >= self._config.keep_misses):
            return None
        searches = [(wishes[at], lists[at]) for at in order]
        return Script(
            settings=settings,
            texts=self._texts(example, settings, searches, fused, rng),
            answer=tuple(fused),
        )

    def _texts(
        self,
        example: Example,
        settings: RunSettings,
        searches: Sequence[tuple[str, Sequence[str]]],
        answer: Sequence[str],
        rng: Generator,
    ) -> tuple[str, ...]:
        numbers: dict[str, int] = {}
        for _, found in searches:
            for item in found:
                numbers.setdefault(item, len(numbers) + 1)

        def named(item: str) -> str:
            title = self._catalog.display_title(item)
            return f"#{numbers[item]}" if settings.answer_form == "numbers" else title

        def search(thought: str, wish: str) -> str:
            return f"{thought}\n{protocol.BEGIN_PREFERENCE} {wish} {protocol.END_PREFERENCE}"

        def go_on(templates: Sequence[str], wish: str, before: Sequence[str]) -> str:
            said = str(rng.choice(templates))
            seen = before[int(rng.integers(min(2, len(before))))]
            return search(said.format(found=named(seen), wish=wish), wish)

        repeated = int(rng.integers(len(searches))) if rng.random() < self._config.repeats else None
        opening = self._opening(example, settings.history_length, rng)
        texts = [search(f"{protocol.BEGIN_THINK}\n{opening}", searches[0][0])]
        for at, (wish, found) in enumerate(searches):
            if at > 0:
                templates = _REFUSED if repeated == at - 1 else _NEXT
                texts.append(go_on(templates, wish, searches[at - 1][1]))
            if repeated == at:
                texts.append(go_on(_NEXT, wish, found))
        hits = Counter(item for _, found in searches for item in set(found))
        again = [item for item in answer if hits[item] > 1][:3]
        closing = (
            str(rng.choice(_AGAIN)).format(again=", ".join(map(named, again)), k=settings.k)
            if again
            else str(rng.choice(_ONCE)).format(k=settings.k)
        )
        lines = "\n".join(f"{rank}. {named(item)}" for rank, item in enumerate(answer, 1))
        texts.append(f"{closing}\n{protocol.END_THINK}")
        texts.append(f"\n{protocol.BEGIN_ANSWER}\n{lines}\n{protocol.END_ANSWER}")
        texts.append("")  # end of sequence
        return tuple(texts)

    def _opening(self, example: Example, length: int, rng: Generator) -> str:
        read = [self._row[item] for item in example.history[-length:]]
        common = self._vocabulary.history_terms(read, 2)
        title = self._catalog.display_title(example.history[-1])
        intent = str(rng.choice(_INTENTS))
        if not common:
            return intent
        values = " and ".join(self._vocabulary.phrases(common))
        return f"{str(rng.choice(_OPENINGS)).format(values=values, title=title)} {intent}"


def _choose(
    target: str, lists: Sequence[Sequence[str]], vectors: NDArray[np.float32], count: int
) -> list[int]:
    """Take the search with the greatest gain, then by gain and by difference from those taken.

    The gain of a search is 1 / log2(2 + rank) of the target in its list, 0 where it is not there;
    difference is 1 - the greatest cosine to a preference that was taken.
    """
    gains = np.array(
        [1 / np.log2(2 + found.index(target)) if target in found else 0.0 for found in lists]
    )
    cosines = vectors @ vectors.T
    taken = [int(gains.argmax())]
    while len(taken) < count:
        worth = gains + 1 - cosines[:, taken].max(axis=1)
        worth[taken] = -np.inf
        taken.append(int(worth.argmax()))
    return taken


def demonstrate(
    examples: Sequence[Example],
    demonstrator: Demonstrator,
    retriever: Retriever,
    tokenizer: PreTrainedTokenizerBase,
    *,
    wanted: int,
    max_model_len: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Trajectory]:
    """Play scripts in the graph until `wanted` clean runs are there, or the examples are used up.

    A run counts only if it broke no format rule and its list is the script's. Raises
    TrajectoryError where a state is none of a finished run, EngineError where a script does not
    fit into the run's limits.
    """
    free = {"decoding": "free", "on_limit": "fail", "fill": False, "seed": None}
    made: list[Trajectory] = []
    for at, example, script in demonstrator.scripts(examples, seed):
        if len(made) == wanted:
            break
        policy = ScriptedPolicy(script.texts, tokenizer, max_model_len)
        graph: Any = build_graph(policy, retriever)
        state = graph.invoke(
            {"history": [f"id:{item}" for item in example.history]},
            context=script.settings.model_copy(update=free),
            output_keys=list(RUN_KEYS),
        )
        run = Trajectory.from_state(
            state,
            tokenizer,
            id=f"demonstration/{example.user}/{len(example.history)}/{at}",
            model=policy.name,
            target=example.target,
        )
        if run.failure is not None:
            raise EngineError(f"a demonstration for user {example.user!r}: {run.failure.detail}")
        if not run.violations and tuple(run.answer) == script.answer:
            made.append(run)
            progress(len(made))
    return made
