"""The ``aten`` backend: PyTorch's own FlashAttention-2 kernels.

They run on any CUDA GPU from sm_80, and need no other package.
"""

from __future__ import annotations

import torch
from torch import Tensor

from magi_sink_cp.kernels.backends.flash import (
    NoLseGradientBackend,
    check_flash_2_window,
    flash_2_lse,
    flash_2_maxima,
    kernel_ready,
    missing_sm_80,
    normalise_empty_rows,
)
from magi_sink_cp.kernels.protocol import Dropout, Gradients, KernelRequest, Partial, store


class AtenBackend(NoLseGradientBackend):
    """torch.ops.aten._flash_attention_forward / _backward.

    They report lse = +inf for rows without a key: -inf here.
    """

    name = "aten"
    features = frozenset({"deterministic", "dropout_p"})

    def unavailable(self) -> str | None:
        if reason := missing_sm_80():
            return reason
        if not torch.backends.cuda.is_flash_attention_available():
            return "this build of torch has no FlashAttention kernels"
        return None

    def describe(self) -> str:
        return f"aten (PyTorch's FlashAttention-2, torch {torch.__version__})"

    def _forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        request: KernelRequest,
        out: Tensor | None,
        want_probs: bool,
    ) -> Partial:
        check_flash_2_window(q, k, request)
        q, k, v = (kernel_ready(x) for x in (q, k, v))
        dropout_p = request.params.dropout_p
        result, lse, rng_state, _, attn_probs = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            *_lengths(q, k, request),
            dropout_p,
            request.params.causal,
            want_probs,
            **_mask(request),
        )
        dropout = Dropout(rng_state, attn_probs) if dropout_p > 0 else None
        return Partial(result, normalise_empty_rows(lse), dropout=dropout)

    def _kernel_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        saved: Partial,
        request: KernelRequest,
        into: Gradients | None,
    ) -> Gradients:
        lse, params = flash_2_lse(saved.lse), request.params
        unused = torch.empty((), dtype=torch.uint64, device=q.device)
        rng_state = (
            torch.empty(2, dtype=torch.uint64, device=q.device)
            if saved.dropout is None
            else saved.dropout.rng_state
        )
        arguments = (
            dout,
            q,
            k,
            v,
            saved.out,
            lse,
            *_lengths(q, k, request),
            params.dropout_p,
            params.causal,
            rng_state,
            unused,
        )
        was_deterministic = torch.are_deterministic_algorithms_enabled()
        was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        try:
            # With warn_only the operator would warn and stay non-deterministic.
            if params.deterministic:
                torch.use_deterministic_algorithms(True)
            dq, dk, dv = torch.ops.aten._flash_attention_backward(*arguments, **_mask(request))
        finally:
            torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warn_only)
        return store(Gradients(dq, dk, dv, None), into)


def _lengths(
    q: Tensor, k: Tensor, request: KernelRequest
) -> tuple[Tensor | None, Tensor | None, int, int]:
    if request.varlen is None:
        return None, None, q.shape[1], k.shape[1]
    return (
        request.varlen.cu_seqlens_q,
        request.varlen.cu_seqlens_k,
        *flash_2_maxima(request.varlen, request.params.window_size),
    )


def _mask(request: KernelRequest) -> dict[str, float | int | None]:
    left, right = request.params.window_size
    return {
        "scale": request.params.softmax_scale,
        "window_size_left": left,
        "window_size_right": right,
    }
