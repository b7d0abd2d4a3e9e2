"""FLOP formulas of the operators, for torch.utils.flop_counter.

Forward: 2 · pairs · heads · (head_dim of q + head_dim of v); backward: 2.5 times that. ``pairs``
are the visible (query, key) pairs. Masks, documents and seqused are counted as they are, but for
attention_chunk, which is not counted. Fake tensors hold no offsets: their documents are taken to be
equally long.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from magi_sink_cp.dist.methods.base import CallOptions
from magi_sink_cp.dist.plan import plan_of
from magi_sink_cp.dist.planning.mask import visible_pairs
from magi_sink_cp.ops.attention import Settings, split_inputs
from magi_sink_cp.ops.schema import split_fields


def _lengths(offsets: Tensor, used: Tensor | None, total: int) -> list[int]:
    """Each document's tokens; ``used`` is seqused."""
    documents = offsets.shape[0] - 1
    if isinstance(offsets, FakeTensor) or offsets.is_meta:
        return [total // max(1, documents)] * documents
    if used is not None:
        return [int(n) for n in used.tolist()]
    return [hi - lo for lo, hi in itertools.pairwise(offsets.tolist())]


def _attention_flops(
    inputs: Sequence[Tensor], lengths: Sequence[Tensor | None], settings: Settings
) -> int:
    q, k, v = split_inputs(inputs, settings.options.num_heads_q)
    window = settings.params.window_size
    if not lengths or lengths[0] is None:
        pairs = q.shape[0] * visible_pairs(q.shape[1], k.shape[1], *window)
    else:
        offsets_k = lengths[0] if lengths[1] is None else lengths[1]
        rows = _lengths(lengths[0], lengths[2], q.shape[0])
        keys = _lengths(offsets_k, lengths[3], k.shape[0])
        both = zip(rows, keys, strict=True)
        pairs = sum(visible_pairs(num_q, num_k, *window) for num_q, num_k in both)
    return 2 * pairs * q.shape[-2] * (q.shape[-1] + v.shape[-1])


def _cp_attention_flops(q: Tensor, handle: Tensor, options: CallOptions) -> int:
    if isinstance(handle, FakeTensor):
        raise ValueError("the FLOPs of attention across ranks need a real plan, not a fake tensor")
    plan = plan_of(handle)
    batch_size = 1 if q.dim() == 3 else q.shape[0]
    pairs = plan.blueprint.mask(options.window_size).pairs(plan.rank)
    return 4 * batch_size * pairs * q.shape[-2] * q.shape[-1]


@register_flop_formula(torch.ops.magi_sink_cp.attention_forward, get_raw=True)
def _forward(inputs: Any, sink: Any, lengths: Any, extras: Any, *flat: Any, out_val: Any) -> int:
    return _attention_flops(inputs, lengths, Settings.of(flat))


@register_flop_formula(torch.ops.magi_sink_cp.attention_backward, get_raw=True)
def _backward(*arguments: Any, out_val: Any) -> int:
    inputs, lengths, settings = arguments[6], arguments[8], Settings.of(arguments[10:])
    return _attention_flops(inputs, lengths, settings) * 5 // 2


@register_flop_formula(torch.ops.magi_sink_cp.cp_attention_forward, get_raw=True)
def _cp_forward(*arguments: Any, out_val: Any) -> int:
    options, _ = split_fields(CallOptions, arguments[7:])
    return _cp_attention_flops(arguments[0], arguments[4], options)


@register_flop_formula(torch.ops.magi_sink_cp.cp_attention_backward, get_raw=True)
def _cp_backward(*arguments: Any, out_val: Any) -> int:
    options, _ = split_fields(CallOptions, arguments[13:])
    return _cp_attention_flops(arguments[6], arguments[10], options) * 5 // 2
