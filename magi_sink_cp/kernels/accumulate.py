"""Add rows of several tensors into one, rounding once.

One Triton kernel, and its torch twin for CPU tensors:

    out[i] = Σ over terms that have row i of term[i]        in fp32 (fp64 for fp64), in order

Gradients that were computed in several places come together here: each is read once, and the sum
is written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from magi_sink_cp.kernels.protocol import stat_dtype
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

# The largest number of terms one launch takes.
MAX_TERMS = 8


@dataclass(frozen=True)
class Term:
    """Rows ``first …`` of ``tensor`` (rows, …) for the rows ``start … stop`` of the sum.

    Each row is dense.
    """

    tensor: Tensor
    first: int
    start: int
    stop: int


def accumulate(terms: Sequence[Term], out: Tensor) -> None:
    """Write the sum of 1 … MAX_TERMS terms to ``out`` (rows, …), dense; rows of no term become 0.

    out may be the memory of terms, at the same rows.
    """
    if not 1 <= len(terms) <= MAX_TERMS:
        raise ValueError(f"accumulate takes 1 to {MAX_TERMS} terms, got {len(terms)}")
    if out.numel():
        with on_device_of(out):
            (accumulate_triton if out.is_cuda else accumulate_torch)(terms, out)


def accumulate_torch(terms: Sequence[Term], out: Tensor) -> None:
    """The torch twin: same arguments and same result as :func:`accumulate_triton`."""
    total = torch.zeros(out.shape, dtype=stat_dtype(out.dtype), device=out.device)
    for term in terms:
        total[term.start : term.stop] += term.tensor[
            term.first : term.first + term.stop - term.start
        ]
    out.copy_(total)


def accumulate_triton(terms: Sequence[Term], out: Tensor) -> None:
    """Launch the Triton kernel.

    A program is a block of elements of one row or of several short ones.
    """
    rows, columns = out.shape[0], out[0].numel()
    block_columns = min(1024, next_power_of_2(columns))
    block_rows = 4096 // block_columns
    tensors = tuple(term.tensor for term in terms)
    strides = tuple(x.stride(0) for x in tensors)
    starts, stops = (
        tuple(unspecial(term.start) for term in terms),
        tuple(unspecial(term.stop) for term in terms),
    )
    shifts = tuple(unspecial(term.first - term.start) for term in terms)
    blocks = -(-columns // block_columns)
    sizes = (rows, columns, out.stride(0), blocks, len(terms), block_rows, block_columns)
    narrow = max(rows, *(term.first + term.stop for term in terms)) < UNSPECIAL_LIMIT
    kind = (out.device.index, strides, sizes[1:], narrow, *map(pointer, tensors), pointer(out))
    _launch(
        -(-rows // block_rows) * blocks,
        kind,
        (tensors, strides, starts, stops, shifts, out, *sizes),
    )


# New document lengths must not compile the kernel again.
@triton.jit(do_not_specialize=["num_rows"])
def _accumulate_kernel(  # type: ignore[no-untyped-def]
    tensors,  # per term (its rows, columns)
    strides,
    starts,  # unspecial, as the next two
    stops,
    shifts,
    out_ptr,  # (T, columns)
    num_rows,
    num_columns,
    out_stride,
    BLOCKS: tl.constexpr,
    NUM_TERMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) // BLOCKS).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) % BLOCKS * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for i in tl.static_range(NUM_TERMS):
        there = ((row >= starts[i] >> 4) & (row < stops[i] >> 4))[:, None] & inside
        at = tensors[i] + (row + (shifts[i] >> 4))[:, None] * strides[i] + column[None, :]
        total += tl.load(at, mask=there, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + row[:, None] * out_stride + column[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=inside,
    )


_launch = Launcher(_accumulate_kernel)
