"""The ``aten`` backend: the FlashAttention-2 kernels inside PyTorch, on any CUDA GPU from sm_80, with no other package."""

from __future__ import annotations

import torch
from torch import Tensor

from magi_sink_cp.kernels.flash import FlashBackend, kernel_ready
from magi_sink_cp.kernels.protocol import AttentionParams, Gradients, Partial, Varlen

_INF = float("inf")


class AtenBackend(FlashBackend):
    """torch.ops.aten._flash_attention_forward / _backward. They report lse = +inf for rows without a key: -inf here."""

    name = "aten"

    def unavailable(self) -> str | None:
        if not torch.cuda.is_available():
            return "torch sees no CUDA GPU"
        if not torch.backends.cuda.is_flash_attention_available():
            return "this build of torch has no FlashAttention kernels"
        capability = torch.cuda.get_device_capability()
        return None if capability >= (8, 0) else f"it needs sm_80 or newer, and this GPU is sm_{capability[0]}{capability[1]}"

    def unsupported(self, q: Tensor, params: AttentionParams) -> str | None:
        if params.softcap > 0:
            return "PyTorch's FlashAttention-2 has no softcap"
        return super().unsupported(q, params)

    def describe(self) -> str:
        return f"aten (torch {torch.__version__})"

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams, varlen: Varlen | None, out: Tensor | None
    ) -> Partial:
        q, k, v = (kernel_ready(x) for x in (q, k, v))
        result, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *_lengths(q, k, varlen), 0.0, params.causal, False, **_mask(params)
        )
        return Partial(result, lse.masked_fill_(lse == _INF, -_INF))

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
    ) -> Gradients:
        lse = lse.masked_fill(lse == -_INF, _INF)  # exp(S - lse) must be 0, not NaN, for a row without a key
        rng_state = torch.empty(2, dtype=torch.uint64, device=q.device)  # read only when there is dropout
        unused = torch.empty(0, dtype=torch.uint64, device=q.device)
        was_deterministic = torch.are_deterministic_algorithms_enabled()
        was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        try:
            if params.deterministic:  # with warn_only the operator would warn and stay non-deterministic
                torch.use_deterministic_algorithms(True)
            dq, dk, dv = torch.ops.aten._flash_attention_backward(
                dout, q, k, v, out, lse, *_lengths(q, k, varlen), 0.0, params.causal, rng_state, unused, **_mask(params)
            )
        finally:
            torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warn_only)
        return Gradients(dq, dk, dv, None)


def _lengths(q: Tensor, k: Tensor, varlen: Varlen | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    if varlen is None:
        return None, None, q.shape[1], k.shape[1]
    # With max_seqlen_q = 1 the operator assumes that every document has one row and reshapes q for it; a zero-row document breaks
    # that. It is only an upper bound.
    return varlen.cu_seqlens_q, varlen.cu_seqlens_k, max(2, varlen.max_seqlen_q), varlen.max_seqlen_k


def _mask(params: AttentionParams) -> dict[str, float | int | None]:
    left, right = params.window_size
    return {"scale": params.softmax_scale, "window_size_left": left, "window_size_right": right}
