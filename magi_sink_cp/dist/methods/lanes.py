"""Two streams for kernel calls that do not wait for each other.

The processors that the last tiles of one call leave idle start the next call. A call's tiles are
dealt to 132 processors (H200), and until the last tile is done some of them idle: a few percent of
a call over 8k tokens, and as much again for each call that a part of a sequence is cut into
(docs/benchmarks.md). FlashAttention's kernels take a processor's whole shared memory, so two calls
never share one. Taking turns is all they do.
"""

from __future__ import annotations

import contextlib
import functools
from types import TracebackType

import torch

from magi_sink_cp.dist import driver
from magi_sink_cp.dist.transport.base import Transfer


class Lanes:
    """Where the kernel calls of one pass run. Here: all of them on the calling stream.

    A call may read what the calling stream had enqueued when the first call after a :meth:`join`
    was made, and what has arrived (:meth:`arrive`). What it reads must be kept until the next join.
    Use or free its results only after a join. Leaving the ``with`` block joins.
    """

    def __enter__(self) -> Lanes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.join()

    def arrive(self, transfer: Transfer) -> None:
        """Let the calls from here on read what the transfer brings."""
        transfer.wait()

    def turn(self) -> contextlib.AbstractContextManager[object]:
        """Where the next call runs."""
        return contextlib.nullcontext()

    def join(self) -> None:
        """Make the calling stream wait for all calls so far."""


class TwoLanes(Lanes):
    """In turns on the calling stream of the current GPU and on a second stream.

    The second stream reuses only memory that it allocated itself, after a turn has made it wait for
    everything that the calling stream had enqueued, the last reader included. So no tensor needs
    ``record_stream``, which would keep the memory of every layer that the host is ahead of the GPU.
    """

    def __init__(self) -> None:
        self._calling = torch.cuda.current_stream()
        self._beside, self._arrivals = _streams_beside(self._calling)
        self._begun = self._calling.record_event()
        self._turns = 0
        self._joined = True

    def arrive(self, transfer: Transfer) -> None:
        # On a stream of its own, so that neither lane waits for the other's earlier calls.
        self._arrivals.wait_event(self._begun)  # which takes it into a graph that is captured
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
    """Two streams for each calling stream, and for nobody else.

    torch's own streams are handed out again after the 32nd.
    """
    beside, arrivals = (
        torch.cuda.ExternalStream(driver.new_stream(), calling.device) for _ in range(2)
    )
    return beside, arrivals
