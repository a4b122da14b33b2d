"""RecBole as a peer: what goes over, what comes back, and that its numbers are the same as ours."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deeprec.errors import EvaluationError
from deeprec.evals import recommenders
from deeprec.evals.recbole.peer import INSTALLED, PYTHON, PeerResult, run_recbole
from deeprec.tools.interactions import InteractionData, leave_one_out
from deeprec.tools.trm.scoring import ndcg, recall

from .conftest import Evaluate, taking_again

there = pytest.mark.skipif(
    not INSTALLED.exists(), reason="RecBole's environment is not there (make recbole)"
)


def test_a_missing_environment_is_named(tiny_data: InteractionData) -> None:
    with pytest.raises(EvaluationError, match=r"/no/python.*make recbole"):
        run_recbole(tiny_data, "SASRec", epochs=1, python=Path("/no/python"))


def test_a_failure_of_recbole_is_told(tiny_data: InteractionData) -> None:
    # Our own Python has no RecBole.
    with pytest.raises(EvaluationError, match="No package metadata was found for recbole"):
        run_recbole(tiny_data, "SASRec", epochs=1, python=Path(sys.executable))


def test_names_that_would_part_fields_are_refused(tiny_data: InteractionData) -> None:
    users = ("a\tb", *tiny_data.user_ids[1:])
    with pytest.raises(EvaluationError, match=r"user id 'a\\tb'"):
        run_recbole(
            replace(tiny_data, user_ids=users),
            "SASRec",
            epochs=1,
            python=Path(sys.executable),
        )


def whole(data: InteractionData) -> str:
    """What a peer answers, without its environment."""
    rankings = [
        {"user": user, "target": "1", "past_included": ["1"], "past_excluded": ["1"]}
        for user in data.user_ids
    ]
    counts = dict.fromkeys(("threads", "users", "items", "interactions", "examples"), 1)
    return json.dumps(
        {**counts, "recbole": "1", "torch": "2", "epoch_seconds": [], "valid_ndcg_10": 0.0,
         "report": {}, "rankings": rankings}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda text: text[: len(text) // 2], "Invalid JSON"),
        (lambda _: "{}", "Field required"),
        (lambda text: text.replace('"u7"', '"u8"'), "user 'u7' has no ranking in it"),
    ],
)
def test_a_damaged_answer_of_a_peer_is_named(
    run: Evaluate,
    tmp_path: Path,
    tiny_data: InteractionData,
    harm: Callable[[str], str],
    says: str,
) -> None:
    kept = tmp_path / "run" / "peers" / "SASRec.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(harm(whole(tiny_data)))
    entry = {"kind": "recbole", "model": "SASRec"}
    with pytest.raises(EvaluationError, match=rf"peers/SASRec\.json is damaged: {says}.*Remove"):
        run(recommenders={"SASRec": entry})
    kept.write_text(whole(tiny_data))
    assert run(recommenders={"SASRec": entry}).rows[0].short == 80


@there
def test_its_numbers_are_those_of_its_rankings(tiny_data: InteractionData) -> None:
    tiny_data = taking_again(tiny_data, 7)
    result = run_recbole(
        tiny_data,
        "SASRec",
        epochs=2,
        top=len(tiny_data.items),
        options={"hidden_size": 8, "inner_size": 8, "n_heads": 1, "n_layers": 1},
    )
    split = leave_one_out(tiny_data)
    targets = {
        user: tiny_data.items[int(item)].id
        for user, item in zip(tiny_data.user_ids, split.test, strict=True)
        if item >= 0
    }
    assert {row.user: row.target for row in result.rankings} == targets
    assert len(result.epoch_seconds) == 2
    assert result.examples == sum(len(sequence) - 1 for sequence in split.train)
    ranks = np.array([row.past_included.index(row.target) for row in result.rankings])
    for k in (1, 5, 10, 20):
        assert recall(ranks, k) == pytest.approx(result.report[f"recall@{k}"], abs=1e-4)
        assert ndcg(ranks, k) == pytest.approx(result.report[f"ndcg@{k}"], abs=1e-4)
    for row in result.rankings:
        sequence = tiny_data.sequence(tiny_data.user_ids.index(row.user))
        past = {tiny_data.items[int(item)].id for item in sequence[:-1]}
        assert row.past_excluded == [item for item in row.past_included if item not in past]
        assert (row.target in row.past_excluded) == (row.target not in past)
    assert sum(row.target not in row.past_excluded for row in result.rankings) == 7


@there
def test_it_is_judged_as_it_judges_itself(
    run: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"hidden_size": 8, "inner_size": 8, "n_heads": 1, "n_layers": 1}
    entry = {"kind": "recbole", "model": "SASRec", "epochs": 2, "options": small}
    entry["python"] = str(PYTHON.absolute())
    results = run(recommenders={"SASRec": entry})
    rows = {row.label: row.metrics for row in results.rows}
    kept = PeerResult.model_validate_json((tmp_path / "run/peers/SASRec.json").read_bytes())
    for ours, theirs in (("recall@1", "recall@1"), ("recall@5", "recall@5"), ("ndcg@5", "ndcg@5")):
        mean = rows["SASRec, past included"][ours].mean
        assert mean == pytest.approx(kept.report[theirs], abs=1e-4)
    assert rows["SASRec"]["recall@5"].mean >= rows["SASRec, past included"]["recall@5"].mean
    # What it answered is kept: a run that goes on does not fit again.
    (tmp_path / "run/rankings/SASRec.jsonl").unlink()
    monkeypatch.setattr(recommenders, "run_recbole", None)
    assert run(recommenders={"SASRec": entry}).rows == results.rows
