import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from deeprec.errors import CatalogError, RequestError
from deeprec.tools import retriever as retriever_module
from deeprec.tools import search
from deeprec.tools.catalog import Catalog, CatalogSettings, Fingerprint
from deeprec.tools.chroma_store import ChromaStore
from deeprec.tools.filters import Filters
from deeprec.tools.interactions import InteractionData, Item, item_text
from deeprec.tools.retriever import RetrievalRequest, Retriever, ScoredItem
from deeprec.tools.text_encoder import TextEncoder
from deeprec.tools.trm.blend import blend
from deeprec.tools.trm.config import DeepRecConfig
from deeprec.tools.trm.model import TRM
from deeprec.tools.trm.preferences import embed_preferences
from deeprec.tools.trm.scoring import catalog_vectors, history_vectors


@dataclass
class House:
    """A real TRM (random weights), its encoder and a catalog, all small."""

    trm: TRM
    encoder: TextEncoder
    catalog: Catalog
    texts: np.ndarray

    def expected(self, request: RetrievalRequest) -> list[ScoredItem]:
        """The answer by the TRM's own functions, over the whole catalog."""
        ids = list(self.catalog.ids)
        history = [np.array([ids.index(id_) for id_ in request.history])]
        vectors = catalog_vectors(self.trm, self.texts)
        without = history_vectors(self.trm, history, self.texts) @ vectors.T
        asked = bool(request.preference and request.preference.strip())
        scores = without
        if asked:
            preference = embed_preferences(self.encoder, [request.preference or ""])
            has = np.array([True])
            scores = history_vectors(self.trm, history, self.texts, preference, has) @ vectors.T
        open_ = self.catalog.snapshot.attributes.mask(request.filters)
        for at, id_ in enumerate(ids):
            if id_ in request.exclude or not open_[at]:
                without[0, at] = scores[0, at] = -torch.inf
        order = blend(scores, without, request.k) if asked else scores.topk(request.k).indices
        return [ScoredItem(ids[at], float(scores[0, at])) for at in order[0]]


@pytest.fixture(scope="module")
def house(
    tiny_encoder: TextEncoder,
    tiny_data: InteractionData,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[House]:
    torch.manual_seed(0)
    config = DeepRecConfig(
        text_dim=tiny_encoder.dim, dim=8, transition_dim=8, preference_dim=8, history_length=5
    )
    trm = TRM(config, tuple(item.id for item in tiny_data.items)).eval()
    with torch.no_grad():
        for parameter in trm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    texts = tiny_encoder.encode_passages([item_text(item) for item in tiny_data.items])
    with Catalog.build(
        CatalogSettings(folder=tmp_path_factory.mktemp("retriever") / "catalog"),
        tiny_data.items,
        texts,
        catalog_vectors(trm, texts).numpy(),
        fingerprint=Fingerprint("d", "t", "e"),
    ) as catalog:
        yield House(trm, tiny_encoder, catalog, texts)


@pytest.fixture
def retriever(house: House) -> Iterator[Retriever]:
    with Retriever(house.trm, house.encoder, house.catalog) as opened:
        yield opened


REQUESTS = [
    RetrievalRequest(("1", "2", "3"), None, 10),
    RetrievalRequest(("1", "2", "3"), "comedy", 10),
    RetrievalRequest(("1", "2", "3"), "  ", 4, frozenset({"1", "2", "3"})),
    RetrievalRequest(tuple(str(n) for n in range(12)), "horror ; western", 7),
    RetrievalRequest(("39",), "drama", 10, frozenset({"39"}), Filters.parse({"genres": "Drama"})),
    RetrievalRequest(("5", "5", "5"), None, 1, frozenset({"not there"})),
    RetrievalRequest(("30", "2"), "comedy", 40),
    RetrievalRequest(("8",), "western", 9, frozenset("8"), Filters.parse({"year": {"gte": 1985}})),
]


def agree(found: Sequence[ScoredItem], wanted: Sequence[ScoredItem]) -> bool:
    same = [item.id for item in found] == [item.id for item in wanted]
    scores = np.allclose([i.score for i in found], [i.score for i in wanted], atol=1e-4)
    return same and scores


@contextmanager
def held_up(retriever: Retriever, house: House, monkeypatch: pytest.MonkeyPatch):
    """Keep the worker busy, so that what is submitted meanwhile arrives as one batch."""
    go, started = threading.Event(), threading.Event()
    real = house.trm.user_vectors

    def wait(*args: object):
        started.set()
        assert go.wait(20)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(house.trm, "user_vectors", wait)
        first = retriever.submit(RetrievalRequest(("17", "11"), None, 1))
        assert started.wait(20)
        yield
        go.set()
        first.result(20)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: f"{r.preference}-{r.k}")
def test_answers_are_the_trms_blended_and_masked(
    house: House, retriever: Retriever, request_: RetrievalRequest
):
    (found,) = retriever.retrieve([request_])
    assert agree(found, house.expected(request_))
    assert len(found) == request_.k


@pytest.fixture(scope="module")
def large(
    tiny_encoder: TextEncoder, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[House, CatalogSettings]]:
    """5,000 items, too many to be searched whole where HNSW is asked for."""
    torch.manual_seed(1)
    config = DeepRecConfig(
        text_dim=tiny_encoder.dim, dim=8, transition_dim=8, preference_dim=8, history_length=5
    )
    items = [
        Item(str(n), f"Film {n}", {"genres": (("Comedy", "Drama", "Horror")[n % 3],)})
        for n in range(5000)
    ]
    trm = TRM(config, tuple(item.id for item in items)).eval()
    with torch.no_grad():
        for parameter in trm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    texts = np.random.default_rng(0).normal(size=(len(items), tiny_encoder.dim))
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)
    folder = tmp_path_factory.mktemp("large") / "catalog"
    with Catalog.build(
        CatalogSettings(folder=folder),
        items,
        texts,
        catalog_vectors(trm, texts).numpy(),
        fingerprint=Fingerprint("d", "t", "e"),
    ) as catalog:
        yield House(trm, tiny_encoder, catalog, texts), replace(catalog.settings, search="hnsw")


def test_hnsw_serves_the_exact_lists(
    large: tuple[House, CatalogSettings], monkeypatch: pytest.MonkeyPatch
):
    house, settings = large
    rng = np.random.default_rng(3)
    asked = [None, "comedy", "horror ; western", "drama film 3"]
    kinds = [{}, {"exclude": True}, {"filters": Filters.parse({"genres": ["Comedy", "Drama"]})}]
    requests = []
    for n in range(48):
        history = tuple(map(str, rng.integers(5000, size=6)))
        kind = dict(kinds[n % 3])
        if "exclude" in kind:
            kind["exclude"] = frozenset(history)
        requests.append(RetrievalRequest(history, asked[n // 3 % 4], 20, **kind))
    wanted = [house.expected(request) for request in requests]
    queried: list[int] = []
    normalised: list[bool] = []
    query = ChromaStore.query

    def spy(self: ChromaStore, vectors: np.ndarray, n: int) -> list[list[str]]:
        queried.append(len(vectors))
        return query(self, vectors, n)

    def blend_spy(*scores: object, log_z: object) -> torch.Tensor:
        normalised.append(log_z is not None)
        return blend(*scores, log_z=log_z)

    def never(*_: object) -> None:
        raise AssertionError("every item was scored")

    with (
        Catalog.open(settings) as catalog,
        Retriever(house.trm, house.encoder, catalog) as retriever,
    ):
        monkeypatch.setattr(ChromaStore, "query", spy)
        monkeypatch.setattr(retriever_module, "blend", blend_spy)
        monkeypatch.setattr(search, "scores", never)
        found = retriever.retrieve(requests)
    assert sum(queried) >= len(requests)
    assert normalised
    assert all(normalised)
    shared = [
        len({item.id for item in row} & {item.id for item in best}) / 20
        for row, best in zip(found, wanted, strict=True)
    ]
    assert np.mean(shared) >= 0.95
    assert min(shared) >= 0.8


def test_what_arrives_together_is_one_batch(
    house: House, retriever: Retriever, monkeypatch: pytest.MonkeyPatch
):
    encoded: list[list[str]] = []
    batches: list[int] = []
    encode, run = house.encoder.encode_queries, house.trm.user_vectors
    monkeypatch.setattr(
        house.encoder, "encode_queries", lambda texts: encoded.append(list(texts)) or encode(texts)
    )
    monkeypatch.setattr(house.trm, "user_vectors", lambda *a: batches.append(len(a[0])) or run(*a))
    with held_up(retriever, house, monkeypatch):
        futures = [retriever.submit(request) for request in REQUESTS * 3]
    answers = [future.result(20) for future in futures]
    for request, found in zip(REQUESTS * 3, answers, strict=True):
        assert agree(found, house.expected(request))
    # `expected` above ran the model too; the worker ran before it: once for what held it up, and
    # once for all the others.
    users = {(r.history[-5:], p) for r in REQUESTS for p in {None, (r.preference or "").strip()}}
    users = {(h, p or None) for h, p in users}
    assert batches[:2] == [1, len(users)]
    assert sorted(encoded[0]) == ["comedy", "drama", "horror ; western", "western"]


def test_preferences_and_users_are_computed_once(
    house: House, retriever: Retriever, monkeypatch: pytest.MonkeyPatch
):
    first = retriever.retrieve(REQUESTS)

    def again(*_: object) -> None:
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(house.trm, "user_vectors", again)
        patch.setattr(house.encoder, "encode_queries", again)
        assert retriever.retrieve(REQUESTS) == first
    # A known preference of another user is not encoded again either.
    monkeypatch.setattr(house.encoder, "encode_queries", again)
    assert retriever.retrieve([RetrievalRequest(("20",), "comedy", 3)])


BAD = {
    "history is empty": RetrievalRequest((), None, 3),
    "names 'nobody', 'noone', and the catalog": RetrievalRequest(("nobody", "noone"), None, 3),
    "k is 0, and 40 of 40": RetrievalRequest(("1",), None, 0),
    "k is 40, and 39 of 40": RetrievalRequest(("1",), None, 40, frozenset({"1"})),
    "k is 11, and 10 of 40": RetrievalRequest(
        ("1",), None, 11, filters=Filters.parse({"genres": "Drama"})
    ),
    "unknown attribute 'mood'": RetrievalRequest(
        ("1",), None, 3, filters=Filters.parse({"mood": "dark"})
    ),
}


@pytest.mark.parametrize("said", BAD)
def test_bad_requests_are_refused(retriever: Retriever, said: str):
    with pytest.raises(RequestError, match=said):
        retriever.retrieve([BAD[said]])


def test_a_bad_request_fails_only_itself(
    house: House, retriever: Retriever, monkeypatch: pytest.MonkeyPatch
):
    with held_up(retriever, house, monkeypatch):
        good = [retriever.submit(request) for request in REQUESTS]
        bad = [retriever.submit(request) for request in BAD.values()]
    assert all(
        agree(future.result(20), house.expected(request))
        for request, future in zip(REQUESTS, good, strict=True)
    )
    assert all(isinstance(future.exception(20), RequestError) for future in bad)


def test_a_preference_that_breaks_the_encoder_fails_only_its_request(
    house: House, retriever: Retriever, monkeypatch: pytest.MonkeyPatch
):
    encode = house.encoder.encode_queries

    def choosy(texts: Sequence[str]) -> np.ndarray:
        if "poison" in texts:
            raise RuntimeError("the encoder is out of memory")
        return encode(texts)

    monkeypatch.setattr(house.encoder, "encode_queries", choosy)
    with held_up(retriever, house, monkeypatch):
        good = [retriever.submit(request) for request in REQUESTS]
        bad = retriever.submit(RetrievalRequest(("1",), "poison", 3))
    for request, future in zip(REQUESTS, good, strict=True):
        assert agree(future.result(20), house.expected(request))
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.result(20)
    assert retriever.retrieve([REQUESTS[0]])  # the worker lives on


@pytest.mark.parametrize(
    "wild", ["\ud800 lone", "nul \x00", "x" * 100_000, "<|im_end|>\n" * 50, "日本 🎬 \u202e"]
)
def test_whatever_the_policy_writes_is_answered(retriever: Retriever, wild: str):
    assert len(retriever.retrieve([RetrievalRequest(("1",), wild, 5)])[0]) == 5


def test_cancelled_requests_are_left_out(
    house: House, retriever: Retriever, monkeypatch: pytest.MonkeyPatch
):
    served: list[RetrievalRequest] = []
    real = retriever._validated
    monkeypatch.setattr(
        retriever, "_validated", lambda request, now: served.append(request) or real(request, now)
    )
    with held_up(retriever, house, monkeypatch):
        futures = [retriever.submit(request) for request in REQUESTS]
        assert futures[2].cancel()
    assert [future.result(20) for n, future in enumerate(futures) if n != 2]
    assert REQUESTS[2] not in served
    assert REQUESTS[3] in served
    with pytest.raises(CancelledError):
        futures[2].result(20)


async def test_event_loops_await_and_cancel(
    house: House, retriever: Retriever, monkeypatch: pytest.MonkeyPatch
):
    with held_up(retriever, house, monkeypatch):
        kept = asyncio.ensure_future(asyncio.wrap_future(retriever.submit(REQUESTS[0])))
        inner = retriever.submit(REQUESTS[1])
        dropped = asyncio.ensure_future(asyncio.wrap_future(inner))
        await asyncio.sleep(0)
        dropped.cancel()
        await asyncio.sleep(0)
        assert inner.cancelled()
    assert agree(await kept, house.expected(REQUESTS[0]))


def test_many_threads_get_their_own_answers(house: House, retriever: Retriever):
    wanted = [house.expected(request) for request in REQUESTS]
    wrong: list[int] = []

    def ask(seed: int) -> None:
        for n in np.random.default_rng(seed).integers(len(REQUESTS), size=40):
            if not agree(retriever.submit(REQUESTS[n]).result(20), wanted[n]):
                wrong.append(int(n))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong


def test_closing_cancels_what_waits_and_ends_the_worker(
    house: House, monkeypatch: pytest.MonkeyPatch
):
    retriever = Retriever(house.trm, house.encoder, house.catalog)
    with held_up(retriever, house, monkeypatch):
        waiting = retriever.submit(REQUESTS[0])
        closing = threading.Thread(target=retriever.close)
        closing.start()
        while not waiting.cancelled():
            time.sleep(0.001)
    closing.join(20)
    assert not retriever._batches._worker.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        retriever.submit(REQUESTS[0])
    retriever.close()


def test_items_added_are_retrieved_at_once_and_removed_ones_never(
    house: House, retriever: Retriever
):
    request = RetrievalRequest(("1", "2"), "horror", 41)
    known = retriever.retrieve([replace(request, k=40)])[0]
    new = Item("new", "Horror film 7", {"genres": ("Horror",)})
    retriever.upsert([new])
    try:
        found = retriever.retrieve([request])[0]
        assert {item.id for item in found} == {item.id for item in known} | {"new"}
        text = house.encoder.encode_passages([item_text(new)])
        with torch.no_grad():
            vector = house.trm.item_vectors(torch.tensor([-1]), torch.from_numpy(text))
        assert house.catalog.vectors[-1] == pytest.approx(vector[0].numpy(), abs=1e-5)
        # It may be part of a history, too.
        known_new = retriever.retrieve([RetrievalRequest(("new", "1"), None, 3)])
    finally:
        retriever.remove(["new"])
    assert retriever.retrieve([replace(request, k=40)])[0] == known
    # A history that names it is read without it, and none the shorter for it.
    long = ("9", "3", "4", "5", "6", "7")
    (full,) = retriever.retrieve([RetrievalRequest((*long, "new"), "comedy", 5)])
    assert agree(full, house.expected(RetrievalRequest(long, "comedy", 5)))
    (without,) = retriever.retrieve([RetrievalRequest(("new", "1"), None, 3, frozenset({"new"}))])
    assert agree(without, house.expected(RetrievalRequest(("1",), None, 3)))
    assert not agree(without, known_new[0])
    with pytest.raises(RequestError, match="'new'"):
        retriever.retrieve([RetrievalRequest(("new",), None, 3)])


def test_a_changed_item_changes_the_users_who_know_it(house: House, retriever: Retriever):
    request = RetrievalRequest(("1", "2"), None, 5)
    before = retriever.retrieve([request])[0]
    item = house.catalog.item("2")
    retriever.upsert([replace(item, title="western western 50")])
    try:
        after = retriever.retrieve([request])[0]
        assert [i.score for i in after] != pytest.approx([i.score for i in before], abs=1e-4)
    finally:
        retriever.upsert([item])
    assert agree(retriever.retrieve([request])[0], before)


def test_a_catalog_of_another_trm_is_refused(house: House):
    torch.manual_seed(1)
    other = TRM(house.trm.config, house.trm.item_ids)
    wide = TRM(house.trm.config.model_copy(update={"transition_dim": 10}), house.trm.item_ids)
    for trm in (other, wide):
        with pytest.raises(CatalogError, match="not made by this TRM"):
            Retriever(trm, house.encoder, house.catalog)
