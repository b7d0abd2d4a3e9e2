"""Triton where it is installed; without it the module still imports, and only launching a kernel raises.

A CPU-only machine need not have Triton: there the torch twins run.
"""

from __future__ import annotations

from typing import Any

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

        next_power_of_2 = cdiv = staticmethod(lambda *_: 1)

    triton = tl = _MissingTriton()

__all__ = ["tl", "triton"]
