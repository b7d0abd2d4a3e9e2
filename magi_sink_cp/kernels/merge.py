"""Merge partial attention results and add the sink, once.

One Triton kernel, and its torch twin for CPU tensors. For partials A of disjoint key sets and sink
logits z_j ("sh": (s_sink, H), shared by the rows; "ssh": logits per row):

    lse = log(Σ_A exp lse_A + Σ_j exp z_j),    out = Σ_A exp(lse_A - lse) · out_A

The maximum over all terms, the sink included, is taken before any exp. With one partial this is the
sink correction of one device: one read and one write of out. A row that no partial covers, or that
saw no key, has out = 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magi_sink_cp.kernels.protocol import Partial, stat_dtype
from magi_sink_cp.kernels.triton_support import (
    UNSPECIAL_LIMIT,
    Launcher,
    next_power_of_2,
    on_device_of,
    pointer,
    tl,
    triton,
    unspecial,
)

# The largest number of partials one launch takes; a schedule with more folds them into an fp32
# partial as it goes.
MAX_PARTIALS = 4


def merge(
    partials: Sequence[Partial],
    sink: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    cu_seqlens_q: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge 1 … MAX_PARTIALS partials, and the sink if given, into (out, lse).

    Args:
        partials: of disjoint keys; each covers the rows ``start … start + its rows`` of the result.
        sink: fp32, bf16 or fp16 logits, (s_sink, H) or per row (B, T, s_sink, H) / (T, s_sink, H);
            None adds none.
        out: where to write, (B, T, H, D) or (T, H, D). It may be the memory of the first partial at
            the same rows. Default: the first partial's own ``out`` and ``lse`` are overwritten if
            it covers all rows in ``out_dtype``, else new.
        out_dtype: of the result; default that of ``out``, or of the first partial.
        cu_seqlens_q: offsets whose last entry is the number of rows that exist, if it may be
            smaller than T: kernels leave the others unwritten, and here they are rows that saw no
            key.

    Returns:
        out, and lse (B, H, T) or (H, T) in fp32 (fp64 for fp64 partials).
    """
    if not 1 <= len(partials) <= MAX_PARTIALS:
        raise ValueError(f"merge takes 1 to {MAX_PARTIALS} partials, got {len(partials)}")
    first = partials[0]
    out_dtype = out_dtype or (first.out.dtype if out is None else out.dtype)
    if out is not None:
        rows = out.shape[-3]
    elif len(partials) == 1:
        rows = first.start + first.out.shape[-3]
    else:
        rows = max(p.start + p.out.shape[-3] for p in partials)
    covers_all = first.start == 0 and first.out.shape[-3] == rows
    unchanged = (
        len(partials) == 1
        and sink is None
        and covers_all
        and out is None
        and out_dtype == first.out.dtype
    )
    if unchanged and cu_seqlens_q is None:
        return first.out, first.lse
    lse = first.lse if covers_all else first.lse.new_empty(*first.lse.shape[:-1], rows)
    if out is None:
        in_place = covers_all and out_dtype == first.out.dtype
        out = (
            first.out
            if in_place
            else first.out.new_empty(
                *first.out.shape[:-3], rows, *first.out.shape[-2:], dtype=out_dtype
            )
        )
    if out.numel() or lse.numel():
        with on_device_of(out):
            (merge_triton if out.is_cuda else merge_torch)(partials, sink, out, lse, cu_seqlens_q)
    return out, lse


def merge_torch(
    partials: Sequence[Partial],
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
) -> None:
    """The torch twin: same arguments and same result as :func:`merge_triton`."""
    dtype = stat_dtype(out.dtype)
    spans = [slice(p.start, p.start + p.out.shape[-3]) for p in partials]
    terms = []
    for partial, span in zip(partials, spans, strict=True):
        term = lse.new_full(lse.shape, float("-inf"))
        term[..., span] = partial.lse
        if cu_seqlens_q is not None:
            term[..., int(cu_seqlens_q[-1]) :] = float("-inf")
        terms.append(term)
    if sink is not None:
        logits = torch.logsumexp(sink.to(dtype), dim=-2)  # (H,) or (…, T, H)
        terms.append(
            (logits.unsqueeze(-1) if sink.dim() == 2 else logits.transpose(-1, -2)).expand_as(lse)
        )
    merged = torch.logsumexp(torch.stack(terms), dim=0)
    peak = merged.masked_fill(merged == float("-inf"), 0.0)
    total = out.new_zeros(out.shape, dtype=dtype)
    for partial, span, term in zip(partials, spans, terms, strict=False):
        weight = torch.exp(term - peak)[..., span].transpose(-1, -2).unsqueeze(-1)
        total[..., span, :, :] += (partial.out.to(dtype) * weight).masked_fill(weight == 0, 0.0)
    out.copy_(total)
    lse.copy_(merged)


def merge_triton(
    partials: Sequence[Partial],
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
) -> None:
    """Launch the Triton kernel. One program merges a block of rows of one head.

    ``out`` may alias the out of the first partial.
    """
    batch = out.shape[0] if out.dim() == 4 else 1
    rows, heads, head_dim = out.shape[-3:]
    block_dim = next_power_of_2(head_dim)
    # 4096 fp32 accumulators a program (32 a thread) come close to a read+write pass over out:
    # docs/benchmarks.md.
    block_rows = max(1, min(64, 4096 // block_dim))
    # The host's time counts here: a short sequence takes a GPU less than this function.
    first = partials[0]
    outs: tuple[Tensor, ...] = (first.out,)
    lses: tuple[Tensor, ...] = (first.lse,)
    if len(partials) > 1:
        outs, lses = tuple(p.out for p in partials), tuple(p.lse for p in partials)
    starts = tuple(unspecial(p.start) for p in partials)
    stops = tuple(unspecial(p.start + x.shape[-3]) for p, x in zip(partials, outs, strict=True))
    strides = tuple(map(out_strides, outs)), tuple(map(lse_strides, lses))
    own_strides = (
        strides[0][0] if out is first.out else out_strides(out),
        strides[1][0] if lse is first.lse else lse_strides(lse),
        sink_strides(sink),
    )
    num_sinks = 0 if sink is None else sink.shape[-2]
    documents = 0 if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    tensors = (out, lse, sink, cu_seqlens_q)
    own = (sink, cu_seqlens_q) if out is first.out and lse is first.lse else tensors
    pointers = *map(pointer, outs), *map(pointer, lses), *map(pointer, own)
    kind = (
        out.device.index,
        head_dim,
        heads,
        rows < UNSPECIAL_LIMIT,
        strides,
        own_strides,
        len(own),
        pointers,
    )
    sizes = rows, heads, num_sinks, documents, len(partials), head_dim, block_dim, block_rows
    programs = heads * -(-rows // block_rows) * batch
    _launch_merge(
        programs, kind, (outs, lses, starts, stops, *strides, *tensors, *own_strides, *sizes)
    )


def out_strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, row, head) strides of (B, T, H, D) or (T, H, D); the last dimension is dense."""
    strides = x.stride()
    return (strides[0] if len(strides) == 4 else 0, strides[-3], strides[-2])


def lse_strides(x: Tensor) -> tuple[int, int]:
    """(batch, head) strides of (B, H, T) or (H, T); rows are dense."""
    strides = x.stride()
    return (strides[0] if len(strides) == 3 else 0, strides[-2])


def sink_strides(sink: Tensor | None) -> tuple[int, int, int, int]:
    """(batch, row, sink, head) strides; batch and row are 0 for the shared layout ``sh``."""
    if sink is None:
        return (0, 0, 0, 0)
    strides = sink.stride()
    return (
        strides[0] if len(strides) == 4 else 0,
        strides[-3] if len(strides) > 2 else 0,
        strides[-2],
        strides[-1],
    )


# A new token, sink or document count must not compile the kernel again.
@triton.jit(do_not_specialize=["num_rows", "num_sinks", "num_documents"])
def _merge_kernel(  # type: ignore[no-untyped-def]
    outs,  # per partial (B, rows, H, D), any float dtype
    lses,  # per partial (B, H, rows), fp32
    starts,  # unspecial, as the next
    stops,
    outs_strides,
    lses_strides,
    out_ptr,  # (B, T, H, D)
    lse_ptr,  # (B, H, T), fp32
    sink_ptr,  # (…, s_sink, H) or None
    cu_seqlens_ptr,  # (documents + 1,) or None, which is: all rows exist
    out_stride,
    lse_stride,
    sink_stride,
    num_rows,
    num_heads,
    num_sinks,
    num_documents,
    NUM_PARTIALS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    # Heads vary fastest, so that programs that run together read neighbouring memory.
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    block = tl.program_id(0) // num_heads
    batch = (block // tl.cdiv(num_rows, BLOCK_ROWS)).to(tl.int64)
    first_row = (block % tl.cdiv(num_rows, BLOCK_ROWS)).to(tl.int64) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    inside = row < num_rows
    exists = inside
    if cu_seqlens_ptr is not None:
        exists = inside & (row < tl.load(cu_seqlens_ptr + num_documents))

    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    for i in tl.static_range(NUM_PARTIALS):
        start = starts[i] >> 4
        stop = stops[i] >> 4
        # Most blocks may have no row of a partial that covers few.
        if (first_row < stop) & (first_row + BLOCK_ROWS > start):
            covered = exists & (row >= start) & (row < stop)
            at = lses[i] + batch * lses_strides[i][0] + head * lses_strides[i][1] + row - start
            peak = tl.maximum(peak, tl.load(at, mask=covered, other=float("-inf")))
    if sink_ptr is not None:
        sink_at = sink_ptr + batch * sink_stride[0] + row * sink_stride[1] + head * sink_stride[3]
        for j in range(num_sinks):
            logit = tl.load(
                sink_at + tl.cast(j, tl.int64) * sink_stride[2], mask=inside, other=float("-inf")
            ).to(tl.float32)
            peak = tl.maximum(peak, logit)
    peak = tl.where(peak == float("-inf"), 0.0, peak)

    total = tl.zeros([BLOCK_ROWS], tl.float32)
    merged = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for i in tl.static_range(NUM_PARTIALS):
        start = starts[i] >> 4
        stop = stops[i] >> 4
        if (first_row < stop) & (first_row + BLOCK_ROWS > start):
            covered = exists & (row >= start) & (row < stop)
            at = lses[i] + batch * lses_strides[i][0] + head * lses_strides[i][1] + row - start
            weight = tl.exp(tl.load(at, mask=covered, other=float("-inf")) - peak)
            total += weight
            first = outs[i] + batch * outs_strides[i][0] + head * outs_strides[i][2]
            here = first + (row - start)[:, None] * outs_strides[i][1] + dim[None, :]
            value = tl.load(here, mask=(weight > 0)[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
            merged += weight[:, None] * value.to(tl.float32)
    if sink_ptr is not None:
        sink_at = sink_ptr + batch * sink_stride[0] + row * sink_stride[1] + head * sink_stride[3]
        for j in range(num_sinks):
            logit = tl.load(
                sink_at + tl.cast(j, tl.int64) * sink_stride[2], mask=inside, other=float("-inf")
            ).to(tl.float32)
            total += tl.exp(logit - peak)

    # total = 0: a row with neither a key nor a sink.
    divisor = tl.where(total == 0, 1.0, total)
    at = (
        out_ptr
        + batch * out_stride[0]
        + row[:, None] * out_stride[1]
        + head * out_stride[2]
        + dim[None, :]
    )
    merged = (merged / divisor[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(at, merged, mask=inside[:, None] & (dim < HEAD_DIM)[None, :])
    merged_lse = tl.where(total == 0, float("-inf"), peak + tl.log(divisor))
    tl.store(lse_ptr + batch * lse_stride[0] + head * lse_stride[1] + row, merged_lse, mask=inside)


_launch_merge = Launcher(_merge_kernel)
