"""torch's rendezvous over symmetric memory, for ranks that have met others before.

torch 2.11 to 2.13 number the keys under which ranks find each other by process, not by group (pytorch/pytorch#196082): if one of
two ranks has mapped memory with a third in between, each waits for a key that the other never writes. Groups that overlap, or
whose arenas grew more or less often, would be out of step for good. So torch gets a group of the same ranks whose store counts the
keys of one rendezvous alone. pytorch/pytorch#196350 is to mend this; where the oldest torch supported has it, this module may go.
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

from magi_sink_cp.dist.watchdog import timeout_s


class CountingStore(dist.Store):
    """Stores "name/key" as "n/key", if name is the n-th that this rank asks for: the ranks agree though their names differ.

    It has what torch's exchange over a store uses: set, get and wait in 2.11 and 2.12, in 2.13 a barrier too, which adds.
    Who waits for a key does so for ``timeout``, unless another one is asked for.
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
    """Map every rank's buffer, of symmetric memory, on all ranks of the group, each of which must call this.

    ``name``: one that all of them give, and never twice. A rank waits for the others for half the group's timeout: one that could
    not go on waits for it in another collective.

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
