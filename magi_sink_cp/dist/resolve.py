"""From the arguments of cp_attention_with_sink to a Request.

Checks, choice of method, one cache.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from magi_sink_cp.dist.guard.agreement import Signature
from magi_sink_cp.dist.methods.base import CallOptions, CheckedCall, Request
from magi_sink_cp.dist.methods.choose import choose_method
from magi_sink_cp.dist.plan import CPPlan
from magi_sink_cp.dist.planning.mask import FULL
from magi_sink_cp.kernels.backends.registry import check_backend_name
from magi_sink_cp.kernels.caching import BoundedCache
from magi_sink_cp.kernels.checks import (
    as_int,
    as_sink,
    check_qkv,
    check_sink_layout,
    make_params,
    window_limits,
)
from magi_sink_cp.kernels.protocol import stat_dtype

DSINK_REDUCTIONS = ("none", "sum", "avg")
CHECKS = ("auto", "always")
FORWARD = "cp_attention_with_sink"
BACKWARD = "backward of cp_attention_with_sink"

# Each plan's requests, by what was checked: layers and steps repeat, and checks take time.
_requests: weakref.WeakKeyDictionary[CPPlan, BoundedCache[tuple[object, ...], Request]] = (
    weakref.WeakKeyDictionary()
)


def make_call_options(
    plan: CPPlan,
    sink_layout: str,
    softmax_scale: float | None,
    causal: bool | None,
    window_size: Sequence[int | None],
    softcap: float,
    deterministic: bool,
    dsink_reduce: str,
    overlap_degree: int | str,
    grad_reduce_dtype: torch.dtype | None,
    checks: str,
    backend: str,
    head_dim_v: int | None,
) -> CallOptions:
    """The checked :class:`CallOptions`; what depends on tensors is checked by :func:`resolve`.

    Raises:
        TypeError, ValueError: an option is invalid.
    """
    arguments = (
        plan.has_slices, sink_layout, softmax_scale, causal, *window_limits(window_size), softcap,
        deterministic, dsink_reduce, overlap_degree, grad_reduce_dtype, checks, backend, head_dim_v,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return _check_options(*arguments)
    try:
        return _checked_options(*arguments)
    except TypeError:  # a wrong type, or something that cannot be hashed
        return _check_options(*arguments)


def _check_options(
    has_slices: bool,
    sink_layout: str,
    softmax_scale: float | None,
    causal: bool | None,
    left: int,
    right: int,
    softcap: float,
    deterministic: bool,
    dsink_reduce: str,
    overlap_degree: int | str,
    grad_reduce_dtype: torch.dtype | None,
    checks: str,
    backend: str,
    head_dim_v: int | None,
) -> CallOptions:
    check_backend_name(backend)
    if has_slices and (causal is not None or (left, right) != FULL):
        raise ValueError(
            "causal and window_size must be left out with a plan of mask_slices, which are the "
            f"whole mask, got causal={causal!r} and window_size={(left, right)}"
        )
    if causal is None:
        causal = not has_slices
    for name, value, allowed in (
        ("dsink_reduce", dsink_reduce, DSINK_REDUCTIONS),
        ("checks", checks, CHECKS),
    ):
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    check_sink_layout(sink_layout)
    if dsink_reduce != "none" and sink_layout == "ssh":
        raise ValueError(
            f"dsink_reduce={dsink_reduce!r} is for sink_layout='sh'; the rows of an 'ssh' sink "
            "live on one rank each"
        )
    degree = None
    if not isinstance(overlap_degree, str) or overlap_degree != "auto":
        degree = as_int(overlap_degree)
        if degree is None or degree < 0:
            raise ValueError(
                f"overlap_degree must be an int >= 0 or 'auto', got {overlap_degree!r}"
            )
    if grad_reduce_dtype is not None and not isinstance(grad_reduce_dtype, torch.dtype):
        raise TypeError(f"grad_reduce_dtype must be a dtype or None, got {grad_reduce_dtype!r}")
    params = make_params(1, softmax_scale, causal, (left, right), softcap, deterministic)
    return CallOptions(
        sink_layout=sink_layout,
        softmax_scale=None if softmax_scale is None else params.softmax_scale,
        window_size=params.window_size,
        softcap=params.softcap,
        deterministic=params.deterministic,
        dsink_reduce=dsink_reduce,
        overlap_degree=degree,
        grad_reduce_dtype=grad_reduce_dtype,
        always_compare=checks == "always",
        backend=backend,
        head_dim_v=head_dim_v,
    )


# typed: 1, 1.0 and True are equal, and are not all allowed.
_checked_options = functools.lru_cache(maxsize=1024, typed=True)(_check_options)


def requires_grad_of(*tensors: Tensor | None) -> tuple[bool, ...]:
    """For each tensor, whether a gradient will be asked for."""
    if not torch.is_grad_enabled():
        return (False,) * len(tensors)
    return tuple([getattr(x, "requires_grad", False) for x in tensors])


def resolve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    plan: CPPlan,
    options: CallOptions,
    requires_grad: tuple[bool, ...],
    want_lse: bool,
) -> Request:
    """The request for a call, found again where one like it was resolved before.

    Args:
        sink: with two dimensions or more, as :func:`~magi_sink_cp.kernels.checks.as_sink` gives it.
        requires_grad: of q, k, v and sink.
        want_lse: the user gets lse.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    tensors = (q, k, v) if sink is None else (q, k, v, sink)
    try:
        traits = tuple((type(x), x.shape, x.dtype, x.layout, x.device) for x in tensors)
    except AttributeError:  # not a tensor
        return _check_call(q, k, v, sink, plan, options, requires_grad, want_lse)
    requests = _requests.get(plan)
    if requests is None:
        requests = _requests[plan] = BoundedCache(256)
    key = (traits, options, requires_grad, want_lse)
    request = requests.get(key)
    if request is None:
        request = _check_call(q, k, v, sink, plan, options, requires_grad, want_lse)
        requests[key] = request
    return request


def _check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    plan: CPPlan,
    options: CallOptions,
    requires_grad: tuple[bool, ...],
    want_lse: bool,
) -> Request:
    sink = check_tensors(q, k, v, sink, plan, options)
    exact = stat_dtype(q.dtype)
    if options.grad_reduce_dtype not in (None, exact, q.dtype):
        raise ValueError(
            f"grad_reduce_dtype must be {exact} or the dtype of k, {q.dtype}, got "
            f"{options.grad_reduce_dtype!r}"
        )
    batch_size = 1 if q.dim() == 3 else q.shape[0]
    params = make_params(
        q.shape[-1], options.softmax_scale, False, options.window_size, options.softcap,
        options.deterministic,
    )  # fmt: skip
    call = CheckedCall(q, k, v, sink, params, options, batch_size, want_lse)
    method = choose_method(plan)
    state = method.resolve(plan, call)
    grad_reduce_dtype = options.grad_reduce_dtype or exact
    # Token counts are the plan's, which its ranks have compared already.
    record: dict[str, object] = {
        "head_dim of v": options.head_dim_v or v.shape[-1],
        "batch, heads, heads_kv, head_dim": [batch_size, q.shape[-2], k.shape[-2], q.shape[-1]],
        "dtype": str(q.dtype),
        "device type": q.device.type,
        "sink (s_sink, dtype)": None if sink is None else [sink.shape[-2], str(sink.dtype)],
        "sink_layout": options.sink_layout,
        "mask and scores": repr(params),
        "dsink_reduce": options.dsink_reduce,
        "grad_reduce_dtype": str(grad_reduce_dtype),
        "requires_grad of q, k, v, sink": list(requires_grad),
        "method": method.name,
        **state.record,
    }
    return Request(
        method=method,
        state=state,
        group=plan.group_ref,
        cp_size=plan.cp_size,
        local_tokens=plan.local_tokens,
        real_tokens=plan.real_tokens,
        batch_size=batch_size,
        params=params,
        options=options,
        requires_grad=requires_grad,
        want_lse=want_lse,
        grad_reduce_dtype=grad_reduce_dtype,
        signature=Signature(FORWARD, record),
    )


def check_tensors(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, plan: CPPlan, options: CallOptions
) -> Tensor | None:
    """Check the tensors against each other and the plan; returns the checked sink."""
    if isinstance(q, Tensor) and q.dim() == 4:
        check_qkv(q, k, v, 4, "(batch, plan.local_tokens, heads, head_dim)")
    else:
        check_qkv(
            q, k, v, 3,
            "(plan.local_tokens, heads, head_dim) or (batch, plan.local_tokens, heads, head_dim)",
        )  # fmt: skip
    for name, x in (("q", q), ("k", k)):
        if x.shape[-3] != plan.local_tokens:
            raise ValueError(
                f"{name} must have the plan's local_tokens, {plan.local_tokens}, as its tokens, "
                f"got {tuple(x.shape)}"
            )
    sink = as_sink(sink, options.sink_layout, q)
    if options.dsink_reduce != "none" and sink is None:
        raise ValueError(
            f"dsink_reduce={options.dsink_reduce!r} reduces the gradient of a sink, and sink is "
            "None"
        )
    if plan.keys_travel and q.device != plan.device:
        raise ValueError(f"q, k and v must be on the plan's device, {plan.device}, got {q.device}")
    return sink


def agree_on_forward(plan: CPPlan, make_request: Callable[[], Request], always: bool) -> Request:
    """Make the request and compare it over the ranks.

    Raises:
        TypeError, ValueError: on every rank, if an argument is invalid on one or the ranks differ.
    """
    try:
        if plan.keys_travel:
            plan.check_current_device()
        request = make_request()
    except Exception as error:
        plan.agreement.report_error(error, FORWARD, always)
        raise
    plan.agreement.compare(request.signature, FORWARD, always)
    plan.agreement.backwards_to_come += any(request.requires_grad)
    return request


def agree_on_backward(plan: CPPlan, number: int, always: bool) -> None:
    """Raise on every rank if the ranks run the backwards of a plan's calls in different orders.

    On GPUs this is compared only with checks="always"; else what forward compares late is read.
    """
    if plan.agreement.compares_always(always):
        record = {"number of the forward call whose backward this is": number}
        plan.agreement.compare(Signature(BACKWARD, record), BACKWARD, True)
    else:
        plan.agreement.read_late()
