import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deeprec.evals.bench.hnsw_recall import compare, main, requests
from deeprec.settings import load_settings
from deeprec.tools.chroma_store import ChromaStore
from deeprec.tools.interactions import InteractionData, Item
from deeprec.tools.text_encoder import TextEncoder
from deeprec.tools.trm.config import DeepRecConfig
from deeprec.tools.trm.model import TRM
from deeprec.tools.workspace import Workspace


def test_figures_by_hand() -> None:
    exact = [["a", "b", "c", "d"], ["a", "b", "c", "d"], ["a", "b"]]
    hnsw = [["a", "b", "c", "d"], ["a", "b", "d", "c"], ["a", "x"]]
    assert compare(exact, hnsw, ["d", "x", "b"]) == pytest.approx(
        {
            "users": 3,
            "list_overlap": (1 + 1 + 0.5) / 3,
            "same_list": 1 / 3,
            "recall_exact": 2 / 3,
            "recall_hnsw": 1 / 3,
        }
    )


@pytest.fixture
def workspace(
    tiny_encoder: TextEncoder,
    tiny_encoder_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Workspace:
    """600 items, so that the index is asked and not the whole matrix; an untrained TRM."""
    for name, value in (
        ("HOME", tmp_path), ("WORKSPACE", "wide"), ("MODEL", "m"), ("ENCODER", tiny_encoder_folder),
    ):  # fmt: skip
        monkeypatch.setenv(f"DEEPREC_{name}", str(value))
    place = Workspace(load_settings())
    rng = np.random.default_rng(0)
    data = InteractionData(
        name="wide",
        items=tuple(
            Item(
                str(n), f"Film {n}", {"genres": ("Comedy" if n % 2 else "Drama",)} if n > 8 else {}
            )
            for n in range(600)
        ),
        user_ids=tuple(f"u{n}" for n in range(12)),
        users=np.repeat(np.arange(12), 6),
        item_indices=np.concatenate([np.arange(6), rng.permutation(np.arange(9, 600))[:66]]),
        times=np.tile(np.arange(6), 12),
    )
    data.save(place.dataset_dir)
    torch.manual_seed(0)
    config = DeepRecConfig(
        text_dim=tiny_encoder.dim,
        dataset_fingerprint=data.fingerprint,
        encoder_fingerprint=tiny_encoder.fingerprint,
    )
    TRM(config, tuple(item.id for item in data.items)).save_pretrained(place.trm_dir)
    place.index().close()
    return Workspace(load_settings())


def test_requests_are_those_of_the_test_users(workspace: Workspace) -> None:
    kinds = requests(workspace)
    assert {kind: len(asked) for kind, asked in kinds.items()} == {
        "none": 12,
        "history's first": 11,  # nothing describes what the first user saw
    }
    split = workspace.split
    for at, (request, target) in enumerate(kinds["none"]):
        assert target == workspace.data.items[split.test[at]].id
        assert request.history == tuple(str(n) for n in split.test_history(at))
        assert request.exclude == frozenset(request.history)
        assert (request.k, request.preference) == (20, None)
    for request, _ in kinds["history's first"]:
        odd = sum(int(id_) % 2 for id_ in request.history)
        if odd != len(request.history) - odd:
            most = "Comedy" if odd > len(request.history) / 2 else "Drama"
            assert request.preference == f"genres: {most}"


def test_what_the_index_misses_is_measured(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = workspace.folder / "bench" / "hnsw_recall.json"
    query, asked = ChromaStore.query, []

    def counted(store: ChromaStore, vectors: np.ndarray, n: int) -> list[list[str]]:
        if n >= 20:  # fewer when the catalog is probed
            asked.append(len(vectors))
        return query(store, vectors, n)

    monkeypatch.setattr(ChromaStore, "query", counted)
    main()
    whole = json.loads(path.read_text())
    # Without a preference one vector each, then two; the retriever batches as they arrive.
    assert sum(asked) == 12 + 2 * 11
    assert whole["items"] == 600
    assert whole["preference"]["none"]["users"] == 12
    for row in whole["preference"].values():
        assert row["list_overlap"] > 0.95

    def blind(store: ChromaStore, vectors: np.ndarray, n: int) -> list[list[str]]:
        return [ids[n // 2 :] for ids in query(store, vectors, 2 * n)]

    monkeypatch.setattr(ChromaStore, "query", blind)
    monkeypatch.setattr(ChromaStore, "_probe", lambda *_: None)  # it would find the damage
    main()
    for row in json.loads(path.read_text())["preference"].values():
        assert row["list_overlap"] < 0.95
        assert row["same_list"] < 1
