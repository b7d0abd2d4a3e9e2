"""The operators under cp_attention_with_sink, and their autograd.

``magi_sink_cp::cp_attention_forward`` and ``magi_sink_cp::cp_attention_backward`` are registered
with fake implementations and autograd. Dispatch modes and compilers see one opaque operator each,
so every checkpointing policy is right, and a policy that saves ``cp_attention_forward`` lets no key
travel a second time. A plan travels as its handle, so a compiled graph serves every plan.

The operators check less than the function does, as those of ops/attention.py. They communicate in
the order in which they run. As with functional collectives, every rank compiles the same program,
and so runs them in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from magi_sink_cp.dist.methods.base import CallOptions, Request
from magi_sink_cp.dist.plan import CPPlan, keep_plan, plan_of
from magi_sink_cp.dist.resolve import (
    FORWARD,
    agree_on_backward,
    agree_on_forward,
    check_tensors,
    make_call_options,
    requires_grad_of,
    resolve,
)
from magi_sink_cp.kernels.checks import as_flag, refuse_forward_mode
from magi_sink_cp.kernels.protocol import stat_dtype
from magi_sink_cp.ops.attention import is_watched, refuse_second_derivative
from magi_sink_cp.ops.schema import schema_of, split_fields

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor plan"
_OPTIONS = f"bool[] requires_grad, bool want_lse, {schema_of(CallOptions)}"
# number: int64 0-dim, which call of the plan this is; the backward's order is compared by it.
_FORWARD = f"({_TENSORS}, {_OPTIONS}) -> (Tensor out, Tensor lse, Tensor number)"
_BACKWARD = (
    "(Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, Tensor number, bool needs_dsink, "
    f"{_TENSORS}, {_OPTIONS}) -> Tensor[]"
)


def cp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    plan: CPPlan,
    want_lse: bool,
    always_compare: bool,
    options: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """(out, lse); differentiable in q, k, v and sink. ``options`` are make_call_options' arguments.

    Every rank of the group must call this. Errors are raised on every rank.
    """
    grads = requires_grad_of(q, k, v, sink)

    def make_request() -> Request:
        as_flag("return_lse", want_lse)
        return resolve(q, k, v, sink, plan, make_call_options(plan, *options), grads, want_lse)

    if not is_watched((q, k, v, sink)):
        request = agree_on_forward(plan, make_request, always_compare)
        return _CPAttention.apply(q, k, v, sink, plan, request, want_lse)
    try:  # before the dispatcher, whose errors the other ranks would not hear of
        as_flag("return_lse", want_lse)
        checked = make_call_options(plan, *options)
        if not torch.compiler.is_compiling():
            check_tensors(q, k, v, sink, plan, checked)
    except Exception as error:
        if not torch.compiler.is_compiling():
            plan.agreement.report_error(error, FORWARD, always_compare)
        raise
    out, lse, _ = _forward_op(q, k, v, sink, plan.handle, grads, want_lse, *checked)
    return out, lse


# --- Implementations ----------------------------------------------------------------------------


def _rows_of_samples(request: Request, x: Tensor) -> Tensor:
    """(B, T, …) → (B·T, …): the samples' rows back to back; (T, …) as it is."""
    return x if request.batch_size == 1 and x.dim() == 3 else x.flatten(0, 1)


def _columns_of_samples(lse: Tensor) -> Tensor:
    """(B, H, T) → (H, B·T); (H, T) as it is."""
    return lse if lse.dim() == 2 else lse.transpose(0, 1).flatten(1, 2)


def _clear_padding(request: Request, x: Tensor) -> Tensor:
    """x (B·T, …) with zeros on padding that stands between samples.

    Kernels read whole tiles, and what stands there could spread (kernels/existing.py). Padding at
    the end of the rows is in no tile.
    """
    if request.batch_size == 1 or not request.is_padded:
        return x
    return x.masked_fill(request.padding(x.device)[:, None, None], 0)


def _flat_sink(request: Request, sink: Tensor | None) -> Tensor | None:
    """The sink with its samples' rows back to back, and none on padding."""
    if sink is None or sink.dim() == 2:
        return sink
    sink = sink.flatten(0, 1) if sink.dim() == 4 else sink
    if not request.is_padded:
        return sink
    return sink.masked_fill(request.padding(sink.device)[:, None, None], float("-inf"))


def _forward(
    request: Request, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, want_lse: bool
) -> tuple[Tensor, Tensor]:
    """(out, lse) like the user's q, 0 on padding."""
    if q.dim() == 3 and not request.is_padded:
        return request.method.forward(request, q, k, v, sink, want_lse)
    flat_q, flat_k, flat_v = (
        _clear_padding(request, _rows_of_samples(request, x)) for x in (q, k, v)
    )
    flat_sink = _flat_sink(request, sink)
    out, lse = request.method.forward(request, flat_q, flat_k, flat_v, flat_sink, want_lse)
    if request.is_padded:  # the sink alone must not reach a loss on lse
        lse = lse.masked_fill(request.padding(q.device), 0.0)
    if q.dim() == 3:
        return out, lse
    batch = q.shape[:2]
    return out.unflatten(0, batch), lse.unflatten(1, batch).transpose(0, 1).contiguous()


def _backward(
    request: Request,
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs_dsink: bool,
) -> list[Tensor]:
    """dq, dk, dv, and dsink if it is needed."""
    dout = torch.zeros_like(out) if dout is None else dout
    if dlse is not None:
        dlse = dlse.masked_fill(torch.isneginf(lse), 0.0)  # log 0 depends on nothing
    method = request.method
    if q.dim() == 3 and not request.is_padded:
        *grads, dsink = method.backward(request, dout, dlse, q, k, v, sink, out, lse, needs_dsink)
        return grads if dsink is None else [*grads, dsink]
    flat_dout, flat_q, flat_k, flat_v = (
        _clear_padding(request, _rows_of_samples(request, x)) for x in (dout, q, k, v)
    )
    flat_out = _rows_of_samples(request, out)
    lse = _columns_of_samples(lse)
    dlse = None if dlse is None else _columns_of_samples(dlse)
    if request.is_padded:
        padding = request.padding(q.device)
        lse = lse.masked_fill(padding, float("inf"))  # kernels/dsink.py: no such row
        dlse = None if dlse is None else dlse.masked_fill(padding, 0.0)
    dq, dk, dv, dsink = method.backward(
        request, flat_dout, dlse, flat_q, flat_k, flat_v, _flat_sink(request, sink), flat_out, lse,
        needs_dsink,
    )  # fmt: skip
    pairs = ((dq, q), (dk, k), (dv, v))
    grads = [grad.view(x.shape) for grad, x in pairs]
    if dsink is not None and sink is not None:
        grads.append(dsink.view(sink.shape))
    return grads


def _forward_from_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    handle: Tensor,
    requires_grad: Sequence[bool],
    want_lse: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    plan, (options, _) = plan_of(handle), split_fields(CallOptions, rest)

    def make_request() -> Request:
        refuse_forward_mode("attention with sinks")
        return resolve(q, k, v, sink, plan, options, tuple(requires_grad), want_lse)

    request = agree_on_forward(plan, make_request, options.always_compare)
    out, lse = _forward(request, q, k, v, sink, want_lse)
    return out, lse, torch.tensor(next(plan.calls), dtype=torch.int64, device="cpu")


def _backward_from_op(
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    number: Tensor,
    needs_dsink: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    handle: Tensor,
    requires_grad: Sequence[bool],
    want_lse: bool,
    *rest: Any,
) -> list[Tensor]:
    plan, (options, _) = plan_of(handle), split_fields(CallOptions, rest)
    agree_on_backward(plan, int(number), options.always_compare)
    request = resolve(q, k, v, sink, plan, options, tuple(requires_grad), want_lse)
    return _backward(request, dout, dlse, q, k, v, sink, out, lse, needs_dsink)


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, handle: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *batch, rows, heads, _ = q.shape
    lse = q.new_empty((*batch, heads, rows), dtype=stat_dtype(q.dtype))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, lse, torch.empty((), dtype=torch.int64, device="cpu")


def _fake_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    number: Tensor,
    needs_dsink: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    like = [q, k, v, sink] if needs_dsink and sink is not None else [q, k, v]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]


# --- Autograd -----------------------------------------------------------------------------------


class _CPAttention(torch.autograd.Function):
    """The operators' autograd without the dispatcher, and with a request that is resolved once."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        plan: CPPlan,
        request: Request,
        want_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(request, q, k, v, sink, want_lse)
        ctx.save_for_backward(q, k, v, sink, out, lse)
        ctx.plan, ctx.request = plan, request
        ctx.number = next(plan.calls)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, sink, out, lse = ctx.saved_tensors  # read once: checkpointing hands them out once
        needs_dsink = ctx.needs_input_grad[3]
        request: Request = ctx.request
        if torch.is_grad_enabled():  # create_graph=True: a second derivative must raise
            number = torch.tensor(ctx.number, dtype=torch.int64, device="cpu")
            grads = _backward_op(
                dout, dlse, out, lse, number, needs_dsink, q, k, v, sink, ctx.plan.handle,
                list(request.requires_grad), request.want_lse, *request.options,
            )  # fmt: skip
        else:
            agree_on_backward(ctx.plan, ctx.number, request.options.always_compare)
            grads = _backward(request, dout, dlse, q, k, v, sink, out, lse, needs_dsink)
        return *grads, *(None,) * (7 - len(grads))


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, sink, handle, *ctx.rest = inputs
    keep_plan(ctx, handle)
    ctx.save_for_backward(q, k, v, sink, handle, *output)
    ctx.set_materialize_grads(False)


def _op_gradients(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, _number: Any
) -> tuple[Any, ...]:
    q, k, v, sink, handle, out, lse, number = ctx.saved_tensors
    needs_dsink = ctx.needs_input_grad[3]
    grads = _backward_op(
        dout, dlse, out, lse, number, needs_dsink, q, k, v, sink, handle, *ctx.rest
    )
    return *grads, *(None,) * (5 + len(ctx.rest) - len(grads))


_library = torch.library.Library("magi_sink_cp", "FRAGMENT")
for _name, _schema, _implementation, _fake in (
    ("cp_attention_forward", _FORWARD, _forward_from_op, _fake_forward),
    ("cp_attention_backward", _BACKWARD, _backward_from_op, _fake_backward),
):
    _library.define(f"{_name}{_schema}", tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _key)
    torch.library.register_fake(f"magi_sink_cp::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "magi_sink_cp::cp_attention_forward", _op_gradients, setup_context=_set_up, lib=_library
)
torch.library.register_autograd(
    "magi_sink_cp::cp_attention_backward", refuse_second_derivative, lib=_library
)
_forward_op = torch.ops.magi_sink_cp.cp_attention_forward.default
_backward_op = torch.ops.magi_sink_cp.cp_attention_backward.default
