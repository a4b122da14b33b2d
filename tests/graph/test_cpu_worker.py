"""The norms that vLLM's worker computes on a CPU."""

import pytest
import torch

from deeprec.graph.engine.limits import CPU_KERNELS
from deeprec.graph.engine.vllm_inprocess import VLLMEngine
from deeprec.settings import load_settings

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU vLLM has kernels of its own"),
]
_EPSILON = 1e-5


def ops() -> object:
    from deeprec.graph.engine import cpu_worker

    return cpu_worker.ir.ops


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x * (x.pow(2).mean(dim=-1, keepdim=True) + _EPSILON).rsqrt() * weight.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_are_the_norms(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, before, weight = (torch.randn(shape).to(dtype) for shape in ((7, 96), (7, 96), (96,)))
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.01}
    said = ops().rms_norm.impls[CPU_KERNELS].impl_fn(x, weight, _EPSILON)
    torch.testing.assert_close(said.double(), normed(x, weight), **near)
    total = x + before
    fused = ops().fused_add_rms_norm.impls[CPU_KERNELS].impl_fn
    said, left = fused(x.clone(), before.clone(), weight, _EPSILON)
    torch.testing.assert_close(left, total)
    torch.testing.assert_close(said.double(), normed(total, weight), **near)


def test_what_the_kernels_can_not_read_is_left_to_torch() -> None:
    """As the norms of a head's queries, which are a part of each row."""
    norm, both = ops().rms_norm, ops().fused_add_rms_norm
    wide, weight = torch.randn(5, 200), torch.ones(96)
    part, whole = wide[:, 7:103], torch.randn(5, 96)
    halves = weight.bfloat16()
    with norm.set_priority([CPU_KERNELS, "native"]), both.set_priority([CPU_KERNELS, "native"]):
        torch.testing.assert_close(norm(part, weight, _EPSILON).double(), normed(part, weight))
        assert norm.dispatch(whole, weight, _EPSILON).provider == CPU_KERNELS
        assert norm.dispatch(part, weight, _EPSILON).provider == "native"
        assert norm.dispatch(whole, halves, _EPSILON).provider == "native"
        assert norm.dispatch(whole, weight, _EPSILON, 32).provider == "native"
        assert both.dispatch(whole, whole, weight, _EPSILON).provider == CPU_KERNELS
        assert both.dispatch(whole, part, weight, _EPSILON).provider == "native"


def test_the_engine_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.engine.async_llm import AsyncLLM

    asked = []

    class Started:
        async def collective_rpc(self, *_: object, **__: object) -> None:
            pass

        def shutdown(self) -> None:
            pass

    monkeypatch.setattr(AsyncLLM, "from_engine_args", lambda args: asked.append(args) or Started())
    VLLMEngine(load_settings().model_name, max_model_len=1024, kv_cache_gib=1).close()
    priority = asked[0].ir_op_priority
    assert priority.rms_norm == priority.fused_add_rms_norm == [CPU_KERNELS]
    assert resolve_obj_by_qualname(asked[0].worker_extension_cls).deeprec_load
