"""The ``fa4`` backend: FlashAttention-4 (package flash-attn-4, module flash_attn.cute).

It runs on Hopper and Blackwell. Its kernels add one sink per head, forward and backward, at no
measurable cost. They are compiled at first use: some seconds for each new combination of dtype,
head_dim and mask.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from magi_sink_cp.kernels.backends.flash import (
    NO_GPU,
    FlashBackend,
    kernel_ready,
    packed_lengths,
    why_unusable,
)
from magi_sink_cp.kernels.existing import clear, clear_columns, missing_keys, missing_rows
from magi_sink_cp.kernels.protocol import Gradients, KernelRequest, NotUsableError, Partial

INSTALL_HINT = "`pip install --pre flash-attn-4`"

# The head_dims that were checked, by compute capability. The backward of 4.0.0b36 on an H200 gives
# wrong gradients at head_dim 8 and 72.
_HEAD_DIMS = {9: (64, 96, 128, 192, 256), 10: (64, 96, 128), 11: (64, 96, 128)}
_COMMON_ARGUMENTS = (
    "softmax_scale", "causal", "softcap", "window_size_left", "window_size_right",
    "learnable_sink", "cu_seqlens_q",
    "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_q", "seqused_k",
)  # fmt: skip
_FORWARD_ARGUMENTS = (*_COMMON_ARGUMENTS, "num_splits", "pack_gqa", "return_lse", "out")
_BACKWARD_ARGUMENTS = (*_COMMON_ARGUMENTS, "deterministic", "dq", "dk", "dv", "dlse")


@dataclass(frozen=True)
class _Library:
    version: str
    forward: Any
    backward: Any


class Fa4Backend(FlashBackend):
    """flash_attn.cute's forward and backward.

    They take a gradient of lse, and one sink per head, themselves.
    """

    name = "fa4"
    features = frozenset({
        "softcap", "deterministic", "num_splits", "pack_gqa", "seqused_q", "seqused_k",
    })  # fmt: skip

    def unavailable(self) -> str | None:
        if not torch.cuda.is_available():
            return NO_GPU
        major, minor = torch.cuda.get_device_capability()
        if major not in _HEAD_DIMS:
            return (
                "it needs a Hopper or Blackwell GPU (sm_90, sm_100 or sm_110), and this one "
                f"is sm_{major}{minor}"
            )
        return why_unusable(_library)

    def unsupported(
        self, q: Tensor, request: KernelRequest, head_dim_v: int | None = None
    ) -> str | None:
        if reason := super().unsupported(q, request, head_dim_v):
            return reason
        if request.params.num_splits != 1 and torch.cuda.get_device_capability(q.device)[0] == 9:
            return (
                "it has num_splits=1 alone on Hopper, and the call sets "
                f"num_splits={request.params.num_splits}"
            )
        known = _HEAD_DIMS[torch.cuda.get_device_capability(q.device)[0]]
        if q.shape[-1] in known:
            return None
        sizes = ", ".join(map(str, known))
        return f"it is used with a head_dim of {sizes}, and q has {q.shape[-1]}"

    def describe(self) -> str:
        return f"fa4 (flash-attn-4 {_library().version})"

    def forward_with_sink(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor,
        request: KernelRequest,
        exact_lse: bool = True,
        out: Tensor | None = None,
    ) -> Partial:
        """Like forward, with ``sink`` (1, H) in the denominator of every row.

        The kernel's sum overflows where a sink is more than 88 above a row's largest score. Then
        out is 0, which is right, and lse is +inf. That serves a backward without dlse
        (P = exp(S - lse) = 0). With ``exact_lse``, lse is replaced by the sink, which is right.
        """
        partial = self._run_forward(q, k, v, request, out, sink)
        if not exact_lse:
            return partial
        lse = torch.where(partial.lse == float("inf"), sink[0].float().unsqueeze(-1), partial.lse)
        return Partial(partial.out, lse)

    def backward_with_sink(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor,
        saved: Partial,
        request: KernelRequest,
        dlse: Tensor | None,
        into: Gradients | None,
    ) -> tuple[Gradients, Tensor]:
        """Like backward, and dsink (1, H) in the dtype of sink."""
        dq, dk, dv, dsink = self._run_backward(dout, q, k, v, saved, request, dlse, into, sink)
        return Gradients(dq, dk, dv, None), dsink.unsqueeze(0)

    def _forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        request: KernelRequest,
        out: Tensor | None,
        want_probs: bool,
    ) -> Partial:
        return self._run_forward(q, k, v, request, out, None)

    def _backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        saved: Partial,
        request: KernelRequest,
        dlse: Tensor | None,
        into: Gradients | None,
    ) -> Gradients:
        dq, dk, dv = self._run_backward(dout, q, k, v, saved, request, dlse, into, None)
        return Gradients(dq, dk, dv, None)

    @staticmethod
    def _run_forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        request: KernelRequest,
        out: Tensor | None,
        sink: Tensor | None,
    ) -> Partial:
        params, varlen = request.params, request.varlen
        v = clear(v, missing_keys(varlen, v.shape[0]))  # 0 · NaN would reach out
        q, k, v = (kernel_ready(x) for x in (q, k, v))
        result, lse, *_ = _library().forward(
            q, k, v, out=out, num_splits=params.num_splits, pack_gqa=params.pack_gqa,
            return_lse=True, **_common(request, sink),
        )  # fmt: skip
        no_row = missing_rows(varlen, q.shape[0])  # the kernel leaves these rows unwritten
        return Partial(clear(result, no_row), clear_columns(lse, no_row, float("-inf")))

    @staticmethod
    def _run_backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        saved: Partial,
        request: KernelRequest,
        dlse: Tensor | None,
        into: Gradients | None,
        sink: Tensor | None,
    ) -> tuple[Tensor, ...]:
        no_row, no_key = (
            missing_rows(request.varlen, q.shape[0]), missing_keys(request.varlen, k.shape[0])
        )  # fmt: skip
        dout, q, k, v = clear(dout, no_row), clear(q, no_row), clear(k, no_key), clear(v, no_key)
        dout, q, k, v = (kernel_ready(x) for x in (dout, q, k, v))
        dlse = None if dlse is None else dlse.contiguous()
        buffers = {} if into is None else {"dq": into.dq, "dk": into.dk, "dv": into.dv}
        dq, dk, dv, *dsink = _library().backward(
            q, k, v, saved.out, dout, saved.lse, dlse=dlse,
            deterministic=request.params.deterministic, **buffers, **_common(request, sink),
        )  # fmt: skip
        return clear(dq, no_row), clear(dk, no_key), clear(dv, no_key), *dsink


def _common(request: KernelRequest, sink: Tensor | None) -> dict[str, Any]:
    params = request.params
    left, right = (None if size < 0 else size for size in params.window_size)
    return {
        "softmax_scale": params.softmax_scale,
        "causal": params.causal,
        "softcap": params.softcap,
        "window_size_left": left,
        "window_size_right": right,
        "learnable_sink": None if sink is None else sink[0],
        **packed_lengths(request),
    }


@functools.cache
def _library() -> _Library:
    """Find and import the functions once a process, or raise NotUsableError."""
    try:
        if (
            importlib.util.find_spec("flash_attn") is None
            or importlib.util.find_spec("flash_attn.cute") is None
        ):
            raise NotUsableError(f"flash_attn.cute is not installed; {INSTALL_HINT}")
        module = importlib.import_module("flash_attn.cute.interface")
    except NotUsableError:
        raise
    except Exception as error:  # whatever a broken installation raises, it is the reason
        raise NotUsableError(
            f"flash_attn.cute is installed but does not load: {error}; {INSTALL_HINT}"
        ) from error
    functions = []
    for name, needed in (
        ("_flash_attn_fwd", _FORWARD_ARGUMENTS),
        ("_flash_attn_bwd", _BACKWARD_ARGUMENTS),
    ):
        function = getattr(module, name, None)
        known = () if function is None else inspect.signature(function).parameters
        if missing := [argument for argument in needed if argument not in known]:
            raise NotUsableError(
                f"flash_attn.cute.interface.{name} lacks {', '.join(missing)}; 4.0.0b36 is known "
                f"to work; {INSTALL_HINT}"
            )
        functions.append(function)
    return _Library(_version(), *functions)


def _version() -> str:
    try:
        return metadata.version("flash-attn-4")
    except metadata.PackageNotFoundError:
        return "of unknown version"
