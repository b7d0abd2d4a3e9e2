"""The protocol between this package and every attention kernel on one device.

This file imports nothing of the package. Letters in shapes: B batch, T query rows, K key rows,
H query heads, H_kv key/value heads, D head_dim, D_v head_dim of v. A call is either

- dense:   q (B, T, H, D), k (B, K, H_kv, D), v (B, K, H_kv, D_v), lse (B, H, T); or
- varlen:  q (T, H, D), k (K, H_kv, D), v (K, H_kv, D_v), lse (H, T), documents in :class:`Varlen`.

These are FlashAttention's own layouts. Nothing between a kernel and its caller transposes them.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn


class NotUsableError(Exception):
    """Something optional is missing, broken, or has an unknown interface. The text says which."""


class AttentionParams(NamedTuple):
    """The numbers of one attention call: the mask, the score function, hints for the kernel.

    The operators' schema is derived from these fields (ops/schema.py).

    Attributes:
        softmax_scale: factor on q·k, > 0.
        window_size: (left, right): query i sees keys i + (K - T) - left … i + (K - T) + right
            (aligned to the bottom right). -1 is unlimited. A causal mask has right = 0.
        softcap: scores become softcap · tanh(scores / softcap); 0 is off.
        deterministic: the backward gives the same bits in every run.
        dropout_p: probability that a weight is dropped after the softmax. It does not change lse.
        attention_chunk: a query sees only keys of its own chunk of this many keys; 0 is off.
            Forward only.
        num_splits, pack_gqa, sm_margin: how FlashAttention divides its work. They do not change the
            result.
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
    """Packed documents.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: int32 (documents + 1,) offsets, on the device of q.
        max_seqlen_q, max_seqlen_k: at least the longest document.
        seqused_q, seqused_k: int32 (documents,), or None. Only the first ``seqused_q[b]`` rows and
            ``seqused_k[b]`` keys of document b exist. The other rows see no key. The mask is
            aligned to the rows and keys that exist.
        gaps: the rows that ``seqused_q`` leaves out belong to another call: ``out`` and
            ``into.dq`` are left alone there, and lse and delta are undefined. Only for backends
            with the feature "gaps", which write to ``out`` and ``into`` where they are.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    gaps: bool = False


@dataclass(frozen=True)
class Extras:
    """Optional tensors that some kernels take.

    Attributes:
        qv: (B, T, H, D_v) or (T, H, D_v): adds qv·v to the scores (FlashAttention-3). Forward only.
        q_descale, k_descale, v_descale: fp32 (B or documents, H_kv): factors on fp8 q, k and v.
            Forward only.
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
class KernelRequest:
    """What one kernel is asked for, besides q, k and v. It is dense if ``varlen`` is None."""

    params: AttentionParams
    varlen: Varlen | None = None
    extras: Extras = NO_EXTRAS

    def optional_features(self) -> Mapping[str, object]:
        """The optional features that the request needs: argument name → what was given."""
        features = _non_default_params(self.params)
        used: dict[str, object] = {}
        if self.varlen is not None:
            used = {"seqused_q": self.varlen.seqused_q, "seqused_k": self.varlen.seqused_k}
        if self.varlen is not None and self.varlen.gaps:
            features = features | {"gaps": True}
        if self.extras is not NO_EXTRAS or any(x is not None for x in used.values()):
            tensors = vars(self.extras) | used
            given = {name: "a tensor" for name, x in tensors.items() if x is not None}
            return features | given
        return features


_OPTIONAL_PARAMS = (
    "softcap",
    "deterministic",
    "dropout_p",
    "attention_chunk",
    "num_splits",
    "pack_gqa",
    "sm_margin",
)
_DEFAULTS = AttentionParams(1.0)


@functools.lru_cache(maxsize=1024)
def _non_default_params(params: AttentionParams) -> dict[str, object]:
    given = {name: getattr(params, name) for name in _OPTIONAL_PARAMS}
    return {name: value for name, value in given.items() if value != getattr(_DEFAULTS, name)}


@dataclass(frozen=True)
class Dropout:
    """What the backward of a call with dropout needs.

    ``attn_probs`` is FlashAttention's S_dmask (negative where dropped). It is empty unless asked
    for.
    """

    rng_state: Tensor
    attn_probs: Tensor


@dataclass(frozen=True)
class Partial:
    """Attention over some of the keys, for query rows ``start … start + rows`` of a larger tensor.

    ``out`` is (B, rows, H, D_v) or (rows, H, D_v), normalised by ``lse`` (B, H, rows) or (H, rows):
    natural log, fp32 (fp64 for fp64 inputs). A row that saw no key
    has lse = -inf, and its out is 0.
    """

    out: Tensor
    lse: Tensor
    start: int = 0
    dropout: Dropout | None = None


@dataclass(frozen=True)
class RowDelta:
    """delta = Σ_d dout · out of each query row and head, as a kernel left it in memory.

    ``values`` is fp32, (B, H, ≥rows) dense or (H, ≥rows) varlen, for the first ``rows`` query rows.
    Later rows have seen no key. Their out is 0, and so is their delta. With ``block`` > 0
    (FlashAttention-3, varlen) document b starts at column
    ``(cu_seqlens_q[b] + b·block) // block · block`` instead of ``cu_seqlens_q[b]``.
    """

    values: Tensor
    rows: int
    block: int = 0
    cu_seqlens_q: Tensor | None = None


@dataclass(frozen=True)
class Gradients:
    """dq, dk and dv, like the inputs, and delta if the kernel has computed it anyway."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    delta: RowDelta | None


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of lse, delta and all softmax statistics: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_stride(x: Tensor) -> Tensor:
    """x, copied only if its last dimension is strided. The kernels read any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def out_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of out: that of q, or bf16 for fp8."""
    return torch.bfloat16 if dtype == FP8 else dtype


def nothing_seen(q: Tensor, out: Tensor | None = None, head_dim_v: int | None = None) -> Partial:
    """The partial of rows that have seen no key.

    Out = 0 (written to ``out`` if given), lse = -inf.
    """
    *batch, rows, heads, head_dim = q.shape
    if out is None:
        shape = (*batch, rows, heads, head_dim if head_dim_v is None else head_dim_v)
        out = q.new_zeros(shape, dtype=out_dtype(q.dtype))
    else:
        out.zero_()
    lse = q.new_full((*batch, heads, rows), float("-inf"), dtype=stat_dtype(q.dtype))
    return Partial(out, lse)


class Backend(ABC):
    """One source of attention kernels.

    A subclass knows nothing of ranks or of empty inputs. Only ``fa4`` knows of sinks.
    """

    name: str
    # The optional fields of AttentionParams, Extras and Varlen that the kernels honour. A request
    # that sets another one is refused.
    features: frozenset[str] = frozenset()

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this process cannot use the backend at all, or None if it can."""

    def unsupported(
        self, q: Tensor, request: KernelRequest, head_dim_v: int | None = None
    ) -> str | None:
        """Why the backend cannot run a request with this q (device, dtype, head_dim), or None."""
        for name, value in request.optional_features().items():
            if name not in self.features:
                return f"it has no {name}, and the call sets {name}={value}"
        return None

    @abstractmethod
    def _forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        request: KernelRequest,
        out: Tensor | None,
        want_probs: bool,
    ) -> Partial: ...

    @abstractmethod
    def _backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        saved: Partial,
        request: KernelRequest,
        dlse: Tensor | None,
        into: Gradients | None,
    ) -> Gradients: ...

    def describe(self) -> str:
        """The name, with where the kernels come from."""
        return self.name

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        request: KernelRequest,
        out: Tensor | None = None,
        want_probs: bool = False,
    ) -> Partial:
        """Attention of q over these keys. Kernels that can choose where to write use ``out``."""
        if q.numel() and k.numel():
            return self._forward(q, k, v, request, out, want_probs)
        return nothing_seen(q, out, v.shape[-1])

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        saved: Partial,
        request: KernelRequest,
        dlse: Tensor | None = None,
        into: Gradients | None = None,
    ) -> Gradients:
        """Gradients of these keys' share.

        With P = exp(S - lse), dP = dout·vᵀ and delta = Σ_d dout·out:
        dv = Pᵀ·dout, dS = P∘(dP - delta + dlse), dq = dS·k·scale, dk = dSᵀ·q·scale.

        Args:
            saved: the *final* out and lse of the rows: all keys and the sink are included.
            dlse: the gradient that reaches lse, or None.
            into: tensors to write dq, dk and dv to; None allocates them.
        """
        if not (q.numel() and k.numel()):
            dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
            return store(Gradients(dq, dk, dv, None), into)
        return self._backward(dout, q, k, v, saved, request, dlse, into)


def store(grads: Gradients, into: Gradients | None) -> Gradients:
    """grads, copied to ``into`` unless it is None or they are there already."""
    if into is None:
        return grads
    for target, value in ((into.dq, grads.dq), (into.dk, grads.dk), (into.dv, grads.dv)):
        if target is not value:
            target.copy_(value)
    return Gradients(into.dq, into.dk, into.dv, grads.delta)
