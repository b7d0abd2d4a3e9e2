"""The list of backends, and the choice among them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from magi_sink_cp.kernels.backends import fa2, fa3, fa4
from magi_sink_cp.kernels.backends.aten import AtenBackend
from magi_sink_cp.kernels.backends.cpu import CpuBackend
from magi_sink_cp.kernels.backends.fa2 import Fa2Backend
from magi_sink_cp.kernels.backends.fa3 import Fa3Backend
from magi_sink_cp.kernels.backends.fa4 import Fa4Backend
from magi_sink_cp.kernels.backends.ffa import FfaBackend
from magi_sink_cp.kernels.caching import BoundedCache
from magi_sink_cp.kernels.protocol import NO_EXTRAS, Backend, KernelRequest

logger = logging.getLogger("magi_sink_cp")

# Best first. "auto" takes the first that can run the call, but prefers fa4 where fa4's own kernels
# add the sink, and never takes ffa, whose kernels are compiled for minutes at their first use.
_BACKENDS: tuple[Backend, ...] = (
    Fa3Backend(),
    Fa4Backend(),
    Fa2Backend(),
    AtenBackend(),
    FfaBackend(),
    CpuBackend(),
)
_BY_NAME = {backend.name: backend for backend in _BACKENDS}
_AUTOMATIC = tuple(backend for backend in _BACKENDS if not isinstance(backend, FfaBackend))
_INSTALL_HINTS = {"fa3": fa3.INSTALL_HINT, "fa4": fa4.INSTALL_HINT}

_fallback = False
_logged: set[str] = set()


class BackendPolicy(NamedTuple):
    """How a call chooses its backend.

    Attributes:
        backend: "auto" or a backend's name.
        drop_in: the call is one of the fa2_*, fa3_* or fa4_* functions, and ``backend`` is its
            family.
        fallback: what :func:`set_fallback` said when the call was made, so that its forward and
            its backward choose alike.
    """

    backend: str
    drop_in: bool = False
    fallback: bool = False


@dataclass(frozen=True)
class BackendInfo:
    """One row of :func:`backends`.

    Attributes:
        name: what ``backend=`` takes.
        available: whether this process can use it.
        reason: why not; empty if it is available.
    """

    name: str
    available: bool
    reason: str


def backends() -> tuple[BackendInfo, ...]:
    """Every backend, best first, with whether this process can use it, and why not.

    Where magi_attention is installed it is imported, which takes seconds.
    """
    rows = ((backend.name, _unavailable(backend)) for backend in _BACKENDS)
    return tuple(BackendInfo(name, reason is None, reason or "") for name, reason in rows)


def set_fallback(enabled: bool) -> None:
    """Allow fa3_* and fa4_* functions to run on another backend where their own cannot run.

    The other one is the next backend of :func:`backends` that can run the call, but never ffa. It
    is off by default: such a call on a GPU raises. CPU tensors always run on the ``cpu`` backend.
    fa2_* functions always run on PyTorch's own FlashAttention-2 if flash_attn is not installed.

    Raises:
        TypeError: ``enabled`` is not a bool.
    """
    global _fallback
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be a bool, got {enabled!r}")
    _fallback = enabled


def drop_in_policy(family: str) -> BackendPolicy:
    """The policy of the fa2_*, fa3_* or fa4_* functions under the current set_fallback."""
    return BackendPolicy(family, drop_in=True, fallback=_fallback)


def check_backend_name(name: str) -> None:
    """Raise ValueError unless ``name`` is "auto" or a backend's name."""
    if name != "auto" and (not isinstance(name, str) or name not in _BY_NAME):
        raise ValueError(f"backend must be 'auto' or one of {list(_BY_NAME)}, got {name!r}")


def select_backend(
    policy: BackendPolicy,
    q: Tensor,
    request: KernelRequest,
    head_dim_v: int | None = None,
    sink: Tensor | None = None,
) -> Backend:
    """The backend that runs this request under ``policy``.

    Raises:
        ValueError: an unknown name, a named backend that cannot run the request, or no backend
            that can. The text says why.
    """
    varlen, extras = request.varlen, request.extras
    used = varlen is not None and (varlen.seqused_q is not None, varlen.seqused_k is not None)
    given = extras is not NO_EXTRAS and tuple(x is not None for x in vars(extras).values())
    key = (
        policy, q.device, q.dtype, q.shape[-1], head_dim_v, request.params, used, given,
        is_one_sink(sink),
    )  # fmt: skip
    backend = _selected.get(key)
    if backend is None:
        backend = _selected[key] = _select(policy, q, request, head_dim_v, sink)
    return backend


# Asking every backend takes longer than launching a small kernel.
_selected: BoundedCache[tuple[object, ...], Backend] = BoundedCache(4096)


def is_one_sink(sink: Tensor | None) -> bool:
    """Whether this is one sink per head that all rows share: what fa4's kernels can add."""
    return sink is not None and sink.dim() == 2 and sink.shape[0] == 1


def adding_sink(backend: Backend, sink: Tensor | None) -> Fa4Backend | None:
    """``backend`` if its own kernels can add this sink."""
    return backend if isinstance(backend, Fa4Backend) and is_one_sink(sink) else None


def find_adding_sink(
    name: str, q: Tensor, request: KernelRequest, sink: Tensor | None
) -> Fa4Backend | None:
    """The backend whose kernels can add this sink to this request, or None.

    Only backends that ``name`` allows are asked: all for "auto". This does not select it.
    """
    for backend in _BACKENDS:
        adding = adding_sink(backend, sink) if name in ("auto", backend.name) else None
        if adding is not None and _why_not(adding, q, request) is None:
            return adding
    return None


def log_choice(backend: Backend, passed_over: str = "") -> None:
    """Log, once in a process, that it uses this backend."""
    if backend.name not in _logged:
        _logged.add(backend.name)
        why = f" ({passed_over})" if passed_over else ""
        logger.info("attention runs on %s%s", backend.describe(), why)


def _select(
    policy: BackendPolicy,
    q: Tensor,
    request: KernelRequest,
    head_dim_v: int | None,
    sink: Tensor | None,
) -> Backend:
    name = policy.backend
    if policy.drop_in:
        return _select_drop_in(policy, q, request, head_dim_v)
    if name == "auto":
        candidates = sorted(_AUTOMATIC, key=lambda backend: adding_sink(backend, sink) is None)
        return _first(candidates, q, request, head_dim_v, "no backend can run this call")
    check_backend_name(name)
    backend = _BY_NAME[name]
    if reason := _unavailable(backend):
        raise ValueError(f"backend={name!r} is not available: {reason}")
    if reason := backend.unsupported(q, request, head_dim_v):
        raise ValueError(f"backend={name!r} cannot run this call: {reason}")
    return backend


def _select_drop_in(
    policy: BackendPolicy, q: Tensor, request: KernelRequest, head_dim_v: int | None
) -> Backend:
    """The backend of a drop-in function: cpu, the family's own, or the fallback.

    The family fa2 is flash_attn where it is installed, else PyTorch's FlashAttention-2.
    """
    family = policy.backend
    failure = f"no kernel of the {family} functions can run this call"
    if q.device.type == "cpu":
        return _first([_BY_NAME["cpu"]], q, request, head_dim_v, failure)
    if family == "fa2":
        if fa2.is_installed():
            return _first([_BY_NAME["fa2"]], q, request, head_dim_v, failure)
        hint = (
            "The flash_attn package, 2.7 or 2.8, has softcap, alibi_slopes and block_table, and "
            "is not installed"
        )
        return _first([_BY_NAME["aten"]], q, request, head_dim_v, failure, hint)
    own = _BY_NAME[family]
    if policy.fallback:
        others = (backend for backend in _AUTOMATIC if backend is not own)
        return _first([own, *others], q, request, head_dim_v, failure)
    install = f"To get {family}: {_INSTALL_HINTS[family]}. " if _unavailable(own) else ""
    hint = f"{install}magi_sink_cp.set_fallback(True) allows the next backend"
    return _first([own], q, request, head_dim_v, failure, hint)


def _first(
    candidates: Iterable[Backend],
    q: Tensor,
    request: KernelRequest,
    head_dim_v: int | None,
    failure: str,
    hint: str = "",
) -> Backend:
    """The first candidate that can run the request; ValueError with every reason if none can."""
    reasons: list[str] = []
    for backend in candidates:
        reason = _why_not(backend, q, request, head_dim_v)
        if reason is None:
            log_choice(backend, "; ".join(reasons))
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise ValueError(f"{failure}: {'; '.join(reasons)}{'. ' if hint else ''}{hint}")


def _why_not(
    backend: Backend, q: Tensor, request: KernelRequest, head_dim_v: int | None = None
) -> str | None:
    return _unavailable(backend) or backend.unsupported(q, request, head_dim_v)


@functools.cache
def _unavailable(backend: Backend) -> str | None:
    return backend.unavailable()
