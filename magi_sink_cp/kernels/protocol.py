"""What every attention kernel of this package is asked for and gives back.

Shapes: B batch, T query rows, K key rows, H query heads, H_kv key/value heads, D head_dim. A call is either

- dense:   q (B, T, H, D), k and v (B, K, H_kv, D), lse (B, H, T); or
- varlen:  q (T, H, D), k and v (K, H_kv, D), lse (H, T), documents given by :class:`Varlen`.

These are FlashAttention's own layouts; nothing between a kernel and the caller transposes them, and out is never copied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionParams:
    """The mask and the score function of one call.

    Args:
        softmax_scale: factor on q·k, > 0.
        window_size: (left, right): query i sees keys i + (K - T) - left … i + (K - T) + right (bottom-right aligned);
            -1 is unlimited. Causal masking is right = 0.
        softcap: scores become softcap · tanh(scores / softcap); 0 is off.
        deterministic: the backward gives the same bits in every run.
    """

    softmax_scale: float
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    deterministic: bool = False

    @property
    def causal(self) -> bool:
        """Whether the mask is exactly the causal one (no left limit)."""
        return self.window_size == (-1, 0)


@dataclass(frozen=True)
class Varlen:
    """Packed documents: int32 offsets (documents + 1,) on the device of q, and the longest lengths as ints."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class Partial:
    """Attention over a subset of the keys, for the query rows ``start … start + rows`` of a larger tensor.

    ``out`` (B, rows, H, D) or (rows, H, D) is normalised by ``lse`` (B, H, rows) or (H, rows), natural log, fp32 (fp64 for
    fp64 inputs). A row that saw no key has lse = -inf and out = 0.
    """

    out: Tensor
    lse: Tensor
    start: int = 0


@dataclass(frozen=True)
class RowDelta:
    """delta = Σ_d dout · out per query row and head, as a kernel left it.

    ``values`` is (B, H, ≥rows) dense or (H, ≥rows) varlen, fp32, for the first ``rows`` query rows; where it is used for more rows,
    the others have delta = 0 (they have seen no key, so their out is 0). With ``block`` > 0 (FlashAttention-3, varlen) document b
    starts at column ``(cu_seqlens_q[b] + b·block) // block · block`` instead of ``cu_seqlens_q[b]``.
    """

    values: Tensor
    rows: int
    block: int = 0
    cu_seqlens_q: Tensor | None = None


@dataclass(frozen=True)
class Gradients:
    """dq, dk, dv in the inputs' shapes and dtype, and delta where the kernel has it anyway."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    delta: RowDelta | None


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of lse, delta and every other softmax statistic: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_stride(x: Tensor) -> Tensor:
    """x, copied only if its last dimension is strided: the kernels read any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def nothing_seen(q: Tensor, out: Tensor | None = None) -> Partial:
    """The partial of rows that have seen no key yet: out = 0 (in ``out`` if given), lse = -inf."""
    *batch, rows, heads, _ = q.shape
    out = torch.zeros_like(q) if out is None else out.zero_()
    return Partial(out, q.new_full((*batch, heads, rows), float("-inf"), dtype=stat_dtype(q.dtype)))


class Backend(ABC):
    """One source of attention kernels. Subclasses know nothing of sinks, of ranks, or of empty inputs."""

    name: str

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this process cannot use the backend at all, or None if it can."""

    @abstractmethod
    def unsupported(self, q: Tensor, params: AttentionParams) -> str | None:
        """Why the backend cannot run a call with this q (device, dtype, head_dim) and params, or None if it can."""

    @abstractmethod
    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams, varlen: Varlen | None, out: Tensor | None
    ) -> Partial: ...

    @abstractmethod
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
    ) -> Gradients: ...

    def describe(self) -> str:
        """The name with where the kernels come from."""
        return self.name

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams, varlen: Varlen | None = None, out: Tensor | None = None
    ) -> Partial:
        """Attention of q over the keys it is shown. ``out`` is where to write, for kernels that can choose."""
        if q.numel() and k.numel():
            return self._forward(q, k, v, params, varlen, out)
        return nothing_seen(q, out)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        params: AttentionParams,
        varlen: Varlen | None = None,
        dlse: Tensor | None = None,
    ) -> Gradients:
        """Gradients of these keys' share, given the *final* out and lse of the rows (every key and the sink included).

        With P = exp(S - lse), dP = dout·vᵀ and delta = Σ_d dout·out: dv = Pᵀ·dout, dS = P∘(dP - delta + dlse), dq = dS·k·scale,
        dk = dSᵀ·q·scale.
        """
        if not (q.numel() and k.numel()):
            return Gradients(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None)
        return self._backward(dout, q, k, v, out, lse, params, varlen, dlse)
