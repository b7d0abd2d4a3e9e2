"""Lengths of packed documents: cu_seqlens, seqused and max_seqlen, before any kernel runs.

An error names the argument, what was given, and what is allowed. What has only one meaning is
taken: sequences of ints, NumPy arrays, int64 tensors, 0-dim tensors as max_seqlen.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from magi_sink_cp.kernels.checks import INT32_MAX, as_int, as_ints
from magi_sink_cp.kernels.protocol import Varlen

# int64 offsets → (version, int32 offsets). HF passes the same tensor to every layer.
_converted: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# CUDA offsets → (version, contents): copied to the host once, not once a layer.
_host_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


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
    is_meta = isinstance(longest, Tensor) and longest.is_meta  # it has no number
    whole = None if is_meta else as_int(longest)
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

    Numbers on a CPU fit in int32. On a GPU, and in a compiled graph, they are not read: the host
    would wait.
    """
    if not isinstance(values, Tensor):
        is_array = hasattr(values, "__array__")
        if not is_array and (isinstance(values, str) or not isinstance(values, Sequence)):
            raise TypeError(
                f"{name} must be an int32 or int64 tensor, a NumPy array or a sequence of ints, "
                f"got {type(values).__name__}"
            )
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
    if isinstance(values, FakeTensor):  # it has no numbers
        return
    numbers = values.as_subclass(Tensor).numpy()
    for extreme in (int(numbers.min()), int(numbers.max())):
        if abs(extreme) > INT32_MAX:
            raise ValueError(f"{name} must fit in int32, got {extreme}")


def _from_numbers(values: Any, name: str, device: torch.device | None) -> Tensor:
    """A sequence of ints, or a NumPy array, as a tensor."""
    if hasattr(values, "__array__"):
        values = values.tolist()
    if not isinstance(values, Sequence):
        raise TypeError(f"{name} must hold ints, got {values!r}")
    ints = as_ints(name, values)
    largest = max([0, *map(abs, ints)])  # as Dynamo can trace it
    if largest > INT32_MAX:
        raise ValueError(f"{name} must fit in int32, got {largest}")
    return torch.tensor(ints, dtype=torch.int32, device=device or "cpu")


def _as_int32(cu_seqlens: Tensor) -> Tensor:
    """int64 offsets as int32; on a GPU an unchanged tensor is converted once.

    A CUDA graph holds its own conversion, so that a replay reads the offsets of its time.
    """
    if (
        torch.compiler.is_compiling()
        or not cu_seqlens.is_cuda
        or cu_seqlens.is_inference()
        or torch.is_inference_mode_enabled()  # training could not save what is made here
        or torch.cuda.is_current_stream_capturing()
    ):
        return cu_seqlens.to(torch.int32)
    version, converted = _converted.get(cu_seqlens, (None, None))
    if converted is None or version != cu_seqlens._version:
        converted = cu_seqlens.to(torch.int32)
        _converted[cu_seqlens] = (cu_seqlens._version, converted)
    return converted


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


def _shorten(values: Sequence[int]) -> str:
    few = ", ".join(map(str, values[:8]))
    return f"[{few}, …]" if len(values) > 8 else f"[{few}]"
