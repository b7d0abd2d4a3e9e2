"""What a rank says when other ranks do not bring what it waits for. A GPU's queue that waits can raise nothing: it is watched.

After each communication the stream counts up a word in pinned memory; a thread looks at it, without a call to CUDA. When one is
not through after nine tenths of the group's timeout, it says which, and aborts the process, as NCCL's own watchdog does at the
full timeout without knowing what the message was for. When NCCL reports an error before, as it does over sockets
when a process died, the thread says at once what was under way; torch then ends the process when its flight recorder is written, if
those nine tenths do not pass first.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from magi_sink_cp.dist import driver

_INTERVAL_S = 0.5
_SLOTS = 1 << 14


@dataclass(eq=False)
class _Watched:
    """A cp group's communication backend, and whether its error was reported."""

    backend: object
    told: bool = False


@dataclass(frozen=True)
class _Expected:
    number: int
    started: float
    timeout_s: float  # the group's at the start; a later one is for what starts later, as in torch
    what: object
    group: _Watched


class _Watchdog:
    def __init__(self, words: Tensor) -> None:
        """``words``: int32 (_SLOTS,), zero, in memory that both sides see."""
        self._lock = threading.Lock()
        self._waiting: deque[_Expected] = deque()
        self._count = 0
        self.stopped = threading.Event()
        self._words = words
        self._address = words.data_ptr()
        self._seen = (ctypes.c_uint32 * _SLOTS).from_address(self._address)
        threading.Thread(target=self._run, name="magi_sink_cp watchdog", daemon=True).start()

    def watch(self, what: object, group: _Watched, stream: int) -> None:
        with self._lock:
            self._count += 1
            number = self._count & 0x7FFFFFFF
        driver.write_flag(self._address + 4 * (number % _SLOTS), number, stream)
        self._waiting.append(_Expected(number, time.monotonic(), _timeout_s(group.backend), what, group))

    def _run(self) -> None:
        while not self.stopped.wait(_INTERVAL_S):
            self._look()

    def _look(self) -> None:
        now = time.monotonic()  # before the words are read: what finishes during a long look was not late
        pending = [self._waiting.popleft() for _ in range(len(self._waiting))]
        pending = [expected for expected in pending if not self._through(expected)]
        self._waiting.extendleft(reversed(pending))  # in front of what was added meanwhile: the first holds up the rest
        first: dict[_Watched, _Expected] = {}
        for expected in pending:
            first.setdefault(expected.group, expected)
            if now - expected.started > 0.9 * expected.timeout_s:
                _abort(expected.what, now - expected.started)
        for group, expected in first.items():
            if not group.told and (error := _error_of(group.backend)) and not self._through(expected):
                group.told = True
                _report(expected.what, now - expected.started, error)

    def _through(self, expected: _Expected) -> bool:
        """Of two transfers that share a word, _SLOTS apart, the later one's number says that both are through."""
        return (self._seen[expected.number % _SLOTS] - expected.number) & 0x7FFFFFFF < 0x40000000


def _error_of(backend: object) -> str | None:
    """Such as COMM_ERROR; None if the backend has noticed nothing, or is one that does not tell."""
    try:
        error = backend.get_error().name  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):  # torch's debug wrapper has the method for backends that have none
        return None
    return None if error == "SUCCESS" else error


def _report(what: object, waited_s: float, error: str) -> None:
    _say(
        f"{what} is not through after {waited_s:.1f} s, and the backend of its cp group reports {error}: "
        "a rank of that group died, hangs, or cannot be reached."
    )


def _abort(what: object, waited_s: float) -> None:
    _say(
        f"{what} did not finish within {waited_s:.0f} s: another rank died, hangs, or made other calls. "
        "This process ends now, because its GPU waits for data that will not come."
    )
    os.abort()


def _say(text: str) -> None:
    with contextlib.suppress(Exception):  # a stderr that is closed, or a user's own: what comes after must come
        print(f"magi_sink_cp: {text}", file=sys.stderr, flush=True)


_watchdog: _Watchdog | None = None
_watched: weakref.WeakKeyDictionary[ProcessGroup, _Watched] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def failing_as(what: object) -> Iterator[None]:
    """Communication that fails or times out in this block says what it was for."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{what} failed; a rank has died, hangs, or made other calls: {error}") from error


@contextlib.contextmanager
def waiting_for(what: object, group: ProcessGroup, on_gpu: bool) -> Iterator[None]:
    """The host, or on a GPU the current stream, waits in this block. What it waits for is named if it does not come."""
    with failing_as(what):
        yield
    if on_gpu:
        watch(what, group)


def watch(what: object, group: ProcessGroup) -> None:
    """Expect the current stream to come this far within the group's timeout."""
    global _watchdog
    if torch.cuda.is_current_stream_capturing():
        return
    if _watchdog is None:
        _watchdog = _Watchdog(torch.zeros(_SLOTS, dtype=torch.int32, device="cpu", pin_memory=True))
    if group not in _watched:
        _watched[group] = _Watched(group._get_backend(torch.device("cuda")))
    _watchdog.watch(what, _watched[group], torch.cuda.current_stream().cuda_stream)


def _timeout_s(backend: object) -> float:
    """That of what the backend starts now."""
    timeout = getattr(getattr(backend, "options", None), "_timeout", None)
    return (timeout if isinstance(timeout, datetime.timedelta) else dist.constants.default_pg_timeout).total_seconds()
