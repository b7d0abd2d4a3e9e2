"""The list of backends and the choice among them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from magi_sink_cp.kernels import fa2, fa3, fa4
from magi_sink_cp.kernels.aten import AtenBackend
from magi_sink_cp.kernels.cpu import CpuBackend
from magi_sink_cp.kernels.fa2 import Fa2Backend
from magi_sink_cp.kernels.fa3 import Fa3Backend
from magi_sink_cp.kernels.fa4 import Fa4Backend
from magi_sink_cp.kernels.protocol import NO_EXTRAS, Backend, Call

logger = logging.getLogger("magi_sink_cp")

# Best first: "auto" takes the first that can run the call, except that fa4 comes first where its kernels add the sink themselves.
_BACKENDS: tuple[Backend, ...] = (Fa3Backend(), Fa4Backend(), Fa2Backend(), AtenBackend(), CpuBackend())
_logged: set[str] = set()
_fallback = False
# The choice for each kind of call that was seen, as asking every backend costs more than launching a small kernel.
_selected: dict[tuple[object, ...], Backend] = {}
_MOST_SELECTED = 4096

_INSTALL_HINTS = {
    "fa3": fa3.INSTALL_HINT,
    "fa4": fa4.INSTALL_HINT,
}
DROP_IN = "drop-in "


@dataclass(frozen=True)
class BackendInfo:
    """One row of :func:`backends`: ``reason`` says why an unavailable backend is not available, else it is empty."""

    name: str
    available: bool
    reason: str


def backends() -> tuple[BackendInfo, ...]:
    """Every backend, best first, with whether this process can use it and why not."""
    return tuple(BackendInfo(b.name, reason is None, reason or "") for b in _BACKENDS for reason in [_unavailable(b)])


def set_fallback(enabled: bool) -> None:
    """Whether fa3_* and fa4_* functions may run on the next backend of :func:`backends` where theirs cannot run; off at first.

    Off, such a call on a GPU raises. CPU tensors always run on the cpu backend, and fa2_* functions on PyTorch's own
    FlashAttention-2 where flash_attn is not installed.

    Raises:
        TypeError: ``enabled`` is not a bool.
    """
    global _fallback
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be a bool, got {enabled!r}")
    _fallback = enabled


def select_backend(name: str, q: Tensor, call: Call, head_dim_v: int | None = None, sink: Tensor | None = None) -> Backend:
    """The backend called ``name``; for "auto" the best one that can run the call; for "drop-in fa3" what fa3_* functions run on.

    Raises:
        ValueError: an unknown name, a named backend that cannot run the call, or no backend that can; the text says why.
    """
    varlen = call.varlen
    used = (False, False) if varlen is None else (varlen.seqused_q is not None, varlen.seqused_k is not None)
    extras = () if call.extras is NO_EXTRAS else tuple(x is not None for x in vars(call.extras).values())
    one_sink = sink is not None and sink.dim() == 2 and sink.shape[0] == 1
    key = (name, q.device, q.dtype, q.shape[-1], head_dim_v, call.params, used, extras, one_sink, _fallback)
    backend = _selected.get(key)
    if backend is None:
        backend = _select(name, q, call, head_dim_v, sink)
        if len(_selected) >= _MOST_SELECTED:
            _selected.clear()
        _selected[key] = backend
    return backend


def _select(name: str, q: Tensor, call: Call, head_dim_v: int | None, sink: Tensor | None) -> Backend:
    if name == "auto":
        return _first(_candidates(sink), q, call, head_dim_v, "no backend can run this call")
    if name.startswith(DROP_IN):
        return _select_drop_in(name.removeprefix(DROP_IN), q, call, head_dim_v)
    for backend in _BACKENDS:
        if backend.name == name:
            if reason := _unavailable(backend):
                raise ValueError(f"backend={name!r} is not available: {reason}")
            if reason := backend.unsupported(q, call, head_dim_v):
                raise ValueError(f"backend={name!r} cannot run this call: {reason}")
            return backend
    raise ValueError(f"backend must be 'auto' or one of {[b.name for b in _BACKENDS]}, got {name!r}")


def adding_sink(backend: Backend, sink: Tensor | None) -> Fa4Backend | None:
    """The backend if its own kernels add this sink: fa4, for one sink a head that is shared by the rows."""
    if isinstance(backend, Fa4Backend) and sink is not None and sink.dim() == 2 and sink.shape[0] == 1:
        return backend
    return None


def _candidates(sink: Tensor | None) -> list[Backend]:
    return sorted(_BACKENDS, key=lambda backend: adding_sink(backend, sink) is None)


def _select_drop_in(family: str, q: Tensor, call: Call, head_dim_v: int | None) -> Backend:
    """fa2: flash_attn if it is installed, else PyTorch's own. fa3, fa4: theirs, then what set_fallback allows. All: CPU tensors."""
    names = [backend.name for backend in _BACKENDS]
    if q.device.type == "cpu":
        allowed: Iterable[str] = ("cpu",)
    elif family == "fa2":
        allowed = ("fa2",) if fa2.is_installed() else ("aten",)
    else:
        allowed = names[names.index(family) :] if _fallback else (family,)
    hint = "" if family == "fa2" or q.device.type == "cpu" or _fallback else (
        f". To get {family}: {_INSTALL_HINTS[family]}. magi_sink_cp.set_fallback(True) allows the next backend"
    )  # fmt: skip
    backends = [backend for backend in _BACKENDS if backend.name in allowed]
    return _first(backends, q, call, head_dim_v, f"no kernel of the {family} functions can run this call", hint)


def _first(candidates: Iterable[Backend], q: Tensor, call: Call, head_dim_v: int | None, failure: str, hint: str = "") -> Backend:
    reasons: list[str] = []
    for backend in candidates:
        reason = _unavailable(backend) or backend.unsupported(q, call, head_dim_v)
        if reason is None:
            _log_choice(backend, "; ".join(reasons))
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise ValueError(f"{failure}: {'; '.join(reasons)}{hint}")


@functools.cache
def _unavailable(backend: Backend) -> str | None:
    return backend.unavailable()


def _log_choice(backend: Backend, passed_over: str) -> None:
    if backend.name in _logged:
        return
    _logged.add(backend.name)
    logger.info("attention runs on %s%s", backend.describe(), f" ({passed_over})" if passed_over else "")
