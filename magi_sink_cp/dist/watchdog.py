"""Ends the process when ranks do not bring what a GPU waits for: a kernel queue that hangs can raise nothing.

After each transfer the stream counts up a word in pinned memory; a thread looks at it, without a call to CUDA. When a transfer is
not through after nine tenths of the group's timeout, it says which, and aborts the process, as NCCL's own watchdog does at the
full timeout without knowing what the message was for.
"""

from __future__ import annotations

import ctypes
import datetime
import os
import sys
import threading
import time
import weakref
from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from magi_sink_cp.dist import driver
from magi_sink_cp.dist.schedule import Exchange

_INTERVAL_S = 0.5
_SLOTS = 1 << 14


class _Watchdog:
    def __init__(self, words: Tensor) -> None:
        """``words``: int32 (_SLOTS,), zero, in memory that both sides see."""
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, float, float, Exchange]] = deque()
        self._count = 0
        self.stopped = threading.Event()
        self._words = words
        self._address = words.data_ptr()
        self._seen = (ctypes.c_uint32 * _SLOTS).from_address(self._address)
        threading.Thread(target=self._run, name="magi_sink_cp watchdog", daemon=True).start()

    def watch(self, exchange: Exchange, timeout_s: float, stream: int) -> None:
        with self._lock:
            self._count += 1
            number = self._count & 0x7FFFFFFF
        driver.write_flag(self._address + 4 * (number % _SLOTS), number, stream)
        self._waiting.append((number, time.monotonic(), timeout_s, exchange))

    def _run(self) -> None:
        while not self.stopped.wait(_INTERVAL_S):
            now = time.monotonic()
            for _ in range(len(self._waiting)):
                number, started, timeout_s, exchange = self._waiting.popleft()
                # Of two transfers that share a word, _SLOTS apart, the later one's number says that both are through.
                if (self._seen[number % _SLOTS] - number) & 0x7FFFFFFF < 0x40000000:
                    continue
                if now - started > 0.9 * timeout_s:
                    _abort(exchange, now - started)
                self._waiting.append((number, started, timeout_s, exchange))


def _abort(exchange: Exchange, waited_s: float) -> None:
    print(
        f"magi_sink_cp: {exchange} did not finish within {waited_s:.0f} s: one of these ranks died, hangs, or made other calls. "
        "This process ends now, because its GPU waits for data that will not come.",
        file=sys.stderr,
        flush=True,
    )
    os.abort()


_watchdog: _Watchdog | None = None
_timeouts: weakref.WeakKeyDictionary[ProcessGroup, float] = weakref.WeakKeyDictionary()


def watch(exchange: Exchange, group: ProcessGroup) -> None:
    """Expect the current stream to come this far within the group's timeout."""
    global _watchdog
    if torch.cuda.is_current_stream_capturing():
        return
    if _watchdog is None:
        _watchdog = _Watchdog(torch.zeros(_SLOTS, dtype=torch.int32, device="cpu", pin_memory=True))
    if group not in _timeouts:
        _timeouts[group] = timeout_of(group).total_seconds()
    _watchdog.watch(exchange, _timeouts[group], torch.cuda.current_stream().cuda_stream)


def timeout_of(group: ProcessGroup) -> datetime.timedelta:
    """What the group was made with."""
    options = getattr(group._get_backend(torch.device("cuda")), "options", None)
    timeout = getattr(options, "_timeout", None)
    return timeout if isinstance(timeout, datetime.timedelta) else dist.constants.default_pg_timeout
