"""New weights for a running vLLM engine, without starting it again.

`SyncWorker` is mixed into vLLM's worker process (its option worker_extension_cls). The weights
come as a safetensors file and the method is called by its name, so nothing is unpickled.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_FILE = "model.safetensors"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # a folder of its own is made in it


class SyncWorker:
    """Methods that the engine calls in vLLM's worker."""

    model_runner: Any  # of vLLM's worker, which this class is mixed into

    def deeprec_load(self, folder: str) -> None:
        """Replace the model's weights by those that `handed_over` wrote."""
        from safetensors import safe_open
        from vllm.platforms import current_platform

        with safe_open(str(Path(folder) / _FILE), framework="pt") as file:
            self.model_runner.reload_weights(
                weights_iterator=((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118  # no dict
            )
        model = self.model_runner.get_model()
        if current_platform.is_cpu() and model.config.tie_word_embeddings:
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            # The head holds a repacked copy of the embeddings, which reloading leaves stale.
            model.lm_head.weight = model.model.embed_tokens.weight
            dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)


@contextmanager
def handed_over(weights: Mapping[str, Tensor]) -> Iterator[str]:
    """Write weights where another process of this machine reads them fast; gives the folder."""
    from safetensors.torch import save_file

    place = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    folder = tempfile.mkdtemp(prefix="deeprec-weights-", dir=place)
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()},
            Path(folder) / _FILE,
        )
        yield folder
    finally:
        shutil.rmtree(folder)
