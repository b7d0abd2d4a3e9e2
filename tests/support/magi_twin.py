"""A twin of what this package calls of magi_attention.api: plain torch, any device and dtype.

It keeps to the facts of v1.1.1 on which the engine rests: chunks dealt to ranks, local order
ascending, padding at the end of the sequence; an autograd function that saves q, the joined k and
v, out and lse, computes its backward from these, and drops the gradient of lse.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from magi_sink_cp.dist.planning.mask import SLICE_TYPES
from magi_sink_cp.kernels import magi_attention
from magi_sink_cp.kernels.backends import registry
from tests.support.slices import dense


class AttnRanges(list):
    @staticmethod
    def from_ranges(ranges: list[list[int]]) -> AttnRanges:
        return AttnRanges(SimpleNamespace(start=a, end=b) for a, b in ranges)


AttnOverlapMode = SimpleNamespace(STATIC="static", DYNAMIC="dynamic")


@dataclass(frozen=True)
class OverlapConfig:
    mode: str = "static"
    degree: int | None = 1
    max_num_chunks: int = 64

    def __post_init__(self):
        assert self.mode == "static"
        assert self.degree <= self.max_num_chunks


@dataclass(frozen=True)
class DistAttnConfig:
    dispatch_config: object = None
    overlap_config: OverlapConfig = OverlapConfig()


@dataclass(frozen=True, eq=False)
class DistAttnRuntimeKey:
    q_ranges: AttnRanges
    k_ranges: AttnRanges
    attn_mask_type: tuple[Any, ...]
    total_seqlen_q: int
    total_seqlen_k: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    pad_size: int
    chunk_size: int
    cp_group: dist.ProcessGroup
    dist_attn_config: DistAttnConfig
    uneven_shard: bool = False
    chunks: list[list[int]] = field(default_factory=list)  # of each rank


def magi_attn_flex_key(
    q_ranges, k_ranges, attn_mask_type, total_seqlen_q, total_seqlen_k, num_heads_q, num_heads_kv,
    head_dim, pad_size, cp_group_or_mesh, dist_attn_config=None,
) -> DistAttnRuntimeKey:  # fmt: skip
    assert (pad_size, total_seqlen_k) == (0, total_seqlen_q)
    ranks = dist.get_world_size(cp_group_or_mesh)
    size = -(-total_seqlen_q // (8 * ranks))
    assert -(-total_seqlen_q // size) >= ranks
    padded = -(-total_seqlen_q // (size * ranks)) * size * ranks
    every = range(padded // size)
    # The last chunk goes to the first rank: padding is then at the end of several ranks.
    chunks = [
        sorted(n for n in every if (len(every) - 1 - n) % ranks == rank) for rank in range(ranks)
    ]
    return DistAttnRuntimeKey(
        *_padded(q_ranges, k_ranges, attn_mask_type, total_seqlen_q, padded - total_seqlen_q),
        padded, padded, num_heads_q, num_heads_kv, head_dim, padded - total_seqlen_q, size,
        cp_group_or_mesh, dist_attn_config or DistAttnConfig(), chunks=chunks,
    )  # fmt: skip


def _padded(q_ranges, k_ranges, kinds, total, pad_size):
    kinds = [SimpleNamespace(value=kind) for kind in kinds]
    if pad_size:
        more = AttnRanges.from_ranges([[total, total + pad_size]])
        nothing = AttnRanges.from_ranges([[0, 0]])
        return (
            AttnRanges([*q_ranges, *more]),
            AttnRanges([*k_ranges, *nothing]),
            (*kinds, SimpleNamespace(value="full")),
        )
    return q_ranges, k_ranges, tuple(kinds)


def make_flex_key_for_new_mask_after_dispatch(
    q_ranges, k_ranges, attn_mask_type, key_for_dispatch, num_heads_q, num_heads_kv, head_dim,
    dist_attn_config,
) -> DistAttnRuntimeKey:  # fmt: skip
    key = key_for_dispatch
    total = key.total_seqlen_q - key.pad_size
    dist.barrier(key.cp_group)  # making a key communicates
    return DistAttnRuntimeKey(
        *_padded(q_ranges, k_ranges, attn_mask_type, total, key.pad_size),
        key.total_seqlen_q, key.total_seqlen_k, num_heads_q, num_heads_kv, head_dim, key.pad_size,
        key.chunk_size, key.cp_group, dist_attn_config, chunks=key.chunks,
    )  # fmt: skip


def _rows(key: DistAttnRuntimeKey, rank: int) -> Tensor:
    size = key.chunk_size
    return torch.cat([torch.arange(n * size, (n + 1) * size) for n in key.chunks[rank]])


def dispatch(x: Tensor, key: DistAttnRuntimeKey, pad_value: float = 0.0) -> Tensor:
    padding = x.new_full((key.pad_size, *x.shape[1:]), pad_value)
    return torch.cat([x, padding])[_rows(key, dist.get_rank(key.cp_group))]


class DistAttnFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, runtime, sink, softmax_scale, softcap):
        assert sink is None
        assert (q.shape[1], k.shape[1], q.shape[2]) == (
            runtime.num_heads_q, runtime.num_heads_kv, runtime.head_dim
        )  # fmt: skip
        local_kv = torch.cat([k, v])
        scores, _, values = _scores(q, local_kv, runtime, softmax_scale, softcap)
        lse = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - lse.masked_fill(lse.isinf(), 0)[..., None])
        out = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype).contiguous()
        lse = lse.t().contiguous()
        ctx.save_for_backward(q, local_kv, out, lse, sink)
        ctx.dist_attn_runtime, ctx.softmax_scale, ctx.softcap = runtime, softmax_scale, softcap
        return out, lse, None

    @staticmethod
    def backward(ctx, dout, *args):
        q, local_kv, out, lse, _ = ctx.saved_tensors
        key, scale, softcap = ctx.dist_attn_runtime, ctx.softmax_scale, ctx.softcap
        scores, keys, values = _scores(q, local_kv, key, scale, softcap)
        dq, dk, dv = _gradients(dout, q, keys, values, scores, out, lse, scale, softcap)
        own = _rows(key, dist.get_rank(key.cp_group))
        totals = []
        for x in (dk, dv):  # every rank has a share of every key's
            total = x.unflatten(1, (local_kv.shape[1], -1)).sum(2).contiguous()
            dist.all_reduce(total, group=key.cp_group)
            totals.append(total[own])
        return dq, *totals, None, None, None, None


def _scores(
    q: Tensor, local_kv: Tensor, key, softmax_scale, softcap
) -> tuple[Tensor, Tensor, Tensor]:
    """(H, own rows, all keys), and all keys and values with a head for each of q's."""
    group, ranks = key.cp_group, dist.get_world_size(key.cp_group)
    gathered = [torch.empty_like(local_kv) for _ in range(ranks)]
    dist.all_gather(gathered, local_kv, group=group)
    order = torch.cat([_rows(key, rank) for rank in range(ranks)]).argsort()
    k, v = (torch.cat([kv.chunk(2)[i] for kv in gathered])[order] for i in range(2))
    triples = zip(key.q_ranges, key.k_ranges, key.attn_mask_type, strict=True)
    slices = [((a.start, a.end), (b.start, b.end), kind.value) for a, b, kind in triples]
    mask = dense([one for one in slices if one[1][0] < one[1][1]], key.total_seqlen_q).bool()
    return _masked_scores(q, k, v, mask[_rows(key, dist.get_rank(group))], softmax_scale, softcap)


class FlexFlashAttnFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sink, q_ranges, k_ranges, kinds, softmax_scale, softcap):
        assert sink is None
        mask = _mask_of_ranges(q_ranges, k_ranges, kinds, q.shape[0], k.shape[0])
        scores, _, values = _masked_scores(q, k, v, mask, softmax_scale, softcap)
        lse = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - lse.masked_fill(lse.isinf(), 0)[..., None])
        out = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype).contiguous()
        lse = lse.t().contiguous()
        ctx.save_for_backward(q, k, v, sink, out, lse, q_ranges, k_ranges, kinds)
        ctx.softmax_scale, ctx.softcap = softmax_scale, softcap
        return out, lse, None

    @staticmethod
    def backward(ctx, dout, *args):
        q, k, v, _, out, lse, q_ranges, k_ranges, kinds = ctx.saved_tensors
        mask = _mask_of_ranges(q_ranges, k_ranges, kinds, q.shape[0], k.shape[0])
        scores, keys, values = _masked_scores(q, k, v, mask, ctx.softmax_scale, ctx.softcap)
        dq, dk, dv = _gradients(
            dout, q, keys, values, scores, out, lse, ctx.softmax_scale, ctx.softcap
        )
        dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))
        return dq, dk, dv, *(None,) * 6


def _mask_of_ranges(q_ranges, k_ranges, kinds, rows: int, keys: int) -> Tensor:
    assert q_ranges.dtype == k_ranges.dtype == kinds.dtype == torch.int32
    triples = zip(q_ranges.tolist(), k_ranges.tolist(), kinds.tolist(), strict=True)
    slices = [(q, k, SLICE_TYPES[kind]) for q, k, kind in triples if q[0] < q[1] and k[0] < k[1]]
    seen = dense(slices, max(rows, keys))[:rows, :keys]
    assert not (seen > 1).any()
    return seen.bool()


def _masked_scores(q, k, v, mask, softmax_scale, softcap) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, keys) * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~mask, -torch.inf), keys, values


def _gradients(dout, q, keys, values, scores, out, lse, scale, softcap) -> tuple[Tensor, ...]:
    """dq, and dk and dv of a head for each of q's, from the out and lse that were saved."""
    assert lse.stride(-1) == 1
    lse = lse.t().masked_fill(lse.t().isneginf(), torch.inf)
    weights = torch.exp(scores - lse[..., None])
    delta = (dout * out).sum(-1).t()
    ds = weights * (torch.einsum("qhd,khd->hqk", dout, values) - delta[..., None])
    if softcap:
        ds = ds * (1 - (scores.masked_fill(scores.isinf(), 0) / softcap) ** 2)
    dq = torch.einsum("hqk,khd->qhd", ds, keys) * scale
    dk = torch.einsum("hqk,qhd->khd", ds, q) * scale
    return dq, dk, torch.einsum("hqk,qhd->khd", weights, dout)


def flex_flash_attn_func(
    q, k, v, q_ranges, k_ranges, attn_type_map, *, sink=None, softmax_scale=None, softcap=0.0,
    deterministic=False, disable_fwd_atomic_reduction=False,
):  # fmt: skip
    if disable_fwd_atomic_reduction:
        rows = sorted((a, b) for a, b in q_ranges.tolist() if a < b)
        assert all(one[1] <= two[0] for one, two in itertools.pairwise(rows))
    out, lse, _ = FlexFlashAttnFunc.apply(
        q, k, v, sink, q_ranges, k_ranges, attn_type_map, softmax_scale, softcap
    )
    return out, SimpleNamespace(lse=lse)


def calc_attn(q, k, v, key, sink=None, softmax_scale=None, softcap=0.0):
    out, lse, _ = DistAttnFunc.apply(q, k, v, key, sink, softmax_scale, softcap)
    return out, SimpleNamespace(lse=lse)


API = SimpleNamespace(
    AttnOverlapMode=AttnOverlapMode,
    AttnRanges=AttnRanges,
    DistAttnConfig=DistAttnConfig,
    DistAttnRuntimeKey=DistAttnRuntimeKey,
    OverlapConfig=OverlapConfig,
    calc_attn=calc_attn,
    dispatch=dispatch,
    flex_flash_attn_func=flex_flash_attn_func,
    magi_attn_flex_key=magi_attn_flex_key,
    make_flex_key_for_new_mask_after_dispatch=make_flex_key_for_new_mask_after_dispatch,
)


@contextlib.contextmanager
def installed() -> Iterator[Any]:
    """The twin in the place of magi_attention.api, on the CPU."""
    with contextlib.ExitStack() as stack:
        unavailable = registry._unavailable

        def reason(backend):
            return None if backend.name == "ffa" else unavailable(backend)

        stack.enter_context(mock.patch.object(registry, "_unavailable", reason))
        for name, value in {
            "load": lambda: API,
            "missing_gpu": lambda: None,
            "DEVICE_TYPE": "cpu",
            "DTYPES": (torch.float32, torch.float64),
        }.items():
            stack.enter_context(mock.patch.object(magi_attention, name, value))
        yield API
