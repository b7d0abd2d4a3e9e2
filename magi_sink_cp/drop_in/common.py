"""What the drop-in functions share: the checks, the call of the operator, and nothing that is accepted and ignored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magi_sink_cp.kernels.inputs import check_lengths, check_qkv, check_sink
from magi_sink_cp.kernels.protocol import FP8, NO_EXTRAS, AttentionParams, Extras
from magi_sink_cp.kernels.registry import DROP_IN
from magi_sink_cp.ops import FORWARD_ONLY, Lengths, attention, make_op_call, split_inputs

_DENSE = "(batch, seqlen, heads, head_dim)"
_PACKED = "(total, heads, head_dim)"


def dense(
    family: str,
    inputs: Sequence[Tensor],
    sink: Tensor | None,
    sink_layout: str,
    params: AttentionParams,
    *,
    num_heads_q: int = 0,
    extras: Extras = NO_EXTRAS,
    want_probs: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, lse, S_dmask or None) of inputs (batch, seqlen, …)."""
    q, k, v = _views(inputs, num_heads_q)
    check_qkv(q, k, v, 4, _DENSE, fp8_allowed=family == "fa3")
    check_sink(sink, sink_layout, q)
    _check_forward_only(inputs, sink, params, extras)
    call = make_op_call(params, DROP_IN + family, num_heads_q=num_heads_q, want_probs=want_probs)
    return attention(inputs, sink, call, None, extras)


def varlen(
    family: str,
    inputs: Sequence[Tensor],
    sink: Tensor | None,
    sink_layout: str,
    params: AttentionParams,
    lengths: Lengths,
    *,
    extras: Extras = NO_EXTRAS,
    want_probs: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, lse, S_dmask or None) of inputs (total, …) with packed documents."""
    for name, cu_seqlens in (("cu_seqlens_q", lengths.cu_seqlens_q), ("cu_seqlens_k", lengths.cu_seqlens_k)):
        if cu_seqlens is None:
            raise TypeError(f"{name} must be a torch.Tensor of the offsets of packed documents, got None")
    q, k, v = _views(inputs, 0)
    check_qkv(q, k, v, 3, _PACKED, fp8_allowed=family == "fa3", paged=extras.block_table is not None)
    check_sink(sink, sink_layout, q)
    check_lengths(q, k, **lengths._asdict())
    _check_forward_only(inputs, sink, params, extras)
    return attention(inputs, sink, make_op_call(params, DROP_IN + family, want_probs=want_probs), lengths, extras)


def check_packed(name: str, x: Tensor, num_dims: int, shape_text: str, slices: int) -> None:
    """That ``x`` has the rank of qkv or kv, and ``slices`` (3 or 2) as its size before heads and head_dim."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != num_dims or x.shape[-3] != slices:
        raise ValueError(f"{name} must have shape {shape_text}, got {tuple(x.shape)}")


def refuse(**given: object) -> None:
    """Raise for every argument that is not None: its namesake has it, and these functions do not."""
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(f"{name} is not supported together with a sink; got {type(value).__name__}. Leave it None")


def _views(inputs: Sequence[Tensor], num_heads_q: int) -> tuple[Tensor, Tensor, Tensor]:
    if len(inputs) == 3:
        return inputs[0], inputs[1], inputs[2]
    with torch.no_grad():
        return split_inputs(inputs, num_heads_q)


def _check_forward_only(inputs: Sequence[Tensor], sink: Tensor | None, params: AttentionParams, extras: Extras) -> None:
    """Refuse what FlashAttention has no backward for, where a gradient would be asked for."""
    if extras is NO_EXTRAS and params.attention_chunk == 0 and inputs[0].dtype != FP8:
        return
    tensors = (*inputs, sink, extras.qv, extras.alibi_slopes)
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)):
        return
    given = [name for name in FORWARD_ONLY if getattr(extras, name, None) is not None]
    given += ["attention_chunk"] * (params.attention_chunk > 0) + ["fp8 inputs"] * (inputs[0].dtype == FP8)
    if given:
        raise ValueError(
            f"{', '.join(given)}: FlashAttention has a forward for this and no backward, and an input requires a gradient. "
            "Call it under torch.no_grad(), or leave it out"
        )
    if extras.alibi_slopes is not None and extras.alibi_slopes.requires_grad:
        raise ValueError("alibi_slopes must not require a gradient: FlashAttention has none for it")
