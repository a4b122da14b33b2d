"""RecPO: numbers worked out by hand, and gradients of both heads."""

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from deeprec.graph.build import build_graph
from deeprec.graph.engine.tokenizer import load_tokenizer
from deeprec.graph.r2ec.backbone import Backbone
from deeprec.graph.r2ec.head import RecommendationHead
from deeprec.graph.r2ec.items import ItemStates, catalog_readings
from deeprec.graph.r2ec.ranker import HeadRanker
from deeprec.graph.state import RUN_KEYS, RunSettings
from deeprec.tools.interactions import InteractionData, leave_one_out
from deeprec.tools.retriever import Retriever
from deeprec.tools.trm.vocabulary import Vocabulary
from deeprec.training import head_start
from deeprec.training.head_start import HeadStart, Reader, fit_head, readings_of, states_of
from deeprec.training.recpo import (
    RecPO,
    advantages,
    best_of_group,
    clipped_loss,
    dealt_out,
    ndcg,
    outcome,
    reward,
    share_clipped,
)
from deeprec.training.recpo_trainer import reading_of
from deeprec.training.recpo_update import Chain, Group, accumulate, chains_hidden, last_states
from deeprec.training.trajectories import Trajectory

from ..graph.conftest import ScriptedEngine
from ..graph.test_loop import ask

CONFIG = RecPO()


def test_rewards_by_hand() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 0.0])
    # Without item 0 the target (1) stands second of three: e/(e² + e + 1) = 0.2447.
    rank, probability = outcome(scores, 1, gone=[0])
    assert rank == 1
    assert probability == pytest.approx(0.24473, abs=1e-5)
    assert ndcg(rank, 1000) == pytest.approx(1 / math.log2(3))
    assert reward(rank, probability, CONFIG) == pytest.approx(
        0.95 * 0.63093 + 0.05 * 0.24473, abs=1e-5
    )
    assert ndcg(0, 1) == 1
    assert ndcg(1, 1) == ndcg(None, 1000) == 0


def test_a_target_that_may_not_be_shown_earns_nothing() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 0.0])
    assert outcome(scores, 1, among=[0, 2]) == (None, 0.0)
    assert outcome(scores, 1, gone=[1]) == (None, 0.0)
    assert outcome(scores, 1, among=[1, 3])[0] == 0
    # Ties count against it: a head that scores all alike must not be rewarded.
    assert outcome(torch.zeros(4), 2)[0] == 3


def test_advantages_by_hand() -> None:
    found = advantages(torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.4, 0.4, 0.4, 0.4]]))
    deviation = math.sqrt((4 + 1 + 0 + 9) / 3)  # of the sample
    assert found[0].tolist() == pytest.approx([-2 / deviation, -1 / deviation, 0, 3 / deviation])
    assert found[1].tolist() == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert best_of_group(torch.tensor([[0.1, 0.9, 0.9], [0.3, 0.2, 0.1]])).tolist() == [1, 0]


def test_a_control_leaves_nobody_their_own_target() -> None:
    for count in (2, 3, 8):
        for seed in range(20):
            given = dealt_out(count, np.random.default_rng(seed))
            assert sorted(given) == list(range(count))
            assert all(place != at for at, place in enumerate(given))
    assert len({tuple(dealt_out(8, np.random.default_rng(seed))) for seed in range(20)}) > 10


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.2, 2.0, -2.4, -2.4),  # within
        (1.5, 2.0, -2.56, 0.0),  # bound at 1.28
        (0.5, 2.0, -1.0, -1.0),  # of an action that became rarer, the gradient brings it back
        (0.5, -2.0, 1.6, 0.0),  # bound at 0.8
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_clipping_binds(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    old = torch.tensor(-1.5)
    logprob = (old + math.log(ratio)).clone().requires_grad_()
    found = clipped_loss(logprob, old, torch.tensor(advantage), CONFIG)
    found.backward()  # type: ignore[no-untyped-call]
    assert float(found.detach()) == pytest.approx(loss, abs=1e-5)
    assert float(logprob.grad if logprob.grad is not None else 0) == pytest.approx(
        gradient, abs=1e-5
    )
    assert share_clipped(
        logprob.detach()[None], old[None], torch.tensor([advantage]), CONFIG
    ) == float(gradient == 0)


@pytest.fixture
def llm(tiny_llm: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llm, dtype=torch.float32).eval()


@pytest.fixture
def live(llm: PreTrainedModel, tiny_llm: str) -> Backbone:
    return Backbone(getattr(llm, llm.base_model_prefix), load_tokenizer(tiny_llm))


def group(**changes: Any) -> Group:
    chains = [
        Chain([11, 12, 13], [0, 1, 1], [0.0, -9.0, -9.0], 1.2),
        Chain([21, 22, 23, 24], [1, 1, 0, 1], [-9.0, -9.0, 0.0, -9.0], -0.7),
    ]
    fields: dict[str, Any] = {"best": 0, "target": 1, "item_advantage": 1.2}
    return Group([5, 6, 7, 8], chains, **{**fields, **changes})


def logprobs(llm: PreTrainedModel, of: Group, at: int) -> torch.Tensor:
    """Of the policy's tokens, by one plain pass over prompt and chain."""
    chain = of.chains[at]
    ids = torch.tensor([[*of.prompt, *chain.ids]])
    table = llm(input_ids=ids).logits[0, len(of.prompt) - 1 : -1].log_softmax(-1)
    own = [place for place, mask in enumerate(chain.mask) if mask]
    return table[own, [chain.ids[place] for place in own]]


def with_own_logprobs(llm: PreTrainedModel, of: Group) -> Group:
    for at, chain in enumerate(of.chains):
        with torch.no_grad():
            found = iter(logprobs(llm, of, at).tolist())
        chain.old = [next(found) if mask else 0.0 for mask in chain.mask]
    return of


def test_chains_behind_one_prompt_get_the_states_that_each_gets_alone(live: Backbone) -> None:
    of = group()
    with torch.no_grad():
        hidden, ends = chains_hidden(live, of)
        for chain, end in zip(of.chains, ends, strict=True):
            alone = last_states(live, [[*of.prompt, *chain.ids]])[0]
            torch.testing.assert_close(hidden[end], alone, atol=1e-5, rtol=1e-4)


def gradients(llm: PreTrainedModel, head: RecommendationHead) -> dict[str, torch.Tensor]:
    named = [*llm.named_parameters(), *head.named_parameters()]
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def test_the_gradient_is_that_of_the_plain_objective(llm: PreTrainedModel, live: Backbone) -> None:
    torch.manual_seed(0)
    head = RecommendationHead(live.dim)
    of = with_own_logprobs(llm, group())
    items = [[31, 32], [41, 42, 43]]
    kept = torch.randn(3, live.dim)
    accumulate(llm, live, head, [of], items, kept, CONFIG)
    found = gradients(llm, head)
    llm.zero_grad()
    head.zero_grad()
    tokens = sum(
        clipped_loss(logprobs(llm, of, at), logprobs(llm, of, at).detach(),
                     torch.tensor(chain.advantage), CONFIG).sum()
        for at, chain in enumerate(of.chains)
    )  # fmt: skip
    user = last_states(live, [[*of.prompt, *of.chains[0].ids]])
    vectors = head.items(torch.cat([last_states(live, [item]) for item in items] + [kept]))
    item = (head.users(user) @ vectors.T).log_softmax(-1)[0, 1]
    (tokens / 5 + clipped_loss(item, item.detach(), torch.tensor(1.2), CONFIG)).backward()
    wanted = gradients(llm, head)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-3, msg=name)


def test_each_loss_reaches_what_it_is_to_reach(llm: PreTrainedModel, live: Backbone) -> None:
    head = RecommendationHead(live.dim)
    items, kept = [[31, 32], [41, 42, 43]], torch.randn(3, live.dim)
    of = with_own_logprobs(llm, group())
    accumulate(llm, live, head, [of], items, kept, CONFIG.model_copy(update={"item_weight": 0.0}))
    found = gradients(llm, head)
    assert found["lm_head.weight"].abs().sum() > 0
    assert "user.weight" not in found
    llm.zero_grad()
    for chain in of.chains:
        chain.advantage = 0.0
    accumulate(llm, live, head, [of], items, kept, CONFIG)
    found = gradients(llm, head)
    assert found["lm_head.weight"].abs().sum() == 0
    for name in ("user.weight", "item.weight", "log_scale"):
        assert found[name].abs().sum() > 0
    # The item's own tokens are learnt too, not only the user's.
    assert found["model.embed_tokens.weight"][41].abs().sum() > 0


def test_clipping_stops_a_chain_that_the_policy_has_left_behind(
    llm: PreTrainedModel, live: Backbone
) -> None:
    head = RecommendationHead(live.dim)
    of = with_own_logprobs(llm, group())
    for chain in of.chains:  # ratios of e, and of 1/e
        chain.old = [value - math.copysign(1, chain.advantage) for value in chain.old]
    only_tokens = CONFIG.model_copy(update={"item_weight": 0.0})
    figures = accumulate(llm, live, head, [of], [], torch.zeros(0, live.dim), only_tokens)
    assert figures.clipped_tokens == [1.0]
    assert gradients(llm, head)["lm_head.weight"].abs().sum() == 0


def test_the_item_loss_of_a_second_update_is_clipped(llm: PreTrainedModel, live: Backbone) -> None:
    head = RecommendationHead(live.dim)
    of = with_own_logprobs(llm, group())
    items, kept = [[31, 32], [41, 42, 43]], torch.randn(3, live.dim)
    for chain in of.chains:
        chain.advantage = 0.0
    accumulate(llm, live, head, [of], items, kept, CONFIG)
    assert of.old_item is not None
    assert gradients(llm, head)["user.weight"].abs().sum() > 0
    llm.zero_grad()
    head.zero_grad()
    of.old_item -= 1.0  # as if the first update had made the item e times likelier
    accumulate(llm, live, head, [of], items, kept, CONFIG)
    assert gradients(llm, head)["user.weight"].abs().sum() == 0


def test_item_vectors_after_an_update_are_those_of_the_new_weights(
    llm: PreTrainedModel, live: Backbone, retriever: Retriever
) -> None:
    head = RecommendationHead(live.dim)
    ranker = HeadRanker(live, head, retriever.catalog, ItemStates(""))
    try:
        before = ranker.table().vectors
        with torch.no_grad():
            for parameter in (*llm.parameters(), *head.parameters()):
                parameter.add_(torch.randn_like(parameter) * 0.05)
        ranker.refresh("updated")
        fresh = torch.cat([
            head.items(last_states(live, [reading])).detach()
            for reading in catalog_readings(retriever.catalog.snapshot, live)
        ])  # fmt: skip
        torch.testing.assert_close(ranker.table().vectors, fresh, atol=1e-4, rtol=1e-4)
        assert (before - fresh).abs().max() > 1e-2
    finally:
        ranker.close()


@pytest.mark.parametrize(
    "script",
    [
        ("<think>\n" + ask("comedy"), "The odd ones.</think>"),
        ("<think>\n" + ask("comedy"), "</think>"),
        # The last turn is one whose search was refused: no thought of the ranking's.
        ("<think>\n" + ask("comedy"), ask("", "Hm, what?"), "</think>"),
        ("<think>\n" + ask("comedy"), ask("comedy", "Again."), "</think>"),
        ("<think>\n" + ask("comedy"), ask("", "Hm, what?"), "The odd ones.</think>"),
    ],
)
def test_training_reads_what_the_head_read(
    live: Backbone, retriever: Retriever, monkeypatch: pytest.MonkeyPatch, script: Sequence[str]
) -> None:
    ranker = HeadRanker(
        live, RecommendationHead(live.dim), retriever.catalog, ItemStates(""), history_length=2
    )
    read: list[list[int]] = []
    plain = ranker.submit
    monkeypatch.setattr(ranker, "submit", lambda ids: (read.append(list(ids)), plain(ids))[1])
    graph = build_graph(ScriptedEngine(script, 8192), retriever, ranker=ranker)
    settings = RunSettings(decoding="free", rank="head", k=3, retrieve_n=4)
    try:
        state = asyncio.run(
            graph.ainvoke(
                {"history": ["id:0", "id:1", "id:2"]},
                context=settings,
                output_keys=list(RUN_KEYS),
            )
        )
    finally:
        ranker.close()
    run = Trajectory.from_state(state, live.tokenizer, id="run", model="tiny")
    assert [reading_of(run, ranker)] == read


def test_the_strength_of_a_head_is_chosen_by_users_that_it_was_not_fitted_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted: list[set[int]] = []
    plain = head_start._regress

    def regress(head: Any, users: torch.Tensor, *given: Any) -> None:
        fitted.append({int(owner) for owner in users[:, 0]})
        plain(head, users, *given)

    monkeypatch.setattr(head_start, "_regress", regress)
    torch.manual_seed(0)
    owners = torch.arange(30).repeat(20)
    users = torch.randn(600, 8)
    users[:, 0] = owners
    fit_head(
        RecommendationHead(8), users, torch.randint(12, (600,)), owners, torch.randn(12, 8), seed=0
    )
    *tried, last = fitted
    assert all(people == tried[0] for people in tried)
    assert len(tried[0]) == 27  # one of ten is wholly left out
    assert last == set(range(30))


def test_a_head_start_reads_each_line_and_learns(
    tiny_data: InteractionData, live: Backbone, retriever: Retriever, tmp_path: Path
) -> None:
    config = HeadStart(readings=200)
    catalog = retriever.catalog
    split = leave_one_out(tiny_data)
    vocabulary = Vocabulary.build(tiny_data.items)
    reader = Reader(tiny_data, split, catalog, live.tokenizer, vocabulary, history_length=4)
    readings = readings_of(reader, config, seed=0)
    assert len(readings) == 200
    for reading in readings[:20]:
        assert {int(item) for item in reading.targets} <= set(split.train[reading.user].tolist())
        assert reading.places[-1] == len(reading.ids) - 1
        assert len(reading.places) == len(reading.targets)
        for place, target in zip(reading.places[:-1], reading.targets[:-1], strict=True):
            line = live.tokenizer.decode(reading.ids[: place + 1])
            assert int(line.rsplit("Film ", 1)[1]) == (target - 1) % 40  # users walk in steps of 1
    users, targets, owners = states_of(readings, live, tmp_path)
    assert {int(owner) for owner in owners} == {reading.user for reading in readings}
    again, _, _ = states_of(readings, live, tmp_path)
    assert torch.equal(users, again)
    items = live.states(catalog_readings(catalog.snapshot, live))
    head = RecommendationHead(live.dim)
    rows = fit_head(head, users, targets, owners, items, seed=0)
    best = min(rows, key=lambda row: row["valid_loss"])
    assert best["valid_loss"] < math.log(40) - 0.3  # of a head that knows nothing
    with torch.no_grad():
        scores = head.users(users) @ head.items(items).T
    assert float(head.log_scale.detach().exp()) == pytest.approx(best["scale"])
    assert float(head.user.weight.detach().norm()) == pytest.approx(math.sqrt(live.dim), rel=1e-4)
    assert (scores.argmax(dim=1) == targets).float().mean() > 0.3
