"""Checks of user input, before any kernel or collective runs.

An error names the argument, what was given, and what is allowed. What has only one meaning is
taken: NumPy numbers, 0-dim tensors as lengths, int64 offsets, None in a window. This file imports
only protocol.py.
"""

from __future__ import annotations

import functools
import itertools
import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.weak import WeakTensorKeyDictionary

from magi_sink_cp.kernels.protocol import FP8, AttentionParams, Extras, Varlen

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SINK_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
SINK_LAYOUTS = ("sh", "ssh")
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
_LARGEST = 2**31 - 1

# --- Numbers ------------------------------------------------------------------------------------


def as_flag(name: str, value: object) -> bool:
    """value as a bool; a NumPy bool is one too.

    Raises:
        TypeError: it is anything else, 0 and 1 included.
    """
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"{name} must be a bool, got {value!r}")


def as_int(value: object) -> int | None:
    """value as an int, or None if it is not a whole number. A tensor must be 0-dim."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, Tensor):
        whole = not (value.dtype.is_floating_point or value.dtype.is_complex)
        if value.dim() == 0 and whole and value.dtype != torch.bool:
            return operator.index(value)
    elif type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return as_int(value.item())  # type: ignore[attr-defined]
    return None


def as_count(name: str, value: object) -> int:
    """value as an int. Raises ValueError unless it is a whole number >= 1."""
    count = as_int(value)
    if count is None or count < 1:
        raise ValueError(f"{name} must be an int >= 1, got {value!r}")
    return count


def as_float(name: str, value: object, zero_allowed: bool) -> float:
    """value as a finite float that is not negative.

    Raises:
        TypeError: it is not a number.
        ValueError: it is negative, not finite, or 0 where that is not allowed.
    """
    if not isinstance(value, (int, float, numbers.Real)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a float, got {value!r}")
    try:
        converted = float(value)
    except OverflowError:
        converted = math.inf
    # Comparisons, because torch.compile has symbolic floats.
    if not 0 <= converted < math.inf or (converted == 0 and not zero_allowed):
        allowed = ">= 0" if zero_allowed else "> 0"
        raise ValueError(f"{name} must be finite and {allowed}, got {str(value)[:20]}")
    return converted


def window_limits(window_size: Any) -> tuple[int, int]:
    """(left, right) of a window_size; None becomes -1, unlimited.

    Raises:
        ValueError: it is not two ints from -1 on, or None.
    """
    if type(window_size) is tuple and len(window_size) == 2:
        left, right = window_size
        ints = type(left) is int and type(right) is int
        if ints and -1 <= left <= _LARGEST and -1 <= right <= _LARGEST:
            return left, right
    pair = window_size
    if not isinstance(pair, Sequence) and hasattr(pair, "tolist"):  # a tensor or a NumPy array
        pair = pair.tolist()
    if isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2:
        limits = [-1 if limit is None else as_int(limit) for limit in pair]
        if all(limit is not None and -1 <= limit <= _LARGEST for limit in limits):
            return limits[0], limits[1]  # type: ignore[return-value]
    raise ValueError(
        "window_size must be two ints (left, right) from -1, unlimited, to 2^31 - 1, got "
        f"{window_size!r}"
    )


def make_params(
    head_dim: int,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int | None],
    softcap: float,
    deterministic: bool,
    *,
    dropout_p: float = 0.0,
    attention_chunk: int = 0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> AttentionParams:
    """The checked :class:`AttentionParams`.

    ``causal`` becomes a right limit of 0. softmax_scale defaults to head_dim^-1/2.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    arguments = (
        head_dim, softmax_scale, causal, *window_limits(window_size), softcap, deterministic,
        dropout_p, attention_chunk, num_splits, pack_gqa, sm_margin,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return _check_params(*arguments)
    try:
        return _checked_params(*arguments)
    except TypeError:  # a wrong type, or something that cannot be hashed
        return _check_params(*arguments)


def _check_params(
    head_dim: int,
    softmax_scale: float | None,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    deterministic: bool,
    dropout_p: float,
    attention_chunk: int,
    num_splits: int,
    pack_gqa: bool | None,
    sm_margin: int,
) -> AttentionParams:
    right = 0 if as_flag("causal", causal) else right
    deterministic = as_flag("deterministic", deterministic)
    pack_gqa = None if pack_gqa is None else as_flag("pack_gqa", pack_gqa)
    hints = []
    for name, value in (
        ("attention_chunk", attention_chunk),
        ("num_splits", num_splits),
        ("sm_margin", sm_margin),
    ):
        whole = as_int(value)
        if whole is None or not 0 <= whole <= _LARGEST:
            raise ValueError(f"{name} must be an int from 0 to 2^31 - 1, got {value!r}")
        hints.append(whole)
    given_scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    scale = as_float("softmax_scale", given_scale, zero_allowed=False)
    cap = as_float("softcap", softcap, zero_allowed=True)
    dropout = as_float("dropout_p", dropout_p, zero_allowed=True)
    if dropout >= 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p!r}")
    chunk, splits, margin = hints
    return AttentionParams(
        scale, (left, right), cap, deterministic, dropout, chunk, splits, pack_gqa, margin
    )


# The checks take longer than launching a small kernel. typed: 1, 1.0 and True are not all allowed.
_checked_params = functools.lru_cache(maxsize=4096, typed=True)(_check_params)

# --- q, k, v and the sink -----------------------------------------------------------------------


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype if autocast is on and their float dtypes differ.

    Rotary embeddings often leave q and k in fp32 beside a v in bf16.
    """
    if not all(isinstance(x, Tensor) for x in tensors):  # refused later
        return tensors
    kinds = {x.dtype for x in tensors}
    if len(kinds) < 2:
        return tensors
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    if not all(kind in SINK_FLOATS for kind in kinds):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) for x in tensors)


def refuse_dtensor(name: str, x: Tensor) -> None:
    """Raise TypeError for a DTensor, whose local part alone is what kernels can read."""
    if type(x) not in PLAIN_TENSORS and hasattr(x, "placements") and hasattr(x, "device_mesh"):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor with placements {x.placements}. Pass "
            f"{name}.to_local() if this rank's part is what is meant (heads of its own under "
            f"tensor parallelism), else {name}.full_tensor()"
        )


def refuse_forward_mode(what: str) -> None:
    """Raise where forward-mode differentiation is on: an operator would drop its tangents."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"{what} has no forward-mode derivative (torch.func.jvp, dual tensors): use reverse "
            "mode, or leave forward_ad.dual_level() for this call"
        )


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
    """Check rank, heads, head_dim, dtype and device of q, k and v.

    Args:
        num_dims: dimensions that each must have; ``shape_text`` says which.
        paged: k and v are (pages, page size, H_kv, D).
        names: what errors call q, k and v.

    Raises:
        TypeError, ValueError: they do not fit.
    """
    for name, x in zip(names, (q, k, v), strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        refuse_dtensor(name, x)
    dtypes = (*FLOATS, FP8) if fp8_allowed else FLOATS
    if not _is_uniform(q, k, v, num_dims, dtypes, paged):
        for name, x in zip(names, (q, k, v), strict=True):
            _check_one(name, x, q, num_dims, shape_text, dtypes, paged and x is not q)
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if k_shape[:-1] != v_shape[:-1]:
        raise ValueError(
            f"k and v must have one shape, got k {tuple(k_shape)} and v {tuple(v_shape)} (only "
            "head_dim may differ)"
        )
    if q_shape[-1] != k_shape[-1] or q_shape[-1] < 1 or v_shape[-1] < 1:
        raise ValueError(
            "q and k must have one head_dim >= 1 (their last dimension), and v one >= 1, "
            f"got q {q_shape[-1]}, k {k_shape[-1]} and v {v_shape[-1]}"
        )
    heads, heads_kv = q_shape[-2], k_shape[-2]
    if heads < 1 or heads_kv < 1 or heads % heads_kv:
        raise ValueError(
            "the heads of k and v must divide the heads of q (both >= 1), got q "
            f"{heads} and k {heads_kv}"
        )
    if num_dims == 4 and q_shape[0] != k_shape[0]:
        raise ValueError(f"q and k must have one batch size, got q {q_shape[0]} and k {k_shape[0]}")


def _is_uniform(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_dims: int,
    dtypes: Sequence[torch.dtype],
    paged: bool,
) -> bool:
    """Whether :func:`_check_one` has nothing to find. It would cost as much as a launch."""
    dtype, device = q.dtype, q.device
    return (
        k.dtype == dtype == v.dtype
        and k.device == device == v.device
        and dtype in dtypes
        and q.layout == k.layout == v.layout == torch.strided
        and not paged
        and q.dim() == k.dim() == v.dim() == num_dims
    )


def _check_one(
    name: str,
    x: Tensor,
    q: Tensor,
    num_dims: int,
    shape_text: str,
    dtypes: Sequence[torch.dtype],
    paged: bool,
) -> None:
    if paged and x.dim() != 4:
        raise ValueError(
            f"{name} must have 4 dimensions (pages, page size, heads, head_dim), as block_table is "
            f"given, got shape {tuple(x.shape)}"
        )
    if not paged and x.dim() != num_dims:
        raise ValueError(
            f"{name} must have {num_dims} dimensions {shape_text}, got shape {tuple(x.shape)}"
        )
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must have a dtype of {_names(dtypes)}, got {x.dtype}")
    if x.dtype != q.dtype:
        raise TypeError(f"q, k and v must have one dtype, got q {q.dtype} and {name} {x.dtype}")
    if x.device != q.device:
        raise ValueError(
            f"q, k and v must be on one device, got q on {q.device} and {name} on {x.device}"
        )
    check_dense(name, x)


def check_dense(name: str, x: Tensor) -> None:
    """Raise ValueError for sparse and nested tensors."""
    if x.layout != torch.strided:
        raise ValueError(f"{name} must be dense (torch.strided), got {x.layout}")


def check_sink_is_tensor(sink: object, sink_layout: object) -> None:
    """Raise where ``sink`` or ``sink_layout`` is not of its kind.

    A caller of FlashAttention who passes dropout_p or softmax_scale by position hits these.
    """
    if sink is not None and not isinstance(sink, Tensor):
        raise TypeError(
            f"sink must be a torch.Tensor or None, got {type(sink).__name__} ({sink!r}). sink and "
            "sink_layout come right after the tensors (and lengths): pass the arguments that "
            "follow them by name"
        )
    check_sink_layout(sink_layout)


def check_sink_layout(sink_layout: object) -> None:
    """Raise ValueError unless ``sink_layout`` is one of SINK_LAYOUTS."""
    if not isinstance(sink_layout, str) or sink_layout not in SINK_LAYOUTS:
        raise ValueError(f"sink_layout must be one of {SINK_LAYOUTS}, got {sink_layout!r}")


def as_sink(sink: Tensor | None, sink_layout: str, q: Tensor) -> Tensor | None:
    """The checked sink against q (B, T, H, D) or (T, H, D); a sink (H,) as (1, H).

    Raises:
        TypeError, ValueError: layout, shape, dtype or device do not fit.
    """
    check_sink_is_tensor(sink, sink_layout)
    if sink is None:
        return None
    refuse_dtensor("sink", sink)
    allowed = (*SINK_FLOATS, torch.float64) if q.dtype == torch.float64 else SINK_FLOATS
    if sink.dtype not in allowed:
        raise TypeError(f"sink must have a dtype of {_names(allowed)}, got {sink.dtype}")
    if sink.device != q.device:
        raise ValueError(f"sink must be on the device of q ({q.device}), got {sink.device}")
    check_dense("sink", sink)
    given = tuple(sink.shape)
    if sink_layout == "sh" and sink.dim() == 1:
        sink = sink.unsqueeze(0)
    leading = () if sink_layout == "sh" else tuple(q.shape[:-2])
    expected = (*leading, "s_sink >= 1", q.shape[-2])
    matches = sink.dim() == len(expected) and tuple(sink.shape[:-2]) == leading
    if not matches or sink.shape[-1] != q.shape[-2] or sink.shape[-2] < 1:
        text = ", ".join(str(size) for size in expected)
        one = f" or ({q.shape[-2]},)" if sink_layout == "sh" else ""
        raise ValueError(
            f"sink of sink_layout={sink_layout!r} must have shape ({text}){one} for q "
            f"{tuple(q.shape)}, got {given}"
        )
    return sink


# --- Lengths of packed documents ----------------------------------------------------------------


class Lengths(NamedTuple):
    """Checked lengths of packed documents. What the offsets hold is read by :func:`make_varlen`."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None


def make_lengths(
    device: torch.device,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
) -> Lengths | None:
    """The checked :class:`Lengths`, or None if no argument is given.

    Offsets and seqused may be int32 or int64 tensors, NumPy arrays, or sequences of ints. They
    become int32 tensors on ``device``. A max_seqlen may be a 0-dim tensor (reading one from a GPU
    waits for it).

    Raises:
        TypeError, ValueError: one of cu_seqlens is missing, something belongs to cu_seqlens that
            are not given, or a dtype, shape or device does not fit.
    """
    others = {
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "seqused_q": seqused_q,
        "seqused_k": seqused_k,
    }
    if cu_seqlens_q is None and cu_seqlens_k is None:
        for name, value in others.items():
            if value is not None:
                raise ValueError(
                    f"{name} belongs to cu_seqlens_q and cu_seqlens_k, which are not given; got "
                    f"{name}={value}"
                )
        return None
    if cu_seqlens_q is None or cu_seqlens_k is None:
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must be given together, and {missing} is None"
        )
    offsets_q = as_cu_seqlens(cu_seqlens_q, "cu_seqlens_q", device)
    same = cu_seqlens_k is cu_seqlens_q
    offsets_k = offsets_q if same else as_cu_seqlens(cu_seqlens_k, "cu_seqlens_k", device)
    documents = offsets_q.shape[0] - 1
    if offsets_k.shape[0] - 1 != documents:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must name the same number of documents, got "
            f"{documents} and {offsets_k.shape[0] - 1}"
        )
    seqused_q = _as_seqused(seqused_q, "seqused_q", device, documents)
    seqused_k = _as_seqused(seqused_k, "seqused_k", device, documents)
    longest_q = _as_max_seqlen("q", max_seqlen_q)
    longest_k = _as_max_seqlen("k", max_seqlen_k)
    return Lengths(offsets_q, offsets_k, longest_q, longest_k, seqused_q, seqused_k)


def _as_seqused(used: Any, name: str, device: torch.device, documents: int) -> Tensor | None:
    if used is None:
        return None
    used = _as_integers(used, name, device)
    if tuple(used.shape) != (documents,):
        raise ValueError(
            f"{name} must have shape ({documents},), a length for each document, got "
            f"{tuple(used.shape)}"
        )
    # Converted anew in each call: callers write new lengths into the same tensor.
    return used.to(torch.int32)


def _as_max_seqlen(which: str, longest: Any) -> int | None:
    if longest is None:
        return None
    if torch.compiler.is_compiling():  # it may depend on data, and can then not be asked anything
        whole_or_symbol: Any = longest.item() if isinstance(longest, Tensor) else longest
        return whole_or_symbol
    whole = as_int(longest)
    if whole is None or whole < 0:
        raise ValueError(
            f"max_seqlen_{which} must be an int >= 0, the longest document of cu_seqlens_{which}, "
            f"got {longest!r}"
        )
    return whole


def as_cu_seqlens(cu_seqlens: Any, name: str, device: torch.device | None = None) -> Tensor:
    """Offsets as a contiguous int32 tensor; ``device`` must be its own.

    Raises:
        TypeError, ValueError: they cannot be one.
    """
    offsets = _as_integers(cu_seqlens, name, device)
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{name} must have shape (documents + 1,), got {tuple(offsets.shape)}")
    return offsets if offsets.dtype == torch.int32 else _as_int32(offsets)


def _as_integers(values: Any, name: str, device: torch.device | None) -> Tensor:
    """Ints, or a tensor of them, as a contiguous int32 or int64 tensor.

    Numbers on a CPU fit in int32. On a GPU they are not read, as the host would wait.
    """
    if not isinstance(values, Tensor):
        is_array = hasattr(values, "__array__")
        if not is_array and (isinstance(values, str) or not isinstance(values, Sequence)):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(values).__name__}")
        values = _from_numbers(values, name, device)
    if values.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must have dtype torch.int32 or torch.int64, got {values.dtype}")
    if device is not None and values.device != device:
        raise ValueError(f"{name} must be on the device of q ({device}), got {values.device}")
    if not values.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {values.stride()}")
    if values.dtype == torch.int64:
        _check_fits_int32(values, name)
    return values


def _check_fits_int32(values: Tensor, name: str) -> None:
    if torch.compiler.is_compiling() or values.device.type != "cpu" or not values.numel():
        return
    for extreme in torch.aminmax(values):
        if type(extreme) is not Tensor:  # a fake one has no number
            return
        if abs(int(extreme)) > _LARGEST:
            raise ValueError(f"{name} must fit in int32, got {int(extreme)}")


def _from_numbers(values: Any, name: str, device: torch.device | None) -> Tensor:
    """A sequence of ints, or a NumPy array, as a tensor."""
    if hasattr(values, "__array__"):
        values = values.tolist()
    if not isinstance(values, Sequence):
        raise TypeError(f"{name} must hold ints, got {values!r}")
    for entry, value in enumerate(values):
        if as_int(value) is None:
            raise TypeError(f"{name} must hold ints, got {value!r} at entry {entry}")
    numbers_ = [as_int(value) for value in values]
    if any(number is not None and abs(number) > _LARGEST for number in numbers_):
        raise ValueError(f"{name} must fit in int32, got {max(map(abs, numbers_))}")  # type: ignore[arg-type]
    return torch.tensor(numbers_, dtype=torch.int32, device=device or "cpu")


def _as_int32(cu_seqlens: Tensor) -> Tensor:
    """int64 offsets as int32; on a GPU an unchanged tensor is converted once.

    A CUDA graph holds its own conversion, so that a replay reads the offsets of its time.
    """
    if (
        torch.compiler.is_compiling()
        or not cu_seqlens.is_cuda
        or cu_seqlens.is_inference()
        or torch.cuda.is_current_stream_capturing()
    ):
        return cu_seqlens.to(torch.int32)
    version, converted = _converted.get(cu_seqlens, (None, None))
    if converted is None or version != cu_seqlens._version:
        converted = cu_seqlens.to(torch.int32)
        _converted[cu_seqlens] = (cu_seqlens._version, converted)
    return converted


# int64 offsets → (version, int32 offsets). HF passes the same tensor to every layer.
_converted: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# CUDA offsets → (version, contents): copied to the host once, not once a layer.
_host_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def read_cu_seqlens(cu_seqlens: Tensor, name: str, total: int | None) -> tuple[int, ...]:
    """The checked contents of int32 offsets that must run from 0 to ``total``, if that is given.

    A CUDA tensor is copied to the host when it is first seen; unchanged, it costs nothing after
    that. A change that torch does not count (through ``.data``, or in a replayed CUDA graph) is
    not seen.
    """
    return check_offsets(_host_copy(cu_seqlens, name), name, total)


def check_offsets(offsets: tuple[int, ...], name: str, total: int | None) -> tuple[int, ...]:
    """offsets, which must start at 0, never fall, and end at ``total`` tokens, if that is given."""
    if not offsets or offsets[0] != 0:
        raise ValueError(f"{name} must start at 0, got {_shorten(offsets)}")
    for b in range(len(offsets) - 1):
        if offsets[b + 1] < offsets[b]:
            raise ValueError(
                f"{name} must not fall, but entry {b + 1} is {offsets[b + 1]} after {offsets[b]}"
            )
    if total is not None and offsets[-1] != total:
        raise ValueError(f"{name} must end at the number of tokens, {total}, got {offsets[-1]}")
    return offsets


def _host_copy(cu_seqlens: Tensor, name: str) -> tuple[int, ...]:
    # CPU offsets are cheap to read; inference tensors have no version counter.
    if not cu_seqlens.is_cuda or cu_seqlens.is_inference():
        return tuple(cu_seqlens.tolist())
    version, offsets = _host_copies.get(cu_seqlens, (None, ()))
    if version == cu_seqlens._version:
        return offsets
    if torch.cuda.is_current_stream_capturing():
        raise ValueError(
            f"{name} is new and cannot be checked while a CUDA graph is captured: make one call "
            "with this tensor before capture"
        )
    offsets = tuple(cu_seqlens.tolist())
    _host_copies[cu_seqlens] = (cu_seqlens._version, offsets)
    return offsets


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
    """The :class:`Varlen` of packed q and k, after :func:`make_lengths`.

    Args:
        read: check what the offsets hold, also on a GPU (:func:`read_cu_seqlens`). If False, CUDA
            offsets are read only where a max_seqlen is None, and trusted otherwise, as
            FlashAttention does. Offsets on the CPU are always checked.

    Raises:
        ValueError: offsets, max_seqlen or seqused contradict q, k or each other.
    """
    longest = []
    total_k = k.shape[0] if k.dim() == 3 else None  # paged keys do not tell
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
                f"max_seqlen_{name} must be an int >= {actual}, the longest document of "
                f"cu_seqlens_{name}, got {given!r}"
            )
        longest.append(actual if given is None else given)
    for name, used, cu_seqlens in (
        ("seqused_q", seqused_q, cu_seqlens_q),
        ("seqused_k", seqused_k, cu_seqlens_k),
    ):
        if used is None or used.is_cuda:
            continue
        if not bool(((used >= 0) & (used <= cu_seqlens.diff())).all()):
            raise ValueError(
                f"{name} must be from 0 to each document's length {cu_seqlens.diff().tolist()}, "
                f"got {used.tolist()}"
            )
    return Varlen(cu_seqlens_q, cu_seqlens_k, longest[0], longest[1], seqused_q, seqused_k)


# --- Other tensors ------------------------------------------------------------------------------


def check_tensor(
    name: str,
    x: object,
    dtype: torch.dtype,
    shapes: Sequence[tuple[object, ...]],
    device: torch.device,
    meaning: str,
) -> None:
    """Check that x is a contiguous tensor of this dtype and device, with one of ``shapes``.

    A str in a shape stands for any size.
    """
    right = isinstance(x, Tensor) and x.dtype == dtype and x.device == device
    if right and isinstance(x, Tensor) and x.is_contiguous():
        for shape in shapes:
            sizes = zip(x.shape, shape, strict=False)
            if x.dim() == len(shape) and all(isinstance(b, str) or a == b for a, b in sizes):
                return
    texts = (f"({', '.join(map(str, s))}{',' if len(s) == 1 else ''})" for s in shapes)
    raise ValueError(
        f"{name} must be a contiguous {dtype} tensor {' or '.join(texts)} on {device}, {meaning}; "
        f"got {_describe(x)}"
    )


def check_extras(extras: Extras, q: Tensor, k: Tensor, v: Tensor, documents: int) -> None:
    """Check the tensors beside q, k and v, for a batch of, or packed, ``documents``."""
    heads, heads_kv = q.shape[-2], k.shape[-2]
    if extras.qv is not None:
        shapes: tuple[tuple[object, ...], ...] = ((*q.shape[:-1], v.shape[-1]),)
        check_tensor("qv", extras.qv, q.dtype, shapes, q.device, "like q with the head_dim of v")
    for name in ("q_descale", "k_descale", "v_descale"):
        descale = getattr(extras, name)
        if descale is None:
            continue
        if q.dtype != FP8:
            raise ValueError(f"{name} belongs to {FP8} inputs, and these are {q.dtype}")
        meaning = "(batch or documents, key heads)"
        check_tensor(name, descale, torch.float32, ((documents, heads_kv),), q.device, meaning)
    if extras.alibi_slopes is not None:
        shapes = ((heads,), (documents, heads))
        slopes, meaning = extras.alibi_slopes, "a slope a head"
        check_tensor("alibi_slopes", slopes, torch.float32, shapes, q.device, meaning)
    if extras.block_table is not None:
        table, shapes = extras.block_table, ((documents, "blocks"),)
        check_tensor("block_table", table, torch.int32, shapes, q.device, "page numbers")
        if k.shape[1] % 256:
            raise ValueError(
                "FlashAttention-2's pages hold a multiple of 256 keys, got k "
                f"{tuple(k.shape)} (pages, page size, …)"
            )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} on {value.device}"
    return repr(value)


def _shorten(values: Sequence[int]) -> str:
    few = ", ".join(map(str, values[:8]))
    return f"[{few}, …]" if len(values) > 8 else f"[{few}]"


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
