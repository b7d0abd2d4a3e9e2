"""What a schedule consists of: messages, exchanges, stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from magi_sink_cp.dist.planning.mask import Range
from magi_sink_cp.dist.planning.packing import KernelCall


class Message(NamedTuple):
    """Tokens to or from another cp rank.

    Attributes:
        peer: the other cp rank.
        tokens: a range of the tensor that is sent, or of the buffer that receives.
    """

    peer: int
    tokens: Range


@dataclass(frozen=True)
class Route:
    """What a rank must know of the others' buffers to write into them.

    The buffers of exchanges that can be in flight at once stand side by side in an arena, at the
    same place on every rank.

    Attributes:
        places: for each of the exchange's sends, the token of the peer's buffer where it begins.
        parts: tokens of each part of the arena: the largest buffer of any rank.
        part: index of the part that the exchange fills.
    """

    places: tuple[int, ...]
    parts: tuple[int, ...]
    part: int


@dataclass(frozen=True)
class Exchange:
    """What a rank sends and receives at once. Both peers list their messages in the same order.

    Attributes:
        name: what errors call it.
        sends, receives: the messages.
        buffer_tokens: size of the buffer that receives.
        route: only for transports that need it.
    """

    name: str
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]
    buffer_tokens: int
    route: Route | None = None

    @property
    def sent_tokens(self) -> int:
        return sum(m.tokens[1] - m.tokens[0] for m in self.sends)

    @property
    def received_tokens(self) -> int:
        return sum(m.tokens[1] - m.tokens[0] for m in self.receives)

    def __str__(self) -> str:
        sources = sorted({m.peer for m in self.receives})
        targets = sorted({m.peer for m in self.sends})
        return f"{self.name} (from cp ranks {sources}, to cp ranks {targets})"


@dataclass(frozen=True)
class Stage:
    """Keys that come together, and the kernel calls over them.

    Attributes:
        local: it reads the rank's own keys in place; nothing travels, on any rank.
        calls: the kernel calls.
        cast: brings the other ranks' keys into the buffer.
        own: (local keys, their place in the buffer), if the stage reads own keys beside others'.
        reduce: brings home the gradients that other ranks computed for what this one sent, back to
            back in the order of ``cast.sends``.
    """

    local: bool
    calls: tuple[KernelCall, ...]
    cast: Exchange
    own: tuple[tuple[Range, Range], ...]
    reduce: Exchange


@dataclass(frozen=True)
class Schedule:
    """All stages of one rank under one mask, in order.

    Attributes:
        stages: the stages.
        owned: sorted disjoint ranges of rows that a call of some stage owns. Other rows get 0, and
            what calls add that own no rows.
    """

    stages: tuple[Stage, ...]
    owned: tuple[Range, ...]

    @property
    def sent_tokens(self) -> int:
        return sum(stage.cast.sent_tokens for stage in self.stages)

    @property
    def received_tokens(self) -> int:
        return sum(stage.cast.received_tokens for stage in self.stages)

    @property
    def kernel_calls(self) -> list[KernelCall]:
        return [call for stage in self.stages for call in stage.calls]
