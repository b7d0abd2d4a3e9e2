"""The gradient of lse through kernels that take none, on the CPU.

The path of fa3 and aten over the cpu backend's numbers.
"""

from __future__ import annotations

import pytest
import torch

from magi_sink_cp.kernels.backends.cpu import CpuBackend
from magi_sink_cp.kernels.backends.flash import NoLseGradientBackend, kernel_ready
from magi_sink_cp.kernels.checks import make_params
from magi_sink_cp.kernels.protocol import KernelRequest, Partial


class OverCpu(NoLseGradientBackend):
    """A FlashAttention backend whose kernels are the cpu backend's, without a gradient of lse."""

    name = "over cpu"

    def unavailable(self):
        return None

    def _forward(self, *arguments):
        return CpuBackend()._forward(*arguments)

    def _kernel_backward(self, dout, q, k, v, saved, call, into):
        return CpuBackend()._backward(dout, q, k, v, saved, call, None, into)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-38, 1e-9, 1e-3, 1.0, 3.0, 1e5, 1e30])
def test_any_size_of_gradient(dtype, size):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 12, 4, 8).to(dtype) for _ in range(3))
    call = KernelRequest(make_params(8, None, True, (-1, -1), 0.0, False))
    partial = CpuBackend().forward(q, k, v, call)
    dout, dlse = torch.zeros_like(q), torch.randn_like(partial.lse) * size
    exact_saved = Partial(partial.out.float(), partial.lse)
    exact = CpuBackend().backward(
        dout.float(), q.float(), k.float(), v.float(), exact_saved, call, dlse
    )
    result = OverCpu().backward(dout, q, k, v, partial, call, dlse)
    for ours, true in ((result.dq, exact.dq), (result.dk, exact.dk)):
        assert not ours.isnan().any()
        if true.abs().max() < torch.finfo(dtype).max:
            allowed = (
                2 * torch.finfo(dtype).eps * true.norm()
                + torch.finfo(dtype).tiny * true.numel() ** 0.5
            )
            assert (ours.float() - true).norm() <= allowed


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_stays_in_its_batch_entry(value):
    q = torch.randn(2, 6, 2, 8).bfloat16()
    call = KernelRequest(make_params(8, None, False, (-1, -1), 0.0, False))
    partial = CpuBackend().forward(q, q, q, call)
    dlse = torch.zeros_like(partial.lse)
    dlse[0, 0, 0] = value
    grads = OverCpu().backward(torch.zeros_like(q), q, q, q, partial, call, dlse)
    assert not grads.dq[0].isfinite().all()
    assert grads.dq[1].isfinite().all()
    assert grads.dk[1].isfinite().all()


def test_kernel_ready_copies_only_what_the_kernels_cannot_read():
    dense = torch.randn(4, 2, 64).bfloat16()
    assert kernel_ready(dense) is dense
    packed = torch.randn(4, 3, 2, 64).bfloat16()[:, 1]
    assert kernel_ready(packed) is packed
    unaligned, strided = (
        torch.randn(4, 2, 100).bfloat16()[..., 3:67],
        torch.randn(4, 2, 128).bfloat16()[..., ::2],
    )
    for awkward in (unaligned, strided, torch.ones(()).expand(4, 2, 64)):
        ready = kernel_ready(awkward)
        assert ready.is_contiguous()
        assert torch.equal(ready, awkward)
