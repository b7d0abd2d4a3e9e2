"""The ``fa2`` backend: the flash_attn package, 2.7 or 2.8.

Beyond PyTorch's own copy it has softcap, ALiBi and paged keys.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from magi_sink_cp.kernels.backends.flash import (
    NoLseGradientBackend,
    check_flash_2_window,
    flash_2_lse,
    flash_2_maxima,
    kernel_ready,
    mask_and_scores,
    missing_sm_80,
    new_gradients,
    normalise_empty_rows,
    why_unusable,
)
from magi_sink_cp.kernels.protocol import Dropout, Gradients, KernelRequest, NotUsableError, Partial

_MODULE = "flash_attn.flash_attn_interface"
_VERSIONS = ("2.7", "2.8")
_DENSE_ARGUMENTS = (
    "dropout_p",
    "softmax_scale",
    "causal",
    "window_size_left",
    "window_size_right",
    "softcap",
    "alibi_slopes",
)
_VARLEN_ARGUMENTS = (
    *_DENSE_ARGUMENTS,
    "cu_seqlens_q",
    "cu_seqlens_k",
    "max_seqlen_q",
    "max_seqlen_k",
)


@dataclass(frozen=True)
class _Library:
    """The functions of flash_attn.flash_attn_interface that launch kernels."""

    version: str
    forward: Any
    varlen_forward: Any
    backward: Any
    varlen_backward: Any


class Fa2Backend(NoLseGradientBackend):
    """flash_attn's kernels. They report lse = +inf for rows without a key: -inf here."""

    name = "fa2"
    features = frozenset({"softcap", "deterministic", "dropout_p", "alibi_slopes", "block_table"})

    def unavailable(self) -> str | None:
        return missing_sm_80() or why_unusable(_library)

    def unsupported(
        self, q: Tensor, request: KernelRequest, head_dim_v: int | None = None
    ) -> str | None:
        if request.params.softcap > 0 and request.params.dropout_p > 0:
            return (
                f"it has softcap or dropout, not both; got softcap={request.params.softcap} "
                f"and dropout_p={request.params.dropout_p}"
            )
        return super().unsupported(q, request, head_dim_v)

    def describe(self) -> str:
        return f"fa2 (flash_attn {_library().version})"

    def _forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        request: KernelRequest,
        out: Tensor | None,
        want_probs: bool,
    ) -> Partial:
        check_flash_2_window(q, k, request)
        library, arguments = _library(), _common(request) | {"return_softmax": want_probs}
        q, k, v = (kernel_ready(x) for x in (q, k, v))
        if request.varlen is None:
            result, lse, attn_probs, rng_state = library.forward(q, k, v, **arguments)
        else:
            result, lse, attn_probs, rng_state = library.varlen_forward(
                q, k, v, **arguments, block_table=request.extras.block_table
            )
        dropout = None
        if request.params.dropout_p > 0:
            # int64 here, uint64 in PyTorch's own: the operator promises the latter.
            dropout = Dropout(
                rng_state.view(torch.uint64), q.new_empty(0) if attn_probs is None else attn_probs
            )
        return Partial(result, normalise_empty_rows(lse), dropout=dropout)

    def _kernel_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        saved: Partial,
        request: KernelRequest,
        into: Gradients | None,
    ) -> Gradients:
        library = _library()
        dq, dk, dv = new_gradients(q, k, v) if into is None else (into.dq, into.dk, into.dv)
        rng_state = None if saved.dropout is None else saved.dropout.rng_state.view(torch.int64)
        backward = library.backward if request.varlen is None else library.varlen_backward
        backward(
            dout, q, k, v, saved.out, flash_2_lse(saved.lse), dq=dq, dk=dk, dv=dv,
            deterministic=request.params.deterministic, rng_state=rng_state, **_common(request),
        )  # fmt: skip
        return Gradients(dq, dk, dv, None)


def is_installed() -> bool:
    """Whether FlashAttention-2 is there, usable or not.

    FlashAttention-4 alone also answers to ``import flash_attn``.
    """
    try:
        return (
            importlib.util.find_spec("flash_attn") is not None
            and importlib.util.find_spec(_MODULE) is not None
        )
    except Exception:  # flash_attn/__init__.py is there and does not load, whatever it raises
        return True


def _common(request: KernelRequest) -> dict[str, Any]:
    arguments = mask_and_scores(request) | {
        "dropout_p": request.params.dropout_p,
        "causal": request.params.causal,
        "alibi_slopes": request.extras.alibi_slopes,
    }
    if request.varlen is not None:
        max_q, max_k = flash_2_maxima(request.varlen, request.params.window_size)
        arguments |= {
            "cu_seqlens_q": request.varlen.cu_seqlens_q,
            "cu_seqlens_k": request.varlen.cu_seqlens_k,
            "max_seqlen_q": max_q,
            "max_seqlen_k": max_k,
        }
    return arguments


@functools.cache
def _library() -> _Library:
    """Find and load the functions once a process, or raise NotUsableError."""
    if not is_installed():
        raise NotUsableError(
            "flash_attn 2.7 or 2.8 is not installed (a flash_attn that holds FlashAttention-4 "
            "alone does not count); "
            "`pip install flash-attn --no-build-isolation`"
        )
    try:
        module = importlib.import_module(_MODULE)
        version = importlib.import_module("flash_attn").__version__
    except Exception as error:  # whatever a broken installation raises, it is the reason
        raise NotUsableError(f"flash_attn is installed but does not load: {error}") from error
    if not version.startswith(_VERSIONS):
        raise NotUsableError(
            f"flash_attn {' and '.join(_VERSIONS)} are supported, and {version} is installed"
        )
    names = (
        "_flash_attn_forward",
        "_flash_attn_varlen_forward",
        "_flash_attn_backward",
        "_flash_attn_varlen_backward",
    )
    functions = [
        _operator(module, name, _VARLEN_ARGUMENTS if "varlen" in name else _DENSE_ARGUMENTS)
        for name in names
    ]
    return _Library(version, *functions)


def _operator(module: Any, name: str, needed: tuple[str, ...]) -> Any:
    """A function of the package, checked to take the arguments that it will be given."""
    function = getattr(module, name, None)
    known = (
        ()
        if function is None
        else inspect.signature(getattr(function, "_init_fn", function)).parameters
    )
    if missing := [argument for argument in needed if argument not in known]:
        raise NotUsableError(
            f"{_MODULE}.{name} lacks {', '.join(missing)}: this flash_attn is not the interface "
            "of 2.7 and 2.8"
        )
    return function
