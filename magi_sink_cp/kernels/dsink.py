"""The gradient of the sink logits: one Triton kernel, and its torch twin for CPU tensors.

    dz_j = Σ_i exp(z_j - lse_i) · (dlse_i - delta_i)      sum over rows for "sh", none for "ssh"

lse is final (the sink included), delta_i = Σ_d dout_id · out_id, and dlse is the gradient that
reaches lse (0 if none does). FlashAttention-3's backward returns delta. For kernels that do not,
the same Triton kernel computes it in fp32 from out and dout. Sums are taken in a fixed order (in a
block of rows, then over blocks), so the result is the same in every run.

Rows with lse = ±inf contribute nothing, whatever stands in delta, dout, dlse and the sink: -inf is
a row with neither a key nor a sink, and callers mark rows that do not exist with +inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from magi_sink_cp.kernels.merge import lse_strides, out_strides, sink_strides
from magi_sink_cp.kernels.protocol import RowDelta, unit_stride
from magi_sink_cp.kernels.triton_support import (
    Launcher,
    next_power_of_2,
    on_device_of,
    pointer,
    tl,
    triton,
)


def sink_gradient(
    sink: Tensor,
    lse: Tensor,
    delta: RowDelta | None = None,
    out: Tensor | None = None,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
) -> Tensor:
    """dsink in the shape of sink: fp32 for "sh" (fp64 for fp64 statistics), sink's dtype for "ssh".

    Args:
        sink: (s_sink, H), or per row (B, T, s_sink, H) / (T, s_sink, H).
        lse: final, (B, H, T) or (H, T), fp32.
        delta: from the attention backward. If None, out and dout are read instead.
        out, dout: (B, T, H, D) or (T, H, D).
        dlse: gradient of lse, like lse.
        cu_seqlens_q: offsets whose last entry is the number of rows that exist, if it may be
            smaller than T.
    """
    if lse.numel() == 0:
        return torch.zeros_like(sink, dtype=lse.dtype if sink.dim() == 2 else sink.dtype)
    if delta is None and (out is None or dout is None):
        raise ValueError("sink_gradient needs delta, or out and dout to compute it from")
    with on_device_of(lse):
        compute = sink_gradient_triton if lse.is_cuda else sink_gradient_torch
        return compute(sink, lse, delta, out, dout, dlse, cu_seqlens_q)


def sink_gradient_torch(
    sink: Tensor,
    lse: Tensor,
    delta: RowDelta | None,
    out: Tensor | None,
    dout: Tensor | None,
    dlse: Tensor | None,
    cu_seqlens_q: Tensor | None = None,
) -> Tensor:
    """The torch twin: same arguments and same result as :func:`sink_gradient_triton`."""
    rows = lse.shape[-1]
    if delta is not None:
        row_delta = _unpad(delta, rows)
    else:
        assert out is not None, "checked by sink_gradient"
        assert dout is not None, "checked by sink_gradient"
        row_delta = (out.to(lse.dtype) * dout.to(lse.dtype)).sum(-1).transpose(-1, -2)
    missing = lse.isinf()
    if delta is not None and delta.block > 0:
        cu_seqlens_q = delta.cu_seqlens_q
    if cu_seqlens_q is not None:
        missing = missing | (torch.arange(rows, device=lse.device) >= cu_seqlens_q[-1])
    row_term = -row_delta if dlse is None else dlse - row_delta
    if sink.dim() == 2:
        logits = sink.to(lse.dtype).transpose(-1, -2).unsqueeze(-1)
    else:
        logits = sink.to(lse.dtype).movedim(-1, -3).transpose(-1, -2)
    per_row = torch.exp(logits - lse.unsqueeze(-2)) * row_term.unsqueeze(-2)  # (…, H, s_sink, T)
    per_row = per_row.masked_fill(missing.unsqueeze(-2), 0.0)
    if sink.dim() > 2:
        return per_row.transpose(-1, -2).movedim(-3, -1).to(sink.dtype)
    per_head = per_row.sum(-1)
    per_head = per_head if per_head.dim() == 2 else per_head.sum(0)
    return per_head.transpose(0, 1).reshape(-1).view(sink.shape)  # with the strides of a new tensor


def _unpad(delta: RowDelta, rows: int) -> Tensor:
    """delta as (…, H, T)."""
    missing = rows - delta.rows
    if delta.block == 0:
        return torch.nn.functional.pad(delta.values[..., : delta.rows], (0, missing))
    assert delta.cu_seqlens_q is not None, "a padded delta comes with its cu_seqlens_q"
    starts = delta.cu_seqlens_q.long()
    row = torch.arange(delta.rows, device=starts.device)
    document = torch.searchsorted(starts, row, right=True) - 1
    padded_starts = (
        (starts + torch.arange(len(starts), device=starts.device) * delta.block)
        // delta.block
        * delta.block
    )
    return torch.nn.functional.pad(
        delta.values[:, row - starts[document] + padded_starts[document]], (0, missing)
    )


def sink_gradient_triton(
    sink: Tensor,
    lse: Tensor,
    delta: RowDelta | None,
    out: Tensor | None,
    dout: Tensor | None,
    dlse: Tensor | None,
    cu_seqlens_q: Tensor | None = None,
) -> Tensor:
    """Launch the Triton kernel. For "sh" it leaves an fp32 sum per block of rows to be added."""
    heads, rows = lse.shape[-2:]
    all_rows = rows * (lse.shape[0] if lse.dim() == 3 else 1)
    shared = sink.dim() == 2
    if delta is not None:
        out = dout = None
    # Gradients come as autograd leaves them, for example expanded from one number; the kernel reads
    # dense rows.
    dout, dlse = (None if x is None else unit_stride(x) for x in (dout, dlse))
    head_dim = 1 if out is None else out.shape[-1]
    block_dim = next_power_of_2(head_dim)
    # With delta at hand a row is two fp32 numbers, and up to 8k rows fit in one block: nothing is
    # left to add up, which saves a launch. Without, a row is two times head_dim elements.
    if delta is None:
        block_rows, num_warps = max(1, min(64, 4096 // block_dim)), 4
    else:
        block_rows, num_warps = (8192, 16) if shared and all_rows > 1024 else (1024, 4)
    blocks = -(-all_rows // block_rows)
    if shared:
        dsink = torch.empty(blocks, *sink.shape, dtype=torch.float32, device=sink.device)
        dsink_strides = (0, dsink.stride(0), dsink.stride(1), dsink.stride(2))
    else:
        dsink = torch.empty(sink.shape, dtype=sink.dtype, device=sink.device)
        dsink_strides = sink_strides(dsink)
    if delta is not None and delta.block > 0:
        cu_seqlens_q = delta.cu_seqlens_q
    values = None if delta is None else delta.values
    tensors = (sink, lse, values, out, dout, dlse, cu_seqlens_q, dsink)
    strides = (
        sink_strides(sink),
        lse_strides(lse),
        (0, 0) if values is None else lse_strides(values),
        (0, 0, 0) if out is None else out_strides(out),
        (0, 0, 0) if dout is None else out_strides(dout),
        (0, 0) if dlse is None else lse_strides(dlse),
        dsink_strides,
    )
    num_delta_rows = 0 if delta is None else delta.rows
    documents = 0 if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    constants = (
        all_rows > rows,
        0 if delta is None else delta.block,
        shared,
        head_dim,
        block_dim,
        block_rows,
    )
    kind = (lse.device.index, heads, all_rows < 2**31, strides, constants, *map(pointer, tensors))
    sizes = (rows, all_rows, num_delta_rows, heads, sink.shape[-2], documents)
    _launch_sink_gradient(heads * blocks, kind, (*tensors, *strides, *sizes, *constants), num_warps)
    if not shared:
        return dsink
    return dsink[0] if blocks == 1 else dsink.sum(0)


# A new token, sink or document count must not compile the kernel again.
@triton.jit(
    do_not_specialize=["num_rows", "all_rows", "num_delta_rows", "num_sinks", "num_documents"]
)
def _sink_gradient_kernel(  # type: ignore[no-untyped-def]
    sink_ptr,  # (s_sink, H) if SHARED, else (B, T, s_sink, H)
    lse_ptr,  # (B, H, T), fp32
    delta_ptr,  # (B, H, ≥T), fp32, or None
    out_ptr,  # (B, T, H, D), or None where delta is given
    dout_ptr,  # (B, T, H, D), or None where delta is given
    dlse_ptr,  # (B, H, T), fp32, or None
    cu_seqlens_ptr,  # (documents + 1,), or None: all rows exist
    dsink_ptr,  # (blocks of rows, s_sink, H) fp32 if SHARED, else (B, T, s_sink, H)
    sink_stride,
    lse_stride,
    delta_stride,
    out_stride,
    dout_stride,
    dlse_stride,
    dsink_stride,
    num_rows,  # T
    all_rows,  # B·T
    num_delta_rows,
    num_heads,
    num_sinks,
    num_documents,
    BATCHED: tl.constexpr,
    DELTA_BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    block = tl.program_id(0) // num_heads
    batch_row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = batch_row < all_rows
    batch = tl.zeros([BLOCK_ROWS], tl.int64)
    row = batch_row.to(tl.int64)
    exists = inside
    if cu_seqlens_ptr is not None:
        exists = inside & (row < tl.load(cu_seqlens_ptr + num_documents))
    if BATCHED:  # in 32 bits: a 64-bit division a row would cost more than the rest of the kernel
        batch = (batch_row // num_rows).to(tl.int64)
        row = row - batch * num_rows

    if delta_ptr is not None:
        has_delta = exists & (row < num_delta_rows)
        column = row
        if DELTA_BLOCK > 0:
            # Binary search: the last document that starts at or before the row (it is never empty).
            low = tl.zeros([BLOCK_ROWS], tl.int32)
            high = tl.zeros([BLOCK_ROWS], tl.int32) + num_documents
            width = num_documents
            while width > 0:
                middle = (low + high + 1) // 2
                starts_before = tl.load(cu_seqlens_ptr + middle, mask=has_delta, other=0) <= row
                low = tl.where(starts_before, middle, low)
                high = tl.where(starts_before, high, middle - 1)
                width = width // 2
            start = tl.load(cu_seqlens_ptr + low, mask=has_delta, other=0).to(tl.int64)
            column = row - start + (start + low * DELTA_BLOCK) // DELTA_BLOCK * DELTA_BLOCK
        delta = tl.load(
            delta_ptr + batch * delta_stride[0] + head * delta_stride[1] + column,
            mask=has_delta,
            other=0.0,
        )
    else:
        dim = tl.arange(0, BLOCK_DIM)
        mask = exists[:, None] & (dim < HEAD_DIM)[None, :]
        out_row = batch * out_stride[0] + row * out_stride[1] + head * out_stride[2]
        dout_row = batch * dout_stride[0] + row * dout_stride[1] + head * dout_stride[2]
        out = tl.load(out_ptr + out_row[:, None] + dim[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        dout = tl.load(dout_ptr + dout_row[:, None] + dim[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        delta = tl.sum(out * dout, axis=1)
    row_term = -delta
    if dlse_ptr is not None:
        dlse_at = dlse_ptr + batch * dlse_stride[0] + head * dlse_stride[1] + row
        row_term += tl.load(dlse_at, mask=exists, other=0.0)

    lse_at = lse_ptr + batch * lse_stride[0] + head * lse_stride[1] + row
    lse = tl.load(lse_at, mask=exists, other=float("inf"))
    counts = tl.abs(lse) != float("inf")
    for number in range(num_sinks):
        j = tl.cast(number, tl.int64)
        if SHARED:
            logit = tl.load(sink_ptr + j * sink_stride[2] + head * sink_stride[3]).to(tl.float32)
            terms = tl.where(counts, tl.exp(logit - lse) * row_term, 0.0)
            total = tl.sum(terms, axis=0)
            tl.store(
                dsink_ptr
                + block.to(tl.int64) * dsink_stride[1]
                + j * dsink_stride[2]
                + head * dsink_stride[3],
                total,
            )
        else:
            sink_row = (
                batch * sink_stride[0]
                + row * sink_stride[1]
                + j * sink_stride[2]
                + head * sink_stride[3]
            )
            logit = tl.load(sink_ptr + sink_row, mask=inside, other=float("-inf")).to(tl.float32)
            dsink_row = (
                batch * dsink_stride[0]
                + row * dsink_stride[1]
                + j * dsink_stride[2]
                + head * dsink_stride[3]
            )
            terms = tl.where(counts, tl.exp(logit - lse) * row_term, 0.0)
            tl.store(dsink_ptr + dsink_row, terms.to(dsink_ptr.dtype.element_ty), mask=inside)


_launch_sink_gradient = Launcher(_sink_gradient_kernel)
