"""What the FlashAttention backends share: dtypes, head_dim, and the exact gradient of lse through kernels that have none."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from magi_sink_cp.kernels.protocol import AttentionParams, Backend, Gradients, Varlen

MAX_HEAD_DIM = 256


class FlashBackend(Backend):
    """CUDA, fp16 or bf16, head_dim a multiple of 8 up to 256."""

    @abstractmethod
    def _kernel_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        params: AttentionParams,
        varlen: Varlen | None,
    ) -> Gradients: ...

    def unsupported(self, q: Tensor, params: AttentionParams) -> str | None:
        if q.device.type != "cuda":
            return f"it runs on CUDA tensors, and q is on {q.device}"
        if q.dtype not in (torch.float16, torch.bfloat16):
            return f"it takes torch.float16 or torch.bfloat16, and q is {q.dtype}"
        if q.shape[-1] % 8 or q.shape[-1] > MAX_HEAD_DIM:
            return f"it takes a head_dim that is a multiple of 8, at most {MAX_HEAD_DIM}, and q has {q.shape[-1]}"
        return None

    def _backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        params: AttentionParams,
        varlen: Varlen | None,
        dlse: Tensor | None,
    ) -> Gradients:
        """The kernel's gradients and, where a gradient reaches lse, its share from a second call.

        The kernels take no dlse, but they compute delta = Σ_d dout·out from what they are given. A call with v = 0 has dP = 0;
        with dout = 1 and out = -dlse in three leading channels it has delta = -dlse, hence dS = P∘dlse, which is the share
        of dlse. Three channels of an 8- or 11-bit mantissa hold every bit of an fp32 number; dlse is first scaled to at most 2,
        as fp16 holds neither 1e-9 nor 1e5.
        """
        dout, q, k, v = (kernel_ready(x) for x in (dout, q, k, v))
        grads = self._kernel_backward(dout, q, k, v, out, lse, params, varlen)
        if dlse is None:
            return grads
        peak = dlse.abs().nan_to_num(nan=0.0, posinf=0.0).amax()
        scale = torch.exp2(-torch.log2(peak).floor().clamp(-126, 126))
        split_out, split_dout = torch.zeros_like(out), torch.zeros_like(out)
        split_dout[..., :3] = 1
        rest = -(dlse * scale).transpose(-1, -2)
        for channel in range(3):
            split_out[..., channel] = rest
            rest = rest - split_out[..., channel]
        share = self._kernel_backward(split_dout, q, k, torch.zeros_like(v), split_out, lse, params, varlen)
        dq, dk = (
            (whole + part / scale).to(q.dtype) for whole, part in ((grads.dq, share.dq.float()), (grads.dk, share.dk.float()))
        )
        return Gradients(dq, dk, grads.dv, grads.delta)


def kernel_ready(x: Tensor) -> Tensor:
    """x, copied only if the kernels cannot read it where it is: they want a dense last dimension and 16-byte aligned rows."""
    aligned = x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)
