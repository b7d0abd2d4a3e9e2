"""What happens when other ranks do not bring what a GPU waits for.

A blocked GPU stream cannot raise. Neither can a host that NCCL holds until other ranks come (the
first messages between two ranks), or that CUDA holds until the stream drains (a kernel is loaded).
So a thread watches all communication from its start. Streams write words into pinned memory when an
operation is done, and the thread makes no call to CUDA unless something is late.

An operation that is unfinished after nine tenths of the group's timeout is named on stderr. Then,
as the group's ``on_hang`` says, the process is aborted, as NCCL's own watchdog does at the full
timeout; or it goes on. When NCCL reports an error before, as it does over sockets when a process
died, the thread names the unfinished operation at once. torch then ends the process when its flight
recorder is written.
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from magi_sink_cp.dist import driver
from magi_sink_cp.dist.bookkeeping import plain_tensors

_INTERVAL_S = 0.5
_STDERR_S = 2.0
_SLOTS = 1 << 14


ON_HANG = ("abort", "log", "off")


@dataclass(eq=False)
class _Watched:
    """A cp group's backend, what to do when it hangs, and whether an error was reported."""

    backend: object
    on_hang: str = "abort"
    reported: bool = False


@dataclass(eq=False)
class _Expected:
    """A word that a stream will write.

    While there is a ``communication``, the host has not yet told the stream to.
    """

    number: int
    started: float
    timeout_s: float  # the group's when it started; one that is set later is for what starts later
    what: object
    group: _Watched
    communication: weakref.ref[Communication] | None

    def is_late(self, now: float) -> bool:
        """A host may take its time before it waits for what has come."""
        reference = self.communication  # read before the time, which write() sets first
        if now - self.started <= 0.9 * self.timeout_s:
            return False
        if reference is None:
            return True
        communication = reference()
        # NCCL's works count as completed after an error.
        return communication is not None and (
            _error_of(self.group.backend) is not None or not communication.has_come()
        )

    def is_given_up(self) -> bool:
        """This rank will not wait for it: what started it failed otherwise."""
        reference = self.communication
        return reference is not None and reference() is None


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

    def expect(
        self, what: object, group: _Watched, communication: Communication | None = None
    ) -> _Expected:
        with self._lock:
            self._count += 1
            number = self._count & 0x7FFFFFFF
        reference = None if communication is None else weakref.ref(communication)
        expected = _Expected(
            number, time.monotonic(), timeout_s(group.backend), what, group, reference
        )
        self._waiting.append(expected)
        return expected

    def write(self, expected: _Expected, stream: int) -> None:
        """The host is through; from here ``stream`` is waited for."""
        expected.started = time.monotonic()
        try:
            driver.write_flag(
                self._address + 4 * (expected.number % _SLOTS), expected.number, stream
            )
        except BaseException:
            self.drop(expected)
            raise
        expected.communication = None

    def drop(self, expected: _Expected) -> None:
        self._seen[expected.number % _SLOTS] = expected.number

    def _run(self) -> None:
        while not self.stopped.wait(_INTERVAL_S):
            self._look()

    def _look(self) -> None:
        # Before the words are read: what finishes during a long look was not late.
        now = time.monotonic()
        pending = [self._waiting.popleft() for _ in range(len(self._waiting))]
        pending = [expected for expected in pending if not self._through(expected)]
        # In front of what was added meanwhile: the first holds up the rest.
        self._waiting.extendleft(reversed(pending))
        first: dict[_Watched, _Expected] = {}
        for expected in pending:
            first.setdefault(expected.group, expected)
            if expected.is_late(now):
                self._end(expected, now - expected.started)
        for group, expected in first.items():
            if (
                not group.reported
                and (error := _error_of(group.backend))
                and not self._through(expected)
            ):
                group.reported = True
                _report(expected.what, now - expected.started, error)

    def _end(self, expected: _Expected, waited_s: float) -> None:
        if expected.group.on_hang == "abort":
            _abort(expected.what, waited_s)
            return
        if expected.group.on_hang == "log":
            _say(f"{_hangs(expected.what, waited_s)} The job goes on, as on_hang='log' was given.")
        self.drop(expected)  # named once

    def _through(self, expected: _Expected) -> bool:
        """Whether the operation is done.

        Two operations may share a word. The later number then counts for both.
        """
        return (
            expected.is_given_up()
            or (self._seen[expected.number % _SLOTS] - expected.number) & 0x7FFFFFFF < 0x40000000
        )


def _error_of(backend: object) -> str | None:
    """Such as COMM_ERROR; None if the backend has noticed nothing, or is one that does not tell."""
    try:
        error = backend.get_error().name  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        # torch's debug wrapper has the method for backends that have none.
        return None
    return None if error == "SUCCESS" else error


def _report(what: object, waited_s: float, error: str) -> None:
    _say(
        f"{what} has not completed after {waited_s:.1f} s, and the backend of its cp group reports "
        f"{error}: a rank of that group died, hangs, or cannot be reached."
    )


def _hangs(what: object, waited_s: float) -> str:
    return (
        f"{what} did not finish within {waited_s:.0f} s: another rank died, hangs, made other "
        "calls, or skipped a backward."
    )


def _abort(what: object, waited_s: float) -> None:
    _say(
        f"{_hangs(what, waited_s)} This process ends now, because it or its GPU waits for what "
        "will not come."
    )
    os.abort()


def _say(text: str) -> None:
    """Print to stderr, and never let it delay what follows: a blocked or broken stderr is left."""
    speaker = threading.Thread(
        target=print,
        args=(f"magi_sink_cp: {text}",),
        kwargs={"file": sys.stderr, "flush": True},
        daemon=True,
    )
    with contextlib.suppress(RuntimeError):  # no thread can be started
        speaker.start()
        speaker.join(_STDERR_S)


_watchdog: _Watchdog | None = None
_watched: weakref.WeakKeyDictionary[ProcessGroup, _Watched] = weakref.WeakKeyDictionary()


class Communication:
    """What the ranks of a group do together for one purpose, from its start until it is waited for.

    A failure names that purpose, and so does the watchdog after the group's timeout.
    """

    def __init__(
        self,
        what: object,
        group: ProcessGroup,
        on_gpu: bool,
        start: Callable[[], Iterable[dist.Work | None]],
    ) -> None:
        """``start`` starts it; None instead of a Work is an operation that has been waited for."""
        self._what = what
        self._works: list[dist.Work] | None = None
        self._expected: _Expected | None = None
        # CUDA-graph replays are not watched: no host takes part in them.
        if on_gpu and not torch.cuda.is_current_stream_capturing():
            watched = _get_watched(group)
            if watched.on_hang != "off":
                self._expected = _get_watchdog().expect(what, watched, self)
        with self._naming():
            self._works = [work for work in start() if work is not None]

    def wait(self) -> None:
        """Make the current stream (on GPUs) or this thread (on CPUs) wait for it.

        Raises:
            RuntimeError: it failed.
        """
        with self._naming():
            for work in self._works or ():
                work.wait()
        if self._expected is not None:
            _get_watchdog().write(self._expected, torch.cuda.current_stream().cuda_stream)
        self._works = []  # which hold tensors

    def has_come(self) -> bool:
        """Every operation has been started and is through. To be called from any thread."""
        works = self._works
        try:
            return works is not None and all(work.is_completed() for work in works)
        except RuntimeError:  # CUDA itself has failed
            return False

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if self._expected is not None:
                _get_watchdog().drop(self._expected)
            if isinstance(error, RuntimeError):
                raise RuntimeError(
                    f"{self._what} failed; a rank has died, hangs, made other calls, or skipped a "
                    f"backward: {error}"
                ) from error
            raise


def stream_watcher(group: ProcessGroup) -> Callable[[object, int], None]:
    """A function of (what, stream) that expects the stream to come this far within the timeout.

    It does not keep the group alive, and does nothing when the group is gone.
    """
    reference = weakref.ref(_get_watched(group))

    def watch(what: object, stream: int) -> None:
        watched = reference()
        if watched is not None and watched.on_hang != "off":
            watchdog = _get_watchdog()
            watchdog.write(watchdog.expect(what, watched), stream)

    return watch


def set_on_hang(group: ProcessGroup, on_hang: str) -> None:
    """What to do from now on when this group, which has a CUDA backend, hangs."""
    _get_watched(group).on_hang = on_hang


def _get_watchdog() -> _Watchdog:
    global _watchdog
    if _watchdog is None:
        with plain_tensors():
            words = torch.zeros(_SLOTS, dtype=torch.int32, device="cpu", pin_memory=True)
        _watchdog = _Watchdog(words)
    return _watchdog


def _get_watched(group: ProcessGroup) -> _Watched:
    if group not in _watched:
        _watched[group] = _Watched(group._get_backend(torch.device("cuda")))
    return _watched[group]


def timeout_s(backend: object) -> float:
    """The timeout, in seconds, of what a process group's backend starts now."""
    timeout = getattr(getattr(backend, "options", None), "_timeout", None)
    if not isinstance(timeout, datetime.timedelta):
        timeout = dist.constants.default_pg_timeout
    return timeout.total_seconds()
