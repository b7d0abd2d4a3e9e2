"""Checks of user input, before any kernel or collective runs. An error names the argument, what came and what is allowed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from magi_sink_cp.kernels.protocol import AttentionParams, Varlen

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SINK_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
SINK_LAYOUTS = ("sh", "ssh")

# Contents of CUDA cu_seqlens tensors by identity and version: one is copied to the host once, not once a layer.
_host_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def check_qkv(q: Tensor, k: Tensor, v: Tensor, num_dims: int, shape_text: str) -> None:
    """Rank, heads, head_dim, dtype and device of q, k and v."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != num_dims:
            raise ValueError(f"{name} must have {num_dims} dimensions {shape_text}, got shape {tuple(x.shape)}")
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name} must have a dtype of {_names(_FLOATS)}, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"q, k and v must have one dtype, got q {q.dtype} and {name} {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"q, k and v must be on one device, got q on {q.device} and {name} on {x.device}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got k {tuple(k.shape)} and v {tuple(v.shape)}")
    if q.shape[-1] != k.shape[-1] or q.shape[-1] < 1:
        raise ValueError(f"q and k must have one head_dim >= 1 (their last dimension), got q {q.shape[-1]} and k {k.shape[-1]}")
    heads, heads_kv = q.shape[-2], k.shape[-2]
    if heads < 1 or heads_kv < 1 or heads % heads_kv:
        raise ValueError(f"the heads of k and v must divide the heads of q (both >= 1), got q {heads} and k {heads_kv}")
    if num_dims == 4 and q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must have one batch size, got q {q.shape[0]} and k {k.shape[0]}")


def check_sink(sink: Tensor | None, sink_layout: str, q: Tensor) -> None:
    """Layout, shape, dtype and device of the sink logits against q (B, T, H, D) or (T, H, D)."""
    if sink_layout not in SINK_LAYOUTS:
        raise ValueError(f"sink_layout must be one of {SINK_LAYOUTS}, got {sink_layout!r}")
    if sink is None:
        return
    if not isinstance(sink, Tensor):
        raise TypeError(f"sink must be a torch.Tensor or None, got {type(sink).__name__}")
    allowed = (*_SINK_FLOATS, torch.float64) if q.dtype == torch.float64 else _SINK_FLOATS
    if sink.dtype not in allowed:
        raise TypeError(f"sink must have a dtype of {_names(allowed)}, got {sink.dtype}")
    if sink.device != q.device:
        raise ValueError(f"sink must be on the device of q ({q.device}), got {sink.device}")
    leading = () if sink_layout == "sh" else tuple(q.shape[:-2])
    expected = (*leading, "s_sink >= 1", q.shape[-2])
    matches = sink.dim() == len(expected) and tuple(sink.shape[:-2]) == leading and sink.shape[-1] == q.shape[-2]
    if not matches or sink.shape[-2] < 1:
        text = ", ".join(str(size) for size in expected)
        raise ValueError(
            f"sink of sink_layout={sink_layout!r} must have shape ({text}) for q {tuple(q.shape)}, got {tuple(sink.shape)}"
        )


def make_params(
    head_dim: int, softmax_scale: float | None, causal: bool, window_size: Sequence[int], softcap: float, deterministic: bool
) -> AttentionParams:
    """The checked :class:`AttentionParams`; ``causal`` becomes a right window of 0, and the scale defaults to head_dim^-1/2."""
    for name, flag in (("causal", causal), ("deterministic", deterministic)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {flag!r}")
    if (
        not isinstance(window_size, Sequence)
        or len(window_size) != 2
        or not all(_is_int(w) and -1 <= w < 2**31 for w in window_size)
    ):
        raise ValueError(f"window_size must be two ints (left, right) from -1, unlimited, to 2^31 - 1, got {window_size!r}")
    scale = _check_float("softmax_scale", head_dim**-0.5 if softmax_scale is None else softmax_scale, zero_allowed=False)
    cap = _check_float("softcap", softcap, zero_allowed=True)
    left, right = window_size
    return AttentionParams(scale, (left, 0 if causal else right), cap, deterministic)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_float(name: str, value: float, zero_allowed: bool) -> float:
    """value as a finite float that is not negative."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a float, got {value!r}")
    try:
        converted = float(value)
    except OverflowError:
        converted = math.inf
    if not math.isfinite(converted) or converted < 0 or (converted == 0 and not zero_allowed):
        raise ValueError(f"{name} must be finite and {'>= 0' if zero_allowed else '> 0'}, got {str(value)[:20]}")
    return converted


def make_varlen(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> Varlen | None:
    """The checked :class:`Varlen` of packed q and k, or None if neither cu_seqlens is given."""
    if cu_seqlens_q is None and cu_seqlens_k is None:
        for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
            if value is not None:
                raise ValueError(f"{name} belongs to cu_seqlens_q and cu_seqlens_k, which are not given; got {name}={value}")
        return None
    if cu_seqlens_q is None or cu_seqlens_k is None:
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must be given together, and {missing} is None")
    longest = []
    for name, cu_seqlens, x, given in (("q", cu_seqlens_q, q, max_seqlen_q), ("k", cu_seqlens_k, k, max_seqlen_k)):
        offsets = read_cu_seqlens(cu_seqlens, f"cu_seqlens_{name}", x.shape[0], x.device)
        actual = max((hi - lo for lo, hi in itertools.pairwise(offsets)), default=0)
        if given is not None and (not _is_int(given) or given < actual):
            raise ValueError(
                f"max_seqlen_{name} must be an int >= {actual}, the longest document of cu_seqlens_{name}, got {given!r}"
            )
        longest.append(actual if given is None else given)
    if cu_seqlens_q.numel() != cu_seqlens_k.numel():
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must name the same number of documents, "
            f"got {cu_seqlens_q.numel() - 1} and {cu_seqlens_k.numel() - 1}"
        )
    return Varlen(cu_seqlens_q, cu_seqlens_k, longest[0], longest[1])


def read_cu_seqlens(cu_seqlens: Tensor, name: str, total: int, device: torch.device | None = None) -> tuple[int, ...]:
    """The checked contents of an int32 cu_seqlens tensor (documents + 1,) that must run from 0 to ``total``.

    A CUDA tensor costs one copy to the host when it is first seen; the same unchanged tensor costs nothing after that. A change
    that torch does not count as one (through ``.data``, or in a replayed CUDA graph) is not seen.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must have dtype torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"{name} must have shape (documents + 1,), got {tuple(cu_seqlens.shape)}")
    if device is not None and cu_seqlens.device != device:
        raise ValueError(f"{name} must be on the device of q ({device}), got {cu_seqlens.device}")
    if not cu_seqlens.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {cu_seqlens.stride()}")
    return check_offsets(_host_copy(cu_seqlens, name), name, total)


def check_offsets(offsets: tuple[int, ...], name: str, total: int) -> tuple[int, ...]:
    """offsets, which must start at 0, never fall, and end at ``total`` tokens."""
    if not offsets or offsets[0] != 0:
        raise ValueError(f"{name} must start at 0, got {_shorten(offsets)}")
    for b in range(len(offsets) - 1):
        if offsets[b + 1] < offsets[b]:
            raise ValueError(f"{name} must not fall, but entry {b + 1} is {offsets[b + 1]} after {offsets[b]}")
    if offsets[-1] != total:
        raise ValueError(f"{name} must end at the number of tokens, {total}, got {offsets[-1]}")
    return offsets


def _host_copy(cu_seqlens: Tensor, name: str) -> tuple[int, ...]:
    if not cu_seqlens.is_cuda or cu_seqlens.is_inference():  # cheap to read; or without a version counter
        return tuple(cu_seqlens.tolist())
    version, offsets = _host_copies.get(cu_seqlens, (None, ()))
    if version == cu_seqlens._version:
        return offsets
    if torch.cuda.is_current_stream_capturing():
        raise ValueError(
            f"{name} is new and cannot be checked while a CUDA graph is captured: make one call with this tensor before capture"
        )
    offsets = tuple(cu_seqlens.tolist())
    _host_copies[cu_seqlens] = (cu_seqlens._version, offsets)
    return offsets


def _shorten(values: Sequence[int]) -> str:
    return str(list(values)) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, …]"


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
