"""The ``symm_mem`` transport: copies into the peers' memory over NVLink, by copy engines.

They leave the SMs to the attention. PyTorch's symmetric memory gives every rank of a host the
addresses of the others' *arena*, a buffer of one size on all of them. Exchange n (every rank counts
alike) uses a part of it, and two flags for each pair of ranks:

    receiver:  when nothing reads that part any more: ready[receiver → sender] = n
    sender:    when its tensors are there and ready ≥ n: copy, then arrived[sender → receiver] = n
    receiver:  wait() holds the calling stream until arrived ≥ n; release() notes when the part is
               free again

The streams themselves write and await flags (driver.py), so the host never waits. Hosts exchange
nothing unless the arena grows. All copies go through one stream, in the order of the calls.
Exchange n depends on earlier exchanges alone, whatever streams the calls come from. So there is no
cycle and no deadlock. No multicast is used.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor
from torch.distributed import ProcessGroup

from magi_sink_cp.dist import driver
from magi_sink_cp.dist.guard.agreement import GroupRef, collect
from magi_sink_cp.dist.guard.watchdog import Communication, stream_watcher
from magi_sink_cp.dist.planning.exchange import Exchange
from magi_sink_cp.dist.transport.base import OwnCopies, Transfer, Transport
from magi_sink_cp.dist.transport.rendezvous import rendezvous
from magi_sink_cp.kernels.caching import BoundedCache
from magi_sink_cp.kernels.protocol import NotUsableError

_READY, _ARRIVED = 0, 1
# A cache line for each flag, so that two peers' writes do not meet.
_FLAG_BYTES = 128
# The alignment that CUDA kernels prefer.
_ALIGNMENT = 256
_GRANULE = 2 << 20
_SETTING_UP = "symmetric memory: setting it up over the cp group"
_MOST_VIEWS = 128


class Arena(Protocol):
    """Memory of one size on every rank: this rank's as bytes, and everybody's addresses."""

    @property
    def buffer(self) -> Tensor: ...
    @property
    def addresses(self) -> Sequence[int]: ...


class Streams(Protocol):
    """The stream-ordered operations of the protocol. Tests without a GPU bring their own."""

    def check(self) -> None: ...
    def allocate(self, num_bytes: int) -> Arena: ...
    def calling(self) -> int: ...
    def copying(self) -> int: ...
    def copying_own(self) -> int: ...
    def record(self, stream: int) -> object: ...
    def wait(self, stream: int, event: object) -> None: ...
    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None: ...
    def write_flag(self, address: int, value: int, stream: int) -> None: ...
    def wait_flag(self, address: int, value: int, stream: int) -> None: ...
    def watch(self, exchange: Exchange, stream: int) -> None: ...
    def idle(self) -> None: ...


class _Copied(NamedTuple):
    """Tensors that travel, where their buffers begin in the arena, and the bytes of one token."""

    tensors: Sequence[Tensor]
    offsets: Sequence[int]
    token_bytes: Sequence[int]


@dataclass
class _Part:
    """Bytes [begin, end) of the arena. They are free after the event ``free``.

    ``free`` is None until the transfer is released.
    """

    begin: int
    end: int
    free: object | None


class SymmetricMemory(Transport):
    """The protocol above for one group.

    All plans, layers and steps share its arena, which grows with the largest need.
    """

    name = "symm_mem"
    needs_route = True

    def __init__(
        self, rank: int, cp_size: int, streams: Streams, missing_nvlink: str | None = None
    ) -> None:
        # Why copies go another way than NVLink, or None. Equal on all ranks.
        self.missing_nvlink = missing_nvlink
        self._rank = rank
        self._streams = streams
        self._lock = threading.Lock()
        self._flag_bytes = _aligned(2 * cp_size * _FLAG_BYTES)
        self._arena = streams.allocate(max(self._flag_bytes, _GRANULE))
        self._count = 0
        self._failed = False
        self._parts: list[_Part] = []
        # Packed documents make buffers of ever new sizes.
        self._views: BoundedCache[tuple[object, ...], Tensor] = BoundedCache(_MOST_VIEWS)

    @property
    def link(self) -> str:
        return "nvlink" if self.missing_nvlink is None else "network"

    @property
    def num_bytes(self) -> int:
        """Size of this rank's arena."""
        return self._arena.buffer.numel()

    @property
    def exchanges(self) -> int:
        """How many exchanges this rank has started."""
        return self._count

    def fail(self) -> None:
        # Other ranks may have started more exchanges: their next number would be another one.
        self._failed = True

    @property
    def has_failed(self) -> bool:
        """A pass failed on this rank since the last :meth:`resume`."""
        return self._failed

    def resume(self) -> None:
        """All ranks are known to have started as many exchanges."""
        self._failed = False

    def start(self, tensors: Sequence[Tensor], exchange: Exchange, own: OwnCopies = ()) -> Transfer:
        route, streams = exchange.route, self._streams
        streams.check()
        assert route is not None, "schedules have routes for transports that need them"
        if self._failed:
            raise RuntimeError(
                "an earlier call over this cp group failed on this rank, and the ranks may be out "
                "of step: make a new plan with make_cp_plan on every rank, which finds out"
            )
        token_bytes = [x.element_size() * math.prod(x.shape[1:]) for x in tensors]
        part_bytes = [
            sum(_aligned(tokens * each) for each in token_bytes) for tokens in route.parts
        ]
        with self._lock:
            self._grow(self._flag_bytes + sum(part_bytes))
            self._count += 1
            begin = self._flag_bytes + sum(part_bytes[: route.part])
            part = self._take(begin, begin + part_bytes[route.part], exchange)
            offsets, offset = [], begin
            for each in token_bytes:
                offsets.append(offset)
                offset += _aligned(route.parts[route.part] * each)
            buffers = [
                self._view(offset, exchange.buffer_tokens, x)
                for offset, x in zip(offsets, tensors, strict=True)
            ]
            copied = _Copied(tensors, offsets, token_bytes)
            sources = {message.peer for message in exchange.receives}
            for peer in sources:
                ready = self._flag(peer, _READY, self._rank)
                streams.write_flag(ready, self._count, streams.copying())
            inputs = streams.record(streams.calling())
            filled = self._copy_own(copied, own, inputs) if own else None
            sent = self._send(copied, exchange, route.places, inputs) if exchange.sends else None
            arrivals = [self._flag(self._rank, _ARRIVED, peer) for peer in sources]
            return _SymmetricTransfer(
                exchange, buffers, list(tensors), streams, self._count, filled, sent, arrivals, part
            )

    def _copy_own(self, copied: _Copied, own: OwnCopies, inputs: object) -> object:
        """Copy own tokens into this rank's buffers.

        Returns the event after which they are there.
        """
        streams = self._streams
        stream = streams.copying_own()
        streams.wait(stream, inputs)
        for (lo, hi), (place, _) in own:
            self._copy(copied, (lo, hi), self._rank, place, stream)
        return streams.record(stream)

    def _send(
        self, copied: _Copied, exchange: Exchange, places: Sequence[int], inputs: object
    ) -> object:
        """Copy into the peers' buffers once they are ready, and tell them.

        Returns the event behind.
        """
        streams = self._streams
        stream, number = streams.copying(), self._count
        streams.wait(stream, inputs)
        awaited: set[int] = set()
        for message, place in zip(exchange.sends, places, strict=True):
            if message.peer not in awaited:
                awaited.add(message.peer)
                streams.wait_flag(self._flag(self._rank, _READY, message.peer), number, stream)
            self._copy(copied, message.tokens, message.peer, place, stream)
        for peer in awaited:
            streams.write_flag(self._flag(peer, _ARRIVED, self._rank), number, stream)
        sent = streams.record(stream)
        streams.watch(exchange, stream)
        return sent

    def _copy(
        self, copied: _Copied, tokens: tuple[int, int], holder: int, place: int, stream: int
    ) -> None:
        """Copy these tokens of each tensor into the holder's buffers, from token ``place`` on."""
        lo, hi = tokens
        base = self._arena.addresses[holder]
        for x, offset, each in zip(*copied, strict=True):
            target = base + offset + place * each
            self._streams.copy(target, x.data_ptr() + lo * each, (hi - lo) * each, stream)

    def _grow(self, num_bytes: int) -> None:
        """Make room, on every rank at once: all of them see the same sizes in the same order.

        The old arena is kept until the new one is there: a need that cannot be met changes nothing.
        """
        if num_bytes <= self._arena.buffer.numel():
            return
        if any(part.free is None for part in self._parts):
            raise RuntimeError(
                "a transfer that needs more symmetric memory was started while another one is in "
                "flight"
            )
        # With room to spare, so that needs that grow slowly seldom come here.
        eighth = max(_GRANULE, 1 << max(0, num_bytes.bit_length() - 4))
        self._streams.idle()  # nobody reads or writes the arena
        try:
            self._arena = self._streams.allocate(-(-num_bytes // eighth) * eighth)
        except NotUsableError as error:
            raise RuntimeError(
                f"the symm_mem transport has no room for this call's keys: {error}; make a plan "
                "with 'nccl'"
            ) from error
        self._parts, self._count = [], 0
        self._views.clear()

    def _take(self, begin: int, end: int, exchange: Exchange) -> _Part:
        """The bytes as a part of this exchange.

        Both streams that write here wait for whatever has used these bytes before.
        """
        rest = []
        for part in self._parts:
            if part.end <= begin or end <= part.begin:
                rest.append(part)
                continue
            if part.free is None:
                raise RuntimeError(
                    f"{exchange}: its buffer is in use by a transfer that has not been released"
                )
            for stream in (self._streams.copying(), self._streams.copying_own()):
                self._streams.wait(stream, part.free)
            rest += [
                _Part(lo, hi, part.free)
                for lo, hi in ((part.begin, begin), (end, part.end))
                if lo < hi
            ]
        taken = _Part(begin, end, None)
        self._parts = [*rest, taken]
        return taken

    def _view(self, offset: int, tokens: int, like: Tensor) -> Tensor:
        """The arena from ``offset`` on as (tokens, …), of the kind of ``like``."""
        shape = (tokens, *like.shape[1:])
        key = (offset, shape, like.dtype)
        if key not in self._views:
            size = math.prod(shape) * like.element_size()
            self._views[key] = (
                self._arena.buffer[offset : offset + size].view(like.dtype).view(shape)
            )
        return self._views[key]

    def _flag(self, holder: int, kind: int, peer: int) -> int:
        """Address of the flag that ``peer`` writes in the holder's memory."""
        return self._arena.addresses[holder] + (2 * peer + kind) * _FLAG_BYTES


class _SymmetricTransfer(Transfer):
    def __init__(
        self,
        exchange: Exchange,
        buffers: list[Tensor],
        tensors: list[Tensor],
        streams: Streams,
        number: int,
        filled: object | None,
        sent: object | None,
        arrivals: list[int],
        part: _Part,
    ) -> None:
        super().__init__(exchange, buffers)
        self._tensors = tensors  # alive until they are sent
        self._streams = streams
        self._number = number
        self._filled, self._sent = filled, sent
        self._arrivals = arrivals
        self._part = part

    def _wait(self) -> None:
        calling = self._streams.calling()
        if self._filled is not None:
            self._streams.wait(calling, self._filled)
        for flag in self._arrivals:
            self._streams.wait_flag(flag, self._number, calling)
        if self._arrivals:
            self._streams.watch(self._exchange, calling)

    def _release(self) -> None:
        calling = self._streams.calling()
        self._part.free = self._streams.record(calling)
        if self._sent is not None:
            self._streams.wait(calling, self._sent)
        self._tensors = []


@dataclass(frozen=True)
class _CudaArena:
    buffer: Tensor
    addresses: Sequence[int]
    handle: object  # keeps the peers' memory mapped


class _Cuda:
    """Streams on the current GPU; torch's symmetric memory underneath."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = GroupRef(group)
        self._watch = stream_watcher(group)
        self._device = torch.device("cuda", torch.cuda.current_device())
        # With priority: a ready copy must not queue behind kernels where the hardware shares
        # queues.
        self._streams = [torch.cuda.Stream(self._device, priority=-1) for _ in range(2)]
        self._copying, self._copying_own = (stream.cuda_stream for stream in self._streams)
        self._free_events: list[driver.Handle] = []

    def check(self) -> None:
        self._group()  # raises if it has been destroyed
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "symm_mem counts its transfers and cannot be captured in a CUDA graph; make the "
                "plan with transport='nccl'"
            )

    def allocate(self, num_bytes: int) -> Arena:
        """On every rank or on none: the others must not wait for a rank that cannot go on.

        Raises:
            NotUsableError: on every rank, if any rank has no such memory or cannot map the others'.
        """
        group = self._group()
        rank = dist.get_rank(group)
        buffer = handle = reason = None
        try:
            with _without_multicast():
                buffer = symm_mem.empty(num_bytes, dtype=torch.uint8, device=self._device)
            buffer.zero_()
            torch.cuda.synchronize(self._device)
        except Exception as error:  # whatever the driver or torch says, it is the reason
            reason = f"{num_bytes} bytes of symmetric memory: {type(error).__name__}: {error}"[:400]
        records = collect(
            {"reason": reason, "name": f"magi_sink_cp {uuid.uuid4()}"}, group, _SETTING_UP
        )
        _raise_first_reason(records)
        offset = 0
        try:
            assert buffer is not None, "there was no reason against it"
            with _without_multicast():
                handle = rendezvous(buffer, group, records[0]["name"])
            # torch may have put the buffer into a larger block.
            offset = buffer.data_ptr() - handle.buffer_ptrs[rank]
        except Exception as error:
            reason = (
                f"mapping symmetric memory of the other ranks: {type(error).__name__}: {error}"[
                    :400
                ]
            )
        records = collect({"reason": reason, "offset": offset}, group, _SETTING_UP)
        _raise_first_reason(records)
        assert buffer is not None, "there was no reason against it"
        assert handle is not None, "there was no reason against it"
        addresses = [
            base + record["offset"]
            for base, record in zip(handle.buffer_ptrs, records, strict=True)
        ]
        self.idle()  # everybody's flags are zero
        return _CudaArena(buffer, addresses, handle)

    def idle(self) -> None:
        torch.cuda.synchronize(self._device)
        group, device_ids = self._group(), [self._device.index]
        barrier = Communication(
            "symmetric memory: barrier over the cp group",
            group,
            True,
            lambda: [dist.barrier(group, device_ids=device_ids)],
        )
        barrier.wait()
        torch.cuda.synchronize(self._device)

    def calling(self) -> int:
        handle: int = torch._C._cuda_getCurrentRawStream(self._device.index)
        return handle

    def copying(self) -> int:
        return self._copying

    def copying_own(self) -> int:
        return self._copying_own

    def record(self, stream: int) -> object:
        return driver.Event(stream, self._free_events)

    def wait(self, stream: int, event: object) -> None:
        assert isinstance(event, driver.Event)
        event.hold(stream)

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        driver.copy(target, source, num_bytes, stream)

    def write_flag(self, address: int, value: int, stream: int) -> None:
        driver.write_flag(address, value, stream)

    def wait_flag(self, address: int, value: int, stream: int) -> None:
        driver.wait_flag(address, value, stream)

    def watch(self, exchange: Exchange, stream: int) -> None:
        self._watch(exchange, stream)


@contextlib.contextmanager
def _without_multicast() -> Iterator[None]:
    """Keep torch from binding a multicast object to the memory, which nothing here uses."""
    name = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def connect(group: ProcessGroup) -> SymmetricMemory | str:
    """The group's transport, or, on every rank, why there is none.

    Every rank of the group must call this.
    """
    streams, reason, missing_nvlink = None, _missing_here(), None
    if reason is None:
        try:
            streams = _Cuda(group)
            missing_nvlink = driver.missing_nvlink()
        except Exception as error:  # whatever the driver or torch says, it is the reason
            reason = f"{type(error).__name__}: {error}"[:400]
    records = collect(
        {"reason": reason, "host": _host(), "nvlink": missing_nvlink}, group, _SETTING_UP
    )
    try:
        _raise_first_reason(records)
        if len({record["host"] for record in records}) > 1:
            return "its ranks are on different hosts"
        assert streams is not None, "there was no reason against it"
        missing = (
            f"cp rank {rank}: {record['nvlink']}"
            for rank, record in enumerate(records)
            if record["nvlink"]
        )
        return SymmetricMemory(
            dist.get_rank(group), dist.get_world_size(group), streams, next(missing, None)
        )
    except NotUsableError as error:
        return str(error)


def _missing_here() -> str | None:
    try:
        driver.check_available()
    except NotUsableError as error:
        return str(error)
    return None


def _host() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def _raise_first_reason(records: Sequence[Mapping[str, object]]) -> None:
    for rank, record in enumerate(records):
        if record["reason"]:
            raise NotUsableError(f"cp rank {rank}: {record['reason']}")


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
