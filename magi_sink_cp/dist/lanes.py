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
from torch import Tensor

from magi_sink_cp.dist.transport import Transfer


class Lanes:
    """Where the kernel calls of one pass run. One lane: all of them on the calling stream, or on a CPU one after the other.

    A call may read what the calling stream had enqueued when the first call after a :meth:`join` was made, and what has arrived
    (:meth:`arrive`); what it reads must be kept until the next join, and what it gives (:meth:`give`) may be read after that.
    Leaving the ``with`` block joins.
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

    def give(self, *tensors: Tensor) -> None:
        """These tensors, made in the turn that is under way, are read after the next join."""

    def join(self) -> None:
        """The calling stream waits for all calls so far."""


class TwoLanes(Lanes):
    """In turns on the calling stream of the current GPU and on one beside it."""

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

    def give(self, *tensors: Tensor) -> None:
        if self._turns % 2 == 0:
            for tensor in tensors:
                tensor.record_stream(self._calling)

    def join(self) -> None:
        if not self._joined:
            self._calling.wait_stream(self._beside)
        self._turns, self._joined = 0, True


@functools.lru_cache(maxsize=64)
def _streams_beside(calling: torch.cuda.Stream) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Two streams for each that calls, so that passes on several streams do not wait for each other."""
    return torch.cuda.Stream(calling.device), torch.cuda.Stream(calling.device)
