import gc
import os
import shutil
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import chromadb
import numpy as np
import pytest
import torch
from chromadb.config import Settings

from deeprec.errors import AmbiguousTitleError, CatalogError, RequestError
from deeprec.tools import search
from deeprec.tools.catalog import Catalog, CatalogSettings, Fingerprint
from deeprec.tools.chroma_store import ChromaStore
from deeprec.tools.filters import Filters
from deeprec.tools.interactions import Item
from deeprec.tools.trm.blend import blend

from ..conftest import Disk

FINGERPRINT = Fingerprint(dataset="data-1", trm="trm-1", encoder="encoder-1")
SIZE, DIM, TEXT_DIM = 1500, 16, 12  # more than Chroma keeps in its log before it writes an index
GENRES = ("Comedy", "Drama", "Horror")


def made_items(n: int = SIZE) -> list[Item]:
    return [
        Item(
            f"id{i}",
            f"Title {i}",
            {"genres": (GENRES[i % 3],), "year": (str(1950 + i % 50),)},
            "words",
        )
        for i in range(n)
    ]


def made_vectors(n: int = SIZE, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    texts = rng.normal(size=(n, TEXT_DIM)).astype(np.float32)
    return texts, rng.normal(size=(n, DIM)).astype(np.float32)


def build(settings: CatalogSettings, n: int = SIZE) -> Catalog:
    return Catalog.build(settings, made_items(n), *made_vectors(n), fingerprint=FINGERPRINT)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "catalog"
    build(CatalogSettings(folder=folder)).close()
    return folder


@pytest.fixture
def here(template: Path, tmp_path: Path) -> CatalogSettings:
    shutil.copytree(template, tmp_path / "catalog")
    return CatalogSettings(folder=tmp_path / "catalog", timeout_s=0.5)


@pytest.fixture
def catalog(here: CatalogSettings) -> Iterator[Catalog]:
    with Catalog.open(here, fingerprint=FINGERPRINT) as opened:
        yield opened


def same(left: Catalog, right: Catalog) -> bool:
    a, b = left.snapshot, right.snapshot
    return (
        a.items == b.items
        and np.array_equal(a.vectors, b.vectors)
        and np.array_equal(a.text_embeddings, b.text_embeddings)
        and a.titles == b.titles
    )


def found_by(
    catalog: Catalog,
    users: np.ndarray,
    k: int,
    *,
    exclude: Sequence[Collection[str]] | None = None,
    filters: Sequence[Filters] | None = None,
) -> list[list[tuple[str, float]]]:
    """The k best candidates of each user, as (id, score)."""
    now, rows = catalog.snapshot, range(len(users))
    allowed = [
        now.allowed(exclude[r] if exclude else (), filters[r] if filters else Filters())
        for r in rows
    ]
    positions, (scores,) = catalog.candidates(now, [torch.from_numpy(users)], k, allowed)
    answers = []
    for row, may in enumerate(allowed):
        best = scores[row].topk(min(k, may.count))
        where = best.indices if positions is None else positions[row][best.indices]
        pairs = zip(where.tolist(), best.values.tolist(), strict=True)
        answers.append([(now.ids[at], score) for at, score in pairs])
    return answers


def exact(users: np.ndarray, vectors: np.ndarray, k: int, allowed: np.ndarray) -> np.ndarray:
    return np.argsort(-np.where(allowed, users @ vectors.T, -np.inf), axis=1)[:, :k]


def test_everything_comes_back_exactly(catalog: Catalog):
    texts, vectors = made_vectors()
    assert catalog.snapshot.items == tuple(made_items())
    assert catalog.ids == tuple(item.id for item in made_items())
    assert np.array_equal(catalog.vectors, vectors)
    assert np.array_equal(catalog.text_embeddings, texts)
    assert catalog.vectors.dtype == np.float32
    assert catalog.vectors.flags.c_contiguous
    assert not catalog.vectors.flags.writeable
    assert catalog.item("id7") == made_items()[7]
    assert catalog.display_title("id7") == "Title 7"
    assert catalog.resolve_title("title 7") == "id7"


def test_awkward_items_come_back_exactly(tmp_path: Path):
    items = [
        Item("a\x00b", "nul \x00 in title", {"": ("",), "item": ("x",), "order": ("y",)}, "\x00"),
        Item("a", "<|im_end|>\u202e", {"tags": ("\u200b", "a;b")}, "line\nbreak"),
        Item("日本/é ' \"", "日本", {}, "\U0001f600"),
    ]
    settings = CatalogSettings(folder=tmp_path / "c a?t#%a'log")
    texts, vectors = made_vectors(3)
    with Catalog.build(settings, items, texts, vectors, fingerprint=FINGERPRINT) as built:
        assert built.snapshot.items == tuple(items)
        assert built.display_title("a") == "‹|im_end|›"
        assert built.display_attributes("a") == {"tags": ("a;b",)}


def test_chroma_holds_text_attributes_and_both_vectors(here: CatalogSettings):
    with closing_client(here) as client:
        collections = {c.name: c for c in client.list_collections()}
        held = collections.pop("deeprec").get(
            ids=["id4"], include=["documents", "metadatas", "embeddings"]
        )
        (texts,) = collections.values()
        (row,) = held["metadatas"]
        text = texts.get(ids=[row["text"]], include=["embeddings"])["embeddings"]
    assert held["documents"] == ["Title 4. genres: Drama. year: 1954. words"]
    assert (row["title"], row["attribute:genres"]) == ("Title 4", "Drama")
    assert np.array_equal(np.float32(held["embeddings"][0][:-1]), made_vectors()[1][4])
    assert np.array_equal(np.float32(text[0]), made_vectors()[0][4])


def closing_client(settings: CatalogSettings) -> "closing[chromadb.api.client.Client]":
    return closing(
        chromadb.PersistentClient(settings.folder, settings=Settings(anonymized_telemetry=False))
    )


@pytest.mark.parametrize("how", ["exact", "hnsw"])
def test_the_largest_inner_products_are_found(here: CatalogSettings, how: str):
    users = made_vectors(9, seed=1)[1]
    raw = [None, {"genres": "Comedy"}, {"genres": "Drama", "year": {"gte": 1997}}] * 3
    fitting = [
        lambda of: True,
        lambda of: "Comedy" in of["genres"],
        lambda of: "Drama" in of["genres"] and int(of["year"][0]) >= 1997,
    ]
    # Excluding the best ones makes HNSW widen its search.
    vectors = made_vectors()[1]
    best = exact(users, vectors, 40, np.ones((9, SIZE), dtype=bool))
    exclude = [{f"id{i}" for i in row[: n * 5]} | {"not there"} for n, row in enumerate(best)]
    items = made_items()
    allowed = np.array(
        [
            [fits(item.attributes) and item.id not in gone for item in items]
            for fits, gone in zip(fitting * 3, exclude, strict=True)
        ]
    )
    with Catalog.open(replace(here, search=how)) as catalog:
        filters = [Filters.parse(f) for f in raw]
        found = found_by(catalog, users, 10, exclude=exclude, filters=filters)
    for user, row, wanted in zip(users, found, exact(users, vectors, 10, allowed), strict=True):
        assert [id_ for id_, _ in row] == [f"id{i}" for i in wanted]
        assert [score for _, score in row] == pytest.approx(vectors[wanted] @ user, abs=1e-4)


def test_chroma_orders_by_the_inner_product(catalog: Catalog, here: CatalogSettings):
    user = made_vectors(1, seed=1)[1]
    ((best, score), *_) = found_by(catalog, user, 3)[0]
    with closing_client(here) as client:
        held = client.get_collection("deeprec", embedding_function=None)
        answer = held.query(query_embeddings=np.append(user, 0), n_results=1, include=["distances"])
    assert answer["ids"] == [[best]]
    lengths = (user**2).sum() + held.metadata["radius"] ** 2
    assert (lengths - answer["distances"][0][0]) / 2 == pytest.approx(score, abs=1e-3)


def test_vectors_that_share_a_mean_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    n = 2500
    texts, vectors = made_vectors(n)
    vectors[:, :4] += 4
    settings = CatalogSettings(folder=tmp_path / "c", search="hnsw")
    longer = (2 * vectors[:3]).astype(np.float32)  # than any that the index was built for
    users = np.concatenate([made_vectors(40, seed=1)[1], longer])
    with Catalog.build(settings, made_items(n), texts, vectors, fingerprint=FINGERPRINT) as catalog:
        catalog.upsert([Item(f"new{i}", "N") for i in range(3)], texts[:3], longer)
        monkeypatch.setattr(search, "scores", None)  # no scoring of every item
        found = found_by(catalog, users, 20)
        best = exact(users, catalog.vectors, 20, np.ones((43, n + 3), dtype=bool))
    share = [
        len({id_ for id_, _ in row} & {catalog.ids[at] for at in wanted}) / 20
        for row, wanted in zip(found, best, strict=True)
    ]
    assert np.mean(share) > 0.95
    assert [row[0][0] for row in found[-3:]] == [catalog.ids[at] for at in best[-3:, 0]]


@pytest.mark.parametrize("how", ["exact", "hnsw"])
def test_where_few_are_allowed_fewer_come_back(here: CatalogSettings, how: str):
    with Catalog.open(replace(here, search=how)) as catalog:
        keep = {"id1", "id2"}
        others = {i for i in catalog.ids if i not in keep}
        (found,) = found_by(catalog, made_vectors(1)[1], 5, exclude=[others])
        assert {id_ for id_, _ in found} == keep


def shared(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Share of the wanted positions that were found, over rows."""
    pairs = zip(found.tolist(), wanted.tolist(), strict=True)
    return float(np.mean([len({*row} & {*best}) / len(best) for row, best in pairs]))


def test_sums_over_the_catalog_are_estimated_under_hnsw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    n = 6000  # three times as many as are sampled
    vectors = made_vectors(n)[1]
    # One is sure of what it wants, the other hardly prefers anything.
    users = [torch.from_numpy(by * made_vectors(8, seed=s)[1]) for by, s in ((0.9, 1), (0.4, 2))]
    settings = CatalogSettings(folder=tmp_path / "c", search="hnsw")
    with Catalog.build(
        settings, made_items(n), vectors[:, :2], vectors, fingerprint=FINGERPRINT
    ) as catalog:
        now = catalog.snapshot
        rows = [
            ((), None),
            (("id1", "id7"), None),
            ((), {"genres": "Comedy"}),
            ((), {"year": 1950}),
        ]
        allowed = [now.allowed(gone, Filters.parse(raw)) for gone, raw in rows * 2]
        whole = [search.scores(of, now.matrix, allowed) for of in users]
        found = catalog.candidates(now, users, 20, allowed)
        sums = catalog.log_z(now, users, found, allowed)
        assert catalog.log_z(now, users, found, allowed)[0].tolist() == sums[0].tolist()
        monkeypatch.setattr(catalog._store, "settings", replace(settings, search="exact"))
        every = catalog.candidates(now, users, 20, allowed)
        assert catalog.log_z(now, users, every, allowed) is None
    assert found.positions.shape[1] < 500
    for scores, pool, estimate in zip(whole, found.scores, sums, strict=True):
        # Chroma builds its index on several threads, so the pool differs from run to run.
        error = (estimate - scores.logsumexp(1)).abs()
        blind = (pool.logsumexp(1) - scores.logsumexp(1)).abs()  # the pool alone is not enough
        assert error.mean() < 0.5 * blind.mean()
    wanted = blend(whole[0], whole[1], 20)
    estimated = found.positions.gather(1, blend(*found.scores, 20, log_z=(sums[0], sums[1])))
    guessed = found.positions.gather(1, blend(*found.scores, 20))
    assert shared(estimated, wanted) > 0.9
    assert shared(estimated, wanted) > shared(guessed, wanted)


def test_updates_keep_memory_and_chroma_equal(catalog: Catalog, here: CatalogSettings):
    texts, vectors = made_vectors(3, seed=5)
    catalog.upsert(
        [Item("new", "Title 5"), Item("id3", "Other"), Item("new2", "N")], texts, vectors
    )
    catalog.remove(["id9", "new2"])
    assert catalog.ids[3] == "id3"
    assert catalog.ids[-1] == "new"
    assert len(catalog) == SIZE
    assert catalog.display_title("id5") == "Title 5 (1955)"
    assert catalog.display_title("new") == "Title 5 [id new]"
    assert catalog.resolve_title("other") == "id3"
    assert found_by(catalog, vectors[:1] * 100, 1)[0][0][0] == "new"
    with Catalog.open(here) as again:
        assert same(catalog, again)
    with closing_client(here) as client:
        assert sum(c.count() for c in client.list_collections()) == 2 * SIZE  # no text is left over
        row = client.get_collection("deeprec", embedding_function=None).get(ids=["id3"])
        assert "attribute:genres" not in row["metadatas"][0]


def test_updated_items_are_found_by_hnsw(here: CatalogSettings):
    with Catalog.open(replace(here, search="hnsw")) as catalog:
        texts, vectors = made_vectors(1, seed=5)
        catalog.upsert([Item("id3", "Other")], texts, vectors)
        catalog.remove(["id4"])
        assert found_by(catalog, vectors * 100, 1)[0][0][0] == "id3"
        assert found_by(catalog, made_vectors()[1][4:5], 1)[0][0][0] != "id4"


def test_an_old_snapshot_goes_with_its_last_reference(catalog: Catalog):
    """No cycle holds it until a full collection, which may never come (tools/loading.py)."""
    gc.disable()
    try:
        old = weakref.ref(catalog.snapshot)
        now = catalog.snapshot
        now.allowed({"id3"}, Filters.parse({"genres": ["Drama"]}))
        assert now.shown_attributes(now.position("id4"))
        assert now.titles[0]
        assert now.title_index
        del now
        catalog.remove(["id3"])
        assert old() is None
    finally:
        gc.enable()


def test_what_is_allowed_is_what_is_neither_excluded_nor_filtered_out(catalog: Catalog):
    rng = np.random.default_rng(0)
    now = catalog.snapshot
    for size in (0, 1, 40):
        excluded = frozenset(now.ids[at] for at in rng.choice(SIZE, size)) | {"of another catalog"}
        for filters in (Filters(), Filters.parse({"genres": ["Drama"]})):
            may = now.allowed(excluded, filters)
            asked = np.sort(rng.choice(SIZE, 300))[::-1].copy()
            fits = [not filters or "Drama" in now.items[at].attributes["genres"] for at in asked]
            expected = [
                fit and now.ids[at] not in excluded for at, fit in zip(asked, fits, strict=True)
            ]
            assert may.of(asked).tolist() == expected
            assert may.count == may.of(np.arange(SIZE)).sum()


def test_a_snapshot_stays_as_it_was(catalog: Catalog):
    before = catalog.snapshot
    catalog.remove(["id0"])
    assert before.ids[0] == "id0"
    assert len(before) == SIZE == len(before.vectors)


def test_bad_updates_are_refused_and_change_nothing(catalog: Catalog, here: CatalogSettings):
    texts, vectors = made_vectors(2, seed=5)
    two = [Item("new", "N"), Item("new2", "N")]
    nan = vectors.copy()
    nan[1, 0] = np.nan
    for problem, attempt in {
        "given twice": lambda: catalog.upsert([two[0], two[0]], texts, vectors),
        "id 'id1' is given twice": lambda: catalog.remove(["id1", "id1"]),
        "no item with id 'no'": lambda: catalog.remove(["id1", "no"]),
        "empty catalog": lambda: catalog.remove(catalog.ids),
        "width 3": lambda: catalog.upsert(two, texts, vectors[:, :3]),
        "width 4": lambda: catalog.upsert(two, texts[:, :4], vectors),
        "shape": lambda: catalog.upsert(two, texts[:1], vectors),
        "'new2' are not finite": lambda: catalog.upsert(two, texts, nan),
        "no items": lambda: catalog.upsert([], texts[:0], vectors[:0]),
    }.items():
        with pytest.raises(CatalogError, match=problem):
            attempt()
    with Catalog.open(here) as again:
        assert same(catalog, again)
        assert len(again) == SIZE


def test_texts_are_read_as_ids_and_titles(tmp_path: Path):
    items = [
        Item("187", "Godfather"),
        Item("330", "187"),
        Item("5", "5"),
        Item("id:6", "Marked"),
        Item("7", "id:5"),
    ]
    texts, vectors = made_vectors(len(items))
    with Catalog.build(
        CatalogSettings(folder=tmp_path / "c"), items, texts, vectors, fingerprint=FINGERPRINT
    ) as catalog:
        wanted = {"330": "330", " 330 ": "330", "5": "5", "godfather": "187", "ID:5": "7"}
        wanted |= {"id:187": "187", "id: 330": "330", "id:5": "5", "id:6": "id:6"}
        assert {text: catalog.resolve(text) for text in wanted} == wanted
        for text in ("187", " 187\t"):
            with pytest.raises(AmbiguousTitleError, match="'id:187'") as caught:
                catalog.resolve(text)
            assert caught.value.candidates == [("187", "Godfather"), ("330", "187")]
        with pytest.raises(RequestError, match="no item has the id '18'"):
            catalog.resolve("id:18")
        with pytest.raises(RequestError, match="no item is titled 'nothing'"):
            catalog.resolve("nothing")


def test_unknown_ids_are_named(catalog: Catalog):
    for attempt in (catalog.item, catalog.display_title, catalog.display_attributes):
        with pytest.raises(CatalogError, match="no item with id 'nobody'"):
            attempt("nobody")


@pytest.mark.parametrize(
    ("part", "said"), [("dataset", "data set"), ("trm", "TRM"), ("encoder", "sentence encoder")]
)
def test_a_catalog_of_something_else_is_refused(here: CatalogSettings, part: str, said: str):
    other = replace(FINGERPRINT, **{part: "other-2"})
    with pytest.raises(CatalogError, match=f"another {said}") as caught:
        Catalog.open(here, fingerprint=other)
    assert getattr(FINGERPRINT, part) in str(caught.value)
    assert "other-2" in str(caught.value)


def test_another_schema_is_refused(here: CatalogSettings):
    with closing_client(here) as client:
        held = client.get_collection("deeprec", embedding_function=None)
        held.modify(metadata={**held.metadata, "schema": 99})
    with pytest.raises(CatalogError, match="schema 99"):
        Catalog.open(here)


def test_settings_want_a_folder_or_a_server():
    for wrong in ({}, {"folder": Path("x"), "host": "localhost"}):
        with pytest.raises(CatalogError, match="give one of both"):
            CatalogSettings(**wrong)


# Faults


def indexes(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


def drop_indexes(folder: Path) -> None:
    for path in indexes(folder):
        shutil.rmtree(path)


def halve_indexes(folder: Path) -> None:
    for path in indexes(folder):
        os.truncate(path / "data_level0.bin", (path / "data_level0.bin").stat().st_size // 2)


def scramble_indexes(folder: Path) -> None:
    """Swap one vector in the middle of each file; everything can be read, and counts are right."""
    for path in indexes(folder):
        raw = bytearray((path / "data_level0.bin").read_bytes())
        middle = len(raw) // 2
        raw[middle : middle + 4 * DIM] = np.full(DIM, 0.5, dtype=np.float32).tobytes()
        (path / "data_level0.bin").write_bytes(raw)


def truncate_database(folder: Path) -> None:
    os.truncate(folder / "chroma.sqlite3", (folder / "chroma.sqlite3").stat().st_size // 2)


def overwrite_database(folder: Path) -> None:
    (folder / "chroma.sqlite3").write_bytes(b"not a database " * 1000)


def empty_database(folder: Path) -> None:
    (folder / "chroma.sqlite3").write_bytes(b"")


def delete_database(folder: Path) -> None:
    (folder / "chroma.sqlite3").unlink()


def lose_texts(folder: Path) -> None:
    with closing_client(CatalogSettings(folder=folder)) as client:
        (texts,) = [c for c in client.list_collections() if c.name != "deeprec"]
        texts.delete(ids=texts.get(limit=1)["ids"])


def spoil_an_item(folder: Path) -> None:
    with closing_client(CatalogSettings(folder=folder)) as client:
        client.get_collection("deeprec", embedding_function=None).update(
            ids=["id5"], metadatas=[{"item": "{"}]
        )


FAULTS = [
    drop_indexes,
    scramble_indexes,
    truncate_database,
    overwrite_database,
    empty_database,
    delete_database,
    lose_texts,
    spoil_an_item,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_damage_is_found_at_open_and_mended_by_building_again(here: CatalogSettings, fault):
    assert here.folder is not None
    fault(here.folder)
    with pytest.raises(CatalogError, match="deeprec index") as caught:
        Catalog.open(here, fingerprint=FINGERPRINT)
    assert str(here.folder) in str(caught.value)
    with build(here, 9) as again:
        assert len(again) == 9


def test_an_index_cut_short_is_found_at_open(here: CatalogSettings):
    # In a process of its own: Chroma reads the short file into memory that it does not clear, and
    # where this process built the catalog that may hold the very vectors that the file has lost.
    halve_indexes(here.folder)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from deeprec.tools.catalog import Catalog, CatalogSettings\n"
        "Catalog.open(CatalogSettings(folder=Path(sys.argv[1])))"
    )
    opened = subprocess.run(
        [sys.executable, "-c", code, str(here.folder)], capture_output=True, text=True, check=False
    )
    assert opened.returncode == 1
    last = opened.stderr.splitlines()[-1]
    assert "CatalogError" in last
    assert str(here.folder) in last
    assert "deeprec index" in last


def test_a_catalog_that_lost_its_index_counts_right_and_is_refused(here: CatalogSettings):
    """What makes it treacherous: Chroma still counts all items, and answers with one."""
    drop_indexes(here.folder)
    with closing_client(here) as client:
        held = client.get_collection("deeprec", embedding_function=None)
        assert held.count() == SIZE
        user = np.append(made_vectors(1, seed=1)[1], 0)
        answer = held.query(query_embeddings=user, n_results=10, include=[])
        assert len(answer["ids"][0]) < 10
    with pytest.raises(CatalogError, match="deeprec index"):
        Catalog.open(here, fingerprint=FINGERPRINT)
    with build(here) as again:
        texts, vectors = made_vectors()
        assert again.snapshot.items == tuple(made_items())
        assert np.array_equal(again.vectors, vectors)
        assert np.array_equal(again.text_embeddings, texts)


def damage_index(folder: Path) -> None:
    drop_indexes(folder)
    truncate_database(folder)


@pytest.mark.parametrize("fault", [drop_indexes, truncate_database, damage_index])
def test_damage_while_serving_is_an_error_and_no_crash(here: CatalogSettings, fault):
    """Exact search answers from memory; HNSW answers rightly, or not at all."""
    vectors = made_vectors(4, seed=1)[1]
    with Catalog.open(replace(here, search="hnsw")) as catalog:
        before = found_by(catalog, vectors, 5)
        fault(here.folder)
        with suppress(CatalogError):
            assert found_by(catalog, vectors, 5) == before
        assert len(catalog.snapshot.items) == SIZE


def test_an_index_that_answers_badly_is_found(here: CatalogSettings, monkeypatch):
    monkeypatch.setattr(ChromaStore, "query", lambda self, vectors, n: [["id1"]] * len(vectors))
    with pytest.raises(CatalogError, match="does not find the vectors"):
        Catalog.open(here)


@pytest.mark.parametrize("found", [[f"id{n}" for n in range(10)], ["id1"] * 10, ["no"] * 10])
def test_wrong_answers_of_the_right_number_are_found(
    here: CatalogSettings, monkeypatch: pytest.MonkeyPatch, found: list[str]
):
    monkeypatch.setattr(ChromaStore, "query", lambda self, vectors, n: [found] * len(vectors))
    with pytest.raises(CatalogError, match="does not find the vectors"):
        Catalog.open(here)


@pytest.mark.parametrize("kind", ["equal", "zero", "half equal", "tiny"])
def test_equal_vectors_are_no_damage(tmp_path: Path, kind: str):
    n = 300
    texts, vectors = made_vectors(n)
    alike = {"equal": slice(None), "zero": slice(None), "half equal": slice(0, n, 2)}.get(kind)
    if alike is not None:
        vectors[alike] = 0 if kind == "zero" else vectors[1]
    else:
        vectors *= 1e-12
    settings = CatalogSettings(folder=tmp_path / "c")
    with Catalog.build(settings, made_items(n), texts, vectors, fingerprint=FINGERPRINT) as built:
        assert len(built) == n
        assert np.array_equal(built.vectors, vectors)


def test_a_missing_catalog_is_not_made(tmp_path: Path):
    with pytest.raises(CatalogError, match="no catalog at"):
        Catalog.open(CatalogSettings(folder=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


HOLD = """
import sqlite3, sys, time
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("BEGIN " + sys.argv[2])
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture(params=["EXCLUSIVE", "IMMEDIATE"])
def lock(here: CatalogSettings, request: pytest.FixtureRequest):
    holders = []

    def hold() -> None:
        command = [sys.executable, "-c", HOLD, str(here.folder / "chroma.sqlite3"), request.param]
        holders.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        holders[0].stdout.readline()

    yield hold
    for holder in holders:
        holder.kill()
        holder.communicate()


def test_a_locked_database_is_refused_in_time(here: CatalogSettings, lock):
    lock()
    start = time.monotonic()
    with pytest.raises(CatalogError, match="locked by another process"):
        Catalog.open(here)
    assert time.monotonic() - start < 10


def test_a_lock_while_serving_refuses_updates_only(catalog: Catalog, lock):
    lock()
    with pytest.raises(CatalogError, match="locked by another process"):
        catalog.remove(["id1"])
    assert len(found_by(catalog, made_vectors(1)[1], 5)[0]) == 5


def test_after_a_failed_update_searches_answer_and_updates_wait_for_a_reopen(
    catalog: Catalog, here: CatalogSettings, monkeypatch
):
    before = catalog.snapshot
    texts, vectors = made_vectors(1, seed=5)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        # The text is written, the item is not.
        patch.setattr(catalog._store._vectors, "upsert", full)
        with pytest.raises(CatalogError, match="No space left"):
            catalog.upsert([Item("id3", "Other")], texts, vectors)
    assert catalog.snapshot is before
    with pytest.raises(CatalogError, match="failed half-way"):
        catalog.remove(["id1"])
    assert found_by(catalog, before.vectors[3:4] * 100, 1)
    with Catalog.open(here) as again:
        assert same(catalog, again)  # the leftover text is nobody's


def test_a_full_disk_stops_an_update_and_a_build_and_loses_nothing(
    template: Path, small_disk: Callable[[int], Disk]
):
    disk = small_disk(16)
    shutil.copytree(template, disk.folder / "catalog")
    here = CatalogSettings(folder=disk.folder / "catalog")
    texts, vectors = made_vectors(500, seed=5)
    changed = [Item(f"id{i}", "Other", {}, "words " * 300) for i in range(500)]
    with Catalog.open(here, fingerprint=FINGERPRINT) as catalog:
        before = catalog.snapshot
        disk.fill()
        with pytest.raises(CatalogError, match=r"disk is full.*Free disk space"):
            catalog.upsert(changed, texts, vectors)
        assert catalog.snapshot is before
        assert len(found_by(catalog, vectors[:1], 5)[0]) == 5
    with pytest.raises(CatalogError, match="Free disk space"):
        build(here)
    assert {path.name for path in disk.folder.iterdir()} == {"catalog", ".filler"}
    disk.free()
    with Catalog.open(here, fingerprint=FINGERPRINT) as catalog:
        assert len(catalog) == SIZE
        old = {item.id: item for item in before.items}
        new = {item.id: item for item in changed}
        assert all(item in (old[item.id], new.get(item.id)) for item in catalog.snapshot.items)
        catalog.upsert(changed, texts, vectors)
        assert catalog.item("id499") == changed[499]


UPDATE = """
import sys
from pathlib import Path
import numpy as np
from deeprec.tools.catalog import Catalog, CatalogSettings
from deeprec.tools.interactions import Item
catalog = Catalog.open(CatalogSettings(folder=Path(sys.argv[1])))
rng = np.random.default_rng(1)
print("go", flush=True)
for turn in range(10_000):
    chosen = rng.choice(1500, 40, replace=False)
    items = [Item(f"id{i}", f"turn {turn}") for i in chosen]
    # Rows of one direction alone would be too much alike for any search index.
    texts = rng.standard_normal((40, 12)).astype(np.float32)
    vectors = rng.standard_normal((40, 16)).astype(np.float32)
    texts[:, 0] = vectors[:, 0] = turn / 1000
    catalog.upsert(items, texts, vectors)
"""


def test_a_process_killed_during_updates_leaves_whole_items(here: CatalogSettings):
    with subprocess.Popen(
        [sys.executable, "-c", UPDATE, str(here.folder)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        time.sleep(1.0)
        process.kill()
    with Catalog.open(here) as catalog:
        now = catalog.snapshot
        changed = [at for at, item in enumerate(now.items) if item.title.startswith("turn ")]
        assert changed
        assert len(now) == SIZE
        for at in changed:
            mark = np.float32(int(now.items[at].title.split()[1]) / 1000)
            assert now.vectors[at][0] == mark
            assert now.text_embeddings[at][0] == mark
        catalog.remove(["id0"])


# Building


def test_a_failed_build_leaves_the_old_catalog(here: CatalogSettings, monkeypatch):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Catalog.build(here, made_items(9), *made_vectors(9), fingerprint=FINGERPRINT, progress=stop)
    assert [path.name for path in here.folder.parent.iterdir()] == ["catalog"]
    with Catalog.open(here, fingerprint=FINGERPRINT) as old:
        assert len(old) == SIZE


BUILD = """
import sys
from pathlib import Path
import numpy as np
from deeprec.tools.catalog import Catalog, CatalogSettings, Fingerprint
from deeprec.tools.interactions import Item
print("go", flush=True)
items = [Item(f"id{i}", "new") for i in range(1500)]
for turn in range(10_000):
    rows = np.full((1500, 1), 1.0 + turn, dtype=np.float32)
    Catalog.build(
        CatalogSettings(folder=Path(sys.argv[1])), items, rows.repeat(12, 1), rows.repeat(16, 1),
        fingerprint=Fingerprint("data-1", "trm-1", "encoder-1"),
    ).close()
    print("built", flush=True)
"""


def test_a_process_killed_during_builds_leaves_a_whole_catalog(here: CatalogSettings):
    with subprocess.Popen(
        [sys.executable, "-c", BUILD, str(here.folder)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        for _ in range(2):  # the second build is under way
            assert process.stdout.readline()
        wait_for_a_build(here.folder.parent)
        process.kill()
    with Catalog.open(here, fingerprint=FINGERPRINT) as catalog:
        assert {item.title for item in catalog.snapshot.items} == {"new"}
        assert len(catalog) == SIZE
    with build(here, 9) as catalog:
        assert len(catalog) == 9


def wait_for_a_build(folder: Path) -> None:
    """Until a catalog is being written beside the one that is there."""
    limit = time.monotonic() + 60
    while not list(folder.glob(".catalog.*/chroma.sqlite3")):
        assert time.monotonic() < limit


def test_a_build_replaces_the_old_catalog_and_tells_how_far_it_is(here: CatalogSettings):
    seen: list[tuple[int, int]] = []
    with Catalog.build(
        here,
        made_items(9),
        *made_vectors(9),
        fingerprint=replace(FINGERPRINT, trm="trm-2"),
        progress=lambda done, total: seen.append((done, total)),
    ) as catalog:
        assert catalog.fingerprint.trm == "trm-2"
        assert len(catalog) == 9
    assert seen == [(9, 9)]
    assert [path.name for path in here.folder.parent.iterdir()] == ["catalog"]


def test_a_catalog_may_be_closed_twice(tmp_path: Path):
    settings = CatalogSettings(folder=tmp_path / "c")
    with build(settings, 9) as first:
        first.close()
    with build(settings, 9):  # the folder does not count as open
        pass


def test_builds_never_overwrite_something_else(tmp_path: Path, catalog: Catalog):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(CatalogError, match="holds something else"):
        build(CatalogSettings(folder=tmp_path / "other"), 9)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"
    with pytest.raises(CatalogError, match="open in this process"):
        build(catalog.settings, 9)


@pytest.mark.parametrize("twice", [made_items(3) + made_items(1), []])
def test_items_given_twice_or_not_at_all_are_refused(tmp_path: Path, twice: list[Item]):
    with pytest.raises(CatalogError, match=r"given twice|no items"):
        Catalog.build(
            CatalogSettings(folder=tmp_path / "c"),
            twice,
            *made_vectors(len(twice)),
            fingerprint=FINGERPRINT,
        )
    assert not list(tmp_path.iterdir())


# Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CatalogSettings]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    chroma = Path(sys.executable).with_name("chroma")
    folder = tmp_path_factory.mktemp("server")
    command = [chroma, "run", "--path", folder, "--host", "127.0.0.1", "--port", str(port)]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield CatalogSettings(host="127.0.0.1", port=port)
    finally:
        process.kill()
        process.wait()


def test_a_server_is_the_same_code(server: CatalogSettings, catalog: Catalog):
    build(server, 9).close()
    with build(replace(server, search="hnsw")) as remote:  # replaces the first
        assert same(remote, catalog)
        user = made_vectors(3, seed=2)[1]
        assert [[id_ for id_, _ in row] for row in found_by(remote, user, 5)] == [
            [id_ for id_, _ in row] for row in found_by(catalog, user, 5)
        ]
        remote.remove(["id0"])
        names = [c.name for c in remote._store._client.list_collections()]
        assert len(names) == 2  # nothing is left of builds
    with Catalog.open(server, fingerprint=FINGERPRINT) as again:
        assert len(again) == SIZE - 1
    with pytest.raises(CatalogError, match="no catalog at"):
        Catalog.open(replace(server, collection="another"))


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(CatalogError, match=r"127\.0\.0\.1:9.*chroma run"):
        Catalog.open(CatalogSettings(host="127.0.0.1", port=9, timeout_s=5))


def test_a_server_that_never_answers_is_left_in_time():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        with pytest.raises(CatalogError, match=r"did not answer within 0\.5 s"):
            Catalog.open(CatalogSettings(host="127.0.0.1", port=port, timeout_s=0.5))
