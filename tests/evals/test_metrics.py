import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from deeprec.evals.metrics import (
    Checked,
    check,
    coverage,
    diversity,
    novelty,
    parse_metric,
    ranks,
    values,
)
from deeprec.tools.trm import scoring

NAMES = ["recall@1", "recall@3", "ndcg@3", "mrr"]
KNOWN = frozenset("abcdef")


def test_values_by_hand() -> None:
    found = values(np.array([1, 2, 3, 4, 0]), NAMES, 4)
    assert found[0].tolist() == [1, 0, 0, 0, 0]
    assert found[1].tolist() == [1, 1, 1, 0, 0]
    assert found[2] == pytest.approx([1, 1 / math.log2(3), 0.5, 0, 0])
    assert found[3] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 0])


def test_random_rankings_as_other_libraries_judge_them() -> None:
    rng = np.random.default_rng(0)
    n, k = 30, 10
    lists = [rng.permutation(n) for _ in range(200)]
    targets = rng.integers(n, size=200)
    checked = [check([str(item) for item in ids], k, {str(i) for i in range(n)}) for ids in lists]
    found = ranks(checked, [str(target) for target in targets])
    ours = values(found, ["recall@5", "ndcg@5", "ndcg@10", "mrr"], k)
    truth, scores = np.zeros((200, n)), np.zeros((200, n))
    for user, (ids, target) in enumerate(zip(lists, targets, strict=True)):
        truth[user, target] = 1
        scores[user, ids] = np.arange(n, 0, -1)
    assert ours[1].mean() == pytest.approx(ndcg_score(truth, scores, k=5))
    assert ours[2].mean() == pytest.approx(ndcg_score(truth, scores, k=10))
    zero_based = np.array(
        [list(ids).index(target) for ids, target in zip(lists, targets, strict=True)]
    )
    assert ours[0].mean() == scoring.recall(zero_based, 5)
    assert ours[1].mean() == pytest.approx(scoring.ndcg(zero_based, 5))
    expected = np.where(zero_based < k, 1 / (zero_based + 1), 0).mean()
    assert ours[3].mean() == pytest.approx(expected)


def test_every_fault_of_a_list_is_a_miss_at_its_place() -> None:
    found = check(["a", "a", "?", None, "h", "b", "c"], 6, KNOWN | {"h"}, past={"h"})
    assert found.places == ("a", None, None, None, None, "b")
    assert found.duplicates == ("a",)
    assert found.unknown == ("?", "(nothing)")
    assert found.past == ("h",)
    assert ranks([found, found, found], ["b", "c", "h"]).tolist() == [6, 0, 0]


def test_an_unknown_target_named_twice_hits_nothing() -> None:
    found = check(["?", "?"], 2, KNOWN)
    assert found.unknown == ("?", "?")
    assert ranks([found], ["?"]).tolist() == [0]


@given(
    st.lists(st.lists(st.sampled_from([*"abcdef?!", None]), max_size=12), min_size=1, max_size=20),
    st.sampled_from("abcdef"),
)
def test_recall_never_passes_one(lists: list[list[str | None]], target: str) -> None:
    found = ranks([check(items, 5, KNOWN) for items in lists], [target] * len(lists))
    table = values(found, ["recall@1", "recall@5", "ndcg@5", "mrr"], 5)
    assert table.min() >= 0
    assert table.max() <= 1
    hits = [target in items[:5] for items in lists]
    assert table[1].tolist() == hits


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hitrate@5", "there is no metric 'hitrate@5': known are recall@N, ndcg@N and mrr"),
        ("recall@0", "there is no metric"),
        ("mrr@5", "there is no metric"),
        ("recall@11", "'recall@11' reaches beyond the k = 10"),
    ],
)
def test_a_metric_that_does_not_exist(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_metric(name, 10)


def test_beyond_accuracy_by_hand() -> None:
    lists = [Checked(("a", "b")), Checked(("a", None)), Checked(())]
    assert coverage(lists, 4) == 0.5
    # 3 users: one has a, three have b; with one user added 2/4 and 4/4.
    owners = {"a": 1.0, "b": 3.0}
    assert novelty(lists, owners, 3) == pytest.approx((0.5 + 1) / 2)
    assert novelty([Checked(("a",))], {"a": 0.0}, 3) == 2.0
    vectors = np.array([[1, 0], [0.6, 0.8]], dtype=np.float32)
    assert diversity(lists, {"a": 0, "b": 1}, vectors) == pytest.approx(0.4)
    assert diversity([], {}, vectors) == novelty([], {}, 3) == 0
