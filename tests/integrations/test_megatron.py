"""Megatron's core_attention with sinks, beside Megatron's unfused attention."""

from __future__ import annotations

import contextlib
import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")

from tests.support.ranks import run_on_ranks

HEADS, GROUPS, DIM = 8, 2, 16


def make_config(**options):
    from megatron.core.transformer.transformer_config import TransformerConfig

    defaults = {
        "num_layers": 1, "hidden_size": HEADS * DIM, "num_attention_heads": HEADS,
        "num_query_groups": GROUPS, "kv_channels": DIM, "attention_dropout": 0.0,
        "softmax_type": "learnable", "use_cpu_initialization": True, "masked_softmax_fusion": False,
    }  # fmt: skip
    return TransformerConfig(**defaults | options)


class OneRank:
    def size(self):
        return 1


def ours(config, group):
    from megatron.core.transformer.enums import AttnMaskType

    from magi_sink_cp.integrations.megatron import SinkDotProductAttention

    groups = SimpleNamespace(tp=OneRank(), cp=group)
    return SinkDotProductAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)


def unfused(config, q, k, v, offset):
    """Megatron's own attention of the whole sequence, (s, b, h, d)."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.fusions import fused_softmax
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    tokens = torch.arange(q.shape[0])
    hidden = tokens[None, :] > tokens[:, None]
    if config.window_size is not None:
        hidden |= tokens[None, :] < tokens[:, None] - config.window_size[0]
    memory = SimpleNamespace(get_tensor=lambda shape, dtype, _: torch.empty(shape, dtype=dtype))
    tracker = SimpleNamespace(fork=contextlib.nullcontext)
    with (
        mock.patch.object(torch.cuda, "current_device", return_value=torch.device("cpu")),
        mock.patch.object(parallel_state, "get_global_memory_buffer", return_value=memory),
        mock.patch.object(tensor_parallel, "get_cuda_rng_tracker", return_value=tracker),
        mock.patch.object(fused_softmax, "get_sliding_window_causal_mask", return_value=hidden),
    ):
        module = DotProductAttention(
            config, 1, AttnMaskType.causal, "self", pg_collection=SimpleNamespace(tp=OneRank())
        )
        module.softmax_offset = torch.nn.Parameter(offset.clone())
        out = module(q, k, v, hidden[None, None])
    return out, module.softmax_offset


def inputs(total, batch):
    generator = torch.Generator().manual_seed(0)
    shapes = [(total, batch, heads, DIM) for heads in (HEADS, GROUPS, GROUPS)]
    tensors = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    return (*tensors, torch.randn(HEADS, generator=generator) * 2)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, (5, 0)])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_sbhd(num_ranks, window):
    run_on_ranks(num_ranks, body_sbhd, window=window)


def body_sbhd(group, device, *, window) -> None:
    from magi_sink_cp import make_cp_plan

    config = make_config(window_size=window)
    q, k, v, offset = inputs(24, 2)
    expected, theirs = unfused(config, q, k, v, offset)
    dout = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    grads = torch.autograd.grad(expected, (q, k, v, theirs), dout)
    module = ours(config, group)
    module.softmax_offset.data.copy_(offset)
    plan = make_cp_plan(24, group=group, layout="zigzag")  # how Megatron shards a batch
    local = [plan.shard(x.detach()).requires_grad_() for x in (q, k, v)]
    out = module(*local, None)
    close(out, plan.shard(expected.detach()))
    mine = torch.autograd.grad(out, (*local, module.softmax_offset), plan.shard(dout))
    for one, other in zip(mine[:3], grads[:3], strict=True):
        close(one, plan.shard(other))
    dsink = mine[3].clone()
    dist.all_reduce(dsink, group=group)
    close(dsink, grads[3])


@pytest.mark.parametrize(("kind", "sink"), [("vanilla", None), ("off-by-one", 0.0)])
def test_fixed_sinks(kind, sink):
    run_on_ranks(1, body_fixed, kind=kind, sink=sink)


def body_fixed(group, device, *, kind, sink) -> None:
    from magi_sink_cp import attention_with_sink

    q, k, v, _ = inputs(12, 2)
    module = ours(make_config(softmax_type=kind), group)
    assert not list(module.parameters())
    logits = None if sink is None else torch.full((HEADS,), sink)
    expected = attention_with_sink(*(x.transpose(0, 1) for x in (q, k, v)), logits, causal=True)
    close(module(q, k, v, None), expected.transpose(0, 1).flatten(2))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_thd(num_ranks):
    run_on_ranks(num_ranks, body_thd)


def body_thd(group, device) -> None:
    """Documents of 5, 8 and 3 tokens, padded to multiples of 4, in Transformer Engine's order."""
    from megatron.core.packed_seq_params import PackedSeqParams

    config = make_config()
    lengths, padded = [5, 8, 3], [0, 8, 16, 20]
    q, k, v, offset = inputs(20, 1)
    outs, parts = [], []
    for length, start in zip(lengths, padded, strict=False):
        rows = slice(start, start + length)
        outs.append(unfused(config, q[rows], k[rows], v[rows], offset)[0].detach())
        parts.append(torch.arange(start, start + length))
    cp_size, rank = dist.get_world_size(group), dist.get_rank(group)
    order = []
    for lo, hi in itertools.pairwise(padded):
        chunk = (hi - lo) // (2 * cp_size)
        for number in (rank, 2 * cp_size - 1 - rank):
            order += range(lo + number * chunk, lo + (number + 1) * chunk)
    module = ours(config, group)
    module.softmax_offset.data.copy_(offset)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=torch.tensor([0, 5, 13, 16], dtype=torch.int32),
        cu_seqlens_kv=torch.tensor([0, 5, 13, 16], dtype=torch.int32),
        cu_seqlens_q_padded=torch.tensor(padded, dtype=torch.int32),
        cu_seqlens_kv_padded=torch.tensor(padded, dtype=torch.int32),
    )
    for _ in range(2):  # the second layer finds the plan
        out = module(*(x[order, 0] for x in (q, k, v)), None, packed_seq_params=packed)
    whole = torch.zeros(20, HEADS * DIM)
    whole[order] = out.flatten(1).detach()
    dist.all_reduce(whole, group=group)
    for part, expected in zip(parts, outs, strict=True):
        close(whole[part], expected[:, 0])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout must be 0, got 0.1"),
        ({"softmax_type": "sparse"}, "softmax_type must be one of"),
    ],
)
def test_configs_that_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        ours(make_config(**options), None)


def test_calls_that_are_refused():
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    module = ours(make_config(), None)
    q, k, v, offset = inputs(4, 1)
    with pytest.raises(ValueError, match="attention_bias must be None"):
        module(q, k, v, None, attention_bias=offset)
    with pytest.raises(ValueError, match="attn_mask_type must be causal.*arbitrary"):
        module(q, k, v, None, attn_mask_type=AttnMaskType.arbitrary)
    packed = PackedSeqParams(qkv_format="sbhd")
    with pytest.raises(ValueError, match="qkv_format must be 'thd', got 'sbhd'"):
        module(q, k, v, None, packed_seq_params=packed)
    offsets = torch.tensor([0, 4])
    packed = PackedSeqParams(cu_seqlens_q=offsets, cu_seqlens_q_padded=offsets)
    with pytest.raises(ValueError, match="cu_seqlens_q_padded must be None without a causal mask"):
        module(q, k, v, None, attn_mask_type=AttnMaskType.no_mask, packed_seq_params=packed)
