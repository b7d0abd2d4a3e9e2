"""The two operators under every single-device function, and the autograd function around them.

``magi_sink_cp::attention_forward`` and ``magi_sink_cp::attention_backward`` are registered with PyTorch with their fake (meta)
implementations, so that torch.compile, torch.export, selective activation checkpointing and dispatch modes see one opaque operator
each. Overload ``dropout`` is the same with the tag that keeps a recomputation from drawing other random numbers.

Layouts of the inputs: ``[q, k, v]``; ``[q, kv]`` with kv (…, 2, H_kv, D); ``[qkv]`` with qkv (…, 3, H, D), or (…, H + 2 H_kv, D),
whose number of query heads is then given. Gradients come back in the same layout, written where they belong.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from magi_sink_cp.kernels.dsink import sink_gradient
from magi_sink_cp.kernels.inputs import make_varlen
from magi_sink_cp.kernels.merge import merge
from magi_sink_cp.kernels.protocol import (
    NO_EXTRAS,
    AttentionParams,
    Backend,
    Call,
    Dropout,
    Extras,
    Gradients,
    Partial,
    out_dtype,
    stat_dtype,
)
from magi_sink_cp.kernels.registry import adding_sink, select_backend

# The fields of AttentionParams, in their order.
_PARAMS = (
    "float softmax_scale, int window_size_left, int window_size_right, float softcap, bool deterministic, float dropout_p, "
    "int attention_chunk, int num_splits, bool? pack_gqa, int sm_margin"
)
# lengths: none, or cu_seqlens_q, cu_seqlens_k (None: the same), seqused_q, seqused_k. extras: none, or the fields of Extras.
_TENSORS = "Tensor[] inputs, Tensor? sink, Tensor?[] lengths, Tensor?[] extras"
_CALL = (
    "SymInt max_seqlen_q, SymInt max_seqlen_k, str backend, int num_heads_q, bool read_lengths, bool want_lse, bool want_probs, "
    f"{_PARAMS}"
)
_FORWARD = f"({_TENSORS}, {_CALL}) -> (Tensor out, Tensor lse, Tensor[] dropout)"
_BACKWARD = (
    f"(Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, Tensor[] dropout, bool needs_dsink, {_TENSORS}, {_CALL}) -> Tensor[]"
)
_NO_MAXIMUM = -1  # stands for a max_seqlen of None


class OpCall(NamedTuple):
    """The arguments of the operators that are neither tensors nor lengths, in the order of their schema."""

    backend: str
    num_heads_q: int
    read_lengths: bool
    want_lse: bool
    want_probs: bool
    softmax_scale: float
    window_size_left: int
    window_size_right: int
    softcap: float
    deterministic: bool
    dropout_p: float
    attention_chunk: int
    num_splits: int
    pack_gqa: bool | None
    sm_margin: int


def make_op_call(
    params: AttentionParams,
    backend: str,
    *,
    want_lse: bool,
    num_heads_q: int = 0,
    read_lengths: bool = False,
    want_probs: bool = False,
) -> OpCall:
    """``want_lse``: lse is returned to the user; without, it need only be right for the backward. ``want_probs``: return S_dmask.
    ``read_lengths``: check what cu_seqlens hold, on a GPU too.
    """
    if not isinstance(want_lse, bool):
        raise TypeError(f"return_lse and return_attn_probs must be bools, got {want_lse!r}")
    left, right = params.window_size
    return OpCall(
        backend,
        num_heads_q,
        read_lengths,
        want_lse,
        want_probs,
        params.softmax_scale,
        left,
        right,
        params.softcap,
        params.deterministic,
        params.dropout_p,
        params.attention_chunk,
        params.num_splits,
        params.pack_gqa,
        params.sm_margin,
    )


@functools.lru_cache(maxsize=4096)
def _params_of(call: OpCall) -> AttentionParams:
    return AttentionParams(call.softmax_scale, (call.window_size_left, call.window_size_right), *call[8:])


class Lengths(NamedTuple):
    """Packed documents, as a user gives them."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None


def attention(
    inputs: Sequence[Tensor], sink: Tensor | None, call: OpCall, lengths: Lengths | None = None, extras: Extras = NO_EXTRAS
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, lse, S_dmask or None) of checked arguments; differentiable in ``inputs`` and ``sink``."""
    maxima = (_NO_MAXIMUM, _NO_MAXIMUM)
    others: list[Tensor | None] = []
    if lengths is not None:
        maxima = _maximum(lengths.max_seqlen_q), _maximum(lengths.max_seqlen_k)
        same = lengths.cu_seqlens_k is lengths.cu_seqlens_q
        others = [lengths.cu_seqlens_q, None if same else lengths.cu_seqlens_k, lengths.seqused_q, lengths.seqused_k]
    if extras is not NO_EXTRAS:
        others += [None] * (_NUM_LENGTHS - len(others)) + list(vars(extras).values())
    if torch.compiler.is_compiling():
        inputs, others = _distinct(inputs), _distinct(others)
    return _Attention.apply((call, maxima, len(inputs), lengths is not None), *inputs, sink, *others)


_NUM_LENGTHS = 4


def _maximum(longest: int | None) -> int:
    """The operators' max_seqlen: a Python int (of NumPy's, say), or whatever torch.compile has in its place."""
    if longest is None:
        return _NO_MAXIMUM
    return longest if torch.compiler.is_compiling() else operator.index(longest)


def _distinct(tensors: Sequence[Any]) -> list[Any]:
    """tensors, a repeated one as a view of itself: torch.compile takes no tensor twice."""
    distinct: list[Any] = []
    for x in tensors:
        distinct.append(x.view_as(x) if x is not None and any(x is other for other in distinct) else x)
    return distinct


def split_inputs(inputs: Sequence[Tensor], num_heads_q: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of inputs in one of the layouts above."""
    if len(inputs) == 3:
        return inputs[0], inputs[1], inputs[2]
    if len(inputs) == 2:
        k, v = inputs[1].unbind(-3)
        return inputs[0], k, v
    (qkv,) = inputs
    if num_heads_q == 0:
        q, k, v = qkv.unbind(-3)
    else:
        heads_kv = (qkv.shape[-2] - num_heads_q) // 2
        q, k, v = qkv.split([num_heads_q, heads_kv, heads_kv], dim=-2)
    return q, k, v


class _Attention(torch.autograd.Function):
    """forward: partial of all keys → merge with the sink (in place). backward: the kernel's own, then dsink from its delta.

    ``tensors`` are the inputs, the sink, then nothing, or the four lengths, or these and the extras.
    """

    @staticmethod
    def forward(
        ctx: Any, call: tuple[OpCall, tuple[int, int], int, bool], *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        op_call, maxima, *_ = call
        run = _forward
        if _is_watched(tensors):
            run = _forward_op.dropout if op_call.dropout_p > 0 else _forward_op.default
        out, lse, dropout = run(*_arguments(call, tensors), *maxima, *op_call)
        ctx.save_for_backward(*tensors, out, lse, *dropout)
        ctx.call, ctx.num_tensors = call, len(tensors)
        ctx.set_materialize_grads(False)
        if not dropout:
            return out, lse, None
        ctx.mark_non_differentiable(dropout[1])
        return out, lse, dropout[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        op_call, maxima, num_inputs, _ = ctx.call
        saved = ctx.saved_tensors  # to be read once: checkpointing gives them out once
        tensors, (out, lse, *dropout) = saved[: ctx.num_tensors], saved[ctx.num_tensors :]
        needs_dsink = ctx.needs_input_grad[1 + num_inputs]
        arguments = _arguments(ctx.call, tensors)
        run = _backward_op if _is_watched((dout, dlse, *tensors)) else _backward
        grads = run(dout, dlse, out, lse, dropout, needs_dsink, *arguments, *maxima, *op_call)
        return None, *grads, *(None,) * (ctx.num_tensors - len(grads))


def _is_watched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a compiler, a dispatch mode, a tensor subclass or a meta tensor has to see the operator.

    If none has, its implementation is called directly: the dispatcher takes 15 µs to hand 25 arguments from Python to Python.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    return any(x is not None and (type(x) not in _PLAIN or x.is_meta) for x in tensors)


_PLAIN = (Tensor, torch.nn.Parameter)


def _arguments(call: tuple[OpCall, tuple[int, int], int, bool], tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """inputs, sink, lengths and extras as the operators take them."""
    _, _, num_inputs, has_lengths = call
    rest = tensors[num_inputs + 1 :]
    lengths = list(rest[:_NUM_LENGTHS]) if has_lengths else []
    return list(tensors[:num_inputs]), tensors[num_inputs], lengths, list(rest[_NUM_LENGTHS:])


def _resolve(
    inputs: Sequence[Tensor],
    sink: Tensor | None,
    lengths: Sequence[Tensor | None],
    extras: Sequence[Tensor | None],
    arguments: tuple[Any, ...],
) -> tuple[tuple[Tensor, Tensor, Tensor], OpCall, Call, Backend]:
    """q, k and v, and the kernels' view of an operator's arguments."""
    op_call = OpCall(*arguments[2:])
    q, k, v = split_inputs(inputs, op_call.num_heads_q)
    varlen = None
    if lengths:
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k = lengths
        assert cu_seqlens_q is not None, "lengths start with cu_seqlens_q"
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        max_q, max_k = (None if n == _NO_MAXIMUM else n for n in arguments[:2])
        varlen = make_varlen(q, k, cu_seqlens_q, cu_seqlens_k, max_q, max_k, seqused_q, seqused_k, op_call.read_lengths)
    call = Call(_params_of(op_call), varlen, Extras(*extras) if extras else NO_EXTRAS)
    return (q, k, v), op_call, call, select_backend(op_call.backend, q, call, v.shape[-1], sink)


def _forward(
    inputs: list[Tensor], sink: Tensor | None, lengths: list[Tensor | None], extras: list[Tensor | None], *arguments: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    (q, k, v), op_call, call, backend = _resolve(inputs, sink, lengths, extras, arguments)
    native = adding_sink(backend, sink)
    if native is not None and sink is not None and q.numel() and k.numel():
        partial = native.forward_with_sink(q, k, v, sink, call, op_call.want_lse)
        return partial.out, partial.lse, []
    partial = backend.forward(q, k, v, call, want_probs=op_call.want_probs)
    # FlashAttention-2 lays out like q, whatever its strides are; the operator promises a contiguous out.
    target = None if partial.out.is_contiguous() else torch.empty_like(partial.out, memory_format=torch.contiguous_format)
    # Rows behind the last document are the kernel's business, as in FlashAttention, but must not reach a sink.
    trusted = call.varlen is not None and not op_call.read_lengths and q.is_cuda and sink is not None
    ends = call.varlen.cu_seqlens_q if trusted and call.varlen is not None else None
    out, lse = merge([partial], sink, out=target, cu_seqlens_q=ends)
    if call.params.dropout_p == 0:
        return out, lse, []
    shape = _probs_shape(q, k, lengths, op_call, arguments[:2])
    if partial.dropout is None:  # no kernel ran on empty inputs
        return out, lse, [q.new_empty(2, dtype=torch.uint64), q.new_zeros(shape)]
    probs = partial.dropout.attn_probs
    if op_call.want_probs and tuple(probs.shape) != shape:  # a kernel may have been given a larger max_seqlen_k
        probs = probs[..., : shape[-2], : shape[-1]].contiguous()
    return out, lse, [partial.dropout.rng_state, probs if op_call.want_probs else q.new_empty(shape)]


def _backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout: list[Tensor],
    needs_dsink: bool,
    inputs: list[Tensor],
    sink: Tensor | None,
    lengths: list[Tensor | None],
    extras: list[Tensor | None],
    *arguments: Any,
) -> list[Tensor]:
    (q, k, v), op_call, call, backend = _resolve(inputs, sink, lengths, extras, arguments)
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = None if dlse is None else dlse.masked_fill(torch.isneginf(lse), 0.0)  # log 0 depends on nothing
    saved = Partial(out, lse, dropout=Dropout(*dropout) if dropout else None)
    into = None
    if len(inputs) < 3:
        written = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        into = Gradients(*split_inputs(written, op_call.num_heads_q), None)
    native, dsink = adding_sink(backend, sink), []
    if native is not None and sink is not None and q.numel() and k.numel():
        grads, native_dsink = native.backward_with_sink(dout, q, k, v, sink, saved, call, dlse, into)
        dsink = [native_dsink] if needs_dsink else []
    else:
        grads = backend.backward(dout, q, k, v, saved, call, dlse, into)
        if needs_dsink and sink is not None:
            dsink = [sink_gradient(sink, lse, grads.delta, out, dout, dlse).to(sink.dtype).contiguous()]
    if into is None:
        written = [x.contiguous() for x in (grads.dq, grads.dk, grads.dv)]
    return [*written, *dsink]


def _fake_forward(
    inputs: list[Tensor], sink: Tensor | None, lengths: list[Tensor | None], extras: list[Tensor | None], *arguments: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    op_call = OpCall(*arguments[2:])
    q, k, v = split_inputs(inputs, op_call.num_heads_q)
    *batch, rows, heads, _ = q.shape
    out = q.new_empty((*batch, rows, heads, v.shape[-1]), dtype=out_dtype(q.dtype))
    lse = q.new_empty((*batch, heads, rows), dtype=stat_dtype(q.dtype))
    if op_call.dropout_p == 0:
        return out, lse, []
    probs = q.new_empty(_probs_shape(q, k, lengths, op_call, arguments[:2]))
    return out, lse, [q.new_empty(2, dtype=torch.uint64), probs]


def _probs_shape(
    q: Tensor, k: Tensor, lengths: Sequence[Tensor | None], op_call: OpCall, maxima: tuple[int, int]
) -> tuple[int, ...]:
    """Of S_dmask: (batch or documents, heads, longest rows and keys rounded up to 128), or (0,) where it is not wanted."""
    if not op_call.want_probs:
        return (0,)
    sizes = maxima if lengths else (q.shape[-3], k.shape[-3])
    documents = lengths[0].shape[0] - 1 if lengths and lengths[0] is not None else q.shape[0]
    return (documents, q.shape[-2], -(-sizes[0] // 128) * 128, -(-sizes[1] // 128) * 128)


def _fake_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout: list[Tensor],
    needs_dsink: bool,
    inputs: list[Tensor],
    sink: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    like = [*inputs, sink] if needs_dsink and sink is not None else inputs
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]


_library = torch.library.Library("magi_sink_cp", "DEF")
_library.define(f"attention_forward{_FORWARD}", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(f"attention_forward.dropout{_FORWARD}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded))
_library.define(f"attention_backward{_BACKWARD}", tags=(torch.Tag.pt2_compliant_tag,))
for _name, _implementation, _fake in (
    ("attention_forward", _forward, _fake_forward),
    ("attention_forward.dropout", _forward, _fake_forward),
    ("attention_backward", _backward, _fake_backward),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _key)
    torch.library.register_fake(f"magi_sink_cp::{_name}", _fake, lib=_library)
_forward_op = torch.ops.magi_sink_cp.attention_forward
_backward_op = torch.ops.magi_sink_cp.attention_backward.default
