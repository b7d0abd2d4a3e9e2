"""Attention with sinks across context-parallel ranks.

Shapes on a rank: T local tokens, H query heads, H_kv key/value heads, D head_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from magi_sink_cp.dist.agreement import backend_for
from magi_sink_cp.dist.layout import RankRanges
from magi_sink_cp.dist.plan import CPPlan
from magi_sink_cp.dist.schedule import KernelCall, Schedule, Stage
from magi_sink_cp.dist.transport import Transfer, group_cast, group_reduce
from magi_sink_cp.kernels.dsink import sink_gradient
from magi_sink_cp.kernels.inputs import check_qkv, check_sink, make_params
from magi_sink_cp.kernels.merge import MAX_PARTIALS, merge
from magi_sink_cp.kernels.protocol import AttentionParams, Backend, Call, Gradients, Partial, RowDelta, nothing_seen, stat_dtype
from magi_sink_cp.kernels.registry import check_backend_name, select_backend

DSINK_REDUCTIONS = ("none", "sum", "avg")


def cp_attention_with_sink(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None = None,
    *,
    plan: CPPlan,
    sink_layout: str = "sh",
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    dsink_reduce: str = "none",
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`magi_sink_cp.attention_with_sink` over the whole sequence of ``plan``, of which every rank holds its shard.

    Equals attention_with_sink on the whole packed sequence, then ``plan.shard``. Every rank of the plan's group must call it, and
    every rank must run backward through it if any does (a rank without a loss of its own can use ``out.sum() * 0``).

    Args:
        q: (plan.local_tokens, h, d).
        k, v: (plan.local_tokens, h_kv, d); h_kv divides h.
        plan: of :func:`magi_sink_cp.make_cp_plan`; its documents do not see each other.
        sink: "sh": (s_sink, h), the same on every rank. "ssh": (plan.local_tokens, s_sink, h), sharded like q.
        causal: mask within each document.
        window_size: (left, right) tokens seen around each query in its document; -1 is unlimited; causal makes right 0. Only the
            keys within the window travel, and one plan serves layers with different windows.
        dsink_reduce: of the gradient of an "sh" sink, to which each rank contributes its own rows: "none" leaves the partial sum,
            for frameworks that reduce parameter gradients themselves; "sum" and "avg" all-reduce it over the group.
        sink_layout, softmax_scale, softcap, deterministic, backend, return_lse: as in attention_with_sink.

    Returns:
        out (plan.local_tokens, h, d), or (out, lse) with lse (h, plan.local_tokens). On padding both are 0, whatever the sink.

    Raises:
        TypeError, ValueError: an argument is invalid, or the ranks differ in their arguments, which they compare before any data
            moves: every time on a CPU group, on GPUs the first time that the group sees them. A ``plan`` that is no plan raises on
            its rank alone.
    """
    if not isinstance(plan, CPPlan):
        raise TypeError(f"plan must come from make_cp_plan, got {type(plan).__name__}")
    try:
        call = _check_call(
            q, k, v, sink, plan, sink_layout, softmax_scale, causal, window_size, softcap, deterministic, dsink_reduce, backend
        )
    except Exception as error:
        plan.agree(error, "cp_attention_with_sink")
        raise
    plan.agree(_signature(q, k, v, sink, call, sink_layout), "cp_attention_with_sink")
    out, lse = _CPAttentionWithSink.apply(q, k, v, sink, call)
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class _Call:
    """Everything of a call that is not differentiated."""

    plan: CPPlan
    schedule: Schedule
    backend: Backend
    params: AttentionParams
    dsink_reduce: str


def _check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    plan: CPPlan,
    sink_layout: str,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int],
    softcap: float,
    deterministic: bool,
    dsink_reduce: str,
    backend: str,
) -> _Call:
    check_qkv(q, k, v, 3, "(plan.local_tokens, heads, head_dim)")
    if v.shape != k.shape:
        raise ValueError(f"k and v must have one shape across ranks, got k {tuple(k.shape)} and v {tuple(v.shape)}")
    for name, x in (("q", q), ("k", k)):
        if x.shape[0] != plan.local_tokens:
            raise ValueError(
                f"{name} must have the plan's local_tokens, {plan.local_tokens}, as its first size, got {tuple(x.shape)}"
            )
    check_sink(sink, sink_layout, q)
    params = make_params(q.shape[-1], softmax_scale, causal, window_size, softcap, deterministic)
    check_backend_name(backend)
    if dsink_reduce not in DSINK_REDUCTIONS:
        raise ValueError(f"dsink_reduce must be one of {DSINK_REDUCTIONS}, got {dsink_reduce!r}")
    if dsink_reduce != "none" and sink_layout == "ssh":
        raise ValueError(f"dsink_reduce={dsink_reduce!r} is for sink_layout='sh'; the rows of an 'ssh' sink live on one rank each")
    if dsink_reduce != "none" and sink is None:
        raise ValueError(f"dsink_reduce={dsink_reduce!r} reduces the gradient of a sink, and sink is None")
    if plan.group is not None and backend_for(plan.group, q.device.type) is None:
        config = dist.get_backend_config(plan.group)
        raise ValueError(f"q, k and v must be on a device that the plan's group ({config}) can send from, got {q.device}")
    return _Call(plan, plan.schedule(params.window_size), select_backend(backend, q, Call(params)), params, dsink_reduce)


def _signature(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, call: _Call, sink_layout: str) -> dict[str, object]:
    """What the ranks must agree on. Token counts are the plan's, which its ranks have compared already."""
    return {
        "heads, heads_kv, head_dim": [q.shape[1], k.shape[1], q.shape[2]],
        "dtype": str(q.dtype),
        "device type": q.device.type,
        "sink (s_sink, dtype)": None if sink is None else [sink.shape[-2], str(sink.dtype)],
        "sink_layout": sink_layout,
        "mask and scores": repr(call.params),
        "dsink_reduce": call.dsink_reduce,
        "backend": call.backend.name,
        "requires_grad of q, k, v, sink": [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (q, k, v, sink)],
    }


class _CPAttentionWithSink(torch.autograd.Function):
    """Attention of sharded rows over keys that travel, and its gradients.

    Sharded: q, out, dq (T, H, D); k, v, dk, dv (T, H_kv, D); lse (H, T). Replicated: sink (s_sink, H); or sharded, (T, s_sink, H).

    forward:   for each stage s and the keys A_s that it brings, (out_s, lse_s) = attention(q, A_s) while A_{s+1} travels; then,
               once, lse = (⊕_s lse_s) ⊕ log Σ_j exp z_j and out = Σ_s exp(lse_s - lse) out_s.
    backward:  for each stage, with the final lse and out: dq += dq_s; dk_s and dv_s travel home while stage s + 1 computes. The
               sink's gradient needs only lse and delta: its all-reduce starts after the first stage and is waited for at the end.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
        k, v = k.contiguous(), v.contiguous()
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        partials: list[Partial] = []
        for stage, k_stage, v_stage in _travelling_keys(k, v, call):
            for kernel in stage.calls:
                if len(partials) == MAX_PARTIALS:
                    partials = [Partial(*merge(partials, out_dtype=stat_dtype(q.dtype)))]
                rows, keys = slice(*kernel.rows), slice(*kernel.keys)
                target = out[rows] if not partials else None
                partials.append(_forward_kernel(q[rows], k_stage[keys], v_stage[keys], kernel, call, target))
        out, lse = merge(partials or [nothing_seen(q)], sink, out=out)
        ctx.save_for_backward(q, k, v, sink, out, lse)
        if call.plan.real_tokens < q.shape[0]:  # the padding's lse, the sink alone, must not reach a loss on lse
            lse = lse.clone()
            lse[:, call.plan.real_tokens :] = 0.0
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sink, out, lse = ctx.saved_tensors
        call: _Call = ctx.call
        dout = torch.zeros_like(out) if dout is None else dout
        if dlse is not None:  # log 0 depends on nothing, and padding belongs to nothing
            dlse = dlse.masked_fill(torch.isneginf(lse) | (torch.arange(q.shape[0], device=q.device) >= call.plan.real_tokens), 0.0)
        remote = call.schedule.remote
        dq = _GradientSum(q, sum(len(stage.calls) for stage in call.schedule.stages))
        arrivals = 1 + sum(stage.sent_tokens > 0 for stage in remote)
        dk, dv = _GradientSum(k, arrivals), _GradientSum(v, arrivals)
        dsink: _SinkGradient | None = None
        homeward: tuple[Stage, Transfer] | None = None
        for stage, k_stage, v_stage in _travelling_keys(k, v, call):
            dk_stage, dv_stage = _GradientSum(k_stage, len(stage.calls)), _GradientSum(v_stage, len(stage.calls))
            delta: RowDelta | None = None
            for number, kernel in enumerate(stage.calls):
                grads = _backward_kernel(dout, q, k_stage, v_stage, out, lse, dlse, kernel, call)
                dq.add((kernel.rows,), grads.dq)
                dk_stage.add((kernel.keys,), grads.dk)
                dv_stage.add((kernel.keys,), grads.dv)
                if number == 0:  # on own keys it covers every row
                    delta = grads.delta
            if stage is call.schedule.local:
                dk.add(((0, k.shape[0]),), dk_stage.result())
                dv.add(((0, v.shape[0]),), dv_stage.result())
                if ctx.needs_input_grad[3]:
                    dsink = _SinkGradient(sink_gradient(sink, lse, delta, out, dout, dlse), call)
                continue
            _add_arrived(homeward, dk, dv)
            assert call.plan.group is not None, "a plan with remote stages has a group"
            homeward = stage, group_reduce([dk_stage.result(), dv_stage.result()], stage, call.plan.group)
        _add_arrived(homeward, dk, dv)
        sink_grad = None if dsink is None else dsink.wait().to(sink.dtype)
        return dq.result(), dk.result(), dv.result(), sink_grad, None


def _travelling_keys(k: Tensor, v: Tensor, call: _Call) -> Iterator[tuple[Stage, Tensor, Tensor]]:
    """Yield (stage, its k, its v), stage by stage, with the next stage's keys already on their way."""
    stages, arriving = call.schedule.stages, None
    for number, stage in enumerate(stages):
        k_stage, v_stage = (k, v) if arriving is None else arriving.wait()
        if number + 1 < len(stages):
            assert call.plan.group is not None, "a plan with remote stages has a group"
            arriving = group_cast((k, v), stages[number + 1], call.plan.group)
        yield stage, k_stage, v_stage


def _forward_kernel(q: Tensor, k: Tensor, v: Tensor, kernel: KernelCall, call: _Call, out: Tensor | None) -> Partial:
    """Attention of one kernel call; its single document, if it has but one, runs as a dense batch of one."""
    request = _request(kernel, call, q.device)
    if request.varlen is not None:
        partial = call.backend.forward(q, k, v, request, out)
    else:
        dense = call.backend.forward(q[None], k[None], v[None], request, None if out is None else out[None])
        partial = Partial(dense.out[0], dense.lse[0])
    return Partial(partial.out, partial.lse, kernel.rows[0])


def _backward_kernel(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, kernel: KernelCall, call: _Call
) -> Gradients:
    """Gradients of one kernel call, for its rows and keys."""
    rows, keys = slice(*kernel.rows), slice(*kernel.keys)
    request = _request(kernel, call, q.device)
    dout, q, saved = dout[rows], q[rows], Partial(out[rows], lse[:, rows].contiguous())
    dlse = None if dlse is None else dlse[:, rows]
    if request.varlen is not None:
        return call.backend.backward(dout, q, k[keys], v[keys], saved, request, dlse)
    dense_dlse = None if dlse is None else dlse[None]
    dense = Partial(saved.out[None], saved.lse[None])
    grads = call.backend.backward(dout[None], q[None], k[keys][None], v[keys][None], dense, request, dense_dlse)
    delta = None if grads.delta is None else RowDelta(grads.delta.values[0], grads.delta.rows)
    return Gradients(grads.dq[0], grads.dk[0], grads.dv[0], delta)


def _request(kernel: KernelCall, call: _Call, device: torch.device) -> Call:
    """The call's params with the mask of one kernel call."""
    return Call(dataclasses.replace(call.params, window_size=kernel.window_size), call.plan.varlen(kernel, device))


class _GradientSum:
    """Sums ``count`` contributions to the gradient of ``x`` along its first dimension, in fp32, in the order they are added.

    Two contributions are added in one kernel that computes in fp32 and rounds once; only more of them need an fp32 buffer.
    """

    def __init__(self, x: Tensor, count: int) -> None:
        self._like = x
        self._left = count
        self._sum: Tensor | None = None

    def add(self, ranges: RankRanges, contribution: Tensor) -> None:
        """Add ``contribution``, which holds the rows of ``ranges`` back to back."""
        if not contribution.shape[0]:
            return
        self._left -= 1
        if self._sum is None and ranges == ((0, self._like.shape[0]),):
            self._sum = contribution
            return
        if self._sum is None:
            self._sum = torch.zeros_like(self._like)
        if self._left > 0:
            self._sum = self._sum.to(stat_dtype(self._sum.dtype))
        base = 0
        for lo, hi in ranges:
            self._sum[lo:hi] += contribution[base : base + hi - lo]
            base += hi - lo

    def result(self) -> Tensor:
        """The sum in the dtype of x; rows without a contribution are 0."""
        return torch.zeros_like(self._like) if self._sum is None else self._sum.to(self._like.dtype)


class _SinkGradient:
    """dsink on its way through ``dsink_reduce``."""

    def __init__(self, dsink: Tensor, call: _Call) -> None:
        self._dsink = dsink
        self._divisor = call.plan.cp_size if call.dsink_reduce == "avg" else 1
        reduces = call.dsink_reduce != "none" and call.plan.group is not None and call.plan.cp_size > 1
        self._work = dist.all_reduce(dsink, group=call.plan.group, async_op=True) if reduces else None

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        return self._dsink / self._divisor if self._divisor > 1 else self._dsink


def _add_arrived(homeward: tuple[Stage, Transfer] | None, dk: _GradientSum, dv: _GradientSum) -> None:
    """Wait for the gradients of this rank's keys that another rank computed, and add them."""
    if homeward is None:
        return
    stage, transfer = homeward
    for total, arrived in zip((dk, dv), transfer.wait(), strict=True):
        total.add(stage.send, arrived)
