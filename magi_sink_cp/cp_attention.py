"""Attention with sinks across context-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magi_sink_cp.dist.plan import CPPlan
from magi_sink_cp.kernels.checks import own_heads, under_autocast
from magi_sink_cp.ops.cp_attention import cp_attention


def cp_attention_with_sink(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None = None,
    *,
    plan: CPPlan,
    sink_layout: str = "sh",
    softmax_scale: float | None = None,
    causal: bool | None = None,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    dsink_reduce: str = "none",
    overlap_degree: int | str = "auto",
    grad_reduce_dtype: torch.dtype | None = None,
    checks: str = "auto",
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`magi_sink_cp.attention_with_sink` over a sequence of which every rank holds its shard.

    It equals attention_with_sink on the whole packed sequence, followed by ``plan.shard``. Every
    rank of the plan's group must call it. If any rank runs backward through it, all must, in the
    same order; a rank without a loss of its own can use ``out.sum() * 0``.
    With a plan of engine "magi" overlap_degree, grad_reduce_dtype, deterministic and backend follow
    MagiAttention, or are refused (docs/engines.md).

    Args:
        q: (plan.local_tokens, h, d), or (b, plan.local_tokens, h, d): b samples, each of them a
            sequence as the plan says. fp16, bf16, fp32 or fp64, as the backend takes.
        k, v: (plan.local_tokens, h_kv, d), or with b as q; h_kv divides h. v may have a head_dim of
            its own: zeros are added to the smaller one, so it costs what the larger one costs.
        sink: "sh": (s_sink, h) or (h,), the same on every rank. "ssh": (plan.local_tokens, s_sink,
            h), or with b, sharded like q. None is plain attention. A DTensor may be sharded by its
            heads over tensor-parallel ranks, as q's heads are.
        plan: of :func:`magi_sink_cp.make_cp_plan`. Its documents do not see each other.
        causal: mask within each document. None is True, or what the plan's mask_slices say; beside
            these neither causal nor window_size may be given.
        window_size: (left, right) tokens seen around each query in its document; -1 or None is
            unlimited. causal sets right to 0. Only keys within the window travel. One plan serves
            layers with different windows.
        dsink_reduce: how the gradient of an "sh" sink, to which each rank contributes its rows, is
            reduced. "none" leaves the partial sum, for frameworks that reduce parameter gradients
            themselves. "sum" and "avg" all-reduce it over the group.
        overlap_degree: in how many stages other ranks' keys travel while the stage before is
            computed; at most cp_size - 1 count. 0 gathers them all at once. "auto" asks a cost
            model, for forward and for backward (magi_sink_cp/dist/planning/cost.py).
        grad_reduce_dtype: in which dk and dv of several ranks are added: torch.float32 (default;
            fp64 for fp64 inputs), or the dtype of k, which saves memory and rounds after each.
        checks: when the ranks compare their arguments. "auto": as under Raises. "always": at once
            in every call, forward and backward, for debugging.
        sink_layout, softmax_scale, softcap, deterministic, backend, return_lse: as in
            attention_with_sink.

    Returns:
        out (plan.local_tokens, h, d of v), or (out, lse) with lse (h, plan.local_tokens); with b as
        q, (b, plan.local_tokens, h, d of v) and (b, h, plan.local_tokens). Both are 0 on padding.

    Raises:
        TypeError, ValueError: an argument is invalid on some rank, or the ranks differ in their
            arguments. Raised on every rank before any data moves: every time on a CPU group; on
            GPUs when the plan sees the arguments for the first time, and the group has seen fewer
            than eight plans with such arguments. Later differences raise when they have been read,
            at the latest in the plan's last backward or the next make_cp_plan (docs/concepts.md).
            A ``plan`` that is no plan raises on its rank alone.
        RuntimeError: a transfer failed or took longer than the group's timeout (on GPUs,
            make_cp_plan's ``on_hang`` says what happens instead); or, in backward, a second
            derivative is asked for.
    """
    if not isinstance(plan, CPPlan):
        raise TypeError(f"plan must come from make_cp_plan, got {type(plan).__name__}")
    q, k, v = under_autocast(q, k, v)
    if isinstance(sink, Tensor):
        sink = own_heads(sink, q)
        if sink_layout == "sh" and sink.dim() == 1:
            sink = sink.unsqueeze(0)
    head_dim_v = _own_head_dim(q, k, v)
    if head_dim_v is not None:
        if softmax_scale is None:
            softmax_scale = q.shape[-1] ** -0.5
        q, k, v = _padded_to_one_head_dim(q, k, v)
    options = (
        sink_layout, softmax_scale, causal, window_size, softcap, deterministic, dsink_reduce,
        overlap_degree, grad_reduce_dtype, checks, backend, head_dim_v,
    )  # fmt: skip
    out, lse = cp_attention(q, k, v, sink, plan, return_lse, checks == "always", options)
    if head_dim_v is not None:
        out = out[..., :head_dim_v].contiguous()
    return (out, lse) if return_lse else out


def _own_head_dim(q: Tensor, k: Tensor, v: Tensor) -> int | None:
    """The head_dim of v where it alone differs from k's and q's. Other tensors are refused later,
    on every rank.
    """
    for x in (q, k, v):
        if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_nested or x.dim() < 3:
            return None
    is_own = k.shape[:-1] == v.shape[:-1] and 0 < q.shape[-1] == k.shape[-1] != v.shape[-1] > 0
    return v.shape[-1] if is_own else None


def _padded_to_one_head_dim(*tensors: Tensor) -> tuple[Tensor, ...]:
    """With zeros behind: they change no score, and the columns of out that they add are 0."""
    width = max(x.shape[-1] for x in tensors)
    missing = [width - x.shape[-1] for x in tensors]
    pad = torch.nn.functional.pad  # which copies where nothing is missing
    return tuple(pad(x, (0, n)) if n else x for x, n in zip(tensors, missing, strict=True))
