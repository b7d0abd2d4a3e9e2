"""Attention with sinks across context-parallel ranks.

Shapes on a rank: T local tokens, H query heads, H_kv key/value heads, D head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from magi_sink_cp.dist.agreement import GroupRef, Signature
from magi_sink_cp.dist.lanes import Lanes, TwoLanes
from magi_sink_cp.dist.layout import Range, union
from magi_sink_cp.dist.overlap import SINK_KERNEL_SLOWER
from magi_sink_cp.dist.plan import CPPlan
from magi_sink_cp.dist.schedule import CAUSAL, FULL, Exchange, KernelCall, Schedule, Stage
from magi_sink_cp.dist.transport import Own, Transfer, Transport
from magi_sink_cp.dist.watchdog import Communication
from magi_sink_cp.kernels.accumulate import MAX_TERMS, Term, accumulate
from magi_sink_cp.kernels.dsink import sink_gradient
from magi_sink_cp.kernels.fa4 import Fa4Backend
from magi_sink_cp.kernels.inputs import check_qkv, check_sink, make_params
from magi_sink_cp.kernels.merge import MAX_PARTIALS, merge
from magi_sink_cp.kernels.protocol import (
    AttentionParams,
    Backend,
    Call,
    Gradients,
    Partial,
    RowDelta,
    Varlen,
    nothing_seen,
    stat_dtype,
)
from magi_sink_cp.kernels.registry import check_backend_name, find_adding_sink, log_choice, select_backend

DSINK_REDUCTIONS = ("none", "sum", "avg")
CHECKS = ("auto", "always")
_DSINK = "cp_attention_with_sink: all-reduce of dsink over the cp group"


# torch.compile breaks the graph here and compiles what stands around: transfers have an order that no graph knows of.
@torch.compiler.disable
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
    overlap_degree: int | str = "auto",
    grad_reduce_dtype: torch.dtype | None = None,
    checks: str = "auto",
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`magi_sink_cp.attention_with_sink` over the whole sequence of ``plan``, of which every rank holds its shard.

    Equals attention_with_sink on the whole packed sequence, then ``plan.shard``. Every rank of the plan's group must call it, and
    every rank must run backward through it if any does (a rank without a loss of its own can use ``out.sum() * 0``).

    Args:
        q: (plan.local_tokens, h, d), or (b, plan.local_tokens, h, d): b samples, each of them a sequence as the plan says.
        k, v: (plan.local_tokens, h_kv, d), or with b as q; h_kv divides h.
        plan: of :func:`magi_sink_cp.make_cp_plan`; its documents do not see each other.
        sink: "sh": (s_sink, h), the same on every rank. "ssh": (plan.local_tokens, s_sink, h), or with b, sharded like q.
        causal: mask within each document.
        window_size: (left, right) tokens seen around each query in its document; -1 is unlimited; causal makes right 0. Only the
            keys within the window travel, and one plan serves layers with different windows.
        dsink_reduce: of the gradient of an "sh" sink, to which each rank contributes its own rows: "none" leaves the partial sum,
            for frameworks that reduce parameter gradients themselves; "sum" and "avg" all-reduce it over the group.
        overlap_degree: in how many stages other ranks' keys travel while the stage before is computed, at most cp_size - 1; 0
            gathers all of them, and of the rows that wait for them computes only so many twice as fill that time. "auto" takes
            what a cost model says, for forward and for backward (magi_sink_cp/dist/overlap.py).
        grad_reduce_dtype: in which several ranks' contributions to dk and dv are added up: torch.float32 (default; fp64 for fp64
            inputs) or the dtype of k, which saves memory and rounds after each.
        checks: when the ranks compare their arguments: "auto" as under Raises, "always" in every call, for debugging.
        sink_layout, softmax_scale, softcap, deterministic, backend, return_lse: as in attention_with_sink.

    Returns:
        out (plan.local_tokens, h, d), or (out, lse) with lse (h, plan.local_tokens); with b as q: (b, plan.local_tokens, h, d) and
        (b, h, plan.local_tokens). On padding both are 0, whatever the sink.

    Raises:
        TypeError, ValueError: an argument is invalid, or the ranks differ in their arguments, which they compare before any data
            moves: every time on a CPU group, on GPUs the first time that the plan sees them. A ``plan`` that is no plan raises on
            its rank alone.
        RuntimeError: a transfer failed or took longer than the group's timeout; on GPUs the process ends with that text instead.
    """
    if not isinstance(plan, CPPlan):
        raise TypeError(f"plan must come from make_cp_plan, got {type(plan).__name__}")
    always = checks == "always"
    try:
        if checks not in CHECKS:
            raise ValueError(f"checks must be one of {CHECKS}, got {checks!r}")
        if plan.transport is not None:
            plan.check_current_device()
        call = _known_call(
            q, k, v, sink, plan, sink_layout, softmax_scale, causal, window_size, softcap, deterministic, dsink_reduce,
            overlap_degree, grad_reduce_dtype, backend,
        )  # fmt: skip
    except Exception as error:
        plan.agree(error, "cp_attention_with_sink", always)
        raise
    plan.agree(call.signature, "cp_attention_with_sink", always)
    if q.dim() == 3:
        out, lse = _CPAttentionWithSink.apply(q, k, v, sink, call, return_lse)
    else:
        batch = q.shape[:2]
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        sink = sink.flatten(0, 1) if sink is not None and sink_layout == "ssh" else sink
        out, lse = _CPAttentionWithSink.apply(q, k, v, sink, call, return_lse)
        out, lse = out.unflatten(0, batch), lse.unflatten(1, batch).transpose(0, 1)
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class _Call:
    """Everything of a call that is not differentiated; it does not hold the plan, which holds it."""

    group: GroupRef | None
    cp_size: int
    transport: Transport | None
    local_tokens: int
    real_tokens: int
    batch_size: int
    overlap_degrees: tuple[int, int]  # of forward and backward
    two_lanes: tuple[bool, bool]
    schedule: Schedule
    backward_schedule: Schedule
    backend: Backend
    sink_backend: Fa4Backend | None  # whose forward adds the sink to what a row's own keys give; if None, the merge does
    params: AttentionParams
    dsink_reduce: str
    grad_reduce_dtype: torch.dtype
    signature: Signature
    requests: dict[int, Call] = field(default_factory=dict)  # of each kernel call, by its id

    @functools.cached_property
    def merges(self) -> bool:
        """Whether any row has several partial results in forward."""
        return not all(kernel.first for stage in self.schedule.stages for kernel in stage.calls)

    def lanes(self, backward: bool, device: torch.device) -> Lanes:
        """For one pass."""
        kernels = [kernel for stage in (self.backward_schedule if backward else self.schedule).stages for kernel in stage.calls]
        if device.type != "cuda" or not self.two_lanes[backward] or len(kernels) < 2:
            return Lanes()
        for kernel in kernels:  # what calls on either lane read is there before the first of them
            _request(kernel, self, device)
        return TwoLanes()

    def padding(self, device: torch.device) -> Tensor:
        """bool (T,): the rows that are no token of the sequence."""
        rows = torch.arange(self.batch_size * self.local_tokens, device=device)
        return rows % max(1, self.local_tokens) >= self.real_tokens


def _known_call(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, plan: CPPlan, *options: Any) -> _Call:
    """The checked call, found again where one like it was checked before: layers and steps repeat, and checks take time."""
    tensors = (q, k, v) if sink is None else (q, k, v, sink)
    try:
        key = (
            *((type(x), x.shape, x.dtype, x.layout, x.device, x.requires_grad) for x in tensors),
            torch.is_grad_enabled(),
            *map(_exactly, options),
        )
        call = plan.calls.get(key)
    except (AttributeError, TypeError):  # something that is no tensor, or cannot be looked up
        return _check_call(q, k, v, sink, plan, *options)
    if call is None:
        call = _check_call(q, k, v, sink, plan, *options)
        if len(plan.calls) >= _MOST_CALLS:
            plan.calls.clear()
        plan.calls[key] = call
    return call


_MOST_CALLS = 256


def _exactly(option: object) -> tuple[object, ...]:
    """The option with its types, as 1, 1.0 and True are equal, and are not all allowed."""
    if isinstance(option, list | tuple):
        return type(option), *((type(x), x) for x in option)
    return type(option), option


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
    overlap_degree: int | str,
    grad_reduce_dtype: torch.dtype | None,
    backend: str,
) -> _Call:
    if isinstance(q, Tensor) and q.dim() == 4:
        check_qkv(q, k, v, 4, "(batch, plan.local_tokens, heads, head_dim)")
    else:
        check_qkv(q, k, v, 3, "(plan.local_tokens, heads, head_dim) or (batch, plan.local_tokens, heads, head_dim)")
    if v.shape != k.shape:
        raise ValueError(
            f"k and v must have the same shape (a head_dim of its own for v works on one device), got {tuple(k.shape)} and "
            f"{tuple(v.shape)}"
        )
    for name, x in (("q", q), ("k", k)):
        if x.shape[-3] != plan.local_tokens:
            raise ValueError(f"{name} must have the plan's local_tokens, {plan.local_tokens}, as its tokens, got {tuple(x.shape)}")
    batch_size = 1 if q.dim() == 3 else q.shape[0]
    check_sink(sink, sink_layout, q)
    params = make_params(q.shape[-1], softmax_scale, causal, window_size, softcap, deterministic)
    check_backend_name(backend)
    if dsink_reduce not in DSINK_REDUCTIONS:
        raise ValueError(f"dsink_reduce must be one of {DSINK_REDUCTIONS}, got {dsink_reduce!r}")
    if dsink_reduce != "none" and sink_layout == "ssh":
        raise ValueError(f"dsink_reduce={dsink_reduce!r} is for sink_layout='sh'; the rows of an 'ssh' sink live on one rank each")
    if dsink_reduce != "none" and sink is None:
        raise ValueError(f"dsink_reduce={dsink_reduce!r} reduces the gradient of a sink, and sink is None")
    chosen = select_backend(backend, q, Call(params))
    sink_backend = find_adding_sink(backend, q, Call(params), sink)
    slower = None if sink_backend is None else 0.0 if sink_backend is chosen else SINK_KERNEL_SLOWER
    sizes = batch_size, q.shape[-2], k.shape[-2], q.shape[-1], q.element_size()
    overlap = plan.overlap(params.window_size, *sizes, slower)
    if not overlap.sink_in_kernel:
        sink_backend = None
    if sink_backend is not None:
        log_choice(sink_backend)
    if overlap_degree == "auto":
        degrees = overlap.degrees
    elif not isinstance(overlap_degree, int) or isinstance(overlap_degree, bool) or overlap_degree < 0:
        raise ValueError(f"overlap_degree must be an int >= 0 or 'auto', got {overlap_degree!r}")
    else:
        degrees = overlap_degree, overlap_degree
    exact = stat_dtype(q.dtype)
    if grad_reduce_dtype not in (None, exact, q.dtype):
        raise ValueError(f"grad_reduce_dtype must be {exact} or the dtype of k, {q.dtype}, got {grad_reduce_dtype!r}")
    if plan.transport is not None and q.device != plan.device:
        raise ValueError(f"q, k and v must be on the plan's device, {plan.device}, got {q.device}")
    # Token counts are the plan's, which its ranks have compared already.
    signature: dict[str, object] = {
        "batch, heads, heads_kv, head_dim": [batch_size, q.shape[-2], k.shape[-2], q.shape[-1]],
        "dtype": str(q.dtype),
        "device type": q.device.type,
        "sink (s_sink, dtype)": None if sink is None else [sink.shape[-2], str(sink.dtype)],
        "sink_layout": sink_layout,
        "mask and scores": repr(params),
        "dsink_reduce": dsink_reduce,
        "overlap_degree (forward, backward)": degrees,
        "grad_reduce_dtype": str(grad_reduce_dtype or exact),
        "backend": chosen.name,
        "the sink is added by": "the merge" if sink_backend is None else sink_backend.name,
        "requires_grad of q, k, v, sink": [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (q, k, v, sink)],
    }
    return _Call(
        group=plan.group_ref,
        cp_size=plan.cp_size,
        transport=plan.transport,
        local_tokens=plan.local_tokens,
        real_tokens=plan.real_tokens,
        batch_size=batch_size,
        overlap_degrees=degrees,
        two_lanes=overlap.two_lanes,
        schedule=plan.schedule(params.window_size, degrees[0], batch_size, overlap.head_start, overlap.large_rows),
        backward_schedule=plan.schedule(params.window_size, degrees[1], batch_size),
        backend=chosen,
        sink_backend=sink_backend,
        params=params,
        dsink_reduce=dsink_reduce,
        grad_reduce_dtype=grad_reduce_dtype or exact,
        signature=Signature("cp_attention_with_sink", signature),
    )


class _CPAttentionWithSink(torch.autograd.Function):
    """Attention of sharded rows over keys that travel, and its gradients.

    Sharded: q, out, dq (T, H, D); k, v, dk, dv (T, H_kv, D); lse (H, T). Replicated: sink (s_sink, H); or sharded, (T, s_sink, H).

    forward:   for each stage s and the keys A_s that it brings, (out_s, lse_s) = attention(q, A_s) while A_{s+1} travels; then,
               once, lse = (⊕_s lse_s) ⊕ log Σ_j exp z_j and out = Σ_s exp(lse_s - lse) out_s. Kernels that can add the sink do so
               in the one call that has a row's own key; then only the rows that several calls have are merged.
    backward:  for each stage, with the final lse and out: dq += dq_s; dk_s and dv_s travel home while stage s + 1 computes. The
               sink's gradient needs only lse and delta: its all-reduce starts after the first stage and is waited for at the end.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, call: _Call, return_lse: bool
    ) -> tuple[Tensor, Tensor]:
        k, v = k.contiguous(), v.contiguous()
        padded = call.real_tokens < call.local_tokens
        kernel_sink, merge_sink = (None, sink) if call.sink_backend is None else (sink, None)
        # Rows that no call has are padding. A merge that adds the sink makes them 0.
        out = (torch.zeros_like if padded and merge_sink is None else torch.empty_like)(q, memory_format=torch.contiguous_format)
        own: list[Partial] = []  # of calls that write their rows of out themselves, each row of one of them
        others: list[Partial] = []
        exact_lse = return_lse or call.merges  # what is merged must be finite
        with _Flight(call) as flight, call.lanes(False, q.device) as lanes:
            for stage, k_stage, v_stage in _stages(k, v, call.schedule.stages, flight, lanes):
                for kernel in stage.calls:
                    rows, keys = slice(*kernel.rows), slice(*kernel.keys)
                    target, added = (out[rows], kernel_sink) if kernel.first else (None, None)
                    with lanes.turn():
                        partial = _forward_kernel(q[rows], k_stage[keys], v_stage[keys], kernel, call, target, added, exact_lse)
                    if not kernel.first and len(others) == MAX_PARTIALS - 1:
                        lanes.join()
                        others = [_fold(others)]
                    (own if kernel.first else others).append(partial)
        own_keys = _together(own, q, out)
        out, lse = own_keys.out, own_keys.lse
        _merge_in_place(others, merge_sink, out, lse)
        ctx.save_for_backward(q, k, v, sink, out, lse)
        if padded:  # the padding's lse, the sink alone, must not reach a loss on lse
            lse = lse.masked_fill(call.padding(q.device), 0.0)
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
            dlse = dlse.masked_fill(torch.isneginf(lse) | call.padding(q.device), 0.0)
        stages = call.backward_schedule.stages
        # Where dsink is complete; on every rank at the same stage, because collectives of a group are matched by their order.
        all_rows_seen = stages[0 if call.overlap_degrees[1] > 0 else -1]
        # Rows that no call has are padding.
        padded = call.real_tokens < call.local_tokens
        own_dq = (torch.zeros_like if padded else torch.empty_like)(q, memory_format=torch.contiguous_format)
        with _Flight(call) as flight, call.lanes(True, q.device) as lanes:
            dq = _GradientSum(q, stat_dtype(q.dtype), lanes)
            dk, dv = (_GradientSum(x, call.grad_reduce_dtype, lanes) for x in (k, v))
            dq.add(own_dq, [((0, q.shape[0]), (0, q.shape[0]))])
            dsink = _SinkGradient(sink, lse, call, lanes) if ctx.needs_input_grad[3] else None
            homeward: tuple[Stage, Transfer] | None = None
            for stage, k_stage, v_stage in _stages(k, v, stages, flight, lanes):
                # A local stage's keys are those of dk and dv; others' gradients are put together to travel.
                dk_stage, dv_stage = dk, dv
                if not stage.local:
                    dk_stage, dv_stage = (_GradientSum(x, call.grad_reduce_dtype, lanes) for x in (k_stage, v_stage))
                for kernel in stage.calls:
                    rows, keys = slice(*kernel.rows), slice(*kernel.keys)
                    target = own_dq[rows] if kernel.first else None
                    with lanes.turn():
                        grads = _backward_kernel(dout, q, k_stage[keys], v_stage[keys], out, lse, dlse, kernel, call, target)
                        if kernel.first and dsink is not None:
                            dsink.add(grads.delta, out[rows], dout[rows], None if dlse is None else dlse[:, rows], rows)
                    for total, part in ((dk_stage, grads.dk), (dv_stage, grads.dv)):
                        total.add(part, [(kernel.keys, (0, part.shape[0]))])
                    if not kernel.first:
                        dq.add(grads.dq, [(kernel.rows, (0, grads.dq.shape[0]))])
                leaving: tuple[Stage, Transfer] | None = None
                if not stage.local:
                    grads_here = dk_stage.result(), dv_stage.result()
                    leaving = stage, flight.start(grads_here, stage.reduce)
                    for total, part in zip((dk, dv), grads_here, strict=True):
                        total.add(part, stage.own)
                if dsink is not None and stage is all_rows_seen:
                    dsink.reduce()
                if stage is not stages[-1]:
                    dq.fold()
                if homeward is not None:
                    _add_arrived(*homeward, dk, dv)
                    dk.fold()
                    dv.fold()
                    homeward[1].release()
                homeward = leaving
            if homeward is None:
                return dq.result(), dk.result(), dv.result(), None if dsink is None else dsink.result(), None, None
            grad_q = dq.result()  # while the last gradients travel
            _add_arrived(*homeward, dk, dv)
            grad_k, grad_v = dk.result(), dv.result()
            homeward[1].release()
            return grad_q, grad_k, grad_v, None if dsink is None else dsink.result(), None, None


class _Flight:
    """The transfers of one pass; if it fails, none is left behind under way."""

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._transfers: list[Transfer] = []

    def start(self, tensors: Sequence[Tensor], exchange: Exchange, own: Own = ()) -> Transfer:
        """Transport.start."""
        assert self._call.transport is not None, "a plan with travelling stages has a transport"
        transfer = self._call.transport.start(tensors, exchange, own)
        self._transfers.append(transfer)
        return transfer

    def __enter__(self) -> _Flight:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for transfer in self._transfers:
                transfer.abandon()
            if self._call.transport is not None:
                self._call.transport.fail()


def _stages(k: Tensor, v: Tensor, stages: Sequence[Stage], flight: _Flight, lanes: Lanes) -> Iterator[tuple[Stage, Tensor, Tensor]]:
    """Yield (stage, its k, its v), one by one, with the next stage's keys already on their way."""
    arriving: Transfer | None = None
    for number, stage in enumerate(stages):
        here, k_stage, v_stage = arriving, k, v
        if here is not None:
            lanes.arrive(here)
            k_stage, v_stage = here.buffers
        if number + 1 < len(stages):
            # Before this stage's calls: own keys that start() puts beside the others' are there for both lanes.
            coming = stages[number + 1]
            arriving = flight.start((k, v), coming.cast, coming.own)
        yield stage, k_stage, v_stage
        if here is not None:
            lanes.join()
            here.release()


def _together(partials: Sequence[Partial], q: Tensor, out: Tensor) -> Partial:
    """One contiguous partial of all rows from those of disjoint rows, in ``out`` already where the kernel could write there."""
    if not partials:
        return nothing_seen(q, out)
    partials = sorted(partials, key=lambda partial: partial.start)  # a head start comes first, and has later rows
    first = partials[0]
    if len(partials) == 1 and first.out.shape[0] == q.shape[0] and first.out.is_contiguous():
        return first
    spans = [_span(partial) for partial in partials]
    for partial, (start, stop) in zip(partials, spans, strict=True):
        if partial.out.data_ptr() != out[start:stop].data_ptr():
            out[start:stop] = partial.out
    if [0, *(stop for _, stop in spans)] == [*(start for start, _ in spans), q.shape[0]]:
        return Partial(out, torch.cat([partial.lse for partial in partials], dim=1))
    lse = first.lse.new_full((q.shape[1], q.shape[0]), float("-inf"))
    for partial, (start, stop) in zip(partials, spans, strict=True):
        lse[:, start:stop] = partial.lse
    return Partial(out, lse)


def _span(partial: Partial) -> Range:
    """The rows that the partial has."""
    return partial.start, partial.start + partial.out.shape[0]


def _merge_in_place(others: Sequence[Partial], sink: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """Merge what other keys give into the rows of out and lse that see them, and the sink, if there is one, into all."""

    def merge_rows(start: int, stop: int, which: Sequence[int]) -> None:
        here = Partial(out[start:stop], lse[:, start:stop])
        sink_here = None if sink is None else _sink_of(sink, slice(start, stop))
        merge([here, *_moved([others[i] for i in which], start)], sink_here, out=here.out)

    # Apart, as a merge of several partial results takes longer also for the rows that have but one.
    done = 0
    for (start, stop), which in _clusters([_span(partial) for partial in others]):
        if sink is not None and done < start:
            merge_rows(done, start, [])
        merge_rows(start, stop, which)
        done = stop
    if sink is not None and done < out.shape[0]:
        merge_rows(done, out.shape[0], [])


def _sink_of(sink: Tensor, rows: slice) -> Tensor:
    """The sink of these rows: "sh" is that of all, "ssh" has one for each."""
    return sink if sink.dim() == 2 else sink[rows]


def _fold(partials: Sequence[Partial]) -> Partial:
    """One partial of exact dtype from several; rows between them have seen no key."""
    start = min(partial.start for partial in partials)
    return Partial(*merge(_moved(partials, start), out_dtype=stat_dtype(partials[0].out.dtype)), start)


def _moved(partials: Sequence[Partial], start: int) -> list[Partial]:
    """The partials as seen from row ``start``."""
    return [dataclasses.replace(partial, start=partial.start - start) for partial in partials]


def _clusters(spans: Sequence[Range]) -> list[tuple[Range, list[int]]]:
    """The rows of overlapping spans together, and which spans these are, in their order."""
    return [(rows, [i for i, (start, _) in enumerate(spans) if rows[0] <= start < rows[1]]) for rows in union(spans)]


def _forward_kernel(
    q: Tensor, k: Tensor, v: Tensor, kernel: KernelCall, call: _Call, out: Tensor | None, sink: Tensor | None, exact_lse: bool
) -> Partial:
    """Attention of one kernel call; its single document, if it has but one, runs as a dense batch of one.

    A ``sink`` is added by the kernel, and where ``exact_lse`` is not asked for, lse may be +inf under one that outweighs all keys.
    """
    request = _request(kernel, call, q.device)
    dense = request.varlen is None
    if dense:
        q, k, v, out = q[None], k[None], v[None], None if out is None else out[None]
    if sink is None:
        partial = call.backend.forward(q, k, v, request, out)
    else:
        assert call.sink_backend is not None, "kernels are given the sinks that they can add"
        partial = call.sink_backend.forward_with_sink(q, k, v, sink, request, exact_lse, out)
    if dense:
        return Partial(partial.out[0], partial.lse[0], kernel.rows[0])
    return Partial(partial.out, partial.lse, kernel.rows[0])


def _backward_kernel(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    kernel: KernelCall,
    call: _Call,
    dq: Tensor | None,
) -> Gradients:
    """Gradients of one kernel call over its keys k and v, for its rows of the other tensors, in ``dq`` if that is given."""
    rows = slice(*kernel.rows)
    request = _request(kernel, call, q.device)
    dout, q, saved = dout[rows], q[rows], Partial(out[rows], lse[:, rows].contiguous())
    dlse = None if dlse is None else dlse[:, rows]
    into = None if dq is None else Gradients(dq, torch.empty_like(k), torch.empty_like(v), None)
    if request.varlen is not None:
        return call.backend.backward(dout, q, k, v, saved, request, dlse, into)
    dense = Partial(saved.out[None], saved.lse[None])
    dense_dlse = None if dlse is None else dlse[None]
    dense_into = None if into is None else Gradients(into.dq[None], into.dk[None], into.dv[None], None)
    grads = call.backend.backward(dout[None], q[None], k[None], v[None], dense, request, dense_dlse, dense_into)
    delta = None if grads.delta is None else RowDelta(grads.delta.values[0], grads.delta.rows)
    return Gradients(grads.dq[0], grads.dk[0], grads.dv[0], delta)


def _request(kernel: KernelCall, call: _Call, device: torch.device) -> Call:
    """The call's params with the mask of one kernel call."""
    request = call.requests.get(id(kernel))  # the schedules keep their kernel calls
    if request is None:
        params = dataclasses.replace(call.params, window_size=kernel.window_size)
        request = call.requests[id(kernel)] = Call(params, _varlen(kernel, device))
    return request


def _varlen(kernel: KernelCall, device: torch.device) -> Varlen | None:
    """The call's offsets on ``device``; None for a single document, which runs as a dense batch of one.

    Windows with more rows than keys run packed: FlashAttention-2 gets some of them wrong (kernels/flash.py).
    """
    both_offsets = kernel.cu_seqlens_q, kernel.cu_seqlens_k
    if len(kernel.cu_seqlens_q) == 2 and (kernel.window_size in (FULL, CAUSAL) or kernel.cu_seqlens_q[1] <= kernel.cu_seqlens_k[1]):
        return None
    max_q, max_k = (max(hi - lo for lo, hi in itertools.pairwise(offsets)) for offsets in both_offsets)
    both = torch.tensor(both_offsets, dtype=torch.int32).to(device)
    return Varlen(both[0].contiguous(), both[1].contiguous(), max_q, max_k)


class _GradientSum:
    """The gradient of ``x`` as a sum of contributions along its first dimension, in the order they are added, rounded once.

    Contributions are kept until :meth:`fold` or :meth:`result` adds them; what is folded is kept in ``dtype``.
    """

    def __init__(self, x: Tensor, dtype: torch.dtype, lanes: Lanes) -> None:
        self._like = x
        self._dtype = dtype
        self._lanes = lanes
        self._terms: list[Term] = []

    def add(self, contribution: Tensor, pieces: Sequence[tuple[Range, Range]]) -> None:
        """Add, for each (rows of x, rows of contribution), these to those."""
        for (start, stop), (first, _) in pieces:
            if len(self._terms) == MAX_TERMS:
                self.fold()
            self._terms.append(Term(contribution, first, start, stop))

    def fold(self) -> None:
        """Add up what there is, so that the contributions may go."""
        if len(self._terms) > 1:
            self._terms = [Term(self._sum(self._dtype), 0, 0, self._like.shape[0])]

    def result(self) -> Tensor:
        """The sum in the dtype of x; rows without a contribution are 0."""
        return self._sum(self._like.dtype) if self._terms else torch.zeros_like(self._like)

    def _sum(self, dtype: torch.dtype) -> Tensor:
        """The sum in ``dtype``. A first contribution of all rows in this dtype has the others added to it, where they are."""
        self._lanes.join()
        first, *others = self._terms
        rows = self._like.shape[0]
        if first.tensor.dtype == dtype and (first.start, first.stop, first.tensor.shape[0]) == (0, rows, rows):
            for (start, stop), which in _clusters([(term.start, term.stop) for term in others]):
                here = first.tensor[start:stop]
                moved = [Term(t.tensor, t.first, t.start - start, t.stop - start) for t in (others[i] for i in which)]
                accumulate([Term(here, 0, 0, stop - start), *moved], here)
            return first.tensor
        out = torch.empty_like(self._like, dtype=dtype)
        accumulate(self._terms, out)
        return out


class _SinkGradient:
    """dsink from the rows of each call, and on its way through ``dsink_reduce``."""

    def __init__(self, sink: Tensor, lse: Tensor, call: _Call, lanes: Lanes) -> None:
        self._sink, self._lse, self._call, self._lanes = sink, lse, call, lanes
        self._parts: list[tuple[slice, Tensor]] = []
        self._dsink: Tensor | None = None
        self._reduction: Communication | None = None

    def add(self, delta: RowDelta | None, out: Tensor, dout: Tensor, dlse: Tensor | None, rows: slice) -> None:
        """Add what these rows contribute."""
        self._parts.append((rows, sink_gradient(_sink_of(self._sink, rows), self._lse[:, rows], delta, out, dout, dlse)))

    def reduce(self) -> None:
        """Every row has been added: start the reduction over the ranks, if one was asked for."""
        call = self._call
        if call.dsink_reduce != "none" and call.group is not None and call.cp_size > 1:
            dsink, group = self._total(), call.group()
            self._reduction = Communication(
                _DSINK, group, dsink.is_cuda, lambda: [dist.all_reduce(dsink, group=group, async_op=True)]
            )
            self._dsink = dsink

    def result(self) -> Tensor:
        """dsink in the dtype of sink."""
        dsink = self._total() if self._dsink is None else self._dsink
        if self._reduction is not None:
            self._reduction.wait()
        return (dsink / self._call.cp_size if self._call.dsink_reduce == "avg" else dsink).to(self._sink.dtype)

    def _total(self) -> Tensor:
        """The sum of the parts under "sh"; under "ssh" each has rows of its own."""
        self._lanes.join()
        if self._sink.dim() == 2 and self._parts:
            # Of one memory layout on every rank, as reductions go by memory.
            return functools.reduce(torch.add, (part for _, part in self._parts)).contiguous()
        dsink = torch.zeros_like(
            self._sink, dtype=self._lse.dtype if self._sink.dim() == 2 else None, memory_format=torch.contiguous_format
        )
        for rows, part in self._parts:
            dsink[rows] = part
        return dsink


def _add_arrived(stage: Stage, transfer: Transfer, dk: _GradientSum, dv: _GradientSum) -> None:
    """Wait for the gradients of this rank's keys that other ranks computed, and add them."""
    transfer.wait()
    pieces = [(sent.tokens, arrived.tokens) for sent, arrived in zip(stage.cast.sends, stage.reduce.receives, strict=True)]
    for total, buffer in zip((dk, dv), transfer.buffers, strict=True):
        total.add(buffer, pieces)
