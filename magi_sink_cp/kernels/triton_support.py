"""Triton where it is installed; without it the module still imports, and only launching a kernel raises.

A CPU-only machine need not have Triton: there the torch twins run.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as _error:
    if _error.name != "triton":
        raise

    class _MissingTriton:
        """Stands in for ``triton`` and ``triton.language``: decorates kernels that raise when they are launched."""

        constexpr = object

        def jit(self, kernel: Any = None, **options: Any) -> Any:
            return self if kernel is not None else self.jit

        def __getitem__(self, grid: object) -> object:
            raise ModuleNotFoundError("the kernels for CUDA tensors need triton: `pip install triton`", name="triton")

    triton = tl = _MissingTriton()


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n. (Triton's own is a traced function, ten times as slow on the host.)"""
    return 1 << (n - 1).bit_length()


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of x current, where Triton launches; nothing to do in nearly every call."""
    is_current = not x.is_cuda or x.device.index == torch.cuda.current_device()
    return _NOTHING if is_current else torch.cuda.device_of(x)


_NOTHING = contextlib.nullcontext()

__all__ = ["next_power_of_2", "on_device_of", "tl", "triton"]
