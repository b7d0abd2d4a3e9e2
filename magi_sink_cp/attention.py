"""Attention with sinks on one device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from magi_sink_cp.cp_attention import cp_attention_with_sink
from magi_sink_cp.dist.make_plan import make_cp_plan
from magi_sink_cp.dist.plan import CPPlan
from magi_sink_cp.dist.planning.mask import Slice, check_slices, in_order
from magi_sink_cp.kernels.backends.registry import BackendPolicy, check_backend_name
from magi_sink_cp.kernels.caching import BoundedCache
from magi_sink_cp.kernels.checks import (
    as_flag,
    as_sink,
    check_qkv,
    make_params,
    under_autocast,
    window_limits,
)
from magi_sink_cp.kernels.lengths import make_lengths
from magi_sink_cp.ops.attention import OperatorOptions, attention

# Plans of mask_slices: layers and steps repeat.
_plans: BoundedCache[object, CPPlan] = BoundedCache(64)


def attention_with_sink(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None = None,
    *,
    sink_layout: str = "sh",
    cu_seqlens_q: Tensor | Sequence[int] | None = None,
    cu_seqlens_k: Tensor | Sequence[int] | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    mask_slices: Sequence[Slice] | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention whose softmax denominator also holds learnable sink logits.

    For query row i and head h, with scores S_ij = softcap(scale · q_i·k_j) over the visible keys
    and sink logits z (the sinks of gpt-oss):

        out_i = Σ_j exp(S_ij - lse_i) v_j,    lse_i = log(Σ_j exp S_ij + Σ_s exp z_s)

    It is differentiable once, in q, k, v and sink.

    Args:
        q: (b, sq, h, d), or packed (total_q, h, d) with cu_seqlens; fp16, bf16, fp32 or fp64, as
            the backend takes. Under autocast, inputs of different float dtypes get autocast's.
        k, v: (b, sk, h_kv, d) or (total_k, h_kv, d); h_kv divides h. v may have a head_dim of its
            own where the backend can.
        sink: logits, natural log, fp32 (bf16 and fp16 are computed in fp32). None is plain
            attention. -inf switches a sink off. A DTensor may be sharded by its heads over
            tensor-parallel ranks, as q's heads are.
        sink_layout: "sh": sink is (s_sink, h) or (h,), shared by all rows. "ssh": a sink per row,
            (b, sq, s_sink, h) or (total_q, s_sink, h). Any s_sink >= 1.
        cu_seqlens_q, cu_seqlens_k: (documents + 1,) int32 or int64 offsets of packed documents on
            the device of q, or a sequence of ints. A new CUDA tensor is copied to the host once.
        max_seqlen_q, max_seqlen_k: at least the longest document; None reads it from cu_seqlens.
        mask_slices: the whole mask, as in :func:`magi_sink_cp.make_cp_plan`; queries and keys are
            the same tokens, and every sample of a batch has this mask. Neither causal, window_size
            nor cu_seqlens go with it. Equal slices are planned once, outside of a compiled graph:
            for torch.compile(fullgraph=True) make the plan yourself, without a group, and call
            cp_attention_with_sink.
        softmax_scale: factor on q·k; None is d^-1/2.
        causal: mask aligned to the bottom right: row i sees keys up to i + sk - sq.
        window_size: (left, right) tokens seen around i + sk - sq; -1 or None is unlimited. causal
            sets right to 0. A window of 128 keys, the query's own included, is (127, 0).
        softcap: scores become softcap · tanh(scores / softcap); 0 is off.
        deterministic: the backward gives the same bits in every run.
        backend: "auto", or a name of :func:`magi_sink_cp.backends`.
        return_lse: also return lse.

    Returns:
        out like q (with v's head_dim), or (out, lse). lse is fp32, (b, h, sq) or (h, total_q), the
        sink included (fp64 for fp64 inputs). A row that sees no key has out = 0 and
        lse = log Σ exp z, or -inf without a sink. A gradient that reaches lse is exact.

    Raises:
        TypeError, ValueError: an argument is invalid. Raised before any kernel runs.
        RuntimeError: in backward, a second derivative is asked for.
    """
    if mask_slices is not None:
        lengths_given = any(
            x is not None for x in (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        )
        limited = window_limits(window_size) != (-1, -1)
        if as_flag("causal", causal) or limited or lengths_given:
            raise ValueError(
                "causal, window_size, cu_seqlens and max_seqlen must be left out beside "
                f"mask_slices, which are the whole mask, got causal={causal!r}, "
                f"window_size={window_size!r} and {'some' if lengths_given else 'no'} lengths"
            )
        return cp_attention_with_sink(
            q,
            k,
            v,
            sink,
            plan=_plan_of_slices(q, k, mask_slices),
            sink_layout=sink_layout,
            softmax_scale=softmax_scale,
            softcap=softcap,
            deterministic=deterministic,
            backend=backend,
            return_lse=return_lse,
        )
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    shape_text = "(batch, seqlen, heads, head_dim)"
    if packed:
        shape_text = "(total, heads, head_dim), as cu_seqlens are given,"
    q, k, v = under_autocast(q, k, v)
    check_qkv(q, k, v, 3 if packed else 4, shape_text)
    sink = as_sink(sink, sink_layout, q)
    check_backend_name(backend)
    lengths = make_lengths(q.device, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    params = make_params(q.shape[-1], softmax_scale, causal, window_size, softcap, deterministic)
    options = OperatorOptions(read_lengths=True, want_lse=return_lse)
    out, lse, _ = attention((q, k, v), sink, BackendPolicy(backend), params, options, lengths)
    return (out, lse) if return_lse else out


@torch.compiler.disable(reason="planning is not traced")
def _plan_of_slices(q: Tensor, k: Tensor, mask_slices: Sequence[Slice]) -> CPPlan:
    """The plan of one device for these slices, made once.

    Raises:
        TypeError, ValueError: q and k are no tensors of the same tokens, or the slices are invalid.
    """
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor) or x.dim() not in (3, 4):
            given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"{name} must have shape (total, heads, head_dim) or (batch, seqlen, heads, "
                f"head_dim), got {given}"
            )
    if q.shape[-3] != k.shape[-3]:
        raise ValueError(
            "q and k must have the same tokens beside mask_slices, got "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    total = q.shape[-3]
    slices = in_order(mask_slices)
    if not _are_plain(slices):  # what is equal to ints may not be one, or change
        slices = check_slices(total, slices)
    plan = _plans.get((total, slices))
    if plan is None:
        plan = _plans[total, slices] = make_cp_plan(total, mask_slices=slices)
    return plan


def _are_plain(slices: Any) -> bool:
    """Whether these are nested tuples of ints and a str."""
    try:
        return all(
            type(one) is tuple
            and type(kind) is str
            and all(type(span) is tuple and {*map(type, span)} == {int} for span in spans)
            for one in slices
            for *spans, kind in [one]
        )
    except (TypeError, ValueError):
        return False
