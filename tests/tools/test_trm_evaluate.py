import math

import numpy as np
import pytest
import torch

from deeprec.errors import TRMError
from deeprec.tools.interactions import InteractionData, leave_one_out
from deeprec.tools.text_encoder import TextEncoder
from deeprec.tools.trm.baselines import Markov, popularity
from deeprec.tools.trm.blend import blend
from deeprec.tools.trm.cold import cold_rows, known_rows, without_items
from deeprec.tools.trm.config import DeepRecConfig
from deeprec.tools.trm.evaluate import Judge, cases, preference_texts
from deeprec.tools.trm.model import TRM
from deeprec.tools.trm.preferences import HELD_OUT_TEMPLATES
from deeprec.tools.trm.scoring import exclude, ndcg, recall, target_ranks, users_at_once


def test_ranks_and_metrics_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.5, 0.7, 0.1], [0.2, 0.2, 0.2, 0.2]])
    ranks = target_ranks(scores, np.array([2, 1]))
    assert ranks.tolist() == [1, 3]  # ties count against the target
    assert ndcg(ranks, 10) == pytest.approx((1 / math.log2(3) + 1 / math.log2(5)) / 2)
    assert ndcg(ranks, 2) == pytest.approx(1 / math.log2(3) / 2)
    assert recall(ranks, 2) == 0.5
    assert ndcg(np.zeros(0, dtype=int), 10) == 0


def test_a_score_that_is_no_number_counts_against_the_target() -> None:
    nan = math.nan
    scores = torch.tensor([[nan, nan, nan, nan], [0.5, nan, 0.1, 0.9], [nan, 0.3, 0.2, 0.1]])
    assert target_ranks(scores, np.array([2, 0, 0])).tolist() == [3, 2, 3]
    assert ndcg(target_ranks(scores[:1], np.array([0])), 10) <= 1


def test_scores_of_a_large_catalog_are_held_for_few_users() -> None:
    assert [users_at_once(n) for n in (1_349, 1_000_000, 10**9)] == [256, 20, 1]


def test_the_past_is_excluded_but_not_a_target_seen_before() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    kept = exclude(scores, [np.array([0, 2])], np.array([2]))
    assert kept.tolist() == [[-math.inf, 2.0, 1.0, 0.0]]
    assert scores.tolist() == [[3.0, 2.0, 1.0, 0.0]]


def test_markov_by_hand() -> None:
    markov = Markov([np.array([0, 1, 2])], 4)
    # 0 -> 1 weighs 1 and 0 -> 2 weighs 0.8; 1 -> 2 weighs 1.
    scores = markov.scores([np.array([0, 1]), np.array([3, 0])])
    assert scores[0, 2] == pytest.approx(1 + 0.8 * 0.8 / 1.8, rel=1e-6)
    assert scores[0, 1] == pytest.approx(0.8 / 1.8, rel=1e-6)
    assert scores[1].argmax() == 1
    assert scores[0, 3] < scores[0, 0] < 1e-6  # popular items first among the rest


def test_markov_reads_the_last_items_only() -> None:
    markov = Markov([np.array([0, 1]), np.array([2, 3])], 4)
    assert markov.scores([np.array([0, 2])], length=1)[0].argmax() == 3
    assert markov.scores([np.array([0, 2])], length=1)[0, 1] < 1e-6


def test_popularity_counts() -> None:
    assert popularity([np.array([1, 1]), np.array([2])], 4).tolist() == [0, 2, 1, 0]
    assert popularity([], 2).tolist() == [0, 0]


def test_blend_mixes_probabilities_and_keeps_the_last_places() -> None:
    # Far apart, so that softmax is near one-hot: 0 leads with the preference, 9 without.
    wanted = torch.tensor([[90.0, 80, 70, 60, 50, 40, 30, 20, 10, 0]])
    history = wanted.flip(1)
    assert blend(wanted, history, 5, doubt=0.0, share=0.4).tolist() == [[0, 1, 2, 9, 8]]
    assert blend(wanted, history, 2, doubt=0.3, share=0.0).tolist() == [[0, 9]]
    assert blend(wanted, history, 2, doubt=0.7, share=0.0).tolist() == [[9, 0]]
    assert blend(wanted, wanted, 5).tolist() == [[0, 1, 2, 3, 4]]
    assert sorted(blend(wanted, history, 99)[0].tolist()) == list(range(10))


def test_blend_by_hand() -> None:
    wanted = torch.log(torch.tensor([[0.6, 0.3, 0.1]]))
    history = torch.log(torch.tensor([[0.1, 0.2, 0.7]]))
    # doubt 0.5: .35, .25, .40
    assert blend(wanted, history, 3, doubt=0.5, share=0.0).tolist() == [[2, 0, 1]]


def test_blend_of_a_pool_is_that_of_everything_if_it_knows_the_sums() -> None:
    random = torch.Generator().manual_seed(0)
    wanted, history = (3 * torch.randn(40, 300, generator=random) for _ in range(2))
    history *= torch.linspace(0.1, 2, 40)[:, None]  # flat and peaked: the sums differ much
    best = torch.cat([scores.topk(30, dim=1).indices for scores in (wanted, history)], dim=1)
    # An item that is in both stands in the pool once.
    again = (best[:, :, None] == best[:, None]).tril(-1).any(2)
    pool = [scores.gather(1, best).masked_fill(again, -math.inf) for scores in (wanted, history)]
    sums = (wanted.logsumexp(1), history.logsumexp(1))
    everything = blend(wanted, history, 20)
    assert torch.equal(best.gather(1, blend(*pool, 20, log_z=sums)), everything)
    assert not torch.equal(best.gather(1, blend(*pool, 20)), everything)
    assert torch.equal(blend(wanted, history, 20, log_z=sums), everything)


def test_blend_lists_what_is_excluded_last() -> None:
    wanted = torch.tensor([[900.0, -math.inf, 7, 6]])
    history = torch.tensor([[900.0, -math.inf, 2, 3]])
    for share in (0.0, 0.4):
        assert 1 not in blend(wanted, history, 3, share=share)[0].tolist()


def test_cases_are_the_users_with_a_target(tiny_data: InteractionData) -> None:
    split = leave_one_out(tiny_data)
    test, valid = cases(split), cases(split, "valid")
    assert len(test.users) == len(tiny_data.user_ids)
    assert test.histories[0].tolist() == tiny_data.sequence(0)[:-1].tolist()
    assert valid.histories[0].tolist() == tiny_data.sequence(0)[:-2].tolist()
    assert test.targets[0] == tiny_data.sequence(0)[-1]
    assert len(cases(split, limit=5).users) == 5


def test_preference_texts_describe_what_they_say(
    tiny_data: InteractionData, tiny_encoder: TextEncoder
) -> None:
    given = cases(leave_one_out(tiny_data))
    text = tiny_encoder.encode_passages([item.title for item in tiny_data.items])
    texts = preference_texts(tiny_data, given, text)
    for n, target in enumerate(given.targets):
        genre = tiny_data.items[target].attributes["genres"][0]
        assert texts["all target values"][n] == f"genres: {genre}"
        assert texts["one target value"][n] == f"genres: {genre}"
        assert genre in texts["all, unseen wording"][n]
        assert genre not in texts["unrelated"][n]
        assert texts["its title"][n] == tiny_data.items[target].title
        assert texts["similar title"][n].split("similar to ")[1] != tiny_data.items[target].title
    unseen = {text.replace(g, "{}") for text in texts["all, unseen wording"]
              for g in ("Comedy", "Drama", "Horror", "Western") if g in text}  # fmt: skip
    assert unseen <= set(HELD_OUT_TEMPLATES)


@pytest.fixture(scope="module")
def judge(tiny_data: InteractionData, tiny_encoder: TextEncoder) -> Judge:
    text = tiny_encoder.encode_passages([item.title for item in tiny_data.items])
    return Judge(tiny_data, leave_one_out(tiny_data), text, tiny_encoder)


@pytest.fixture(scope="module")
def untrained(tiny_data: InteractionData, tiny_encoder: TextEncoder) -> TRM:
    config = DeepRecConfig(dim=16, text_dim=tiny_encoder.dim)
    return TRM(config, tuple(item.id for item in tiny_data.items)).eval()


def test_baselines_know_the_walk(judge: Judge) -> None:
    table = judge.baselines()
    assert table["Markov"].ndcg10 > 0.9  # the next film is always the next number
    assert table["popularity"].ndcg10 < 0.5
    assert table["Markov"].users == 80


def test_rows_do_not_depend_on_how_many_users_are_scored_at_once(
    judge: Judge, untrained: TRM, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = judge.row(untrained, "all target values"), judge.baselines()
    asked: list[int] = []

    def few(n_items: int) -> int:
        asked.append(n_items)
        return 7

    monkeypatch.setattr("deeprec.tools.trm.evaluate.users_at_once", few)
    assert (judge.row(untrained, "all target values"), judge.baselines()) == whole
    assert set(asked) == {40}


def test_rows_have_every_kind(judge: Judge, untrained: TRM) -> None:
    table = judge.rows(untrained)
    assert {"absent", "from history", "one target value", "all target values", "unrelated",
            "all, unseen wording", "its title", "similar title"} <= table.keys()  # fmt: skip
    for row in table.values():
        assert row.ndcg10 <= row.recall10 <= row.recall20 <= 1


def test_without_items_takes_the_share_out(tiny_data: InteractionData) -> None:
    warm = without_items(tiny_data, 0.1, 0)
    assert len(warm.items) == 36
    ids = {item.id for item in warm.items}
    kept = [
        (tiny_data.user_ids[u], tiny_data.items[i].id)
        for u, i in zip(tiny_data.users, tiny_data.item_indices, strict=True)
        if tiny_data.items[i].id in ids
    ]
    got = [
        (warm.user_ids[u], warm.items[i].id)
        for u, i in zip(warm.users, warm.item_indices, strict=True)
    ]
    assert got == kept
    assert {item.id for item in without_items(tiny_data, 0.1, 1).items} != ids
    with pytest.raises(TRMError, match="leaves no interaction"):
        without_items(tiny_data, 0.999, 0)


def test_cold_rows_split_the_users_by_their_target(
    judge: Judge, tiny_data: InteractionData, tiny_encoder: TextEncoder
) -> None:
    warm = without_items(tiny_data, 0.25, 0)
    config = DeepRecConfig(dim=16, text_dim=tiny_encoder.dim)
    model = TRM(config, tuple(item.id for item in warm.items)).eval()
    known = known_rows(model, tiny_data)
    assert (known < 0).sum() == 10
    assert all(model.item_ids[k] == i.id for k, i in zip(known, tiny_data.items) if k >= 0)  # noqa: B905
    rows = cold_rows(model, judge)
    cold = (known[judge.cases.targets] < 0).sum()
    assert rows["cold items, all target values"].users == cold > 0
    assert rows["warm items, all target values"].users == 80 - cold
