"""The list of backends and the choice among them."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

from torch import Tensor

from magi_sink_cp.kernels.aten import AtenBackend
from magi_sink_cp.kernels.cpu import CpuBackend
from magi_sink_cp.kernels.fa3 import Fa3Backend
from magi_sink_cp.kernels.protocol import AttentionParams, Backend

logger = logging.getLogger("magi_sink_cp")

# Best first: "auto" takes the first that can run the call.
_BACKENDS: tuple[Backend, ...] = (Fa3Backend(), AtenBackend(), CpuBackend())
_logged: set[str] = set()


@dataclass(frozen=True)
class BackendInfo:
    """One row of :func:`backends`: ``reason`` says why an unavailable backend is not available, else it is empty."""

    name: str
    available: bool
    reason: str


def backends() -> tuple[BackendInfo, ...]:
    """Every backend, best first, with whether this process can use it and why not."""
    return tuple(BackendInfo(b.name, reason is None, reason or "") for b in _BACKENDS for reason in [_unavailable(b)])


def select_backend(name: str, q: Tensor, params: AttentionParams) -> Backend:
    """The backend called ``name``, or for "auto" the best one that can run a call with this q and params.

    Raises:
        ValueError: an unknown name, a named backend that cannot run the call, or no backend that can; the text says why.
    """
    if name == "auto":
        return _select_auto(q, params)
    for backend in _BACKENDS:
        if backend.name == name:
            if reason := _unavailable(backend):
                raise ValueError(f"backend={name!r} is not available: {reason}")
            if reason := backend.unsupported(q, params):
                raise ValueError(f"backend={name!r} cannot run this call: {reason}")
            return backend
    raise ValueError(f"backend must be 'auto' or one of {[b.name for b in _BACKENDS]}, got {name!r}")


def _select_auto(q: Tensor, params: AttentionParams) -> Backend:
    reasons: list[str] = []
    for backend in _BACKENDS:
        reason = _unavailable(backend) or backend.unsupported(q, params)
        if reason is None:
            _log_choice(backend, "; ".join(reasons))
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise ValueError("no backend can run this call: " + "; ".join(reasons))


@functools.cache
def _unavailable(backend: Backend) -> str | None:
    return backend.unavailable()


def _log_choice(backend: Backend, passed_over: str) -> None:
    if backend.name in _logged:
        return
    _logged.add(backend.name)
    logger.info("backend 'auto' is %s%s", backend.describe(), f" ({passed_over})" if passed_over else "")
