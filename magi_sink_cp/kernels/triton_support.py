"""Triton where it is installed. Without it the module imports, and launching a kernel raises.

A CPU-only machine need not have Triton: there the torch twins run.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from magi_sink_cp.kernels.caching import BoundedCache

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as _error:
    if _error.name != "triton":
        raise

    class _MissingTriton:
        """Stands in for ``triton`` and ``triton.language``.

        Decorates kernels that raise when they are launched.
        """

        constexpr = object

        def jit(self, kernel: Any = None, **options: Any) -> Any:
            return self if kernel is not None else self.jit

        def __getitem__(self, grid: object) -> object:
            raise ModuleNotFoundError(
                "the kernels for CUDA tensors need triton: `pip install triton`", name="triton"
            )

    triton = tl = _MissingTriton()


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n.

    (Triton's own is a traced function, ten times as slow on the host.)
    """
    return 1 << (n - 1).bit_length()


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of x current, where Triton launches; nothing to do in nearly every call."""
    is_current = not x.is_cuda or x.device.index == torch.cuda.current_device()
    return _NOTHING if is_current else torch.cuda.device_of(x)


_NOTHING = contextlib.nullcontext()


class Launcher:
    """Launches a Triton kernel, and remembers what was compiled for each kind of call.

    Triton's own look-up takes 12 µs of the host in each launch (docs/benchmarks.md). A call's kind
    must settle everything that Triton compiles for: ``kind``, and what :func:`pointer` says of
    every tensor.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        # Token counts are part of a kind, through the strides.
        self._compiled: BoundedCache[tuple[object, ...], Any] = BoundedCache(4096)

    def __call__(
        self, grid: int, kind: tuple[object, ...], arguments: tuple[object, ...], num_warps: int = 4
    ) -> None:
        """Run ``grid`` programs over ``arguments``, which are all of the kernel's, by position."""
        compiled = self._compiled.get(kind)
        if compiled is not None:
            compiled[grid, 1, 1](*arguments)
            return
        compiled = self._kernel[grid, 1, 1](*arguments, num_warps=num_warps)
        if compiled is not None:  # the interpreter compiles nothing
            self._compiled[kind] = compiled


def pointer(x: Tensor | None) -> tuple[torch.dtype, bool] | None:
    """What Triton compiles for in a tensor argument.

    Dtype, and whether its memory is aligned to 16 bytes.
    """
    return None if x is None else (x.dtype, x.data_ptr() % 16 == 0)


def unspecial(value: int) -> int:
    """Encode an int in a tuple argument so that Triton does not specialise on it.

    Triton specialises 1 and multiples of 16, also where do_not_specialize names the tuple. Decode
    in the kernel with ``>> 4``.
    """
    return 16 * value + 3


# Values below this are 32-bit ints also after unspecial().
UNSPECIAL_LIMIT = 1 << 27

__all__ = [
    "UNSPECIAL_LIMIT",
    "Launcher",
    "next_power_of_2",
    "on_device_of",
    "pointer",
    "tl",
    "triton",
    "unspecial",
]
