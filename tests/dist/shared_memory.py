"""The streams of the symm_mem transport without a GPU: files that all ranks map, and a host that does everything at once."""

from __future__ import annotations

import ctypes
import random
import tempfile
import time

import torch
import torch.distributed as dist


class SharedArena:
    """One file per rank, mapped by all."""

    def __init__(self, paths: list[str], num_bytes: int, rank: int) -> None:
        self._maps = [torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8) for path in paths]
        self.buffer = self._maps[rank]
        self.addresses = [x.data_ptr() for x in self._maps]


class HostStreams:
    """Copies and flags by the host. ``shaky`` makes it pause at random, so that ranks meet the protocol in many orders."""

    def __init__(self, group, shaky: bool = False) -> None:
        self._group = group
        self._rank = dist.get_rank(group)
        self._random = random.Random(self._rank) if shaky else None
        folder = [tempfile.mkdtemp() if self._rank == 0 else None]
        dist.broadcast_object_list(folder, src=dist.get_global_rank(group, 0), group=group)
        self._folder = folder[0]
        self.allocations = 0
        self.watched: list[str] = []

    def check(self) -> None:
        pass

    def allocate(self, num_bytes: int) -> SharedArena:
        self.allocations += 1
        paths = [f"{self._folder}/{self.allocations}_{rank}" for rank in range(dist.get_world_size(self._group))]
        with open(paths[self._rank], "wb") as file:
            file.truncate(num_bytes)
        dist.barrier(self._group)
        return SharedArena(paths, num_bytes, self._rank)

    def calling(self) -> int:
        return 0

    def copying(self) -> int:
        return 1

    def copying_own(self) -> int:
        return 2

    def record(self, stream: int) -> object:
        self._pause()
        return object()

    def wait(self, stream: int, event: object) -> None:
        assert event is not None

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        self._pause()
        ctypes.memmove(target, source, num_bytes)

    def write_flag(self, address: int, value: int, stream: int) -> None:
        self._pause()
        ctypes.c_uint32.from_address(address).value = value & 0xFFFFFFFF

    def wait_flag(self, address: int, value: int, stream: int) -> None:
        deadline = time.monotonic() + 20
        while ctypes.c_int32(ctypes.c_uint32.from_address(address).value - value).value < 0:
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank {self._rank} waits for flag {value} in vain")
            time.sleep(0)

    def watch(self, exchange) -> None:
        self.watched.append(str(exchange))

    def idle(self) -> None:
        dist.barrier(self._group)

    def _pause(self) -> None:
        if self._random is not None and self._random.random() < 0.2:
            time.sleep(self._random.random() * 2e-3)
