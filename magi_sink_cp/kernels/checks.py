"""Checks of user input, before any kernel or collective runs.

An error names the argument, what was given, and what is allowed. What has only one meaning is
taken: NumPy numbers, None in a window. Lengths of packed documents are checked in lengths.py. This
file imports only protocol.py.
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from magi_sink_cp.kernels.protocol import FP8, AttentionParams, Extras

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SINK_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
SINK_LAYOUTS = ("sh", "ssh")
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
INT32_MAX = 2**31 - 1

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


def as_ints(name: str, values: Sequence[object]) -> tuple[int, ...]:
    """Each of values as an int.

    Raises:
        TypeError: one is none; it says which.
    """
    ints = []
    for entry, value in enumerate(values):
        number = as_int(value)
        if number is None:
            raise TypeError(f"{name} must hold ints, got {value!r} at entry {entry}")
        ints.append(number)
    return tuple(ints)


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


def window_limits(window_size: Any, name: str = "window_size") -> tuple[int, int]:
    """(left, right) of a window_size; None becomes -1, unlimited. ``name`` is what an error names.

    Raises:
        ValueError: it is not two ints from -1 on, or None.
    """
    if type(window_size) is tuple and len(window_size) == 2:
        left, right = window_size
        ints = type(left) is int and type(right) is int
        if ints and -1 <= left <= INT32_MAX and -1 <= right <= INT32_MAX:
            return left, right
    pair = window_size
    if not isinstance(pair, Sequence) and hasattr(pair, "tolist"):  # a tensor or a NumPy array
        pair = pair.tolist()
    if isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2:
        limits = [-1 if limit is None else as_int(limit) for limit in pair]
        if all(limit is not None and -1 <= limit <= INT32_MAX for limit in limits):
            return limits[0], limits[1]  # type: ignore[return-value]
    raise ValueError(
        f"{name} must be two ints (left, right) from -1, unlimited, to 2^31 - 1, got "
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
        if whole is None or not 0 <= whole <= INT32_MAX:
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


def is_dtensor(x: Tensor) -> bool:
    """Whether x is a DTensor: told by its attributes, as torch may have no distributed package."""
    return type(x) not in PLAIN_TENSORS and hasattr(x, "placements") and hasattr(x, "device_mesh")


def refuse_dtensor(name: str, x: Tensor) -> None:
    """Raise TypeError for a DTensor, whose local part alone is what kernels can read."""
    if is_dtensor(x):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor with placements {x.placements}. Pass "  # type: ignore[attr-defined]
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


def own_heads(sink: Tensor, q: Tensor) -> Tensor:
    """This rank's part of a DTensor whose heads are sharded as q's are, by tensor parallelism.

    Every other sink comes back as it is: of a replicated DTensor nobody here can tell whether its
    gradient is whole on each rank or a part of the sum.
    """
    if not is_dtensor(sink) or not isinstance(q, Tensor) or q.dim() < 2:
        return sink
    heads = sink.dim() - 1
    by_heads = all(x.is_shard() and x.dim == heads for x in sink.placements)  # type: ignore[attr-defined]
    if by_heads and sink.to_local().shape[-1] == q.shape[-2]:  # type: ignore[attr-defined]
        local: Tensor = sink.to_local()  # type: ignore[attr-defined]
        return local
    return sink


def as_sink(sink: Tensor | None, sink_layout: str, q: Tensor) -> Tensor | None:
    """The checked sink against q (B, T, H, D) or (T, H, D); a sink (H,) as (1, H).

    Raises:
        TypeError, ValueError: layout, shape, dtype or device do not fit.
    """
    check_sink_is_tensor(sink, sink_layout)
    if sink is None:
        return None
    sink = own_heads(sink, q)
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


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
