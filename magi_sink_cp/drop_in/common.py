"""What the drop-in functions share: the checks and the call of the operator.

No argument is accepted and then ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from magi_sink_cp.kernels.backends.registry import drop_in_policy
from magi_sink_cp.kernels.checks import as_sink, check_extras, check_qkv, under_autocast
from magi_sink_cp.kernels.lengths import as_cu_seqlens, make_lengths
from magi_sink_cp.kernels.protocol import FP8, NO_EXTRAS, AttentionParams, Extras
from magi_sink_cp.ops.attention import OperatorOptions, attention, split_inputs

_DENSE = "(batch, seqlen, heads, head_dim)"
_PACKED = "(total, heads, head_dim)"
_NAMES = {
    3: ("q", "k", "v"),
    2: ("q", "k of kv", "v of kv"),
    1: ("q of qkv", "k of qkv", "v of qkv"),
}
# What FlashAttention has a forward for, and no backward; fp8 inputs too.
_FORWARD_ONLY = ("qv", "q_descale", "k_descale", "v_descale", "block_table")


def dense(
    family: str,
    inputs: Sequence[Tensor],
    sink: Tensor | None,
    sink_layout: str,
    params: AttentionParams,
    *,
    want_lse: bool,
    num_heads_q: int = 0,
    extras: Extras = NO_EXTRAS,
    want_probs: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, lse, S_dmask or None) of inputs (batch, seqlen, …)."""
    inputs = under_autocast(*inputs)
    q, k, v = _views(inputs, num_heads_q)
    check_qkv(q, k, v, 4, _DENSE, family == "fa3", False, _NAMES[len(inputs)])
    sink = as_sink(sink, sink_layout, q)
    if extras is not NO_EXTRAS:
        check_extras(extras, q, k, v, q.shape[0])
    _check_forward_only(inputs, sink, params, extras)
    options = OperatorOptions(num_heads_q, want_lse=want_lse, want_probs=want_probs)
    return attention(inputs, sink, drop_in_policy(family), params, options, None, extras)


def varlen(
    family: str,
    inputs: Sequence[Tensor],
    sink: Tensor | None,
    sink_layout: str,
    params: AttentionParams,
    lengths: Sequence[Any],
    *,
    want_lse: bool,
    extras: Extras = NO_EXTRAS,
    want_probs: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, lse, S_dmask or None) of inputs (total, …) with packed documents.

    ``lengths`` are the arguments of make_lengths, in its order.
    """
    inputs = under_autocast(*inputs)
    q, k, v = _views(inputs, 0)
    paged = extras.block_table is not None
    check_qkv(q, k, v, 3, _PACKED, family == "fa3", paged, _NAMES[len(inputs)])
    sink = as_sink(sink, sink_layout, q)
    if len(inputs) == 1:
        # Here, so that errors of type and shape say cu_seqlens; those of contents say cu_seqlens_q.
        cu_seqlens = as_cu_seqlens(lengths[0], "cu_seqlens", q.device)
        lengths = (cu_seqlens, cu_seqlens, *lengths[2:])
    checked = make_lengths(q.device, *lengths)
    if checked is None:
        raise ValueError("cu_seqlens_q and cu_seqlens_k must be given, got None")
    if want_probs and (checked.max_seqlen_q is None or checked.max_seqlen_k is None):
        raise ValueError(
            "return_attn_probs=True needs max_seqlen_q and max_seqlen_k, which give S_dmask its "
            "shape; got None"
        )
    if extras is not NO_EXTRAS:
        check_extras(extras, q, k, v, checked.cu_seqlens_q.shape[0] - 1)
    _check_forward_only(inputs, sink, params, extras)
    options = OperatorOptions(want_lse=want_lse, want_probs=want_probs)
    return attention(inputs, sink, drop_in_policy(family), params, options, checked, extras)


def check_packed(name: str, x: Tensor, num_dims: int, shape_text: str, slices: int) -> None:
    """Check that ``x`` has the rank of qkv or kv, and ``slices`` (3 or 2) before its heads."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != num_dims or x.shape[-3] != slices:
        raise ValueError(f"{name} must have shape {shape_text}, got {tuple(x.shape)}")


def make_extras(**tensors: Tensor | None) -> Extras:
    """The optional tensors, by their names in :class:`Extras`; unchecked."""
    return NO_EXTRAS if all(x is None for x in tensors.values()) else Extras(**tensors)


def refuse(**given: object) -> None:
    """Raise for every argument that is not None.

    The functions of FlashAttention have these arguments, and ours do not.
    """
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(
                f"{name} is not supported together with a sink; got {type(value).__name__}. Leave "
                "it None"
            )


def _views(inputs: Sequence[Tensor], num_heads_q: int) -> tuple[Tensor, Tensor, Tensor]:
    if len(inputs) == 3:
        return inputs[0], inputs[1], inputs[2]
    with torch.no_grad():
        return split_inputs(inputs, num_heads_q)


def _check_forward_only(
    inputs: Sequence[Tensor], sink: Tensor | None, params: AttentionParams, extras: Extras
) -> None:
    """Refuse what FlashAttention has no backward for, where a gradient would be asked for."""
    if extras is NO_EXTRAS and params.attention_chunk == 0 and inputs[0].dtype != FP8:
        return
    others = () if extras is NO_EXTRAS else tuple(vars(extras).values())
    if not (
        torch.is_grad_enabled()
        and any(x is not None and x.requires_grad for x in (*inputs, sink, *others))
    ):
        return
    given = [name for name in _FORWARD_ONLY if getattr(extras, name) is not None]
    given += ["attention_chunk"] * (params.attention_chunk > 0) + ["fp8 inputs"] * (
        inputs[0].dtype == FP8
    )
    if given:
        raise ValueError(
            f"{', '.join(given)}: FlashAttention has a forward for this and no backward, and an "
            "input requires a gradient. "
            "Call it under torch.no_grad(), or leave it out"
        )
    if extras.alibi_slopes is not None and extras.alibi_slopes.requires_grad:
        raise ValueError("alibi_slopes must not require a gradient: FlashAttention has none for it")
