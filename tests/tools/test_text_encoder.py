import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from deeprec.errors import EncoderError
from deeprec.tools.interactions import Item
from deeprec.tools.text_encoder import TextEncoder, item_embeddings

ITEMS = [Item("a", "Film 1", {"genres": ("Comedy",)}), Item("b", "Film 2", {"genres": ("Drama",)})]


class Counting:
    """A real encoder that counts what it is asked for."""

    def __init__(self, encoder: TextEncoder):
        self._encoder, self.calls = encoder, 0
        self.dim, self.fingerprint = encoder.dim, encoder.fingerprint

    def encode_passages(self, texts):
        self.calls += 1
        return self._encoder.encode_passages(texts)


@pytest.fixture
def counting(tiny_encoder: TextEncoder) -> Counting:
    return Counting(tiny_encoder)


def test_vectors_are_unit_float32_in_the_order_given(tiny_encoder: TextEncoder) -> None:
    together = tiny_encoder.encode_queries(["comedy", "horror film 3", "drama"])
    assert together.shape == (3, tiny_encoder.dim)
    assert together.dtype == np.float32
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert np.allclose(together[2], tiny_encoder.encode_queries(["drama"])[0], atol=1e-5)
    assert tiny_encoder.encode_passages([]).shape == (0, tiny_encoder.dim)


def test_query_prompt_is_used_on_the_query_side_only(
    tiny_encoder: TextEncoder, tiny_encoder_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "prompted"
    shutil.copytree(tiny_encoder_folder, folder)
    path = folder / "config_sentence_transformers.json"
    about = json.loads(path.read_text())
    about["prompts"] = {"query": "similar to ", "document": ""}
    path.write_text(json.dumps(about))
    prompted = TextEncoder(str(folder))
    expected = tiny_encoder.encode_queries(["similar to comedy"])
    assert np.allclose(prompted.encode_queries(["comedy"]), expected, atol=1e-5)
    assert np.allclose(
        prompted.encode_passages(["comedy"]), tiny_encoder.encode_passages(["comedy"]), atol=1e-5
    )
    assert prompted.fingerprint != tiny_encoder.fingerprint


def test_fingerprint_is_of_the_content_not_of_the_place(
    tiny_encoder: TextEncoder, tiny_encoder_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_encoder_folder, tmp_path / "moved")
    moved = TextEncoder(str(tmp_path / "moved"))
    moved.encode_queries(["comedy"])  # sets the tokenizer's padding
    assert moved.fingerprint == tiny_encoder.fingerprint


@pytest.mark.parametrize("name", ["nowhere/at/all", "empty", "a-file"])
def test_a_model_that_is_none_is_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a-file").write_text("no model")
    with pytest.raises(EncoderError, match=name):
        TextEncoder(str(tmp_path / name))


def test_a_lone_string_is_refused(tiny_encoder: TextEncoder) -> None:
    with pytest.raises(EncoderError, match="list"):
        tiny_encoder.encode_queries("comedy")


def test_embeddings_are_cached_by_content(counting: Counting, tmp_path: Path) -> None:
    first = item_embeddings(counting, ITEMS, tmp_path)
    again = item_embeddings(counting, ITEMS, tmp_path)
    assert counting.calls == 1
    assert np.array_equal(first, again)
    changed = [ITEMS[0], Item("b", "Film 2", {"genres": ("Horror",)})]
    other = item_embeddings(counting, changed, tmp_path)
    assert counting.calls == 2
    assert not np.allclose(other[1], first[1])
    swapped = item_embeddings(counting, ITEMS[::-1], tmp_path)
    assert np.allclose(swapped, first[::-1], atol=1e-5)


def test_another_encoder_never_meets_the_cache(counting: Counting, tmp_path: Path) -> None:
    item_embeddings(counting, ITEMS, tmp_path)
    counting.fingerprint = "another"
    item_embeddings(counting, ITEMS, tmp_path)
    assert counting.calls == 2


@pytest.mark.parametrize("damage", ["torn", "flipped", "garbage"])
def test_a_damaged_cache_is_computed_again(damage: str, counting: Counting, tmp_path: Path) -> None:
    good = item_embeddings(counting, ITEMS, tmp_path)
    (path,) = tmp_path.iterdir()
    raw = bytearray(path.read_bytes())
    if damage == "torn":
        raw = raw[: len(raw) // 2]
    elif damage == "flipped":
        raw[-3] ^= 0x40  # inside the numbers: the file still parses
    else:
        raw = bytearray(b"not safetensors")
    path.write_bytes(raw)
    assert np.array_equal(item_embeddings(counting, ITEMS, tmp_path), good)
    assert counting.calls == 2
    assert np.array_equal(item_embeddings(counting, ITEMS, tmp_path), good)
    assert counting.calls == 2


def test_nothing_is_left_behind_when_writing_fails(
    counting: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        item_embeddings(counting, ITEMS, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_progress_is_reported(counting: Counting, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    item_embeddings(counting, ITEMS, tmp_path, progress=lambda *at: seen.append(at))
    assert seen == [(2, 2)]
