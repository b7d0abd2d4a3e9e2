"""The ``nccl`` and ``gloo`` transports: grouped send and receive of torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from magi_sink_cp.dist.guard.agreement import GroupRef
from magi_sink_cp.dist.guard.watchdog import Communication
from magi_sink_cp.dist.planning.exchange import Exchange, Message
from magi_sink_cp.dist.transport.base import OwnCopies, Transfer, Transport


class PointToPoint(Transport):
    """One message for each contiguous range and tensor: nothing is packed.

    NCCL runs them on its own stream, after the work that is already enqueued. Whatever is enqueued
    next overlaps with them.
    """

    def __init__(self, group: ProcessGroup, name: str) -> None:
        self.name = name
        self._group = GroupRef(group)

    def start(self, tensors: Sequence[Tensor], exchange: Exchange, own: OwnCopies = ()) -> Transfer:
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
        """Nothing is left over: ranks match messages by order, and all that started completed."""


class _PointToPointTransfer(Transfer):
    def __init__(
        self,
        exchange: Exchange,
        buffers: list[Tensor],
        operations: list[dist.P2POp],
        group: ProcessGroup,
    ) -> None:
        super().__init__(exchange, buffers)
        self._operations = operations  # keeps the sent tensors alive
        self._communication = None
        if operations:
            on_gpu = operations[0].tensor.is_cuda
            self._communication = Communication(
                exchange, group, on_gpu, lambda: dist.batch_isend_irecv(operations)
            )

    def _wait(self) -> None:
        if self._communication is not None:
            self._communication.wait()
        self._operations = []

    def _release(self) -> None:
        pass


def _operations(
    operation: Callable[..., Any],
    tensors: Sequence[Tensor],
    messages: Sequence[Message],
    group: ProcessGroup,
) -> list[dist.P2POp]:
    numbers: dict[int, int] = {}
    operations = []
    for message in messages:
        lo, hi = message.tokens
        peer = dist.get_global_rank(group, message.peer)
        for x in tensors:
            tag = numbers[message.peer] = numbers.get(message.peer, -1) + 1
            operations.append(dist.P2POp(operation, x[lo:hi], peer, group, tag))
    return operations
