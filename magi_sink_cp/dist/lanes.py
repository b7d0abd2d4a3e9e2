"""Two streams for kernel calls that do not wait for each other: the processors that the last tiles of one call leave idle start the
next one.

A call's tiles are dealt out to 132 processors (H200), and until the last of them is done, some have nothing to do: a few percent of
a call over 8k tokens, and as much again for each call that a part of a sequence is cut into. Kernels of FlashAttention take a
processor's whole shared memory, so that two calls do not run on one at once, and in turns is all they do.
"""

from __future__ import annotations

import contextlib
import functools
from types import TracebackType

import torch

from magi_sink_cp.dist import driver
from magi_sink_cp.dist.transport import Transfer


class Lanes:
    """Where the kernel calls of one pass run. One lane: all of them on the calling stream, or on a CPU one after the other.

    A call may read what the calling stream had enqueued when the first call after a :meth:`join` was made, and what has arrived
    (:meth:`arrive`); what it reads must be kept until the next join. What it makes may be read, and let go, where no call has been
    made since a join. Leaving the ``with`` block joins.
    """

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.join()

    def arrive(self, transfer: Transfer) -> None:
        """What the transfer brings may be read by the calls from here on."""
        transfer.wait()

    def turn(self) -> contextlib.AbstractContextManager[object]:
        """Where the next call runs."""
        return contextlib.nullcontext()

    def join(self) -> None:
        """The calling stream waits for all calls so far."""


class TwoLanes(Lanes):
    """In turns on the calling stream of the current GPU and on one beside it.

    Memory that a call beside leaves is used again beside, after a turn has made that stream wait for all that the calling one had
    enqueued, and with it for the last to read it. So no tensor needs ``record_stream``, which would keep the memory of every layer
    that the host is ahead of the GPU.
    """

    def __init__(self) -> None:
        self._calling = torch.cuda.current_stream()
        self._beside, self._arrivals = _streams_beside(self._calling)
        self._begun = self._calling.record_event()
        self._turns = 0
        self._joined = True

    def arrive(self, transfer: Transfer) -> None:
        # On a stream of its own, so that neither lane waits for the other's calls before.
        self._arrivals.wait_event(self._begun)  # which takes it into a graph that is being captured
        with torch.cuda.stream(self._arrivals):
            transfer.wait()
        for lane in (self._calling, self._beside):
            lane.wait_stream(self._arrivals)
        self._joined = False

    def turn(self) -> contextlib.AbstractContextManager[object]:
        if self._turns == 0:
            self._beside.wait_stream(self._calling)
        self._turns += 1
        self._joined = False
        return contextlib.nullcontext() if self._turns % 2 else torch.cuda.stream(self._beside)

    def join(self) -> None:
        if not self._joined:
            self._calling.wait_stream(self._beside)
        self._turns, self._joined = 0, True


@functools.cache
def _streams_beside(calling: torch.cuda.Stream) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Two streams for each that calls, nobody else's: torch's own are dealt out again after the 32nd."""
    beside, arrivals = (torch.cuda.ExternalStream(driver.new_stream(), calling.device) for _ in range(2))
    return beside, arrivals
