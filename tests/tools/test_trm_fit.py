import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from deeprec.errors import TRMError
from deeprec.tools.interactions import InteractionData, Item, leave_one_out
from deeprec.tools.text_encoder import TextEncoder
from deeprec.tools.trm.baselines import Markov
from deeprec.tools.trm.batches import Windows
from deeprec.tools.trm.candidates import Candidates, cross_entropy
from deeprec.tools.trm.cold import cold_rows, known_rows, without_items
from deeprec.tools.trm.config import DeepRecConfig, FitConfig, PaperConfig, PreferenceMix
from deeprec.tools.trm.evaluate import Judge
from deeprec.tools.trm.fit import FitProgress, fit
from deeprec.tools.trm.model import TRM

# Starting from counted transitions would know the walk before any step.
DEEPREC = DeepRecConfig(
    dim=16,
    transition_dim=16,
    preference_dim=16,
    inner=32,
    dropout=0.0,
    item_dropout=0.2,
    transition_start=0.0,
)
COUNTED = DEEPREC.model_copy(update={"transition_start": 0.4})
PAPER = PaperConfig(dim=32, inner=32, experts=2, dropout=0.1)
QUICK = FitConfig(epochs=10, patience=10, batch_size=128, learning_rate=1e-2, pool=400)


def text_of(data: InteractionData, encoder: TextEncoder) -> np.ndarray:
    return encoder.encode_passages(
        [f"{item.title} genres: {', '.join(item.attributes.get('genres', ()))}"
         for item in data.items]
    )  # fmt: skip


@pytest.fixture(scope="module", params=[DEEPREC, PAPER], ids=["deeprec", "paper"])
def fitted(
    request: pytest.FixtureRequest, tiny_data: InteractionData, tiny_encoder: TextEncoder
) -> tuple[TRM, list[FitProgress]]:
    seen: list[FitProgress] = []
    model = fit(
        tiny_data,
        leave_one_out(tiny_data),
        text_of(tiny_data, tiny_encoder),
        tiny_encoder,
        request.param,
        QUICK,
        progress=seen.append,
    )
    return model, seen


@pytest.fixture(scope="module")
def judge(tiny_data: InteractionData, tiny_encoder: TextEncoder) -> Judge:
    return Judge(
        tiny_data, leave_one_out(tiny_data), text_of(tiny_data, tiny_encoder), tiny_encoder
    )


def untrained(model: TRM) -> TRM:
    torch.manual_seed(0)
    return TRM(model.config, model.item_ids).eval()


def test_it_learns_the_walk(fitted: tuple[TRM, list[FitProgress]], judge: Judge) -> None:
    model = fitted[0]
    assert judge.row(untrained(model), None).ndcg10 < 0.25
    assert judge.row(model, None).ndcg10 > 0.75


def test_counted_transitions_are_a_start(
    tiny_data: InteractionData,
    tiny_encoder: TextEncoder,
    judge: Judge,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    split, text = leave_one_out(tiny_data), text_of(tiny_data, tiny_encoder)
    still = FitConfig(epochs=1, learning_rate=1e-9, preferences=False)

    def score() -> float:
        model = fit(tiny_data, split, text, tiny_encoder, COUNTED, still)
        return judge.row(model, None).ndcg10

    assert score() > 0.75
    monkeypatch.setattr("deeprec.tools.trm.fit._STARTED_ITEMS", 39)
    assert score() < 0.25


def test_nothing_is_counted_for_a_start_that_is_not_wanted(
    tiny_data: InteractionData, tiny_encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> Markov:
        raise AssertionError("counted")

    monkeypatch.setattr("deeprec.tools.trm.fit.Markov", never)
    split, text = leave_one_out(tiny_data), text_of(tiny_data, tiny_encoder)
    brief = FitConfig(epochs=1, preferences=False)
    for config in (PAPER, DEEPREC):
        fit(tiny_data, split, text, tiny_encoder, config, brief)
    with pytest.raises(AssertionError, match="counted"):
        fit(tiny_data, split, text, tiny_encoder, COUNTED, brief)


def test_transitions_that_say_nothing_are_no_start(tiny_encoder: TextEncoder) -> None:
    # In training item 0 follows item 0 and there is no other: no likelier than by popularity.
    data = InteractionData(
        name="one film",
        items=tuple(Item(str(n), f"Film {n}") for n in range(4)),
        user_ids=("a", "b"),
        users=np.repeat([0, 1], 5),
        item_indices=np.array([0, 0, 0, 1, 2] * 2),
        times=np.tile(np.arange(5), 2),
    )
    settings = FitConfig(epochs=1, pool=100)
    text = text_of(data, tiny_encoder)
    model = fit(data, leave_one_out(data), text, tiny_encoder, COUNTED, settings)
    assert len(model.item_ids) == 4


def test_it_follows_a_preference_where_the_history_says_nothing(
    tiny_data: InteractionData, tiny_encoder: TextEncoder
) -> None:
    data = at_random(tiny_data)
    split, text = leave_one_out(data), text_of(data, tiny_encoder)
    told = PreferenceMix(history=0, unrelated=0, title=0)
    settings = QUICK.model_copy(update={"epochs": 16, "patience": 16, "mix": told})
    model = fit(data, split, text, tiny_encoder, DEEPREC, settings)
    judge = Judge(data, split, text, tiny_encoder)
    gains = []
    for judged in (untrained(model), model):
        absent = judge.row(judged, None).ndcg10
        kinds = ("all target values", "unrelated")
        gains.append([judge.row(judged, kind).ndcg10 / absent for kind in kinds])
    assert gains[0] == pytest.approx([1, 1], abs=0.1)
    assert gains[1][0] > 1.25
    assert gains[1][1] < 0.9


def at_random(data: InteractionData) -> InteractionData:
    """The same users, who take any film at any time."""
    return InteractionData(
        name="random walks",
        items=data.items,
        user_ids=data.user_ids,
        users=data.users,
        item_indices=np.random.default_rng(3).integers(40, size=len(data.users)),
        times=data.times,
    )


def test_progress_tells_stages_and_validation(
    fitted: tuple[TRM, list[FitProgress]], tiny_data: InteractionData
) -> None:
    seen = fitted[1]
    stages = [at.stage for at in seen]
    assert stages == sorted(stages, key=["preferences", "fit"].index)
    steps = [at for at in seen if at.stage == "fit"]
    assert steps[0].step == 1
    assert steps[0].valid_ndcg is None
    assert steps[-1].valid_ndcg is not None
    assert steps[-1].step == steps[-1].total
    assert steps[-1].epoch == QUICK.epochs
    transitions = len(tiny_data.users) - 3 * len(tiny_data.user_ids)
    assert steps[-1].examples == transitions * QUICK.epochs
    assert steps[-1].loss < steps[0].loss


def test_the_checkpoint_is_tied_to_data_and_encoder(
    fitted: tuple[TRM, list[FitProgress]], tiny_data: InteractionData, tiny_encoder: TextEncoder
) -> None:
    config = fitted[0].config
    assert config.dataset_fingerprint == tiny_data.fingerprint
    assert config.encoder_fingerprint == tiny_encoder.fingerprint
    assert config.text_dim == tiny_encoder.dim
    assert not fitted[0].training


def test_a_preference_costs_deeprec_nothing_when_there_is_none(
    tiny_data: InteractionData, tiny_encoder: TextEncoder
) -> None:
    split, text = leave_one_out(tiny_data), text_of(tiny_data, tiny_encoder)
    settings = QUICK.model_copy(update={"epochs": 3, "learning_rate": 5e-3})
    config = DEEPREC.model_copy(update={"item_dropout": 0.0})
    models = [
        fit(tiny_data, split, text, tiny_encoder, config,
            settings.model_copy(update={"preferences": given}), seed=seed)
        for given, seed in ((True, 0), (False, 0), (False, 1))
    ]  # fmt: skip
    history = torch.tensor([[n, n + 1, n + 2] for n in range(0, 37, 4)])
    given = (history, torch.as_tensor(text)[history], torch.full((len(history),), 3))
    items = (torch.arange(40), torch.as_tensor(text))
    with torch.no_grad():
        scores = [(m.user_vectors(*given) @ m.item_vectors(*items).T).ravel() for m in models]
    alike = torch.corrcoef(torch.stack(scores))[0]
    # The same up to the order of batches and dropout inside the text parts: their draws differ.
    assert alike[1] > 0.85
    assert alike[2] < 0.6  # another seed


def test_early_stopping_keeps_the_best_epoch(
    tiny_data: InteractionData, tiny_encoder: TextEncoder
) -> None:
    data = at_random(tiny_data)  # there is nothing to find, so that scores go up and down
    split, text = leave_one_out(data), text_of(data, tiny_encoder)
    seen: list[FitProgress] = []
    settings = FitConfig(epochs=40, patience=2, batch_size=512, learning_rate=1e-2, pool=200)
    model = fit(data, split, text, tiny_encoder, DEEPREC, settings, progress=seen.append)
    scores = {at.epoch: at.valid_ndcg for at in seen if at.valid_ndcg is not None}
    best = max(scores, key=lambda epoch: math.prod(scores[epoch]))
    assert 1 < best < seen[-1].epoch == best + 2
    kept = Judge(data, split, text, tiny_encoder, which="valid").row(model, None).ndcg10
    assert kept == pytest.approx(scores[best][0])
    assert all(kept != pytest.approx(scores[n][0]) for n in scores if n != best)


@pytest.mark.parametrize("epochs", [1, 2])  # the last step may be the one that diverges
def test_divergence_is_an_error(
    epochs: int, tiny_data: InteractionData, tiny_encoder: TextEncoder
) -> None:
    split, text = leave_one_out(tiny_data), text_of(tiny_data, tiny_encoder)
    one_step = FitConfig(epochs=epochs, batch_size=10**6, learning_rate=1e30, preferences=False)
    with pytest.raises(TRMError, match=r"diverged at step \d with learning_rate 1e\+30"):
        fit(tiny_data, split, text, tiny_encoder, DEEPREC, one_step)


def test_a_negative_seed_is_refused_at_once(
    tiny_data: InteractionData, tiny_encoder: TextEncoder
) -> None:
    seen: list[FitProgress] = []
    split, text = leave_one_out(tiny_data), text_of(tiny_data, tiny_encoder)
    with pytest.raises(TRMError, match="seed is -1"):
        fit(tiny_data, split, text, tiny_encoder, DEEPREC, QUICK, seed=-1, progress=seen.append)
    assert not seen


def test_seeds_decide(tiny_data: InteractionData, tiny_encoder: TextEncoder) -> None:
    split, text = leave_one_out(tiny_data), text_of(tiny_data, tiny_encoder)
    settings = QUICK.model_copy(update={"epochs": 1})
    one, same, other = (
        fit(tiny_data, split, text, tiny_encoder, DEEPREC, settings, seed=seed).state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["net.item_embedding.weight"], other["net.item_embedding.weight"])


def test_sampled_softmax_learns_as_well(
    tiny_data: InteractionData, tiny_encoder: TextEncoder, judge: Judge
) -> None:
    settings = QUICK.model_copy(update={"full_softmax_items": 10, "negatives": 8})
    model = fit(
        tiny_data,
        leave_one_out(tiny_data),
        text_of(tiny_data, tiny_encoder),
        tiny_encoder,
        DEEPREC,
        settings,
    )
    assert judge.row(model, None).ndcg10 > 0.75  # untrained below .25


@pytest.mark.parametrize("attributes", [False, True])
def test_tiny_and_bare_data(attributes: bool, tiny_encoder: TextEncoder) -> None:
    given = {"genres": ("Comedy",)} if attributes else {}
    data = InteractionData(
        name="bare",
        items=tuple(Item(str(n), f"Film {n}", given) for n in range(3)),
        user_ids=("a", "b"),
        users=np.array([0, 0, 0, 0, 1]),
        item_indices=np.array([0, 1, 2, 0, 1]),
        times=np.arange(5),
    )
    model = fit(
        data,
        leave_one_out(data),
        text_of(data, tiny_encoder),
        tiny_encoder,
        DEEPREC,
        FitConfig(epochs=2, pool=100),
    )
    assert len(model.item_ids) == 3
    table = Judge(data, leave_one_out(data), text_of(data, tiny_encoder), tiny_encoder).rows(model)
    assert table["absent"].users == 1


def test_nothing_to_learn_is_an_error(tiny_encoder: TextEncoder) -> None:
    data = InteractionData(
        name="single",
        items=(Item("a", "Film 1"), Item("b", "Film 2")),
        user_ids=("u", "v"),
        users=np.array([0, 1]),
        item_indices=np.array([0, 1]),
        times=np.array([0, 1]),
    )
    text = text_of(data, tiny_encoder)
    with pytest.raises(TRMError, match="two or more training interactions"):
        fit(data, leave_one_out(data), text, tiny_encoder, DEEPREC, FitConfig(pool=100))
    with pytest.raises(TRMError, match="item_embeddings"):
        fit(data, leave_one_out(data), text[:1], tiny_encoder, DEEPREC)


def test_cold_items_are_found_by_their_text(tiny_encoder: TextEncoder) -> None:
    # 12 shelves of 8 films that share a text; a user takes 7 of one shelf, in any order.
    rng = np.random.default_rng(0)
    data = InteractionData(
        name="shelves",
        items=tuple(Item(str(n), "Film", {"genres": (str(70 + n // 8),)}) for n in range(96)),
        user_ids=tuple(f"u{n}" for n in range(120)),
        users=np.repeat(np.arange(120), 7),
        item_indices=np.concatenate([8 * (n % 12) + rng.permutation(8)[:7] for n in range(120)]),
        times=np.tile(np.arange(7), 120),
    )
    judge = Judge(data, leave_one_out(data), text_of(data, tiny_encoder), tiny_encoder)
    warm = without_items(data, 0.2, 0)
    settings = QUICK.model_copy(update={"epochs": 6})
    text = text_of(warm, tiny_encoder)
    model = fit(warm, leave_one_out(warm), text, tiny_encoder, DEEPREC, settings)
    assert (known_rows(model, data) < 0).sum() == 19
    before, after = (
        cold_rows(judged, judge)["cold items, all target values"]
        for judged in (untrained(model), model)
    )
    assert after.users > 20
    assert before.ndcg10 < 0.1
    assert after.ndcg10 > 0.25


def test_windows_learn_each_transition_once_with_its_own_history() -> None:
    sequences = [np.arange(3), np.arange(100, 123), np.array([7]), np.arange(50, 57)]
    wanted = {(a, a + 1) for s in sequences for a in s[:-1]}
    for causal in (True, False):
        windows = Windows(sequences, 5, 10)
        got = []
        for batch in windows.epoch(np.random.default_rng(0), causal=causal):
            for row, length, targets in zip(
                batch.history, batch.lengths, batch.targets, strict=True
            ):
                assert (row[:length] >= 0).all()
                assert (row[length:] == -1).all()
                assert (np.diff(row[:length]) == 1).all()  # consecutive, of one user
                assert (targets[length:] == -1).all()
                learned = targets >= 0
                got += list(zip(row[learned].tolist(), targets[learned].tolist(), strict=True))
                if not causal:
                    assert np.flatnonzero(learned).tolist() == [length - 1]
        assert sorted(got) == sorted(wanted)


def test_windows_are_cut_at_other_places_in_each_epoch() -> None:
    windows, rng = Windows([np.arange(50)], 10, 1000), np.random.default_rng(0)
    cuts = {
        tuple(sorted(batch.history[:, 0].tolist()))
        for _ in range(10)
        for batch in windows.epoch(rng, causal=True)
    }
    assert len(cuts) > 3


def test_sampled_loss_agrees_with_the_full_one() -> None:
    torch.manual_seed(0)
    n, batch = 200, 16
    users, items = torch.randn(batch, 8), 0.4 * torch.randn(n, 8)
    counts = torch.arange(1, n + 1)  # popular items are drawn more often as targets
    share = counts / counts.sum()
    sampled, uncorrected = [], []
    full = []
    for _ in range(300):
        targets = torch.multinomial(share, batch, replacement=True)
        full.append(cross_entropy(users @ items.T, targets, None))
        shown, place, chance = Candidates(counts, 64).draw(targets)
        logits = users @ items[shown].T
        sampled.append(cross_entropy(logits, place, chance))
        uncorrected.append(cross_entropy(logits, place, None))
    exact = torch.stack(full).mean()
    assert abs(torch.stack(sampled).mean() - exact) < 0.03 * exact
    assert abs(torch.stack(uncorrected).mean() - exact) > 0.1 * exact


def test_full_candidates_are_all_items() -> None:
    targets = torch.tensor([3, 1])
    shown, place, chance = Candidates(torch.ones(5), 0).draw(targets)
    assert shown.tolist() == [0, 1, 2, 3, 4]
    assert place.tolist() == [3, 1]
    assert chance is None
    logits = torch.randn(2, 5)
    expected = torch.nn.functional.cross_entropy(logits, targets)
    assert cross_entropy(logits, place, None) == expected


def test_a_mix_beyond_everything_is_refused() -> None:
    with pytest.raises(ValidationError, match="more than 1"):
        PreferenceMix(history=0.6, unrelated=0.3, title=0.2)
