"""The ``fa3`` backend: FlashAttention-3 for Hopper, from whichever package holds it.

Sources, in order: operators that something has already registered; the official ``flash_attn_3``
package or its module ``flash_attn_interface``; the extension inside xformers >= 0.0.34
(``xformers/flash_attn_3/_C.so``, loaded without importing xformers).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magi_sink_cp.kernels.backends.flash import (
    NO_GPU,
    NoLseGradientBackend,
    kernel_ready,
    mask_and_scores,
    new_gradients,
    packed_lengths,
    why_unusable,
)
from magi_sink_cp.kernels.existing import clear, clear_columns, missing_keys, missing_rows
from magi_sink_cp.kernels.protocol import (
    FP8,
    AttentionParams,
    Extras,
    Gradients,
    KernelRequest,
    NotUsableError,
    Partial,
    RowDelta,
    Varlen,
)

INSTALL_HINT = (
    "run `make fa3` in a clone of magi_sink_cp, which is `pip install --no-deps xformers==0.0.34 "
    "nvidia-cuda-runtime-cu12`; or install FlashAttention-3 from "
    "https://github.com/Dao-AILab/flash-attention (folder hopper); or import a package that "
    "registers torch.ops.flash_attn_3 before the first call"
)

_COMMON_ARGUMENTS = (
    "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k",
    "softmax_scale", "is_causal",
    "window_size_left", "window_size_right", "softcap", "sm_margin",
)  # fmt: skip
_FORWARD_ARGUMENTS = (
    *_COMMON_ARGUMENTS,
    "out",
    "attention_chunk",
    "num_splits",
    "pack_gqa",
    "q_descale",
    "k_descale",
    "v_descale",
)
_BACKWARD_ARGUMENTS = (*_COMMON_ARGUMENTS, "dq", "dk", "dv", "deterministic")

# What backward_block can be.
_BLOCKS = (64, 80, 96, 128)
# Where softmax_d stands among the tensors that bwd returns, by how many it returns: older builds
# return dq, dk, dv before it.
_SOFTMAX_D_INDEX = {8: 3, 5: 0}


@dataclass(frozen=True)
class _Library:
    """The loaded operators.

    Attributes:
        source: where they come from.
        softmax_d_index: where delta stands among the tensors that bwd returns.
        is_whole: softcap and fp8 were compiled in. xformers leaves them out.
        qv_name: builds call the argument ``q_v`` or ``qv``.
    """

    source: str
    forward: Any
    backward: Any
    softmax_d_index: int
    is_whole: bool
    qv_name: str


class Fa3Backend(NoLseGradientBackend):
    """torch.ops.flash_attn_3.{fwd, bwd}. The backward hands over its softmax_d, which is delta."""

    name = "fa3"
    features = frozenset({
        "softcap", "deterministic", "attention_chunk", "num_splits", "pack_gqa", "sm_margin",
        "seqused_q", "seqused_k", "qv",
        "q_descale", "k_descale", "v_descale", "gaps",
    })  # fmt: skip
    dtypes = (torch.float16, torch.bfloat16, FP8)
    max_head_dim_v = 512

    def unavailable(self) -> str | None:
        if not torch.cuda.is_available():
            return NO_GPU
        major, minor = torch.cuda.get_device_capability()
        if major != 9:
            return f"it needs a Hopper GPU (sm_90), and this one is sm_{major}{minor}"
        return why_unusable(_library)

    def unsupported(
        self, q: Tensor, request: KernelRequest, head_dim_v: int | None = None
    ) -> str | None:
        for feature, wanted in (("softcap", request.params.softcap > 0), ("fp8", q.dtype == FP8)):
            if wanted and not _library().is_whole:
                return f"the FlashAttention-3 build of {_library().source} has no {feature}"
        head_dim, other = q.shape[-1], head_dim_v or q.shape[-1]
        if request.params.deterministic and max(head_dim, other) > 192:
            return (
                "its deterministic backward takes a head_dim of at most 192, and q has "
                f"{head_dim}, v {other}"
            )
        if other != head_dim and not (
            head_dim <= 64 or (128 < head_dim <= 192 and 96 < other <= 128)
        ):
            return (
                "it takes v with a head_dim of its own where that of q is at most 64, or above "
                "128 up to 192 and that of v above "
                f"96 up to 128; q has {head_dim}, v {other}"
            )
        if request.extras.qv is not None and (head_dim > 64 or other < 256):
            return (
                "it takes qv where head_dim is at most 64 and that of v at least 256; q has "
                f"{head_dim}, v {other}"
            )
        if q.dtype == FP8 and (head_dim % 16 or other % 16):
            return (
                f"it takes fp8 with a head_dim that is a multiple of 16, and q has {head_dim}, "
                f"v {other}"
            )
        return super().unsupported(q, request, head_dim_v)

    def describe(self) -> str:
        return f"fa3 ({_library().source})"

    def _forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        request: KernelRequest,
        out: Tensor | None,
        want_probs: bool,
    ) -> Partial:
        library, params, varlen = _library(), request.params, request.varlen
        result, lse, *_ = library.forward(
            kernel_ready(q),
            kernel_ready(k),
            kernel_ready(clear(v, missing_keys(varlen, v.shape[0]))),  # 0 · NaN would reach out
            out=out,
            attention_chunk=params.attention_chunk,
            num_splits=params.num_splits,
            pack_gqa=params.pack_gqa,
            **_common(request),
            **_extras(request.extras, library.qv_name),
        )
        no_row = missing_rows(varlen, q.shape[0])  # the kernel leaves these rows unwritten
        return Partial(clear(result, no_row), clear_columns(lse, no_row, float("-inf")))

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
        library, params, varlen = _library(), request.params, request.varlen
        shortened = varlen is not None and (
            (varlen.seqused_q is not None and not varlen.gaps) or varlen.seqused_k is not None
        )
        dq, dk, dv = new_gradients(q, k, v) if into is None else (into.dq, into.dk, into.dv)
        if shortened:
            for x in (dq, dk, dv):  # the kernel writes only rows and keys that exist
                x.zero_()
            no_row, no_key = missing_rows(varlen, q.shape[0]), missing_keys(varlen, k.shape[0])
            dout, q, k, v = (
                clear(dout, no_row),
                clear(q, no_row),
                clear(k, no_key),
                clear(v, no_key),
            )
        returned = library.backward(
            dout,
            q,
            k,
            v,
            saved.out,
            saved.lse,
            dq=dq,
            dk=dk,
            dv=dv,
            deterministic=params.deterministic,
            **_common(request),
        )
        known = not shortened and q.shape[-1] == v.shape[-1]
        softmax_d = returned[library.softmax_d_index]
        return Gradients(
            dq,
            dk,
            dv,
            _row_delta(softmax_d, q, params, varlen, not library.is_whole) if known else None,
        )


def _common(request: KernelRequest) -> dict[str, Any]:
    return {
        **mask_and_scores(request),
        "is_causal": request.params.causal,
        "sm_margin": request.params.sm_margin,
        **packed_lengths(request),
    }


def _extras(extras: Extras, qv_name: str) -> dict[str, Tensor | None]:
    tensors = {
        qv_name: extras.qv,
        "q_descale": extras.q_descale,
        "k_descale": extras.k_descale,
        "v_descale": extras.v_descale,
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _row_delta(
    softmax_d: Tensor,
    q: Tensor,
    params: AttentionParams,
    varlen: Varlen | None,
    all_head_dims: bool,
) -> RowDelta | None:
    """softmax_d with its layout, or None if that is uncertain: delta is then computed from out.

    A build may leave out head_dims, and pad with the block of a larger one. The size of softmax_d
    tells which, unless two blocks give the same size.
    """
    if varlen is None:
        return RowDelta(softmax_d, q.shape[1])
    block = backward_block(q.shape[-1], varlen.max_seqlen_q, varlen.max_seqlen_k, params)
    documents = varlen.cu_seqlens_q.numel() - 1
    sizes = {size: -(-(q.shape[0] + documents * size) // size) * size for size in _BLOCKS}
    fitting = [size for size, padded in sizes.items() if softmax_d.shape[1] == padded]
    known = block in fitting and (all_head_dims or len(fitting) == 1)
    return RowDelta(softmax_d, q.shape[0], block, varlen.cu_seqlens_q) if known else None


def backward_block(
    head_dim: int, max_seqlen_q: int, max_seqlen_k: int, params: AttentionParams
) -> int:
    """Query rows per block of FA3's sm_90 backward (hopper/flash_api.cpp).

    softmax_d pads each document to multiples of it.
    """
    left, right = params.window_size
    left = -1 if left >= max_seqlen_k - 1 else left
    right = -1 if right >= max_seqlen_q - 1 and not params.causal else right
    causal = left < 0 and right == 0
    if head_dim <= 64:
        return 96 if causal and params.softcap > 0 else 128
    if 96 < head_dim <= 128:
        return 64 if left >= 0 or right >= 0 or params.softcap > 0 else 80
    return 64


@functools.cache
def _library() -> _Library:
    """Find and load the operators once; NotUsableError names every place that was tried."""
    source, is_whole = _load()
    forward, backward = torch.ops.flash_attn_3.fwd, torch.ops.flash_attn_3.bwd
    for operator, needed in ((forward, _FORWARD_ARGUMENTS), (backward, _BACKWARD_ARGUMENTS)):
        known = {argument.name for argument in operator.default._schema.arguments}
        if missing := [name for name in needed if name not in known]:
            raise NotUsableError(
                f"{operator} of {source} lacks the arguments {', '.join(missing)}: "
                f"{operator.default._schema}"
            )
    returns = backward.default._schema.returns
    if len(returns) not in _SOFTMAX_D_INDEX:
        raise NotUsableError(
            f"bwd of {source} returns {len(returns)} tensors; 5 or 8 are known: "
            f"{backward.default._schema}"
        )
    qv_name = (
        "q_v"
        if any(argument.name == "q_v" for argument in forward.default._schema.arguments)
        else "qv"
    )
    return _Library(
        source, forward.default, backward.default, _SOFTMAX_D_INDEX[len(returns)], is_whole, qv_name
    )


def _load() -> tuple[str, bool]:
    """Register torch.ops.flash_attn_3.

    Returns where the operators come from, and whether softcap and fp8 were compiled in.
    """
    if _registered():
        return "operators registered by another package", not _is_xformers_loaded()
    for package, module in (
        ("flash_attn_3", "flash_attn_3._C"),
        ("flash_attn_interface", "flash_attn_interface"),
    ):
        if importlib.util.find_spec(package) is None:
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a broken installation raises, it is the reason
            raise NotUsableError(f"{package} is installed but does not load: {error}") from error
        if not _registered():
            raise NotUsableError(
                f"{package} is installed but registers no torch.ops.flash_attn_3.fwd and bwd"
            )
        return (
            f"{package} {_version('flash-attn-3') or _version('flash_attn_3') or ''}".rstrip(),
            True,
        )
    spec = importlib.util.find_spec("xformers")
    if spec is None or not spec.submodule_search_locations:
        raise NotUsableError(f"neither flash_attn_3 nor xformers is installed; {INSTALL_HINT}")
    extension = Path(next(iter(spec.submodule_search_locations))) / "flash_attn_3" / "_C.so"
    if not extension.is_file():
        raise NotUsableError(
            f"this xformers has no flash_attn_3/_C.so (0.0.34 has); {INSTALL_HINT}"
        )
    try:
        _preload_cuda_runtime_12()
        torch.ops.load_library(str(extension))
    except OSError as error:
        raise NotUsableError(
            f"the FlashAttention-3 extension of xformers does not load: {error}; {INSTALL_HINT}"
        ) from error
    return f"xformers {_version('xformers') or ''}".rstrip(), False


def _registered() -> bool:
    return hasattr(torch.ops.flash_attn_3, "fwd") and hasattr(torch.ops.flash_attn_3, "bwd")


def _preload_cuda_runtime_12() -> None:
    """Load libcudart.so.12, which xformers' extension links to.

    nvidia-cuda-runtime-cu12 has it.
    """
    for folder in sys.path:
        runtime = Path(folder) / "nvidia" / "cuda_runtime" / "lib" / "libcudart.so.12"
        if runtime.is_file():
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
            return


def _is_xformers_loaded() -> bool:
    return any(path.endswith("xformers/flash_attn_3/_C.so") for path in torch.ops.loaded_libraries)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
