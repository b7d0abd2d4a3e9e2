"""One small collective by which all ranks learn whether they agree, and if not, how they differ."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from magi_sink_cp.dist.bookkeeping import plain_tensors
from magi_sink_cp.dist.guard.watchdog import Communication

_RECORD_BYTES = 4096


class GroupRef:
    """A process group that is not kept alive.

    destroy_process_group ends gloo's threads only if nothing else holds the group, and a thread
    that frees a tensor while Python shuts down aborts the process.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._ref = weakref.ref(group)

    def __call__(self) -> ProcessGroup:
        """The group; RuntimeError if it has been destroyed."""
        group = self._ref()
        if group is None or not _is_registered(group):
            raise RuntimeError(
                "the plan's process group has been destroyed; make a new plan with make_cp_plan"
            )
        return group


def _is_registered(group: ProcessGroup) -> bool:
    """Whether torch still knows the group. A destroyed group's object may outlive it."""
    try:
        dist.get_rank(group)
    except ValueError:
        return False
    return True


class Signature:
    """What all ranks must give to one call of ``what``, by name.

    ``key`` identifies the content, so that repeated comparisons can be skipped.
    """

    def __init__(self, what: str, content: Mapping[str, object]) -> None:
        self.content = content
        self.key = repr((what, content))


def backends_of(group: ProcessGroup) -> dict[str, str]:
    """The name of the group's backend for each device type that has one."""
    return dict(entry.split(":") for entry in dist.get_backend_config(group).split(","))


def backend_for(group: ProcessGroup, device_type: str) -> str | None:
    """The backend by which the group moves tensors of a device type, or None.

    It is "nccl" for CUDA tensors and "gloo" for the CPU's: gloo sends no CUDA tensors.
    """
    name = backends_of(group).get(device_type)
    return None if (device_type, name) == ("cuda", "gloo") else name


def group_device(group: ProcessGroup) -> torch.device:
    """Where the group's attention runs.

    The current GPU if it has a backend for it, else the CPU.
    """
    if backend_for(group, "cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def agree(record: Mapping[str, object] | Exception, group: ProcessGroup, what: str) -> None:
    """Compare ``record`` over the ranks of ``group``, by one all-gather of 4 KiB per rank.

    Every rank of the group must call this. A rank whose own checks failed passes its exception.

    Raises:
        ValueError: on every rank, if the records differ or another rank failed. The text says which
            rank has what.
        Exception: on a rank that passed an exception, that exception.
    """
    content: dict[str, object] = {"call": what}
    if isinstance(record, Exception):
        text = f"{type(record).__name__}: {record}"
        content = {"error": text[:600]}  # at most 600 · 6 bytes as JSON
    else:
        content |= record
    records = collect(content, group, f"{what}: comparing arguments over the cp group")
    if isinstance(record, Exception):
        raise record
    for rank, other in enumerate(records):
        if "error" in other:
            raise ValueError(
                f"{what}: cp rank {rank} was given something invalid, so no rank goes on: "
                f"{other['error']}"
            )
    for name in records[0]:
        values = [other.get(name) for other in records]
        if any(value != values[0] for value in values):
            text = ", ".join(f"rank {rank}: {value!r}" for rank, value in enumerate(values))
            raise ValueError(
                f"{what}: all ranks of the cp group must be given the same {name}, got {text}"
            )


def collect(record: Mapping[str, object], group: ProcessGroup, what: str) -> list[dict[str, Any]]:
    """Every rank's record, in the order of the ranks. Every rank of the group must call this.

    ``what`` is what an error names.
    """
    encoded = json.dumps(record, ensure_ascii=False).encode()
    if len(encoded) > _RECORD_BYTES:
        raise ValueError(
            f"the record takes {len(encoded)} bytes to exchange, more than {_RECORD_BYTES}: "
            f"{str(record)[:200]}…"
        )
    with plain_tensors():
        # On the GPU even if the group has gloo beside NCCL: NCCL's first operation in a group must
        # be one in which every rank takes part, and in a stage of attention some send nothing.
        padded = bytearray(encoded.ljust(_RECORD_BYTES))
        mine = torch.frombuffer(padded, dtype=torch.uint8).to(group_device(group))
        return [json.loads(raw.tobytes()) for raw in all_gather(mine, group, what).cpu().numpy()]


def all_gather(mine: Tensor, group: ProcessGroup, what: str) -> Tensor:
    """(ranks, bytes): every rank's uint8 (bytes,), as gloo does not gather every dtype.

    ``what`` is what an error names.
    """
    gathered = mine.new_empty(dist.get_world_size(group), mine.numel())

    def start() -> list[dist.Work | None]:
        if mine.is_cuda:  # in one piece; gloo of some versions takes a list alone
            return [dist.all_gather_into_tensor(gathered.view(-1), mine, group=group)]
        return [dist.all_gather(list(gathered), mine, group=group)]

    gather = Communication(what, group, mine.is_cuda, start)
    gather.wait()
    return gathered
