"""Checks of user input, before any kernel or collective runs. An error names the argument, what came and what is allowed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from magi_sink_cp.kernels.protocol import FP8, AttentionParams, Extras, Varlen

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FLOATS_AND_FP8 = (*_FLOATS, FP8)
SINK_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
SINK_LAYOUTS = ("sh", "ssh")

# Contents of CUDA cu_seqlens tensors by identity and version: one is copied to the host once, not once a layer.
_host_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def check_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_dims: int,
    shape_text: str,
    fp8_allowed: bool = False,
    paged: bool = False,
    names: Sequence[str] = ("q", "k", "v"),
) -> None:
    """Rank, heads, head_dim, dtype and device of q, k and v, called ``names``. ``paged``: k, v are (pages, page size, H_kv, D)."""
    for name, x in zip(names, (q, k, v), strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    dtype, device = q.dtype, q.device
    dtypes = _FLOATS_AND_FP8 if fp8_allowed else _FLOATS
    shapes = q.shape, k.shape, v.shape
    uniform = k.dtype == dtype == v.dtype and k.device == device == v.device and dtype in dtypes
    uniform = uniform and q.layout == k.layout == v.layout == torch.strided
    if uniform and not paged and len(shapes[0]) == len(shapes[1]) == len(shapes[2]) == num_dims:
        names = ()  # nothing to find below, which would cost as much as a launch
    for name, x, shape in zip(names, (q, k, v), shapes, strict=False):
        if paged and x is not q:
            if len(shape) != 4:
                raise ValueError(
                    f"{name} must have 4 dimensions (pages, page size, heads, head_dim), as block_table is given, "
                    f"got shape {tuple(shape)}"
                )
        elif len(shape) != num_dims:
            raise ValueError(f"{name} must have {num_dims} dimensions {shape_text}, got shape {tuple(shape)}")
        if x.dtype not in dtypes:
            raise TypeError(f"{name} must have a dtype of {_names(dtypes)}, got {x.dtype}")
        if x.dtype != dtype:
            raise TypeError(f"q, k and v must have one dtype, got q {dtype} and {name} {x.dtype}")
        if x.device != device:
            raise ValueError(f"q, k and v must be on one device, got q on {device} and {name} on {x.device}")
        if x.layout != torch.strided:
            raise ValueError(f"{name} must be dense (torch.strided), got {x.layout}")
    q_shape, k_shape, v_shape = shapes
    if k_shape[:-1] != v_shape[:-1]:
        raise ValueError(f"k and v must have one shape, got k {tuple(k_shape)} and v {tuple(v_shape)} (only head_dim may differ)")
    if q_shape[-1] != k_shape[-1] or q_shape[-1] < 1 or v_shape[-1] < 1:
        raise ValueError(
            "q and k must have one head_dim >= 1 (their last dimension), and v one >= 1, "
            f"got q {q_shape[-1]}, k {k_shape[-1]} and v {v_shape[-1]}"
        )
    heads, heads_kv = q_shape[-2], k_shape[-2]
    if heads < 1 or heads_kv < 1 or heads % heads_kv:
        raise ValueError(f"the heads of k and v must divide the heads of q (both >= 1), got q {heads} and k {heads_kv}")
    if num_dims == 4 and q_shape[0] != k_shape[0]:
        raise ValueError(f"q and k must have one batch size, got q {q_shape[0]} and k {k_shape[0]}")


def check_sink(sink: Tensor | None, sink_layout: str, q: Tensor) -> None:
    """Layout, shape, dtype and device of the sink logits against q (B, T, H, D) or (T, H, D)."""
    if sink_layout not in SINK_LAYOUTS:
        raise ValueError(f"sink_layout must be one of {SINK_LAYOUTS}, got {sink_layout!r}")
    if sink is None:
        return
    if not isinstance(sink, Tensor):
        raise TypeError(f"sink must be a torch.Tensor or None, got {type(sink).__name__}")
    allowed = (*SINK_FLOATS, torch.float64) if q.dtype == torch.float64 else SINK_FLOATS
    if sink.dtype not in allowed:
        raise TypeError(f"sink must have a dtype of {_names(allowed)}, got {sink.dtype}")
    if sink.device != q.device:
        raise ValueError(f"sink must be on the device of q ({q.device}), got {sink.device}")
    if sink.layout != torch.strided:
        raise ValueError(f"sink must be dense (torch.strided), got {sink.layout}")
    leading = () if sink_layout == "sh" else tuple(q.shape[:-2])
    expected = (*leading, "s_sink >= 1", q.shape[-2])
    matches = sink.dim() == len(expected) and tuple(sink.shape[:-2]) == leading and sink.shape[-1] == q.shape[-2]
    if not matches or sink.shape[-2] < 1:
        text = ", ".join(str(size) for size in expected)
        raise ValueError(
            f"sink of sink_layout={sink_layout!r} must have shape ({text}) for q {tuple(q.shape)}, got {tuple(sink.shape)}"
        )


def make_params(
    head_dim: int,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int],
    softcap: float,
    deterministic: bool,
    *,
    dropout_p: float = 0.0,
    attention_chunk: int = 0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> AttentionParams:
    """The checked :class:`AttentionParams`; ``causal`` becomes a right window of 0, and the scale defaults to head_dim^-1/2.

    The same arguments are checked once: the checks cost more than launching a small kernel.
    """
    arguments = (
        head_dim, softmax_scale, causal, softcap, deterministic, dropout_p, attention_chunk, num_splits, pack_gqa, sm_margin,
    )  # fmt: skip
    if torch.compiler.is_compiling() or type(window_size) is not tuple or len(window_size) != 2:
        return _check_params(window_size, *arguments)
    key = (window_size, *arguments)
    kinds = (*map(type, window_size), *map(type, arguments))  # True and 1.0 are equal to 1
    try:
        checked = _checked_params.get((key, kinds))
    except TypeError:  # something that cannot be hashed is no number either
        return _check_params(window_size, *arguments)
    if checked is None:
        checked = _check_params(window_size, *arguments)
        if len(_checked_params) >= _MOST_CHECKED_PARAMS:
            _checked_params.clear()
        _checked_params[key, kinds] = checked
    return checked


_checked_params: dict[tuple[object, ...], AttentionParams] = {}
_MOST_CHECKED_PARAMS = 4096


def _check_params(
    window_size: Sequence[int],
    head_dim: int,
    softmax_scale: float | None,
    causal: bool,
    softcap: float,
    deterministic: bool,
    dropout_p: float,
    attention_chunk: int,
    num_splits: int,
    pack_gqa: bool | None,
    sm_margin: int,
) -> AttentionParams:
    for name, flag in (("causal", causal), ("deterministic", deterministic)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {flag!r}")
    if pack_gqa is not None and not isinstance(pack_gqa, bool):
        raise TypeError(f"pack_gqa must be a bool or None, got {pack_gqa!r}")
    if (
        not isinstance(window_size, Sequence)
        or len(window_size) != 2
        or not all(_is_int(w) and -1 <= w < 2**31 for w in window_size)
    ):
        raise ValueError(f"window_size must be two ints (left, right) from -1, unlimited, to 2^31 - 1, got {window_size!r}")
    for name, value in (("attention_chunk", attention_chunk), ("num_splits", num_splits), ("sm_margin", sm_margin)):
        if not _is_int(value) or not 0 <= value < 2**31:
            raise ValueError(f"{name} must be an int from 0 to 2^31 - 1, got {value!r}")
    scale = check_float("softmax_scale", head_dim**-0.5 if softmax_scale is None else softmax_scale, zero_allowed=False)
    cap = check_float("softcap", softcap, zero_allowed=True)
    dropout = check_float("dropout_p", dropout_p, zero_allowed=True)
    if dropout >= 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p!r}")
    left, right = window_size
    return AttentionParams(
        scale, (left, 0 if causal else right), cap, deterministic, dropout, attention_chunk, num_splits, pack_gqa, sm_margin
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    """Whether value is an integer, NumPy's included, and neither a bool nor a tensor (reading one would wait for the GPU)."""
    return hasattr(value, "__index__") and not isinstance(value, (bool, Tensor))


def check_float(name: str, value: float, zero_allowed: bool) -> float:
    """value as a finite float that is not negative."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a float, got {value!r}")
    try:
        converted = float(value)
    except OverflowError:
        converted = math.inf
    if not 0 <= converted < math.inf or (converted == 0 and not zero_allowed):  # comparisons: torch.compile has symbolic floats
        raise ValueError(f"{name} must be finite and {'>= 0' if zero_allowed else '> 0'}, got {str(value)[:20]}")
    return converted


def check_lengths(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, **others: Any) -> None:
    """That cu_seqlens come in pairs, with a right dtype, shape and device, and nothing that belongs to them without them.

    ``others`` are max_seqlen_q, max_seqlen_k (ints) and seqused_q, seqused_k (int32 (documents,) tensors), by name. What
    cu_seqlens hold is read by :func:`make_varlen`.
    """
    if cu_seqlens_q is None and cu_seqlens_k is None:
        for name, value in others.items():
            if value is not None:
                raise ValueError(f"{name} belongs to cu_seqlens_q and cu_seqlens_k, which are not given; got {name}={value}")
        return
    if cu_seqlens_q is None or cu_seqlens_k is None:
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must be given together, and {missing} is None")
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_cu_seqlens(cu_seqlens, name, q.device)
    documents = cu_seqlens_q.shape[0] - 1
    if cu_seqlens_k.shape[0] - 1 != documents:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must name the same number of documents, got {documents} and {cu_seqlens_k.shape[0] - 1}"
        )
    for name in ("seqused_q", "seqused_k"):
        used = others.get(name)
        if used is not None:
            check_tensor(name, used, torch.int32, ((documents,),), q.device, "a length for each document")
    for name in ("max_seqlen_q", "max_seqlen_k"):
        longest = others.get(name)
        if torch.compiler.is_compiling():  # it may depend on data, which nothing can be asked of
            break
        if longest is not None and (not _is_integer(longest) or longest < 0):
            raise ValueError(f"{name} must be an int >= 0, the longest document of cu_seqlens_{name[-1]}, got {longest!r}")


def check_tensor(
    name: str, x: object, dtype: torch.dtype, shapes: Sequence[tuple[object, ...]], device: torch.device, meaning: str
) -> None:
    """That x is a contiguous tensor of this dtype and device, with one of ``shapes``, where a str stands for any size."""
    if isinstance(x, Tensor) and x.dtype == dtype and x.device == device and x.is_contiguous():
        for shape in shapes:
            if x.dim() == len(shape) and all(isinstance(b, str) or a == b for a, b in zip(x.shape, shape, strict=True)):
                return
    allowed = " or ".join(f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})" for shape in shapes)
    raise ValueError(f"{name} must be a contiguous {dtype} tensor {allowed} on {device}, {meaning}; got {_describe(x)}")


def check_extras(extras: Extras, q: Tensor, k: Tensor, v: Tensor, documents: int) -> None:
    """Shapes, dtypes and devices of the tensors beside q, k and v, for a batch of, or packed, ``documents``."""
    heads, heads_kv = q.shape[-2], k.shape[-2]
    if extras.qv is not None:
        check_tensor("qv", extras.qv, q.dtype, ((*q.shape[:-1], v.shape[-1]),), q.device, "like q with the head_dim of v")
    for name in ("q_descale", "k_descale", "v_descale"):
        descale = getattr(extras, name)
        if descale is not None and q.dtype != FP8:
            raise ValueError(f"{name} belongs to {FP8} inputs, and these are {q.dtype}")
        if descale is not None:
            check_tensor(name, descale, torch.float32, ((documents, heads_kv),), q.device, "(batch or documents, key heads)")
    if extras.alibi_slopes is not None:
        shapes = ((heads,), (documents, heads))
        check_tensor("alibi_slopes", extras.alibi_slopes, torch.float32, shapes, q.device, "a slope a head")
    if extras.block_table is not None:
        check_tensor("block_table", extras.block_table, torch.int32, ((documents, "blocks"),), q.device, "page numbers")
        if k.shape[1] % 256:
            raise ValueError(f"FlashAttention-2's pages hold a multiple of 256 keys, got k {tuple(k.shape)} (pages, page size, …)")


def make_varlen(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    read: bool = True,
) -> Varlen:
    """The :class:`Varlen` of packed q and k, after :func:`check_lengths`.

    ``read``: check what the offsets hold, also on a GPU (see :func:`read_cu_seqlens`). Without it CUDA offsets are read only
    if a max_seqlen is None, and trusted otherwise, as FlashAttention does. Offsets on the CPU are always checked.
    """
    longest = []
    total_k = k.shape[0] if k.dim() == 3 else None  # unknown of paged keys, (pages, page size, H_kv, D)
    for name, cu_seqlens, total, given in (
        ("q", cu_seqlens_q, q.shape[0], max_seqlen_q),
        ("k", cu_seqlens_k, total_k, max_seqlen_k),
    ):
        if cu_seqlens.is_cuda and not read and given is not None:
            longest.append(given)
            continue
        offsets = read_cu_seqlens(cu_seqlens, f"cu_seqlens_{name}", total)
        actual = max((hi - lo for lo, hi in itertools.pairwise(offsets)), default=0)
        if given is not None and given < actual:
            raise ValueError(
                f"max_seqlen_{name} must be an int >= {actual}, the longest document of cu_seqlens_{name}, got {given!r}"
            )
        longest.append(actual if given is None else given)
    for name, used, cu_seqlens in (("seqused_q", seqused_q, cu_seqlens_q), ("seqused_k", seqused_k, cu_seqlens_k)):
        if used is not None and not used.is_cuda and not bool(((used >= 0) & (used <= cu_seqlens.diff())).all()):
            raise ValueError(f"{name} must be from 0 to each document's length {cu_seqlens.diff().tolist()}, got {used.tolist()}")
    return Varlen(cu_seqlens_q, cu_seqlens_k, longest[0], longest[1], seqused_q, seqused_k)


def check_cu_seqlens(cu_seqlens: Tensor, name: str, device: torch.device | None = None) -> None:
    """Type, dtype, shape, device and layout of a cu_seqlens tensor."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must have dtype torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} must have shape (documents + 1,), got {tuple(cu_seqlens.shape)}")
    if device is not None and cu_seqlens.device != device:
        raise ValueError(f"{name} must be on the device of q ({device}), got {cu_seqlens.device}")
    if not cu_seqlens.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {cu_seqlens.stride()}")


def read_cu_seqlens(cu_seqlens: Tensor, name: str, total: int | None) -> tuple[int, ...]:
    """The checked contents of an int32 cu_seqlens tensor (documents + 1,) that must run from 0 to ``total``, if that is given.

    A CUDA tensor costs one copy to the host when it is first seen; the same unchanged tensor costs nothing after that. A change
    that torch does not count as one (through ``.data``, or in a replayed CUDA graph) is not seen.
    """
    check_cu_seqlens(cu_seqlens, name)
    return check_offsets(_host_copy(cu_seqlens, name), name, total)


def check_offsets(offsets: tuple[int, ...], name: str, total: int | None) -> tuple[int, ...]:
    """offsets, which must start at 0, never fall, and end at ``total`` tokens, if that is given."""
    if not offsets or offsets[0] != 0:
        raise ValueError(f"{name} must start at 0, got {_shorten(offsets)}")
    for b in range(len(offsets) - 1):
        if offsets[b + 1] < offsets[b]:
            raise ValueError(f"{name} must not fall, but entry {b + 1} is {offsets[b + 1]} after {offsets[b]}")
    if total is not None and offsets[-1] != total:
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


def _describe(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else repr(value)


def _shorten(values: Sequence[int]) -> str:
    return str(list(values)) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, …]"


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
