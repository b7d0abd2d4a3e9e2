"""Moving keys to the ranks that need them and their gradients home, asynchronously, over torch.distributed (NCCL or gloo).

Both directions are grouped point-to-point messages, one per (tensor, contiguous range), so that nothing is packed or copied on the
way out. NCCL runs them on its own stream after the work that is already enqueued; whatever is enqueued next overlaps with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from magi_sink_cp.dist.layout import RankRanges, pack
from magi_sink_cp.dist.schedule import Stage


class Transfer:
    """Messages in flight and the buffers that they fill.

    The buffers and the sent tensors must be left alone until :meth:`wait` has returned.
    """

    def __init__(self, messages: list[dist.P2POp], received: list[Tensor], what: str) -> None:
        self._received: list[Tensor] | None = received
        self._what = what
        self._sent = messages  # keeps the sent tensors alive
        self._works = dist.batch_isend_irecv(messages) if messages else []

    def wait(self) -> list[Tensor]:
        """Make the current stream (NCCL) or this thread (gloo) wait for the messages; returns the filled buffers.

        Raises:
            RuntimeError: called twice, or the messages failed; the text names the transfer.
        """
        if self._received is None:
            raise RuntimeError(f"{self._what}: wait() was called twice")
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            raise RuntimeError(f"{self._what} failed: {error}") from error
        received, self._received, self._sent, self._works = self._received, None, [], []
        return received


def group_cast(tensors: Sequence[Tensor], stage: Stage, group: ProcessGroup) -> Transfer:
    """Send each tensor's ``stage.send`` ranges to ``stage.send_to`` and receive into new buffers from ``stage.receive_from``.

    tensors are (local tokens, …), dense; the buffers are (received tokens, …).
    """
    buffers = [x.new_empty(stage.received_tokens, *x.shape[1:]) for x in tensors]
    messages = _messages(dist.isend, tensors, stage.send, stage.send_to, group)
    messages += _messages(dist.irecv, buffers, stage.receive, stage.receive_from, group)
    return Transfer(messages, buffers, f"group_cast from cp rank {stage.receive_from} to {stage.send_to}")


def group_reduce(partials: Sequence[Tensor], stage: Stage, group: ProcessGroup) -> Transfer:
    """The way back of :func:`group_cast`: partials (received tokens, …) go to their owner, ``stage.receive_from``.

    The buffers are (sent tokens, …): what ``stage.send_to`` computed for this rank's ``stage.send`` ranges, back to back; adding
    them up is the owner's.
    """
    buffers = [x.new_empty(stage.sent_tokens, *x.shape[1:]) for x in partials]
    messages = _messages(dist.isend, partials, stage.receive, stage.receive_from, group)
    messages += _messages(dist.irecv, buffers, pack(stage.send), stage.send_to, group)
    return Transfer(messages, buffers, f"group_reduce from cp rank {stage.send_to} to {stage.receive_from}")


def _messages(
    operation: Callable[..., object], tensors: Sequence[Tensor], ranges: RankRanges, peer: int, group: ProcessGroup
) -> list[dist.P2POp]:
    pieces = [x[lo:hi] for lo, hi in ranges for x in tensors]
    global_peer = dist.get_global_rank(group, peer)
    return [dist.P2POp(operation, piece, global_peer, group, tag) for tag, piece in enumerate(pieces)]
