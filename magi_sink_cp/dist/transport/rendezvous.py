"""torch's rendezvous over symmetric memory, for ranks that have met others before.

torch 2.11 to 2.13 number the keys under which ranks find each other by process, not by group
(pytorch/pytorch#196082). If one of two ranks has mapped memory with a third before, each waits for
a key that the other never writes. Groups that overlap, or whose arenas grew a different number of
times, would be out of step for good. So torch gets a stand-in group of the same ranks, whose store
counts the keys of one rendezvous alone. pytorch/pytorch#196350 is to fix this. When the oldest
supported torch has it, remove this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch.distributed import ProcessGroup

from magi_sink_cp.dist.guard.watchdog import timeout_s


class CountingStore(dist.Store):
    """Stores "name/key" as "n/key" if name is the n-th that this rank asks for.

    So the ranks agree although their names differ. It has what torch's exchange over a store uses:
    set, get and wait in 2.11 and 2.12; in 2.13 also a barrier, which adds. Waiting for a key takes
    at most ``timeout``, unless the caller gives another one.
    """

    def __init__(self, store: dist.Store, timeout: timedelta) -> None:
        super().__init__()
        self._store = store
        self._timeout = timeout
        self._numbers: dict[str, int] = {}

    def _counted(self, key: str) -> str:
        name, _, rest = key.rpartition("/")
        return f"{self._numbers.setdefault(name, len(self._numbers))}/{rest}"

    def set(self, key: str, value: Any) -> None:
        self._store.set(self._counted(key), value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._store.get(self._counted(key))

    def add(self, key: str, amount: int) -> int:
        return self._store.add(self._counted(key), amount)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._store.wait([self._counted(key) for key in keys], timeout or self._timeout)


def rendezvous(buffer: Tensor, group: ProcessGroup, name: str) -> symm_mem._SymmetricMemory:
    """Map every rank's buffer of symmetric memory on all ranks of the group.

    Every rank must call this. A rank waits for the others for half the group's timeout: one that
    cannot go on waits for this rank in another collective.

    Args:
        name: the same on all ranks, and never used twice.

    Raises:
        RuntimeError: a rank is missing, or torch cannot map its memory.
    """
    group_name: Any = name  # of a type of torch's own in some versions
    half = timedelta(seconds=timeout_s(group._get_backend(torch.device("cuda"))) / 2)
    store = CountingStore(dist.PrefixStore(name, c10d._get_process_group_store(group)), half)
    stand_in = ProcessGroup(store, dist.get_rank(group), dist.get_world_size(group))
    c10d._register_process_group(group_name, stand_in)
    try:
        return symm_mem.rendezvous(buffer, group_name)
    finally:
        c10d._unregister_process_group(group_name)
