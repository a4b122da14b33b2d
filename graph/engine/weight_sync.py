"""What we add to vLLM's worker process: new weights while it runs, and an end with its owner.

`SyncWorker` is mixed into the worker (vLLM's option worker_extension_cls). The weights come as a
safetensors file and methods are called by their names, so nothing is unpickled.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor

_FILE = "model.safetensors"
_SLACK = 2**20  # bytes: names and shapes
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # a folder of its own is made in it


class SyncWorker:
    """Methods that the engine calls in vLLM's worker."""

    model_runner: Any  # of vLLM's worker, which this class is mixed into

    def deeprec_watch(self, owner: int) -> None:
        """End vLLM's processes when the process that started the engine has ended in any way."""
        core = os.getppid()  # the engine core, or the owner itself where they share a process
        mine = [os.getpid()] if core == owner else [core, os.getpid()]
        threading.Thread(target=_end_with, args=(owner, mine), daemon=True).start()

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


def _end_with(owner: int, processes: Sequence[int]) -> None:
    import psutil

    with suppress(psutil.NoSuchProcess):
        psutil.Process(owner).wait()
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@contextmanager
def handed_over(weights: Mapping[str, Tensor]) -> Iterator[str]:
    """Write weights where another process of this machine reads them fast; gives the folder.

    Raises EngineError where there is no room for them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    folder = tempfile.mkdtemp(prefix="deeprec-weights-", dir=_roomy(size))
    try:
        try:
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()},
                Path(folder) / _FILE,
            )
        except (OSError, SafetensorError) as error:
            raise EngineError(
                f"no room in {Path(folder).parent} for {size / 2**20:.0f} MiB of weights on their "
                f"way to the engine: {error}. Free some, or set TMPDIR to a roomier folder."
            ) from error
        yield folder
    finally:
        shutil.rmtree(folder)


def _roomy(size: int) -> Path | None:
    """Shared memory where it holds so many bytes: containers often have 64 MiB of it."""
    fits = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > size + _SLACK
    return _SHARED_MEMORY if fits else None
