"""The operators under every single-device function, and their autograd.

``magi_sink_cp::attention_forward`` and ``magi_sink_cp::attention_backward`` are registered with
fake (meta) implementations and autograd. So torch.compile, torch.export, selective activation
checkpointing and dispatch modes see one opaque operator each. The overload ``dropout`` is the same
with the tag that keeps a recomputation from drawing other random settings.

The operators check less than the functions that call them: call those.

``inputs`` is one of ``[q, k, v]``; ``[q, kv]`` with kv (…, 2, H_kv, D); ``[qkv]`` with qkv
(…, 3, H, D), or (…, H + 2 H_kv, D) with the number of query heads given. Gradients come back in the
same layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from magi_sink_cp.kernels.backends.fa4 import Fa4Backend
from magi_sink_cp.kernels.backends.registry import BackendPolicy, adding_sink, select_backend
from magi_sink_cp.kernels.checks import PLAIN_TENSORS, as_flag, refuse_forward_mode
from magi_sink_cp.kernels.dsink import sink_gradient
from magi_sink_cp.kernels.existing import clear_columns, missing_rows
from magi_sink_cp.kernels.lengths import Lengths, make_varlen
from magi_sink_cp.kernels.merge import merge
from magi_sink_cp.kernels.protocol import (
    NO_EXTRAS,
    AttentionParams,
    Backend,
    Dropout,
    Extras,
    Gradients,
    KernelRequest,
    Partial,
    out_dtype,
    stat_dtype,
)
from magi_sink_cp.ops.schema import schema_of, split_fields


class OperatorOptions(NamedTuple):
    """What the operators are told besides tensors, :class:`BackendPolicy` and AttentionParams.

    Attributes:
        num_heads_q: query heads of a (…, H + 2 H_kv, D) qkv; 0 for every other layout.
        read_lengths: check what CUDA offsets hold.
        want_lse: lse is returned to the user. If False, it need only be right for the backward.
        want_probs: also return FlashAttention-2's S_dmask.
    """

    num_heads_q: int = 0
    read_lengths: bool = False
    want_lse: bool = False
    want_probs: bool = False


class Settings(NamedTuple):
    """All arguments of the operators that are not tensors, in the order of the schema."""

    max_seqlen_q: int
    max_seqlen_k: int
    policy: BackendPolicy
    options: OperatorOptions
    params: AttentionParams

    def flat(self) -> tuple[Any, ...]:
        """As the operators take them."""
        return *self[:2], *self.policy, *self.options, *self.params

    @staticmethod
    def of(flat: tuple[Any, ...]) -> Settings:
        """The inverse of :meth:`flat`."""
        policy, rest = split_fields(BackendPolicy, flat[2:])
        options, rest = split_fields(OperatorOptions, rest)
        params, _ = split_fields(AttentionParams, rest)
        return Settings(flat[0], flat[1], policy, options, params)


# lengths: [], or cu_seqlens_q, cu_seqlens_k (None: the same one), seqused_q, seqused_k.
# extras: [], or the fields of Extras.
_TENSORS = "Tensor[] inputs, Tensor? sink, Tensor?[] lengths, Tensor?[] extras"
_SETTINGS = (
    "SymInt max_seqlen_q, SymInt max_seqlen_k, "
    f"{schema_of(BackendPolicy, OperatorOptions, AttentionParams)}"
)
_FORWARD = f"({_TENSORS}, {_SETTINGS}) -> (Tensor out, Tensor lse, Tensor[] dropout)"
_BACKWARD = (
    "(Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, Tensor[] dropout, bool needs_dsink, "
    f"{_TENSORS}, {_SETTINGS}) -> Tensor[]"
)
_NO_MAXIMUM = -1  # stands for a max_seqlen of None


def attention(
    inputs: Sequence[Tensor],
    sink: Tensor | None,
    policy: BackendPolicy,
    params: AttentionParams,
    options: OperatorOptions,
    lengths: Lengths | None = None,
    extras: Extras = NO_EXTRAS,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, lse, S_dmask or None) of checked arguments.

    Differentiable in ``inputs`` and ``sink``.
    """
    as_flag("return_lse and return_attn_probs", options.want_lse)
    longest_q = longest_k = _NO_MAXIMUM
    length_tensors: list[Tensor | None] = []
    if lengths is not None:
        longest_q = _NO_MAXIMUM if lengths.max_seqlen_q is None else lengths.max_seqlen_q
        longest_k = _NO_MAXIMUM if lengths.max_seqlen_k is None else lengths.max_seqlen_k
        same = lengths.cu_seqlens_k is lengths.cu_seqlens_q
        offsets_k = None if same else lengths.cu_seqlens_k
        length_tensors = [lengths.cu_seqlens_q, offsets_k, lengths.seqused_q, lengths.seqused_k]
    extra_tensors = [] if extras is NO_EXTRAS else list(vars(extras).values())
    settings = Settings(longest_q, longest_k, policy, options, params)
    if not is_watched((*inputs, sink, *length_tensors, *extra_tensors)):
        result = _Attention.apply(
            settings, len(inputs), len(length_tensors),
            *inputs, sink, *length_tensors, *extra_tensors,
        )  # fmt: skip
        out, lse, dropout = result[0], result[1], result[2:]
    else:
        if torch.compiler.is_compiling():  # which takes no tensor twice
            inputs, length_tensors = _distinct(inputs), _distinct(length_tensors)
        run = _forward_op.dropout if params.dropout_p > 0 else _forward_op.default
        out, lse, dropout = run(inputs, sink, length_tensors, extra_tensors, *settings.flat())
    return out, lse, dropout[1] if len(dropout) else None


def is_watched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether something must see the operator: a compiler, a dispatch mode, a tensor subclass.

    If not, its implementation is called directly: the dispatcher takes 15 µs to hand 25 arguments
    from Python to Python.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    return any(x is not None and (type(x) not in PLAIN_TENSORS or x.is_meta) for x in tensors)


def _distinct(tensors: Sequence[Any]) -> list[Any]:
    """tensors, where one that comes again is a view of itself."""
    distinct: list[Any] = []
    for x in tensors:
        again = x is not None and any(x is other for other in distinct)
        distinct.append(x.view_as(x) if again else x)
    return distinct


def split_inputs(inputs: Sequence[Tensor], num_heads_q: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of ``inputs`` in one of the layouts above."""
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


# --- Implementations ----------------------------------------------------------------------------


def _resolve(
    inputs: Sequence[Tensor],
    sink: Tensor | None,
    lengths: Sequence[Tensor | None],
    extras: Sequence[Tensor | None],
    settings: Settings,
) -> tuple[tuple[Tensor, Tensor, Tensor], KernelRequest, Backend]:
    """q, k and v, what the kernels are asked for, and the backend that is."""
    q, k, v = split_inputs(inputs, settings.options.num_heads_q)
    varlen = None
    if lengths:
        offsets_q, offsets_k, seqused_q, seqused_k = lengths
        assert offsets_q is not None, "lengths start with cu_seqlens_q"
        offsets_k = offsets_q if offsets_k is None else offsets_k
        max_q, max_k = (None if n == _NO_MAXIMUM else n for n in settings[:2])
        read = settings.options.read_lengths
        varlen = make_varlen(q, k, offsets_q, offsets_k, max_q, max_k, seqused_q, seqused_k, read)
    request = KernelRequest(settings.params, varlen, Extras(*extras) if extras else NO_EXTRAS)
    backend = select_backend(settings.policy, q, request, v.shape[-1], sink)
    return (q, k, v), request, backend


def _backend_adding_sink(
    backend: Backend, sink: Tensor | None, q: Tensor, k: Tensor, request: KernelRequest
) -> Fa4Backend | None:
    """``backend`` if its kernels add this sink to this call. They do not know of missing rows."""
    if request.varlen is not None and request.varlen.seqused_q is not None:
        return None
    return adding_sink(backend, sink) if q.numel() and k.numel() else None


def _unread_offsets(q: Tensor, request: KernelRequest, settings: Settings) -> Tensor | None:
    """cu_seqlens_q if rows may stand behind the last document without the host's knowledge."""
    if request.varlen is None or settings.options.read_lengths or not q.is_cuda:
        return None
    return request.varlen.cu_seqlens_q


def _forward(
    inputs: Sequence[Tensor],
    sink: Tensor | None,
    lengths: Sequence[Tensor | None],
    extras: Sequence[Tensor | None],
    settings: Settings,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    (q, k, v), request, backend = _resolve(inputs, sink, lengths, extras, settings)
    want_lse, want_probs = settings.options.want_lse, settings.options.want_probs
    native = _backend_adding_sink(backend, sink, q, k, request)
    if native is not None and sink is not None:
        partial = native.forward_with_sink(q, k, v, sink, request, want_lse)
        return partial.out, partial.lse, []
    partial = backend.forward(q, k, v, request, want_probs=want_probs)
    no_row = missing_rows(request.varlen, q.shape[0])
    if no_row is not None and sink is not None and sink.dim() == 3:
        unusable = no_row[:, None, None] & ~sink.isfinite()
        sink = sink.masked_fill(unusable, float("-inf"))
    target = None
    if not partial.out.is_contiguous():  # FlashAttention-2 lays out like q, whatever its strides
        target = torch.empty_like(partial.out, memory_format=torch.contiguous_format)
    ends = None if sink is None else _unread_offsets(q, request, settings)
    out, lse = merge([partial], sink, out=target, cu_seqlens_q=ends)
    if request.params.dropout_p == 0:
        return out, lse, []
    shape = _probs_shape(q, k, lengths, settings)
    if partial.dropout is None:  # no kernel ran on empty inputs
        return out, lse, [q.new_empty(2, dtype=torch.uint64), q.new_zeros(shape)]
    probs = partial.dropout.attn_probs
    if not want_probs:
        probs = q.new_empty(shape)
    elif tuple(probs.shape) != shape:  # a kernel may have been given a larger max_seqlen_k
        probs = probs[..., : shape[-2], : shape[-1]].contiguous()
    return out, lse, [partial.dropout.rng_state, probs]


def _backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout: Sequence[Tensor],
    needs_dsink: bool,
    inputs: Sequence[Tensor],
    sink: Tensor | None,
    lengths: Sequence[Tensor | None],
    extras: Sequence[Tensor | None],
    settings: Settings,
) -> list[Tensor]:
    (q, k, v), request, backend = _resolve(inputs, sink, lengths, extras, settings)
    dout = torch.zeros_like(out) if dout is None else dout
    no_row = missing_rows(request.varlen, q.shape[0])
    ends = _unread_offsets(q, request, settings)
    if dlse is not None:
        dlse = dlse.masked_fill(torch.isneginf(lse), 0.0)  # log 0 depends on nothing
        dlse = clear_columns(dlse, no_row)
        if ends is not None:
            dlse = clear_columns(dlse, torch.arange(dlse.shape[-1], device=q.device) >= ends[-1])
    saved = Partial(out, lse, dropout=Dropout(*dropout) if dropout else None)
    into = None
    if len(inputs) < 3:
        written = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        into = Gradients(*split_inputs(written, settings.options.num_heads_q), None)
    native, dsink = _backend_adding_sink(backend, sink, q, k, request), []
    if native is not None and sink is not None:
        grads, native_dsink = native.backward_with_sink(
            dout, q, k, v, sink, saved, request, dlse, into
        )
        dsink = [native_dsink] if needs_dsink else []
    else:
        grads = backend.backward(dout, q, k, v, saved, request, dlse, into)
        if needs_dsink and sink is not None:
            final_lse = clear_columns(lse, no_row, float("inf"))  # dsink.py: no such row
            grad = sink_gradient(sink, final_lse, grads.delta, out, dout, dlse, ends)
            dsink = [grad.to(sink.dtype).contiguous()]
    if into is None:
        written = [x.contiguous() for x in (grads.dq, grads.dk, grads.dv)]
    return [*written, *dsink]


def _fake_forward(
    inputs: Sequence[Tensor],
    sink: Tensor | None,
    lengths: Sequence[Tensor | None],
    extras: Sequence[Tensor | None],
    settings: Settings,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    q, k, v = split_inputs(inputs, settings.options.num_heads_q)
    *batch, rows, heads, _ = q.shape
    out = q.new_empty((*batch, rows, heads, v.shape[-1]), dtype=out_dtype(q.dtype))
    lse = q.new_empty((*batch, heads, rows), dtype=stat_dtype(q.dtype))
    if settings.params.dropout_p == 0:
        return out, lse, []
    probs = q.new_empty(_probs_shape(q, k, lengths, settings))
    return out, lse, [q.new_empty(2, dtype=torch.uint64), probs]


def _fake_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout: Sequence[Tensor],
    needs_dsink: bool,
    inputs: Sequence[Tensor],
    sink: Tensor | None,
    lengths: Sequence[Tensor | None],
    extras: Sequence[Tensor | None],
    settings: Settings,
) -> list[Tensor]:
    like = [*inputs, sink] if needs_dsink and sink is not None else inputs
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]


def _probs_shape(
    q: Tensor, k: Tensor, lengths: Sequence[Tensor | None], settings: Settings
) -> tuple[int, ...]:
    """(B or documents, H, rows and keys rounded up to 128), or (0,) where S_dmask is not wanted."""
    if not settings.options.want_probs:
        return (0,)
    rows, keys, documents = q.shape[-3], k.shape[-3], q.shape[0]
    if lengths and lengths[0] is not None:
        rows, keys, documents = *settings[:2], lengths[0].shape[0] - 1
    return documents, q.shape[-2], -(-rows // 128) * 128, -(-keys // 128) * 128


# --- Autograd -----------------------------------------------------------------------------------


def _save(
    ctx: Any,
    num_inputs: int,
    num_lengths: int,
    settings: Settings,
    tensors: Sequence[Tensor | None],
    results: Sequence[Tensor],
) -> None:
    """Keep what backward needs.

    ``tensors`` are inputs, sink, lengths and extras; ``results`` are out, lse and dropout.
    """
    ctx.save_for_backward(*tensors, *results)
    ctx.counts = num_inputs, num_lengths, len(tensors)
    ctx.settings = settings
    ctx.set_materialize_grads(False)
    if len(results) > 2:
        ctx.mark_non_differentiable(*results[2:])


def _gradients(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, needs_dsink: bool
) -> tuple[list[Tensor], Tensor | None]:
    """The gradients of the inputs, and of the sink."""
    num_inputs, num_lengths, num_tensors = ctx.counts
    saved = ctx.saved_tensors  # read once: checkpointing hands them out once
    tensors, (out, lse, *dropout) = saved[:num_tensors], saved[num_tensors:]
    inputs, sink, rest = tensors[:num_inputs], tensors[num_inputs], tensors[num_inputs + 1 :]
    lengths, extras = list(rest[:num_lengths]), list(rest[num_lengths:])
    # With create_graph=True the operator's autograd node raises when a second derivative is asked
    # for.
    watched = torch.is_grad_enabled() or is_watched((dout, dlse, *tensors))
    arguments = dout, dlse, out, lse, dropout, needs_dsink, list(inputs), sink, lengths, extras
    if watched:
        grads = _backward_op(*arguments, *ctx.settings.flat())
    else:
        grads = _backward(*arguments, ctx.settings)
    return grads[:num_inputs], grads[num_inputs] if len(grads) > num_inputs else None


class _Attention(torch.autograd.Function):
    """The operators' autograd without the dispatcher.

    forward: partial of all keys → merge with the sink, in place.
    backward: the kernel's own, then dsink from its delta.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, num_inputs: int, num_lengths: int, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        behind = num_inputs + 1 + num_lengths
        inputs, sink = tensors[:num_inputs], tensors[num_inputs]
        lengths, extras = tensors[num_inputs + 1 : behind], tensors[behind:]
        out, lse, dropout = _forward(inputs, sink, lengths, extras, settings)  # type: ignore[arg-type]
        _save(ctx, num_inputs, num_lengths, settings, tensors, (out, lse, *dropout))
        return out, lse, *dropout

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        num_inputs, _num_lengths, num_tensors = ctx.counts
        needs_dsink = ctx.needs_input_grad[3 + num_inputs]
        grads, dsink = _gradients(ctx, dout, dlse, needs_dsink)
        return None, None, None, *grads, dsink, *(None,) * (num_tensors - num_inputs - 1)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    tensors, sink, lengths, extras, *flat = inputs
    out, lse, dropout = output
    # torch.library takes a list that holds a None for one argument, others for as many as it holds.
    ctx.no_gradients = [
        None if any(x is None for x in list_) else [None] * len(list_)
        for list_ in (lengths, extras)
    ]
    every = (*tensors, sink, *lengths, *extras)
    _save(ctx, len(tensors), len(lengths), Settings.of(tuple(flat)), every, (out, lse, *dropout))


def _op_backward(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, _dropout: Any
) -> tuple[Any, ...]:
    grads, dsink = _gradients(ctx, dout, dlse, ctx.needs_input_grad[1])
    settings = (None,) * len(ctx.settings.flat())
    return list(grads), dsink, *ctx.no_gradients, *settings


def refuse_second_derivative(ctx: Any, *grads: Any) -> NoReturn:
    """The autograd of every backward operator."""
    raise RuntimeError(
        "attention with sinks has no second derivative (hessian, hvp, gradient penalty): its "
        "gradients cannot be differentiated again. Detach them, or compute the term that needs "
        "them with plain torch operations"
    )


def _registered(implementation: Callable[..., Any], num_tensors: int) -> Callable[..., Any]:
    """The implementation as the dispatcher calls it: with the fields of Settings one by one."""

    def call(*arguments: Any) -> Any:
        refuse_forward_mode("attention with sinks")
        return implementation(*arguments[:num_tensors], Settings.of(arguments[num_tensors:]))

    return call


library = torch.library.Library("magi_sink_cp", "DEF")
_COMPLIANT = torch.Tag.pt2_compliant_tag
library.define(f"attention_forward{_FORWARD}", tags=(_COMPLIANT,))
library.define(
    f"attention_forward.dropout{_FORWARD}", tags=(_COMPLIANT, torch.Tag.nondeterministic_seeded)
)
library.define(f"attention_backward{_BACKWARD}", tags=(_COMPLIANT,))
for _name, _implementation, _fake, _num_tensors in (
    ("attention_forward", _forward, _fake_forward, 4),
    ("attention_forward.dropout", _forward, _fake_forward, 4),
    ("attention_backward", _backward, _fake_backward, 10),
):
    for _key in ("CPU", "CUDA"):
        library.impl(_name, _registered(_implementation, _num_tensors), _key)
    _fake_call = _registered(_fake, _num_tensors)
    torch.library.register_fake(f"magi_sink_cp::{_name}", _fake_call, lib=library)
for _overload in ("attention_forward", "attention_forward.dropout"):
    torch.library.register_autograd(
        f"magi_sink_cp::{_overload}", _op_backward, setup_context=_set_up, lib=library
    )
torch.library.register_autograd(
    "magi_sink_cp::attention_backward", refuse_second_derivative, lib=library
)
_forward_op = torch.ops.magi_sink_cp.attention_forward
_backward_op = torch.ops.magi_sink_cp.attention_backward.default
