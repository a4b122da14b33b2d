"""Small real parts for the tests of tools/: a sentence encoder that is built on the spot (real
sentence-transformers, random weights) and a data set whose regularities a TRM can learn."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from hypothesis import settings
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from deeprec.graph.engine.tokenizer import load_tokenizer
from deeprec.graph.engine.vllm_inprocess import VLLMEngine
from deeprec.settings import load_settings
from deeprec.tools.interactions import InteractionData, Item
from deeprec.tools.text_encoder import TextEncoder

# The same examples in every run of `make test`; `make fuzz` draws others each time, many more.
settings.register_profile("test", derandomize=True, deadline=None, max_examples=200)
settings.register_profile("fuzz", deadline=None, max_examples=4_000, print_blob=True)
settings.load_profile("test")

GENRES = ("Comedy", "Drama", "Horror", "Western")


@pytest.fixture(scope="session")
def tiny_encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers model, 32 wide, over a vocabulary of a hundred words."""
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", *(genre.lower() for genre in GENRES), "genres", "similar", "to"]
    words += ["film", ":", ";", ",", ".", *(str(n) for n in range(90))]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            initializer_range=0.5,
        )
    )
    bert.save_pretrained(folder / "bert")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder / "bert")
    body = Transformer(str(folder / "bert"))
    model = SentenceTransformer(modules=[body, Pooling(32), Normalize()], device="cpu")
    model.save(str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="session")
def tiny_encoder(tiny_encoder_folder: Path) -> TextEncoder:
    return TextEncoder(str(tiny_encoder_folder))


@pytest.fixture(scope="session")
def tiny_data() -> InteractionData:
    """80 users who walk through 40 films in steps of one, with a genre for every ten films."""
    items = tuple(
        Item(str(n), f"Film {n}", {"genres": (GENRES[n // 10],), "year": (str(1960 + n),)})
        for n in range(40)
    )
    rng = np.random.default_rng(0)
    length = 12
    starts = rng.integers(40, size=80)
    walks = (starts[:, None] + np.arange(length)) % 40
    return InteractionData(
        name="tiny",
        items=items,
        user_ids=tuple(f"u{n}" for n in range(80)),
        users=np.repeat(np.arange(80), length).astype(np.int32),
        item_indices=walks.ravel().astype(np.int32),
        times=np.tile(np.arange(length), 80).astype(np.int64),
    )


@pytest.fixture(scope="session")
def real_engine() -> Iterator[VLLMEngine]:
    """The demo's LLM in vLLM; starting it takes half a minute. float32, as weights are compared."""
    engine = VLLMEngine(
        load_settings().model_name, max_model_len=4096, kv_cache_gib=1, dtype="float32"
    )
    yield engine
    engine.close()


class Disk:
    """A file system of its own that a test can fill to the last byte."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / ".filler"

    def fill(self, *, leave: int = 0) -> None:
        """Take all that is free but `leave` bytes."""
        self._filler.touch()
        free = os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_frsize
        with self._filler.open("ab", buffering=0) as file:
            file.write(bytes(max(0, free - leave)))

    def free(self) -> None:
        """Give back what `fill` took."""
        self._filler.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Disk]]:
    """Make a disk of so many MiB: a tmpfs, so that the kernel itself says ENOSPC."""
    folder = tmp_path / "disk"
    mounted = False

    def make(mebibytes: int) -> Disk:
        nonlocal mounted
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
        try:
            mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            mounted = False
        if not mounted:
            pytest.skip("a small disk can't be mounted here: that takes root on Linux")
        return Disk(folder)

    yield make
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


Serve = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """Run a server on a free port, given the command and the path that tells that it is up; its
    address. "PORT" in the command is the port; `environment` is added to this process's. What it
    says goes into the file `log`, if one is named.
    """

    @contextmanager
    def serving(
        *command: str,
        alive: str,
        cwd: Path | None = None,
        log: Path | None = None,
        **environment: str,
    ) -> Iterator[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        url = f"http://127.0.0.1:{port}"
        log = log or tmp_path_factory.mktemp("server") / "log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", *(port if word == "PORT" else word for word in command)],
                stdout=sink,
                stderr=sink,
                cwd=cwd,
                env={**os.environ, **environment},
            )
            try:
                deadline = time.monotonic() + 600
                while not _answers(f"{url}{alive}"):
                    if process.poll() is not None or time.monotonic() > deadline:
                        pytest.fail(f"the server did not start: {log.read_text()[-3000:]}")
                    time.sleep(1)
                yield url
            finally:
                process.terminate()
                process.wait(timeout=60)

    return serving


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).is_success
    except httpx.TransportError:
        return False


@pytest.fixture(scope="session")
def llm_server(serve: Serve) -> Iterator[str]:
    """Address of vLLM's own server, as `deeprec serve-llm` starts it."""
    with serve(
        *("deeprec.cli", "serve-llm", "--port", "PORT"),
        alive="/health",
        DEEPREC_ENGINE__KV_CACHE_GIB="1",
        DEEPREC_ENGINE__MAX_MODEL_LEN="4096",
    ) as url:
        yield url


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A causal LM of two layers with a head of its own, and the demo model's tokenizer."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(load_settings().model_name)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = str(tmp_path_factory.mktemp("llm"))
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
