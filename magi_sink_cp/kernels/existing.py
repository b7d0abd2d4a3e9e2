"""Rows and keys that do not exist: behind ``seqused`` in a document, behind the last document.

Whatever stands there must reach no result and no gradient. Kernels read whole tiles, so a NaN in
a neighbouring row can spread: FlashAttention-3 multiplies it by a weight of 0. These functions
clear such rows in a copy, and only where a call has them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from magi_sink_cp.kernels.protocol import Varlen


def rows_behind(total: int, cu_seqlens: Tensor, seqused: Tensor | None) -> Tensor:
    """bool (total,): the rows that do not exist, on the device of cu_seqlens."""
    starts = cu_seqlens.long()
    row = torch.arange(total, device=starts.device)
    document = torch.searchsorted(starts[1:], row, right=True)
    if seqused is None:
        return document == starts.shape[0] - 1
    used = torch.nn.functional.pad(seqused, (0, 1))  # no row exists behind the last document
    return row - starts[document] >= used[document]


def missing_rows(varlen: Varlen | None, total: int) -> Tensor | None:
    """bool (total,): query rows that do not exist, as ``seqused_q`` leaves them out; or None.

    Those in a gap (Varlen.gaps) exist, for another call.
    """
    if varlen is None or varlen.seqused_q is None or varlen.gaps:
        return None
    return rows_behind(total, varlen.cu_seqlens_q, varlen.seqused_q)


def missing_keys(varlen: Varlen | None, total: int) -> Tensor | None:
    """bool (total,): keys that ``seqused_k`` leaves out, or None if it is not given."""
    if varlen is None or varlen.seqused_k is None:
        return None
    return rows_behind(total, varlen.cu_seqlens_k, varlen.seqused_k)


def clear(x: Tensor, missing: Tensor | None) -> Tensor:
    """x (rows, …), or a copy of it with zeros in the missing rows."""
    if missing is None:
        return x
    return x.masked_fill(missing.view(-1, *(1,) * (x.dim() - 1)), 0)


def clear_columns(x: Tensor, missing: Tensor | None, value: float = 0.0) -> Tensor:
    """x (…, rows), or a copy of it with ``value`` in the missing rows."""
    return x if missing is None else x.masked_fill(missing, value)
