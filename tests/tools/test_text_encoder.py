import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import configuration_utils

from deeprec.errors import EncoderError
from deeprec.tools.interactions import Item
from deeprec.tools.text_encoder import TextEncoder, _fingerprint, item_embeddings

from ..conftest import Disk

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


def edited(folder: Path, file: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """The folder, with a change made to one of its JSON files."""
    about = json.loads((folder / file).read_text())
    change(about)
    (folder / file).write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"num_attention_heads": 4}),
        ("config.json", {"layer_norm_eps": 1e-3}),
        ("config.json", {"hidden_act": "relu"}),
        ("1_Pooling/config.json", {"pooling_mode": "cls"}),
        ("sentence_bert_config.json", {"max_seq_length": 3}),
    ],
    ids=str,
)
def test_fingerprint_tells_configurations_apart(
    file: str,
    change: dict[str, object],
    tiny_encoder: TextEncoder,
    tiny_encoder_folder: Path,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(tiny_encoder_folder, tmp_path / "changed")
    other = TextEncoder(str(edited(folder, file, lambda about: about.update(change))))
    texts = ["comedy film 3 , similar to horror"]
    assert not np.allclose(other.encode_queries(texts), tiny_encoder.encode_queries(texts))
    assert other.fingerprint != tiny_encoder.fingerprint


def test_fingerprint_is_of_no_version_and_no_process(
    tiny_encoder: TextEncoder,
    tiny_encoder_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(tiny_encoder_folder, tmp_path / "other")
    script = "import sys; from deeprec.tools.text_encoder import TextEncoder as T;"
    made = subprocess.run(
        [sys.executable, "-c", f"{script} print(T(sys.argv[1]).fingerprint)", str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert made.stdout.strip() == tiny_encoder.fingerprint
    model = SentenceTransformer(str(folder), device="cpu")
    model[0].auto_model.config._name_or_path = "/elsewhere"
    monkeypatch.setattr(configuration_utils, "__version__", "99.0")
    assert "99.0" in model[0].auto_model.config.to_diff_dict().values()
    assert _fingerprint(model) == tiny_encoder.fingerprint


def test_lone_numbers_among_the_weights_count(tiny_encoder_folder: Path) -> None:
    prints = set()
    for value in (1.0, 2.0):
        model = SentenceTransformer(str(tiny_encoder_folder), device="cpu")
        model[0].register_parameter("scale", torch.nn.Parameter(torch.tensor(value)))
        prints.add(_fingerprint(model))
    assert len(prints) == 2


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "weights": cut_weights,
    "module": lambda folder: (folder / "modules.json").write_text(
        (folder / "modules.json").read_text().replace("Pooling", "NoSuchModule")
    ),
    "type": lambda folder: edited(
        folder, "config.json", lambda about: about.update(hidden_size="wide")
    ),
    "length": lambda folder: edited(
        folder, "sentence_bert_config.json", lambda about: about.update(max_seq_length=-3)
    ),
    "list": lambda folder: (folder / "config_sentence_transformers.json").write_text("[1]"),
    "pooling": lambda folder: (folder / "1_Pooling" / "config.json").write_text('{"x": []}'),
    "tokenizer": lambda folder: (folder / "tokenizer.json").write_text('{"model": 3}'),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_model_is_refused_in_words(
    what: str, tiny_encoder_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_encoder_folder, tmp_path / "damaged")
    DAMAGE[what](folder)
    with pytest.raises(EncoderError, match=r"(?s)can't load .*damaged.*Give a hub name"):
        TextEncoder(str(folder))


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
    with pytest.raises(EncoderError, match="disk full"):
        item_embeddings(counting, ITEMS, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_leaves_nothing(
    tiny_encoder: TextEncoder, small_disk: Callable[[int], Disk]
) -> None:
    disk = small_disk(1)
    disk.fill()
    with pytest.raises(EncoderError, match=r"No space left on device.*Free disk space"):
        item_embeddings(tiny_encoder, ITEMS, disk.folder / "cache")
    disk.free()
    assert not list(disk.folder.rglob("*.part"))
    assert len(item_embeddings(tiny_encoder, ITEMS, disk.folder / "cache")) == len(ITEMS)


def test_weights_that_give_no_numbers_are_told(tiny_encoder_folder: Path) -> None:
    broken = TextEncoder(str(tiny_encoder_folder))
    with torch.no_grad():
        next(broken._model.parameters()).fill_(float("nan"))
    with pytest.raises(EncoderError, match="not finite"):
        broken.encode_queries(["comedy"])


def test_progress_is_reported(counting: Counting, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    item_embeddings(counting, ITEMS, tmp_path, progress=lambda *at: seen.append(at))
    assert seen == [(2, 2)]
