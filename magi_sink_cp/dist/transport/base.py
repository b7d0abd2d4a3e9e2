"""What a transport promises: moving keys to the ranks that need them, and their gradients home.

A transport carries out one :class:`~magi_sink_cp.dist.planning.exchange.Exchange` after the other.
Every rank of the group starts the same ones in the same order, as with any collective. p2p.py does
it over torch.distributed; symmetric.py writes to the peers' memory itself.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from magi_sink_cp.dist.planning.exchange import Exchange
from magi_sink_cp.dist.planning.mask import Range

# (tokens of the tensors that are sent, tokens of the buffers) that a rank copies for itself.
OwnCopies = Sequence[tuple[Range, Range]]


class Transfer(ABC):
    """Messages in flight, and the buffers that they fill: one for each tensor that is sent.

    A buffer is (buffer tokens, …). The sent tensors must be left alone until :meth:`release` has
    returned.
    """

    def __init__(self, exchange: Exchange, buffers: list[Tensor]) -> None:
        self.buffers = buffers
        self._exchange = exchange
        self._waited = self._released = False

    def wait(self) -> None:
        """Make the current stream (on GPUs) or this thread (on CPUs) wait for the buffers.

        Raises:
            RuntimeError: called twice, or the messages failed. The text names operation, stage and
                ranks.
        """
        if self._waited:
            raise RuntimeError(f"{self._exchange}: wait() was called twice")
        self._waited = True
        self._wait()

    @abstractmethod
    def _wait(self) -> None: ...

    def release(self) -> None:
        """Give the buffers back, and allow the sent tensors to change.

        Everything that reads the buffers must be enqueued on the current stream before.
        """
        self._released = True
        self._release()
        self.buffers = []

    @abstractmethod
    def _release(self) -> None: ...

    def abandon(self) -> None:
        """After a failure: let the messages finish if they can.

        If all ranks failed alike, they can then go on with other calls.
        """
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

    @property
    def link(self) -> str:
        """Over what the keys travel: a key of planning/cost.py's LINK."""
        return "network"

    @abstractmethod
    def fail(self) -> None:
        """A pass failed on this rank; its transfers have been abandoned."""

    @abstractmethod
    def start(self, tensors: Sequence[Tensor], exchange: Exchange, own: OwnCopies = ()) -> Transfer:
        """Send each tensor's ``exchange.sends`` and receive into the transfer's buffers.

        Args:
            tensors: (tokens, …), dense.
            own: (tokens of the tensors, tokens of the buffers) that this rank copies into its
                buffers.
        """
