"""Moving keys to the ranks that need them and their gradients home, asynchronously.

A transport carries out one :class:`~magi_sink_cp.dist.schedule.Exchange` after the other: every rank of the group starts the same
ones in the same order, as with any collective. :class:`PointToPoint` does it over torch.distributed (NCCL or gloo);
``symmetric.py`` writes to the peers' memory itself.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from magi_sink_cp.dist.agreement import GroupRef
from magi_sink_cp.dist.layout import Range
from magi_sink_cp.dist.schedule import Exchange, Message
from magi_sink_cp.dist.watchdog import Communication

Own = Sequence[tuple[Range, Range]]


class Transfer(ABC):
    """Messages in flight and the buffers that they fill, one for each tensor sent: (buffer tokens, …).

    The sent tensors must be left alone until :meth:`release` has returned.
    """

    def __init__(self, exchange: Exchange, buffers: list[Tensor]) -> None:
        self.buffers = buffers
        self._exchange = exchange
        self._waited = self._released = False

    def wait(self) -> None:
        """Make the current stream (on GPUs) or this thread (on CPUs) wait for what fills the buffers.

        Raises:
            RuntimeError: called twice, or the messages failed; the text names operation, stage and ranks.
        """
        if self._waited:
            raise RuntimeError(f"{self._exchange}: wait() was called twice")
        self._waited = True
        self._wait()

    @abstractmethod
    def _wait(self) -> None: ...

    def release(self) -> None:
        """Everything that reads the buffers is enqueued on the current stream, and what comes next may change what was sent."""
        self._released = True
        self._release()
        self.buffers = []

    @abstractmethod
    def _release(self) -> None: ...

    def abandon(self) -> None:
        """After a failure: let the messages finish if they can, so that the ranks, if all of them failed, can go on."""
        with contextlib.suppress(RuntimeError):
            if not self._waited:
                self.wait()
        with contextlib.suppress(RuntimeError):
            if not self._released:
                self.release()


class Transport(ABC):
    """How the ranks of one group reach each other."""

    name: str
    # Whether start() needs the exchange's route.
    needs_route = False

    @abstractmethod
    def fail(self) -> None:
        """A pass failed on this rank; its transfers have been abandoned."""

    @abstractmethod
    def start(self, tensors: Sequence[Tensor], exchange: Exchange, own: Own = ()) -> Transfer:
        """Send each tensor's ``exchange.sends`` and receive into the transfer's buffers. tensors are (tokens, …), dense.

        ``own``: (tokens of the tensors, tokens of the buffers) that this rank puts into its buffers itself.
        """


class PointToPoint(Transport):
    """Grouped send and receive of torch.distributed, one message for each contiguous range and tensor: nothing is packed.

    NCCL runs them on its own stream after the work that is already enqueued; whatever is enqueued next overlaps with them.
    """

    def __init__(self, group: ProcessGroup, name: str) -> None:
        self.name = name
        self._group = GroupRef(group)

    def start(self, tensors: Sequence[Tensor], exchange: Exchange, own: Own = ()) -> Transfer:
        buffers = [x.new_empty(exchange.buffer_tokens, *x.shape[1:]) for x in tensors]
        group = self._group()
        operations = _operations(dist.irecv, buffers, exchange.receives, group)
        operations += _operations(dist.isend, tensors, exchange.sends, group)
        transfer = _PointToPointTransfer(exchange, buffers, operations, group)
        for (lo, hi), (start, stop) in own:
            for x, buffer in zip(tensors, buffers, strict=True):
                buffer[start:stop].copy_(x[lo:hi])
        return transfer

    def fail(self) -> None:
        """Nothing is left: the messages between two ranks are matched by their order, and all that were started are through."""


class _PointToPointTransfer(Transfer):
    def __init__(self, exchange: Exchange, buffers: list[Tensor], operations: list[dist.P2POp], group: ProcessGroup) -> None:
        super().__init__(exchange, buffers)
        self._operations = operations  # keeps the sent tensors alive
        self._communication = None
        if operations:
            on_gpu = operations[0].tensor.is_cuda
            self._communication = Communication(exchange, group, on_gpu, lambda: dist.batch_isend_irecv(operations))

    def _wait(self) -> None:
        if self._communication is not None:
            self._communication.wait()
        self._operations = []

    def _release(self) -> None:
        pass


def _operations(
    operation: Callable[..., Any], tensors: Sequence[Tensor], messages: Sequence[Message], group: ProcessGroup
) -> list[dist.P2POp]:
    numbers: dict[int, int] = {}
    operations = []
    for message in messages:
        lo, hi = message.tokens
        for x in tensors:
            tag = numbers[message.peer] = numbers.get(message.peer, -1) + 1
            operations.append(dist.P2POp(operation, x[lo:hi], dist.get_global_rank(group, message.peer), group, tag))
    return operations
