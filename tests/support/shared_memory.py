"""The streams of the symm_mem transport without a GPU: files that all ranks map, and a thread for
each stream that copies.

The calling stream is the host itself, as torch's CPU kernels are.
"""

from __future__ import annotations

import ctypes
import queue
import random
import tempfile
import threading
import time

import torch
import torch.distributed as dist


class SharedArena:
    """One file per rank, mapped by all."""

    def __init__(self, paths: list[str], num_bytes: int, rank: int) -> None:
        self._maps = [
            torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8) for path in paths
        ]
        self.buffer = self._maps[rank]
        self.addresses = [x.data_ptr() for x in self._maps]


class _Stream:
    """Does what is enqueued, in order, some time later."""

    def __init__(self, pause) -> None:
        self._work: queue.Queue = queue.Queue()
        self._pause = pause
        self.error: Exception | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def put(self, action) -> None:
        if self.error is not None:
            raise self.error
        self._work.put(action)

    def finish(self) -> None:
        self._work.join()

    def _run(self) -> None:
        while True:
            action = self._work.get()
            try:
                self._pause()
                action()
            except Exception as error:
                self.error = error
            self._work.task_done()


class HostStreams:
    """``shaky`` makes the copying streams lag behind at random, so that ranks meet the protocol
    in many orders.
    """

    def __init__(self, group, shaky: bool = False) -> None:
        self._group = group
        self._rank = dist.get_rank(group)
        self._random = random.Random(self._rank) if shaky else None
        folder = [tempfile.mkdtemp() if self._rank == 0 else None]
        dist.broadcast_object_list(folder, src=dist.get_global_rank(group, 0), group=group)
        self._folder = folder[0]
        self._streams = {stream: _Stream(self._pause) for stream in (1, 2)}
        self.allocations = 0
        self.watched: list[tuple[str, int]] = []

    def check(self) -> None:
        pass

    def allocate(self, num_bytes: int) -> SharedArena:
        self.allocations += 1
        paths = [
            f"{self._folder}/{self.allocations}_{rank}"
            for rank in range(dist.get_world_size(self._group))
        ]
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
        event = threading.Event()
        self._do(stream, event.set)
        return event

    def wait(self, stream: int, event: object) -> None:
        assert isinstance(event, threading.Event)
        self._do(stream, lambda: self._until(event.is_set, "an event"))

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        self._do(stream, lambda: ctypes.memmove(target, source, num_bytes))

    def write_flag(self, address: int, value: int, stream: int) -> None:
        def write() -> None:
            ctypes.c_uint32.from_address(address).value = value & 0xFFFFFFFF

        self._do(stream, write)

    def wait_flag(self, address: int, value: int, stream: int) -> None:
        def reached() -> bool:
            return ctypes.c_int32(ctypes.c_uint32.from_address(address).value - value).value >= 0

        self._do(stream, lambda: self._until(reached, f"flag {value}"))

    def watch(self, exchange, stream: int) -> None:
        self.watched.append((str(exchange), stream))

    def idle(self) -> None:
        for stream in self._streams.values():
            stream.finish()
        dist.barrier(self._group)

    def _do(self, stream: int, action) -> None:
        if stream == 0:
            action()
        else:
            self._streams[stream].put(action)

    def _until(self, condition, what: str) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank {self._rank} waits for {what} in vain")
            time.sleep(0)

    def _pause(self) -> None:
        if self._random is not None and self._random.random() < 0.3:
            time.sleep(self._random.random() * 2e-3)
