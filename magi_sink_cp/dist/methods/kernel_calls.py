"""Planned kernel calls bound to a device, and how one of them runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from magi_sink_cp.dist.bookkeeping import plain_tensors, upload
from magi_sink_cp.dist.planning.exchange import Exchange, Schedule
from magi_sink_cp.dist.planning.mask import CAUSAL, FULL, Range
from magi_sink_cp.dist.planning.packing import KernelCall
from magi_sink_cp.kernels.backends.fa4 import Fa4Backend
from magi_sink_cp.kernels.protocol import (
    AttentionParams,
    Backend,
    Gradients,
    KernelRequest,
    Partial,
    RowDelta,
    Varlen,
)

# Offsets of one call start at multiples of 16 bytes: kernels compile for that alignment.
_ALIGNED_OFFSETS = 4


@dataclass(frozen=True)
class BoundCall:
    """A kernel call with its offsets on the device.

    Attributes:
        rows, keys: of q, and of the stage's keys.
        owns_rows: as in :class:`~magi_sink_cp.dist.planning.packing.KernelCall`.
        request: what the kernel is asked for. Without a Varlen the call is a dense batch of one.
        gap: bool (rows,): which rows are in a gap; None if none is.
    """

    rows: slice
    keys: slice
    owns_rows: bool
    request: KernelRequest
    gap: Tensor | None

    @property
    def row_range(self) -> Range:
        return self.rows.start, self.rows.stop

    @property
    def key_range(self) -> Range:
        return self.keys.start, self.keys.stop


@dataclass(frozen=True)
class BoundStage:
    """A stage of a schedule with its calls bound; the fields are those of Stage."""

    local: bool
    calls: tuple[BoundCall, ...]
    cast: Exchange
    own: tuple[tuple[Range, Range], ...]
    reduce: Exchange


def bind(
    schedule: Schedule, params: AttentionParams, device: torch.device
) -> tuple[BoundStage, ...]:
    """The schedule's stages for ``device``; all offsets go there in one copy."""
    packed = [call for call in schedule.kernel_calls if not _is_dense(call)]
    arrays = iter(_upload([array for call in packed for array in _arrays(call)], device))

    def bound(call: KernelCall) -> BoundCall:
        params_of_call = params._replace(window_size=call.window_size)
        rows, keys = slice(*call.rows), slice(*call.keys)
        if _is_dense(call):
            return BoundCall(rows, keys, call.owns_rows, KernelRequest(params_of_call), None)
        offsets_q, offsets_k = next(arrays), next(arrays)
        used = gap = None
        if call.seqused_q is not None:
            used, gap = next(arrays), next(arrays).view(torch.bool)[: rows.stop - rows.start]
        lengths_q = np.diff(call.cu_seqlens_q) if call.seqused_q is None else call.seqused_q
        varlen = Varlen(
            offsets_q,
            offsets_k,
            int(lengths_q.max()),
            int(np.diff(call.cu_seqlens_k).max()),
            seqused_q=used,
            gaps=used is not None,
        )
        return BoundCall(rows, keys, call.owns_rows, KernelRequest(params_of_call, varlen), gap)

    return tuple(
        BoundStage(stage.local, tuple(map(bound, stage.calls)), stage.cast, stage.own, stage.reduce)
        for stage in schedule.stages
    )


def _is_dense(call: KernelCall) -> bool:
    """Whether the call is one document that runs as a dense batch of one.

    Windows with more rows than keys run packed: FlashAttention-2 computes some of them wrongly as
    dense calls (kernels/backends/flash.py).
    """
    if len(call.cu_seqlens_q) != 2:
        return False
    unlimited = call.window_size in (FULL, CAUSAL)
    return unlimited or bool(call.cu_seqlens_q[1] <= call.cu_seqlens_k[1])


def _arrays(call: KernelCall) -> list[NDArray[np.int32]]:
    """What a packed call needs on the device; the flags of a gap as bytes in int32 words."""
    arrays = [call.cu_seqlens_q, call.cu_seqlens_k]
    if call.seqused_q is not None:
        in_gap = np.repeat(call.seqused_q == 0, np.diff(call.cu_seqlens_q))
        in_gap = np.append(in_gap, np.zeros(-len(in_gap) % 4, dtype=bool))
        arrays += [call.seqused_q, in_gap.view(np.int32)]
    return arrays


def _upload(arrays: Sequence[NDArray[np.int32]], device: torch.device) -> list[Tensor]:
    """Each array as an int32 tensor on ``device``."""
    sizes = list(map(len, arrays))
    starts = [0, *itertools.accumulate(size + -size % _ALIGNED_OFFSETS for size in sizes)]
    with plain_tensors():
        host = torch.zeros(starts[-1], dtype=torch.int32, device="cpu")
        values = host.numpy()
        for start, array in zip(starts, arrays, strict=False):
            values[start : start + len(array)] = array
        whole = upload(host, device)
        return [whole[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def run_forward(
    call: BoundCall,
    backend: Backend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
) -> Partial:
    """Attention of the call's rows of q over its keys of the stage; ``out`` is where to write."""
    q, k, v = q[call.rows], k[call.keys], v[call.keys]
    if call.request.varlen is not None:
        partial = backend.forward(q, k, v, call.request, out)
        return Partial(partial.out, partial.lse, call.rows.start)
    dense_out = None if out is None else out[None]
    partial = backend.forward(q[None], k[None], v[None], call.request, dense_out)
    return Partial(partial.out[0], partial.lse[0], call.rows.start)


def run_forward_with_sink(
    call: BoundCall,
    backend: Fa4Backend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor,
    exact_lse: bool,
    out: Tensor,
) -> Partial:
    """Like :func:`run_forward`, by a kernel that adds the sink.

    If not ``exact_lse``, lse may be +inf under a sink that outweighs all keys.
    """
    q, k, v = q[call.rows], k[call.keys], v[call.keys]
    if call.request.varlen is not None:
        partial = backend.forward_with_sink(q, k, v, sink, call.request, exact_lse, out)
        return Partial(partial.out, partial.lse, call.rows.start)
    partial = backend.forward_with_sink(
        q[None], k[None], v[None], sink, call.request, exact_lse, out[None]
    )
    return Partial(partial.out[0], partial.lse[0], call.rows.start)


def lse_of_rows(call: BoundCall, lse: Tensor) -> Tensor:
    """lse (H, rows) of the call's rows, contiguous; +inf in a gap, which is: no such row."""
    lse = lse[:, call.rows]
    return lse.contiguous() if call.gap is None else lse.masked_fill(call.gap, float("inf"))


def run_backward(
    call: BoundCall,
    backend: Backend,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor | None,
) -> Gradients:
    """Gradients of the call's rows and keys, with dq in the call's rows of ``dq`` if it is given.

    ``lse`` is lse_of_rows; all other tensors but k and v (the stage's) are those of all rows.
    """
    rows, request = call.rows, call.request
    k, v, dout, q, out = k[call.keys], v[call.keys], dout[rows], q[rows], out[rows]
    dlse = None if dlse is None else dlse[:, rows]
    into = None
    if dq is not None:
        into = Gradients(dq[rows], torch.empty_like(k), torch.empty_like(v), None)
    if request.varlen is not None:
        return backend.backward(dout, q, k, v, Partial(out, lse), request, dlse, into)
    if into is not None:
        into = Gradients(into.dq[None], into.dk[None], into.dv[None], None)
    grads = backend.backward(
        dout[None], q[None], k[None], v[None], Partial(out[None], lse[None]), request,
        None if dlse is None else dlse[None], into,
    )  # fmt: skip
    delta = None
    if grads.delta is not None:
        delta = RowDelta(grads.delta.values[0], grads.delta.rows)
    return Gradients(grads.dq[0], grads.dk[0], grads.dv[0], delta)
