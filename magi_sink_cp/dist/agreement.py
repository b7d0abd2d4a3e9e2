"""One small collective by which all ranks learn that they agree, or that, and how, they do not."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

_RECORD_BYTES = 4096


def group_device(group: ProcessGroup) -> torch.device:
    """Where the group's collectives take their tensors: the current CUDA device for NCCL, else the CPU."""
    if "nccl" in dist.get_backend_config(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def agree(record: Mapping[str, object] | Exception, group: ProcessGroup, what: str) -> None:
    """Compare ``record`` over the ranks of ``group``; a rank whose own checks failed passes its exception instead.

    Every rank of the group must call this. It is one all-gather of 4 KiB a rank.

    Raises:
        ValueError: on every rank, if the records differ or another rank failed; the text says which rank has what.
        Exception: on a rank that passed an exception, that exception.
    """
    content = {"error": f"{type(record).__name__}: {record}"[:600]} if isinstance(record, Exception) else dict(record)
    encoded = json.dumps(content).encode()
    assert len(encoded) <= _RECORD_BYTES, f"the record of {what} has {len(encoded)} bytes, more than {_RECORD_BYTES}"
    mine = torch.frombuffer(bytearray(encoded.ljust(_RECORD_BYTES)), dtype=torch.uint8).to(group_device(group))
    gathered = mine.new_empty(dist.get_world_size(group) * _RECORD_BYTES)
    dist.all_gather(list(gathered.split(_RECORD_BYTES)), mine, group=group)
    if isinstance(record, Exception):
        raise record
    raw = bytes(gathered.tolist())
    records = [json.loads(raw[i : i + _RECORD_BYTES]) for i in range(0, len(raw), _RECORD_BYTES)]
    for rank, other in enumerate(records):
        if "error" in other:
            raise ValueError(f"{what}: cp rank {rank} was given something invalid, so no rank goes on: {other['error']}")
    for name in records[0]:
        values = [other[name] for other in records]
        if any(value != values[0] for value in values):
            text = ", ".join(f"rank {rank}: {value!r}" for rank, value in enumerate(values))
            raise ValueError(f"{what}: all ranks of the cp group must be given the same {name}, got {text}")
