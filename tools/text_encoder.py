"""A frozen sentence encoder (sentence-transformers) with a query and a passage side.

Item embeddings are cached on disk. The key is content: what the encoder is made of and the very
texts it read, so a changed item, another model or another prompt can never meet a stale file.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedModel

from ..errors import EncoderError
from .interactions import Item, item_text

logger = logging.getLogger(__name__)

_KIND = "embeddings"  # name of the one tensor in a cache file
_CHUNK = 1024  # texts between two progress reports


class TextEncoder:
    """Sentences to unit vectors, float32 `[n, dim]`.

    `model` is a Hugging Face hub name or a local folder of a sentence-transformers model.
    Raises EncoderError if it can't be loaded.
    """

    def __init__(self, model: str, *, device: str = "cpu", batch_size: int = 64):
        folder = Path(model)
        if folder.exists() and not folder.is_dir():
            raise EncoderError(
                f"sentence encoder {model!r} is a file. Give a model folder or a hub name."
            )
        try:
            self._model = SentenceTransformer(
                model, device=device, model_kwargs={"use_safetensors": True}
            ).eval()
            tried = self._model.encode(["some words"], show_progress_bar=False)
        except Exception as error:  # the boundary: readers of damaged files raise anything
            raise EncoderError(
                f"can't load the sentence encoder {model!r}, which is none or damaged: {error}. "
                "Give a hub name such as 'sentence-transformers/all-MiniLM-L6-v2' or the folder "
                "of a sentence-transformers model."
            ) from error
        self.name = model
        self.dim = int(tried.shape[1])
        self.batch_size = batch_size
        self.fingerprint = _fingerprint(self._model)

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """What a user asks for: float32 `[n, dim]`, L2-normalised, with the model's query prompt
        where it has one.
        """
        return self._encode(texts, query=True)

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        """What can be found: float32 `[n, dim]`, L2-normalised."""
        return self._encode(texts, query=False)

    def _encode(self, texts: Sequence[str], *, query: bool) -> np.ndarray:
        if isinstance(texts, str):
            raise EncoderError("encode takes a list of texts; wrap the single text in a list.")
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        encode = self._model.encode_query if query else self._model.encode_document
        try:
            vectors = encode(
                list(texts),
                batch_size=self.batch_size,
                show_progress_bar=False,
                convert_to_numpy=True,
                normalize_embeddings=True,
            )
        except Exception as error:  # the boundary: torch's errors have no common base
            raise EncoderError(
                f"the sentence encoder {self.name!r} failed at {len(texts)} texts: {error}. If "
                "memory ran out, free some or set a smaller batch_size."
            ) from error
        if not np.isfinite(vectors).all():
            raise EncoderError(
                f"the sentence encoder {self.name!r} gave numbers that are not finite: its weights "
                "are damaged. Fetch it again."
            )
        return np.ascontiguousarray(vectors, dtype=np.float32)


def item_embeddings(
    encoder: TextEncoder,
    items: Sequence[Item],
    cache_dir: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Passage embeddings of `item_text(item)` for each item, float32 `[items, encoder.dim]`.

    Read from `cache_dir` if the same encoder has read the same texts before, else computed and
    written there (atomically). A damaged cache file is computed again. `progress` is called with
    (done, total) while encoding. Raises EncoderError, also where the file can't be written.
    """
    texts = [item_text(item) for item in items]
    digest = hashlib.sha256(encoder.fingerprint.encode())
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    key = digest.hexdigest()
    path = Path(cache_dir) / f"item-embeddings-{key[:24]}.safetensors"
    cached = _read_cache(path, key, (len(texts), encoder.dim))
    if cached is not None:
        return cached
    parts = []
    for start in range(0, len(texts), _CHUNK):
        parts.append(encoder.encode_passages(texts[start : start + _CHUNK]))
        if progress is not None:
            progress(min(start + _CHUNK, len(texts)), len(texts))
    vectors = np.concatenate(parts) if parts else np.zeros((0, encoder.dim), dtype=np.float32)
    _write_cache(path, key, vectors)
    return vectors


def _fingerprint(model: SentenceTransformer) -> str:
    """Hash of everything that decides a vector: modules, prompts, tokenizer, weights.

    Nothing of the place, the machine or the versions at hand.
    """
    digest = hashlib.sha256()
    parts = list(model.modules())
    about = {
        "modules": [type(module).__name__ for module in model],
        "options": [part.get_config_dict() for part in parts if hasattr(part, "get_config_dict")],
        "architectures": [
            _without_origin(part.config.to_diff_dict())
            for part in parts
            if isinstance(part, PreTrainedModel)
        ],
        "max_seq_length": model.max_seq_length,
        "prompts": model.prompts,
    }
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    if backend is not None:
        vocabulary = json.loads(backend.to_str())
        # Padding and truncation are set anew by whoever used the tokenizer last.
        for volatile in ("padding", "truncation"):
            vocabulary.pop(volatile, None)
        digest.update(json.dumps(vocabulary, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        flat = tensor.detach().to("cpu").reshape(-1).contiguous()  # a lone number has no last axis
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _without_origin(config: object) -> object:
    """A model's configuration without where it came from and what wrote it."""
    if isinstance(config, dict):
        return {
            key: _without_origin(value)
            for key, value in config.items()
            if key not in ("_name_or_path", "transformers_version")
        }
    return config


def _read_cache(path: Path, key: str, shape: tuple[int, int]) -> np.ndarray | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            vectors: np.ndarray = file.get_tensor(_KIND)
    except (SafetensorError, OSError, ValueError) as error:
        logger.warning("embedding cache %s is unreadable (%s); computing it again", path, error)
        return None
    intact = (
        about.get("key") == key
        and vectors.shape == shape
        and vectors.dtype == np.float32
        and about.get("sha256") == hashlib.sha256(vectors.tobytes()).hexdigest()
    )
    if not intact:
        logger.warning("embedding cache %s is damaged; computing it again", path)
        return None
    return vectors


def _write_cache(path: Path, key: str, vectors: np.ndarray) -> None:
    about = {"key": key, "sha256": hashlib.sha256(vectors.tobytes()).hexdigest()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(save({_KIND: vectors}, metadata=about))
            os.replace(beside, path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise EncoderError(
            f"can't keep item embeddings at {path}: {error}. Free disk space, or choose a folder "
            "that you may write to."
        ) from error
