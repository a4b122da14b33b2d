"""What vLLM's worker gets on a CPU besides `SyncWorker`: fused kernels for its norms.

vLLM builds its kernels of RMSNorm for CPUs too, but has them used on GPUs alone (0.32.0,
vllm/kernels/vllm_c.py); a CPU computes each norm by eight operations of torch. Importing this
registers them with vLLM, once in a process; `cpu_options` asks for them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm import ir
from vllm.platforms import current_platform

from .limits import CPU_KERNELS
from .weight_sync import SyncWorker

current_platform.import_kernels()


def _fits(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    # The kernels read rows that lie one behind the other; norms of heads are of parts of rows.
    whole = variance_size is None and x.is_contiguous()
    return whole and (weight is None or weight.dtype == x.dtype)


def _fits_sum(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return x_residual.is_contiguous() and _fits(x, weight, epsilon, variance_size)


@ir.ops.rms_norm.register_impl(CPU_KERNELS, supports_args=_fits)  # type: ignore[untyped-decorator]
def rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    """See vllm.ir.ops.rms_norm."""
    normed = torch.empty_like(x)
    torch.ops._C.rms_norm(normed, x, weight, epsilon)
    return normed


@ir.ops.fused_add_rms_norm.register_impl(  # type: ignore[untyped-decorator]
    CPU_KERNELS, supports_args=_fits_sum, inplace=True
)
def fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See vllm.ir.ops.fused_add_rms_norm; both tensors are overwritten."""
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


class CPUWorker(SyncWorker):
    """The methods of SyncWorker; naming this class has the kernels registered."""
