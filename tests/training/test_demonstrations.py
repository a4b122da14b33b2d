import numpy as np
import pytest

from deeprec.errors import EngineError
from deeprec.graph import protocol
from deeprec.graph.engine.tokenizer import load_tokenizer
from deeprec.graph.state import RunSettings
from deeprec.settings import load_settings
from deeprec.tools.interactions import InteractionData, Item, leave_one_out
from deeprec.tools.retriever import RetrievalRequest, Retriever
from deeprec.tools.text_encoder import TextEncoder
from deeprec.training.demonstrations import (
    DemonstrationConfig,
    Demonstrator,
    _choose,
    demonstrate,
)
from deeprec.training.run_sft import dataset
from deeprec.training.selection import Example, SelectionConfig, candidates
from deeprec.training.trajectories import Trajectory

SETTINGS = RunSettings(k=3, retrieve_n=6, history_length=4, answer_form="numbers")


@pytest.fixture(scope="module")
def examples(tiny_data: InteractionData) -> list[Example]:
    ids = [item.id for item in tiny_data.items]
    return [
        Example(
            tiny_data.user_ids[at.user], tuple(ids[item] for item in at.history), ids[at.target]
        )
        for at in candidates(leave_one_out(tiny_data), SelectionConfig())
    ]


def made(
    examples: list[Example],
    retriever: Retriever,
    encoder: TextEncoder,
    settings: RunSettings = SETTINGS,
    *,
    wanted: int = 12,
    max_model_len: int = 4096,
    **config: object,
) -> list[Trajectory]:
    chosen = DemonstrationConfig.model_validate(config)
    tokenizer = load_tokenizer(load_settings().model_name)
    return demonstrate(
        examples,
        Demonstrator(retriever, encoder, settings, chosen),
        retriever,
        tokenizer,
        wanted=wanted,
        max_model_len=max_model_len,
    )


@pytest.fixture(scope="module")
def runs(
    examples: list[Example], retriever: Retriever, tiny_encoder: TextEncoder
) -> list[Trajectory]:
    return made(examples, retriever, tiny_encoder, keep_misses=0.0, repeats=0.0)


def test_they_keep_every_rule_and_end_with_a_found_target(runs: list[Trajectory]) -> None:
    assert len(runs) == 12
    for run in runs:
        assert (run.violations, run.failure, run.stop_reason) == ([], None, "answered")
        assert run.target in run.answer
        assert len(set(run.answer)) == 3
        assert 2 <= run.usage.retrievals <= 4
        assert run.completion_ids[-1] == load_tokenizer(load_settings().model_name).eos_token_id


def test_searches_of_a_run_differ_and_say_nothing_of_the_target(runs: list[Trajectory]) -> None:
    for run in runs:
        asked = [turn.preference for turn in run.turns if turn.preference]
        assert len({protocol.preference_key(wish) for wish in asked}) == len(asked)
        own = "".join(piece.text for piece in run.pieces if piece.author == "policy")
        target = f"Film {run.target}"
        assert target not in own.partition(protocol.BEGIN_ANSWER)[0].split()


def test_the_first_search_is_for_anything(
    runs: list[Trajectory], examples: list[Example], retriever: Retriever
) -> None:
    histories = {(e.user, len(e.history)): e.history for e in examples}
    for run in runs:
        _, user, length, _ = run.id.split("/")
        history = histories[user, int(length)]
        alone = RetrievalRequest(history=history, k=6, exclude=frozenset(history))
        expected = [item.id for item in retriever.retrieve([alone])[0]]
        assert [item.id for item in run.turns[0].retrieved] == expected
        assert run.turns[0].preference == protocol.ANYTHING


def test_a_history_is_of_ids_even_where_a_title_reads_like_one(
    examples: list[Example], retriever: Retriever, tiny_encoder: TextEncoder
) -> None:
    retriever.upsert([Item("new", title=examples[0].history[0])])
    try:
        assert made(examples[:8], retriever, tiny_encoder, wanted=1, keep_misses=1.0)
    finally:
        retriever.remove(["new"])


def test_what_varies_is_what_the_prompt_says_and_the_run_does(
    examples: list[Example], retriever: Retriever, tiny_encoder: TextEncoder
) -> None:
    vary = {"k": [2, 4], "retrieve_n": [5, 6], "history_length": [2, 3], "answer_form": ["titles"]}
    varied = made(examples, retriever, tiny_encoder, wanted=24, repeats=0.0, vary=vary)
    seen = {(r.settings.k, r.settings.retrieve_n, r.settings.history_length) for r in varied}
    assert len(seen) == 8
    for run in varied:
        k, shown = run.settings.k, run.pieces[0].text
        assert len(run.answer) == k
        assert f"Recommend {k} items." in shown
        assert "write the best of the listed titles" in shown
        assert shown.count("\n  - ") == run.settings.history_length
        searches = [turn for turn in run.turns if turn.preference]
        assert {len(turn.retrieved) for turn in searches} == {run.settings.retrieve_n}


def test_a_second_pass_draws_anew(
    examples: list[Example], retriever: Retriever, tiny_encoder: TextEncoder
) -> None:
    few, options = examples[:6], {"keep_misses": 1.0, "repeats": 0.0}
    once = made(few, retriever, tiny_encoder, wanted=80, **options)
    twice = made(few, retriever, tiny_encoder, wanted=80, passes=2, **options)
    assert len(twice) == 2 * len(once)
    assert len({run.id for run in twice}) == len(twice)
    again = twice[len(once) :]
    assert [run.completion_ids for run in again] != [run.completion_ids for run in once]


def test_a_repeated_search_is_refused_and_only_what_follows_is_learnt(
    examples: list[Example], retriever: Retriever, tiny_encoder: TextEncoder
) -> None:
    for run in made(examples, retriever, tiny_encoder, repeats=1.0):
        assert sum(turn.refused is not None for turn in run.turns) == 1
        assert run.violations == []
        own = [piece.text for piece in run.pieces if piece.author == "policy"]
        learnt = [text for text, turn in zip(own, run.turns, strict=True) if turn.refused is None]
        tokenizer = load_tokenizer(load_settings().model_name)
        labels = [label for label in dataset([run])[0]["labels"] if label != -100]
        assert tokenizer.decode(labels) == "".join(learnt) + tokenizer.eos_token


def test_misses_are_kept_in_their_share(
    examples: list[Example], retriever: Retriever, tiny_encoder: TextEncoder
) -> None:
    one = SETTINGS.model_copy(update={"k": 1})
    every = made(examples, retriever, tiny_encoder, one, wanted=80, keep_misses=1.0)
    hits = made(examples, retriever, tiny_encoder, one, wanted=80, keep_misses=0.0)
    assert len(every) > len(hits) > 0
    assert all(run.target in run.answer for run in hits)


def test_titles_may_be_the_answer_form(
    examples: list[Example], retriever: Retriever, tiny_encoder: TextEncoder
) -> None:
    settings = SETTINGS.model_copy(update={"answer_form": "titles"})
    run = made(examples, retriever, tiny_encoder, settings, wanted=1)[0]
    assert all(entry.startswith("Film") for entry in run.entries)


def test_only_the_policys_tokens_are_labels(runs: list[Trajectory]) -> None:
    for run, row in zip(runs, dataset(runs), strict=True):
        assert row["input_ids"] == [*run.prompt_ids, *run.completion_ids]
        said = [label for label in row["labels"] if label != -100]
        kept = zip(run.completion_ids, run.authors, strict=True)
        assert said == [token for token, author in kept if author == "policy"]
        assert len(row["labels"]) == len(row["input_ids"])
        assert set(run.authors) == {"policy", "environment"}


def test_one_that_does_not_fit_is_told(
    examples: list[Example], retriever: Retriever, tiny_encoder: TextEncoder
) -> None:
    with pytest.raises(EngineError, match="fit"):
        made(examples, retriever, tiny_encoder, max_model_len=640)


def test_choice_weighs_gain_and_difference() -> None:
    vectors = np.array([[1, 0], [1, 0], [0, 1], [-1, 0]], dtype=np.float32)
    lists = [["a", "t"], ["t"], ["b"], ["c"]]
    assert _choose("t", lists, vectors, 1) == [1]  # the greatest gain
    assert _choose("t", lists, vectors, 2) == [1, 3]  # 0 + 1 - -1 beats .63 + 1 - 1
    assert _choose("none", lists, vectors, 3) == [0, 3, 2]
