"""Which transport a cp group gets. This is the only file that knows all of them."""

from __future__ import annotations

import logging
import weakref

import torch.distributed as dist
from torch.distributed import ProcessGroup

from magi_sink_cp.dist.guard.agreement import backend_for, group_device
from magi_sink_cp.dist.transport.base import Transport
from magi_sink_cp.dist.transport.p2p import PointToPoint
from magi_sink_cp.dist.transport.symmetric import SymmetricMemory, connect

TRANSPORTS = ("auto", "nccl", "gloo", "symm_mem")

_log = logging.getLogger("magi_sink_cp")

# Each group's symmetric memory, or why it has none.
_symmetric: weakref.WeakKeyDictionary[ProcessGroup, SymmetricMemory | str] = (
    weakref.WeakKeyDictionary()
)
# Groups that have been warned.
_warned: weakref.WeakSet[ProcessGroup] = weakref.WeakSet()


def check_transport(name: str, group: ProcessGroup | None) -> None:
    """Raise ValueError unless the group can have a transport of this name."""
    if not isinstance(name, str) or name not in TRANSPORTS:
        raise ValueError(f"transport must be one of {TRANSPORTS}, got {name!r}")
    if group is None or name == "auto":
        return
    device_type = group_device(group).type
    config = dist.get_backend_config(group)
    if name == "symm_mem" and device_type != "cuda":
        raise ValueError(f"transport='symm_mem' is for GPUs, and the group's backend is {config}")
    if name not in ("symm_mem", backend_for(group, device_type)):
        raise ValueError(
            f"transport={name!r} needs a group with that backend for its device ({device_type}), "
            f"got {config}"
        )


def known_symmetric_memory(group: ProcessGroup) -> SymmetricMemory | None:
    """The group's symmetric memory if it has been set up."""
    found = _symmetric.get(group)
    return found if isinstance(found, SymmetricMemory) else None


def choose_transport(name: str, group: ProcessGroup | None) -> Transport | None:
    """The transport of a name that check_transport let through, or None for one rank.

    Every rank of the group must call this.

    Raises:
        RuntimeError: symm_mem was asked for and cannot be set up. The text says why.
    """
    if group is None or dist.get_world_size(group) == 1:
        return None
    device_type = group_device(group).type
    if name == "symm_mem" or (name == "auto" and device_type == "cuda"):
        if group not in _symmetric:
            _symmetric[group] = connect(group)
        found = _symmetric[group]
        if isinstance(found, SymmetricMemory):
            if name == "symm_mem" or found.missing_nvlink is None:
                return found
            why = (
                "symmetric memory would not use NVLink in this group "
                f"({found.missing_nvlink}); transport='symm_mem' takes it"
            )
        elif name == "symm_mem":
            raise RuntimeError(
                f"transport='symm_mem' is not possible in this group: {found}; use 'auto' or 'nccl'"
            )
        else:
            why = f"symmetric memory is not possible in this group: {found}"
        if dist.get_rank(group) == 0 and group not in _warned:
            _warned.add(group)
            _log.warning("magi_sink_cp: keys travel by NCCL, as %s", why)
    return PointToPoint(group, backend_for(group, device_type) or device_type)
