"""Run a test body on n ranks: in a pool of spawned processes under plain pytest, or on torchrun's
own ranks.

A body is a module-level function ``body(group, device, **arguments)``; its assertions count on
every rank.

``RANKS_PER_GPU=4`` in the environment lets ranks share a GPU, so that one GPU can run the tests of
several. NCCL then goes through sockets and copies stay in one GPU's memory: such a run proves
results and order, and nothing of speed.
"""

from __future__ import annotations

import datetime
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 40  # of a collective
BODY_TIMEOUT_S = 240
MAX_RANKS = 4
RANKS_PER_GPU = int(os.environ.get("RANKS_PER_GPU", "1"))


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def gpu_ranks() -> int:
    """For how many ranks there are GPUs."""
    return torch.cuda.device_count() * RANKS_PER_GPU


def take_gpu(rank: int) -> torch.device:
    """The rank's GPU, which becomes the current one.

    To be called before NCCL's first communicator.
    """
    count = torch.cuda.device_count()
    if RANKS_PER_GPU > 1:
        os.environ["NCCL_HOSTID"] = (
            f"ranks {rank // count}"  # NCCL refuses two ranks on one GPU of one host
        )
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    torch.cuda.set_device(rank % count)
    return torch.device("cuda", rank % count)


class _Member:
    """One rank: its process group, with a sub-group of the first n ranks for every n."""

    def __init__(self, device_type: str, **init: Any) -> None:
        timeout = datetime.timedelta(seconds=TIMEOUT_S)
        dist.init_process_group(
            "nccl" if device_type == "cuda" else "gloo", timeout=timeout, **init
        )
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = take_gpu(self.rank) if device_type == "cuda" else torch.device("cpu")
        self.groups = {
            n: dist.new_group(list(range(n)), timeout=timeout)
            for n in range(1, self.world_size + 1)
        }

    def run(self, num_ranks: int, body: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        return (
            body(self.groups[num_ranks], self.device, **arguments)
            if self.rank < num_ranks
            else None
        )


def _serve(
    rank: int, world_size: int, device_type: str, store: str, connection: Connection
) -> None:
    torch.set_num_threads(1)
    member = _Member(device_type, init_method=f"file://{store}", rank=rank, world_size=world_size)
    while (request := connection.recv()) is not None:
        try:
            connection.send((True, member.run(*request)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class _Pool:
    """Spawned ranks that stay alive between tests: starting them costs more than most tests."""

    def __init__(self, device_type: str, world_size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        self.connections, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, world_size, device_type, f"{self._folder.name}/store", theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, num_ranks: int, body: Callable[..., Any], arguments: dict[str, Any]) -> list[Any]:
        try:
            for connection in self.connections[:num_ranks]:
                connection.send((num_ranks, body, arguments))
            answers: list[Any] = []
            for rank, connection in enumerate(self.connections[:num_ranks]):
                # A rank that failed leaves the others waiting in a collective: do not wait for
                # their timeout too.
                failed = any(not ok for ok, _ in answers)
                if connection.poll(5 if failed else BODY_TIMEOUT_S):
                    answers.append(connection.recv())
                else:
                    answers.append((False, f"rank {rank} did not answer"))
            failures = [
                f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok
            ]
            assert not failures, "\n".join(failures)
        except BaseException:
            # Also a timeout of the test itself: what comes later is no answer to the next one.
            self.close()
            raise
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        self._folder.cleanup()
        for device_type in [name for name, pool in _pools.items() if pool is self]:
            del _pools[device_type]


_pools: dict[str, _Pool] = {}
_torchrun_member: dict[str, _Member] = {}


def close_pools() -> None:
    """End the ranks that run_on_ranks has started."""
    for pool in list(_pools.values()):
        pool.close()


def run_on_ranks(
    num_ranks: int, body: Callable[..., Any], device_type: str = "cpu", **arguments: Any
) -> list[Any]:
    """Run ``body`` on ``num_ranks`` ranks.

    Returns what each rank returned; under torchrun, what this rank returned.
    """
    if under_torchrun():
        if device_type not in _torchrun_member:
            if _torchrun_member:
                pytest.skip(
                    reason="torchrun's ranks run the tests of one device type: the first that was "
                    "asked for"
                )
            _torchrun_member[device_type] = _Member(device_type)
        member = _torchrun_member[device_type]
        if num_ranks > member.world_size:
            pytest.skip(reason=f"needs {num_ranks} ranks, and torchrun started {member.world_size}")
        return [member.run(num_ranks, body, arguments)]
    if device_type not in _pools:
        _pools[device_type] = _Pool(
            device_type, min(gpu_ranks(), MAX_RANKS) if device_type == "cuda" else MAX_RANKS
        )
    return _pools[device_type].run(num_ranks, body, arguments)
