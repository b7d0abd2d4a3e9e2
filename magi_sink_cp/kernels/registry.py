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
_NAMES = tuple(backend.name for backend in _BACKENDS)
_logged: set[str] = set()
_fallback = False
# The choice for each kind of call that was seen, as asking every backend costs more than launching a small kernel.
_selected: dict[tuple[object, ...], Backend] = {}
_MOST_SELECTED = 4096

_INSTALL_HINTS = {
    "fa3": fa3.INSTALL_HINT,
    "fa4": fa4.INSTALL_HINT,
}
_DROP_IN, _WITH_FALLBACK = "drop-in ", " with fallback"


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
    """The backend called ``name``; for "auto" the best one that can run the call; what :func:`drop_in_backend` stands for.

    Raises:
        ValueError: an unknown name, a named backend that cannot run the call, or no backend that can; the text says why.
    """
    varlen = call.varlen
    used = (False, False) if varlen is None else (varlen.seqused_q is not None, varlen.seqused_k is not None)
    extras = () if call.extras is NO_EXTRAS else tuple(x is not None for x in vars(call.extras).values())
    one_sink = sink is not None and sink.dim() == 2 and sink.shape[0] == 1
    key = (name, q.device, q.dtype, q.shape[-1], head_dim_v, call.params, used, extras, one_sink)
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
    if name.startswith(_DROP_IN):
        return _select_drop_in(name, q, call, head_dim_v)
    check_backend_name(name)
    backend = next(backend for backend in _BACKENDS if backend.name == name)
    if reason := _unavailable(backend):
        raise ValueError(f"backend={name!r} is not available: {reason}")
    if reason := backend.unsupported(q, call, head_dim_v):
        raise ValueError(f"backend={name!r} cannot run this call: {reason}")
    return backend


def adding_sink(backend: Backend, sink: Tensor | None) -> Fa4Backend | None:
    """The backend if its own kernels add this sink: fa4, for one sink a head that is shared by the rows."""
    if isinstance(backend, Fa4Backend) and sink is not None and sink.dim() == 2 and sink.shape[0] == 1:
        return backend
    return None


def find_adding_sink(name: str, q: Tensor, call: Call, sink: Tensor | None) -> Fa4Backend | None:
    """The backend whose kernels can add this sink to this call, if ``name`` is "auto" or its own. It is not chosen by that."""
    for backend in _BACKENDS:
        adding = adding_sink(backend, sink) if name in ("auto", backend.name) else None
        if adding is not None and _unavailable(adding) is None and adding.unsupported(q, call) is None:
            return adding
    return None


def _candidates(sink: Tensor | None) -> list[Backend]:
    return sorted(_BACKENDS, key=lambda backend: adding_sink(backend, sink) is None)


def drop_in_backend(family: str) -> str:
    """What to call :func:`select_backend` with for fa2_*, fa3_* or fa4_* functions, under the present set_fallback.

    It is asked once a call, so that forward and backward choose the same.
    """
    return f"{_DROP_IN}{family}{_WITH_FALLBACK if _fallback else ''}"


def check_backend_name(name: str) -> None:
    """Raises ValueError unless ``name`` is "auto" or that of a backend."""
    if name != "auto" and name not in _NAMES:
        raise ValueError(f"backend must be 'auto' or one of {list(_NAMES)}, got {name!r}")


def _select_drop_in(name: str, q: Tensor, call: Call, head_dim_v: int | None) -> Backend:
    """fa2: flash_attn if it is installed, else PyTorch's own. fa3, fa4: theirs, then what set_fallback allows. All: CPU tensors."""
    family, fallback = name.removeprefix(_DROP_IN).removesuffix(_WITH_FALLBACK), name.endswith(_WITH_FALLBACK)
    by_name = {backend.name: backend for backend in _BACKENDS}
    failure = f"no kernel of the {family} functions can run this call"
    if q.device.type == "cpu":
        return _first([by_name["cpu"]], q, call, head_dim_v, failure)
    if family == "fa2":
        if fa2.is_installed():
            return _first([by_name["fa2"]], q, call, head_dim_v, failure)
        hint = "The flash_attn package, 2.7 or 2.8, has softcap, alibi_slopes and block_table, and is not installed"
        return _first([by_name["aten"]], q, call, head_dim_v, failure, hint)
    own = by_name[family]
    if fallback:
        return _first([own, *(backend for backend in _BACKENDS if backend is not own)], q, call, head_dim_v, failure)
    hint = f"To get {family}: {_INSTALL_HINTS[family]}. " if _unavailable(own) else ""
    return _first([own], q, call, head_dim_v, failure, f"{hint}magi_sink_cp.set_fallback(True) allows the next backend")


def _first(candidates: Iterable[Backend], q: Tensor, call: Call, head_dim_v: int | None, failure: str, hint: str = "") -> Backend:
    reasons: list[str] = []
    for backend in candidates:
        reason = _unavailable(backend) or backend.unsupported(q, call, head_dim_v)
        if reason is None:
            log_choice(backend, "; ".join(reasons))
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise ValueError(f"{failure}: {'; '.join(reasons)}{'. ' if hint else ''}{hint}")


@functools.cache
def _unavailable(backend: Backend) -> str | None:
    return backend.unavailable()


def log_choice(backend: Backend, passed_over: str = "") -> None:
    """Say once in a process that it has come to use this backend."""
    if backend.name in _logged:
        return
    _logged.add(backend.name)
    logger.info("attention runs on %s%s", backend.describe(), f" ({passed_over})" if passed_over else "")
