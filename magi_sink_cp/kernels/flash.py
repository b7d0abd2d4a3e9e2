"""What the FlashAttention backends share: dtypes, head_dim, and the exact gradient of lse through kernels that have none."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from magi_sink_cp.kernels.protocol import AttentionParams, Backend, Gradients, Varlen, unit_stride

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
        of dlse. Three channels of a 8- or 11-bit mantissa hold every bit of an fp32 number.
        """
        dout, q, k, v = (unit_stride(x) for x in (dout, q, k, v))
        grads = self._kernel_backward(dout, q, k, v, out, lse, params, varlen)
        if dlse is None:
            return grads
        split_out, split_dout = torch.zeros_like(out), torch.zeros_like(out)
        split_dout[..., :3] = 1
        rest = -dlse.transpose(-1, -2)
        for channel in range(3):
            split_out[..., channel] = rest
            rest = rest - split_out[..., channel]
        share = self._kernel_backward(split_dout, q, k, torch.zeros_like(v), split_out, lse, params, varlen)
        return Gradients(grads.dq + share.dq, grads.dk + share.dk, grads.dv, grads.delta)
