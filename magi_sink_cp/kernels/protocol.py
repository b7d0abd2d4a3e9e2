"""What every attention kernel of this package is asked for and gives back.

Shapes: B batch, T query rows, K key rows, H query heads, H_kv key/value heads, D head_dim. A call is either

- dense:   q (B, T, H, D), k and v (B, K, H_kv, D), lse (B, H, T); or
- varlen:  q (T, H, D), k and v (K, H_kv, D), lse (H, T), documents given by :class:`Varlen`.

These are FlashAttention's own layouts; nothing between a kernel and the caller transposes them.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class AttentionParams:
    """Everything of one call that is a number: the mask, the score function, and how the kernel goes about it.

    Args:
        softmax_scale: factor on q·k, > 0.
        window_size: (left, right): query i sees keys i + (K - T) - left … i + (K - T) + right (bottom-right aligned);
            -1 is unlimited. Causal masking is right = 0.
        softcap: scores become softcap · tanh(scores / softcap); 0 is off.
        deterministic: the backward gives the same bits in every run.
        dropout_p: probability with which a weight is dropped after the softmax; lse does not see it.
        attention_chunk: query and key also have to stand in one chunk of this many keys; 0 is off. Forward only.
        num_splits, pack_gqa, sm_margin: FlashAttention's choices of work division; they leave the result as it is.
    """

    softmax_scale: float
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    deterministic: bool = False
    dropout_p: float = 0.0
    attention_chunk: int = 0
    num_splits: int = 1
    pack_gqa: bool | None = None
    sm_margin: int = 0

    @property
    def causal(self) -> bool:
        """Whether the mask is exactly the causal one (no left limit)."""
        return self.window_size == (-1, 0)


@dataclass(frozen=True)
class Varlen:
    """Packed documents: int32 offsets (documents + 1,) on the device of q, and the longest lengths as ints.

    Of document b only the first ``seqused_q[b]`` rows and ``seqused_k[b]`` keys exist, if these int32 (documents,) are given: the
    other rows see no key, and the mask is aligned to the rows and keys that exist.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None


@dataclass(frozen=True)
class Extras:
    """Tensors beside q, k and v that some kernels take.

    Args:
        qv: (B, T, H, D_v) or (T, H, D_v): adds qv·v to the scores (FlashAttention-3's absorbed MLA). Forward only.
        q_descale, k_descale, v_descale: fp32 (B or documents, H_kv), factors on fp8 q, k and v. Forward only.
        alibi_slopes: fp32 (H,) or (B, H): scores get -slope · |i + K - T - j|.
        block_table: int32 (B, blocks): k and v are pages (pages, page size, H_kv, D). Forward only.
    """

    qv: Tensor | None = None
    q_descale: Tensor | None = None
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    alibi_slopes: Tensor | None = None
    block_table: Tensor | None = None


NO_EXTRAS = Extras()


@dataclass(frozen=True)
class Call:
    """What a kernel is asked for, beside q, k and v. Dense without ``varlen``."""

    params: AttentionParams
    varlen: Varlen | None = None
    extras: Extras = NO_EXTRAS

    def requested(self) -> Mapping[str, object]:
        """The optional features that the call needs, by argument name, with what was given."""
        requested = _requested(self.params)
        lengths = {} if self.varlen is None else {"seqused_q": self.varlen.seqused_q, "seqused_k": self.varlen.seqused_k}
        if self.extras is not NO_EXTRAS or any(x is not None for x in lengths.values()):
            tensors = vars(self.extras) | lengths
            requested = requested | {name: "a tensor" for name, x in tensors.items() if x is not None}
        return requested


_OPTIONAL = ("softcap", "deterministic", "dropout_p", "attention_chunk", "num_splits", "pack_gqa", "sm_margin")
_DEFAULTS = AttentionParams(1.0)


@functools.lru_cache(maxsize=1024)
def _requested(params: AttentionParams) -> dict[str, object]:
    return {name: value for name in _OPTIONAL if (value := getattr(params, name)) != getattr(_DEFAULTS, name)}


@dataclass(frozen=True)
class Dropout:
    """What the backward of a call with dropout needs, and FlashAttention's S_dmask (negative where dropped), empty unless asked."""

    rng_state: Tensor
    attn_probs: Tensor


@dataclass(frozen=True)
class Partial:
    """Attention over a subset of the keys, for the query rows ``start … start + rows`` of a larger tensor.

    ``out`` (B, rows, H, D_v) or (rows, H, D_v) is normalised by ``lse`` (B, H, rows) or (H, rows), natural log, fp32 (fp64 for
    fp64 inputs). A row that saw no key has lse = -inf and out = 0.
    """

    out: Tensor
    lse: Tensor
    start: int = 0
    dropout: Dropout | None = None


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


def out_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of out: that of q, or bf16 for fp8."""
    return torch.bfloat16 if dtype == FP8 else dtype


def nothing_seen(q: Tensor, out: Tensor | None = None, head_dim_v: int | None = None) -> Partial:
    """The partial of rows that have seen no key yet: out = 0 (in ``out`` if given), lse = -inf."""
    *batch, rows, heads, head_dim = q.shape
    shape = (*batch, rows, heads, head_dim if head_dim_v is None else head_dim_v)
    out = q.new_zeros(shape, dtype=out_dtype(q.dtype)) if out is None else out.zero_()
    return Partial(out, q.new_full((*batch, heads, rows), float("-inf"), dtype=stat_dtype(q.dtype)))


class Backend(ABC):
    """One source of attention kernels. Subclasses know nothing of sinks (but fa4 has them too), of ranks, or of empty inputs."""

    name: str
    # Names of AttentionParams, Extras and Varlen fields that the kernels honour; a call that sets another one is refused.
    features: frozenset[str] = frozenset()

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this process cannot use the backend at all, or None if it can."""

    def unsupported(self, q: Tensor, call: Call, head_dim_v: int | None = None) -> str | None:
        """Why the backend cannot run a call with this q (device, dtype, head_dim), or None if it can."""
        for name, value in call.requested().items():
            if name not in self.features:
                return f"it has no {name}, and the call sets {name}={value}"
        return None

    @abstractmethod
    def _forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, out: Tensor | None, want_probs: bool) -> Partial: ...

    @abstractmethod
    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Partial, call: Call, dlse: Tensor | None, into: Gradients | None
    ) -> Gradients: ...

    def describe(self) -> str:
        """The name with where the kernels come from."""
        return self.name

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, out: Tensor | None = None, want_probs: bool = False) -> Partial:
        """Attention of q over the keys it is shown. ``out`` is where to write, for kernels that can choose."""
        if q.numel() and k.numel():
            return self._forward(q, k, v, call, out, want_probs)
        return nothing_seen(q, out, v.shape[-1])

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        saved: Partial,
        call: Call,
        dlse: Tensor | None = None,
        into: Gradients | None = None,
    ) -> Gradients:
        """Gradients of these keys' share, given the *final* out and lse of the rows (every key and the sink included) in ``saved``.

        With P = exp(S - lse), dP = dout·vᵀ and delta = Σ_d dout·out: dv = Pᵀ·dout, dS = P∘(dP - delta + dlse), dq = dS·k·scale,
        dk = dSᵀ·q·scale. ``into`` holds tensors to write dq, dk and dv to; without it they are new.
        """
        if not (q.numel() and k.numel()):
            return store(Gradients(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None), into)
        return self._backward(dout, q, k, v, saved, call, dlse, into)


def store(grads: Gradients, into: Gradients | None) -> Gradients:
    """grads, copied to ``into`` if that is given and they are not there yet."""
    if into is None:
        return grads
    for target, value in ((into.dq, grads.dq), (into.dk, grads.dk), (into.dv, grads.dv)):
        if target is not value:
            target.copy_(value)
    return Gradients(into.dq, into.dk, into.dv, grads.delta)
