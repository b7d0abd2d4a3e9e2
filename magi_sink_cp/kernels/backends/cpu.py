"""The ``cpu`` backend: exact attention in torch operations, without a full score matrix.

Full and causal fp32 documents run on PyTorch's own CPU flash kernels, which return lse and take a
third of the time. In bf16 those take three times as long, and they have neither windows nor a
gradient of lse: all else runs tile by tile.

Letters in a document: T query rows, K keys, G = H / H_kv query heads per key head. A tile is R
rows × C keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from magi_sink_cp.kernels.protocol import (
    FP8,
    AttentionParams,
    Backend,
    Gradients,
    KernelRequest,
    Partial,
    RowDelta,
    Varlen,
    nothing_seen,
    store,
)

# Scores of one tile, or else of one row: 16 MiB in fp32, where a 16k × 16k sequence of 8 heads has
# 8 GiB.
_TILE_ELEMENTS = 1 << 22
_TILE_ROWS = 512

_Index = tuple[int] | tuple[slice] | tuple[slice, slice]


class CpuBackend(Backend):
    """Tiles of query rows × the keys that they see.

    Products and statistics in fp32 (fp64 for fp64 inputs).
    """

    name = "cpu"
    # num_splits, pack_gqa and sm_margin do not change the result: they are taken and have no
    # effect.
    features = frozenset({
        "softcap", "deterministic", "seqused_q", "seqused_k", "q_descale", "k_descale", "v_descale",
        "num_splits", "pack_gqa", "sm_margin", "gaps",
    })  # fmt: skip

    def unavailable(self) -> str | None:
        return None

    def unsupported(
        self, q: Tensor, request: KernelRequest, head_dim_v: int | None = None
    ) -> str | None:
        if q.device.type != "cpu":
            return f"it runs on CPU tensors, and q is on {q.device}"
        return super().unsupported(q, request, head_dim_v)

    def _forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        request: KernelRequest,
        out: Tensor | None,
        want_probs: bool,
    ) -> Partial:
        gaps = request.varlen is not None and request.varlen.gaps
        partial = nothing_seen(q, None if gaps else out, v.shape[-1])
        if gaps:
            partial.lse.fill_(float("nan"))  # undefined in a gap; none may count on anything
            for _, _, stats in _documents(q, request.varlen):
                partial.lse[stats] = float("-inf")
        if q.dtype == FP8:
            q, k, v = _dequantised(q, k, v, request)
        with _full_precision():
            for rows, keys, stats in _documents(q, request.varlen):
                tensors = q[rows], k[keys], v[keys]
                out_rows, lse_rows = partial.out[rows], partial.lse[stats]
                if _fits_flash(*tensors, request.params):
                    _flash_forward(*tensors, request.params, out_rows, lse_rows)
                else:
                    _forward_document(*tensors, request.params, out_rows, lse_rows)
        if gaps and out is not None:
            for rows, _, _ in _documents(q, request.varlen):
                out[rows] = partial.out[rows]
            return replace(partial, out=out)
        return partial

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
    ) -> Gradients:
        lse = saved.lse
        delta = (dout.to(lse.dtype) * saved.out.to(lse.dtype)).sum(-1).transpose(-1, -2)
        row_term = delta if dlse is None else delta - dlse
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        with _full_precision():
            for rows, keys, stats in _documents(q, request.varlen):
                tensors = q[rows], k[keys], v[keys]
                if dlse is None and _fits_flash(*tensors, request.params):
                    grads = _flash_backward(
                        dout[rows], *tensors, saved.out[rows], lse[stats], request.params
                    )
                else:
                    grads = _backward_document(
                        dout[rows], *tensors, lse[stats], row_term[stats], request.params
                    )
                dq[rows], dk[keys], dv[keys] = grads
        if into is not None and request.varlen is not None and request.varlen.gaps:
            known = torch.full_like(delta, float("nan"))
            for rows, _, stats in _documents(q, request.varlen):
                into.dq[rows], known[stats] = dq[rows], delta[stats]
            dq, delta = into.dq, known
        return store(Gradients(dq, dk, dv, RowDelta(delta, q.shape[-3])), into)


def _full_precision() -> torch.autocast:
    """autocast would run the products in bf16."""
    return torch.autocast("cpu", enabled=False)


def _fits_flash(q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> bool:
    """Whether PyTorch's CPU flash kernels compute this document, and faster than tiles."""
    if q.dtype != torch.float32 or params.softcap > 0 or v.shape[-1] != q.shape[-1]:
        return False
    if not (q.shape[0] and k.shape[0]):
        return False
    return params.window_size == (-1, -1) or (params.causal and q.shape[0] == k.shape[0])


def _heads_first(x: Tensor, groups: int = 1) -> Tensor:
    """(T, H, D) → (1, H · groups, T, D)."""
    return (x if groups == 1 else x.repeat_interleave(groups, dim=1)).transpose(0, 1)[None]


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, params: AttentionParams, out: Tensor, lse: Tensor
) -> None:
    """Write out (T, H, D) and lse (H, T) of one document."""
    groups = q.shape[1] // k.shape[1]
    result, result_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _heads_first(q), _heads_first(k, groups), _heads_first(v, groups), 0.0, params.causal,
        scale=params.softmax_scale,
    )  # fmt: skip
    out.copy_(result[0].transpose(0, 1))
    lse.copy_(result_lse[0])


def _flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    params: AttentionParams,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one document, given the final out and lse."""
    heads_kv = k.shape[1]
    groups = q.shape[1] // heads_kv
    tensors = _heads_first(dout), _heads_first(q), _heads_first(k, groups), _heads_first(v, groups)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, _heads_first(out), lse[None], 0.0, params.causal, scale=params.softmax_scale
    )
    dq, dk, dv = (grad[0].transpose(0, 1) for grad in grads)
    if groups > 1:
        dk, dv = (x.unflatten(1, (heads_kv, groups)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _dequantised(
    q: Tensor, k: Tensor, v: Tensor, request: KernelRequest
) -> tuple[Tensor, Tensor, Tensor]:
    """fp8 q, k and v in fp32, times their descales (B or documents, H_kv), where given."""
    varlen, extras = request.varlen, request.extras
    lengths = (
        (None, None) if varlen is None else (varlen.cu_seqlens_q.diff(), varlen.cu_seqlens_k.diff())
    )
    scaled = []
    for x, descale, rows in (
        (q, extras.q_descale, lengths[0]),
        (k, extras.k_descale, lengths[1]),
        (v, extras.v_descale, lengths[1]),
    ):
        x = x.float()
        if descale is not None:
            per_head = descale.repeat_interleave(x.shape[-2] // descale.shape[1], dim=1)
            per_row = (
                per_head.unsqueeze(1) if rows is None else per_head.repeat_interleave(rows, dim=0)
            )
            x = x * per_row.unsqueeze(-1)
        scaled.append(x)
    return scaled[0], scaled[1], scaled[2]


def _documents(q: Tensor, varlen: Varlen | None) -> Iterator[tuple[_Index, _Index, _Index]]:
    """Indices of each document (or batch entry) into q, into k and v, and into lse."""
    if varlen is None:
        for b in range(q.shape[0]):
            yield (b,), (b,), (b,)
        return
    rows_of, keys_of = (
        _spans(varlen.cu_seqlens_q, varlen.seqused_q),
        _spans(varlen.cu_seqlens_k, varlen.seqused_k),
    )
    for rows, keys in zip(rows_of, keys_of, strict=True):
        yield (rows,), (keys,), (slice(None), rows)


def _spans(cu_seqlens: Tensor, seqused: Tensor | None) -> list[slice]:
    """The rows of each document, or the first ``seqused`` of them."""
    starts = cu_seqlens.tolist()
    lengths = (
        [hi - lo for lo, hi in itertools.pairwise(starts)] if seqused is None else seqused.tolist()
    )
    return [slice(start, start + length) for start, length in zip(starts, lengths, strict=False)]


def _visible(
    first: int, last: int, shift: int, num_keys: int, window_size: tuple[int, int]
) -> tuple[int, int]:
    """The range of keys that at least one of the query rows first … last - 1 sees."""
    left, right = window_size
    lo = 0 if left < 0 else max(0, first + shift - left)
    hi = num_keys if right < 0 else min(num_keys, last + shift + right)
    return lo, max(lo, hi)


def _tiles(
    num_rows: int, num_keys: int, heads: int, window_size: tuple[int, int]
) -> Iterator[tuple[slice, slice]]:
    """(rows, keys) of tiles whose scores fit in _TILE_ELEMENTS.

    Rows that see no key are left out.
    """
    shift, first = num_keys - num_rows, 0
    while first < num_rows:
        last = min(num_rows, first + _TILE_ROWS)
        lo, hi = _visible(first, last, shift, num_keys, window_size)
        while last - first > 1 and (last - first) * heads * (hi - lo) > _TILE_ELEMENTS:
            last = first + (last - first) // 2
            lo, hi = _visible(first, last, shift, num_keys, window_size)
        if hi > lo:
            yield slice(first, last), slice(lo, hi)
        first = last


def _hidden(rows: slice, keys: slice, shift: int, window_size: tuple[int, int]) -> Tensor | None:
    """Boolean (R, C): the pairs that the window hides; None if it hides none of this tile."""
    left, right = window_size
    sees_left = left < 0 or keys.start >= rows.stop - 1 + shift - left
    sees_right = right < 0 or keys.stop - 1 <= rows.start + shift + right
    if sees_left and sees_right:
        return None
    query, key = (torch.arange(x.start, x.stop, device="cpu") for x in (rows, keys))
    offset = key - (query.unsqueeze(1) + shift)
    hidden = offset > right if right >= 0 else torch.zeros_like(offset, dtype=torch.bool)
    return hidden | (offset < -left) if left >= 0 else hidden


def _group_rows(x: Tensor, heads_kv: int) -> Tensor:
    """(R, H, D) → (H_kv, G·R, D)."""
    rows, heads, dim = x.shape
    return (
        x.unflatten(1, (heads_kv, heads // heads_kv))
        .permute(1, 2, 0, 3)
        .reshape(heads_kv, heads // heads_kv * rows, dim)
    )


def _ungroup_rows(x: Tensor, rows: int) -> Tensor:
    """(H_kv, G·R, D) → (R, H, D)."""
    heads_kv, _, dim = x.shape
    return x.view(heads_kv, -1, rows, dim).permute(2, 0, 1, 3).reshape(rows, -1, dim)


def _scores(
    q: Tensor, k: Tensor, params: AttentionParams, hidden: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Masked scores (H_kv, G·R, C), and the softcap's derivative at them, or None without one."""
    scores = (q @ k.transpose(-1, -2)).mul_(params.softmax_scale)
    slope = None
    if params.softcap > 0:
        tanh = scores.div_(params.softcap).tanh_()
        slope = 1 - tanh.square()
        scores = tanh.mul_(params.softcap)
    if hidden is not None:
        scores.view(k.shape[0], -1, *hidden.shape).masked_fill_(hidden, float("-inf"))
    return scores, slope


def _forward_document(
    q: Tensor, k: Tensor, v: Tensor, params: AttentionParams, out: Tensor, lse: Tensor
) -> None:
    """Write out (T, H, D) and lse (H, T) of the rows that see a key.

    Other rows of ``out`` and ``lse`` keep their values.
    """
    heads_kv, shift = k.shape[1], k.shape[0] - q.shape[0]
    keys_first = [x.to(lse.dtype).transpose(0, 1).contiguous() for x in (k, v)]
    for rows, keys in _tiles(q.shape[0], k.shape[0], q.shape[1], params.window_size):
        k_tile, v_tile = (x[:, keys] for x in keys_first)
        q_tile = _group_rows(q[rows].to(lse.dtype), heads_kv)
        scores, _ = _scores(q_tile, k_tile, params, _hidden(rows, keys, shift, params.window_size))
        tile_lse = torch.logsumexp(scores, dim=-1)
        weights = scores.sub_(_finite(tile_lse).unsqueeze(-1)).exp_()
        out[rows] = _ungroup_rows(weights @ v_tile, rows.stop - rows.start).to(out.dtype)
        lse[:, rows] = tile_lse.view(lse.shape[0], -1)


def _backward_document(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    row_term: Tensor,
    params: AttentionParams,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one document; row_term (H, T) is delta - dlse."""
    heads_kv, shift = k.shape[1], k.shape[0] - q.shape[0]
    k_first, v_first = (x.to(lse.dtype).transpose(0, 1).contiguous() for x in (k, v))
    dq = torch.zeros_like(q)
    dk, dv = torch.zeros_like(k_first), torch.zeros_like(v_first)
    for rows, keys in _tiles(q.shape[0], k.shape[0], q.shape[1], params.window_size):
        q_tile, dout_tile = (_group_rows(x[rows].to(lse.dtype), heads_kv) for x in (q, dout))
        scores, slope = _scores(
            q_tile, k_first[:, keys], params, _hidden(rows, keys, shift, params.window_size)
        )
        stats = [x[:, rows].reshape(heads_kv, -1, 1) for x in (_finite(lse), row_term)]
        weights = scores.sub_(stats[0]).exp_()
        dv[:, keys] += weights.transpose(-1, -2) @ dout_tile
        dscores = (
            (dout_tile @ v_first[:, keys].transpose(-1, -2))
            .sub_(stats[1])
            .mul_(weights)
            .mul_(params.softmax_scale)
        )
        if slope is not None:
            dscores.mul_(slope)
        dq[rows] = _ungroup_rows(dscores @ k_first[:, keys], rows.stop - rows.start).to(dq.dtype)
        dk[:, keys] += dscores.transpose(-1, -2) @ q_tile
    return dq, dk.transpose(0, 1), dv.transpose(0, 1)


def _finite(lse: Tensor) -> Tensor:
    """lse with 0 in place of -inf.

    A row without a visible key has scores of -inf, so exp(S - lse) is then 0.
    """
    return lse.masked_fill(lse == float("-inf"), 0.0)
