"""The user's handle on a context-parallel layout: sharding, positions, and cached schedules."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from magi_sink_cp.dist.agreement import GroupRef, Signature, agree, all_gather, backend_for, backends_of, group_device
from magi_sink_cp.dist.layout import LAYOUTS, Range, RankRanges, num_tokens, union
from magi_sink_cp.dist.overlap import Overlap, Work, choose_overlap
from magi_sink_cp.dist.schedule import (
    HeadStart,
    Schedule,
    Window,
    build_schedule,
    typical_share,
    visible_pairs,
)
from magi_sink_cp.dist.symmetric import SymmetricMemory, connect
from magi_sink_cp.dist.transport import PointToPoint, Transport
from magi_sink_cp.kernels.inputs import check_offsets, read_cu_seqlens

_UNSHARD = "CPPlan.unshard (or shard's backward)"

TRANSPORTS = ("auto", "nccl", "gloo", "symm_mem")

_EXCHANGES = "number of exchanges so far (which differs where a call failed on some ranks alone: start the job again)"

_log = logging.getLogger("magi_sink_cp")

# Each group's symmetric memory, or why it has none.
_symmetric: weakref.WeakKeyDictionary[ProcessGroup, SymmetricMemory | str] = weakref.WeakKeyDictionary()
# Groups that were told so.
_warned: weakref.WeakSet[ProcessGroup] = weakref.WeakSet()


def make_cp_plan(
    total_tokens: int,
    *,
    group: ProcessGroup | DeviceMesh | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    layout: str = "zigzag",
    transport: str = "auto",
) -> CPPlan:
    """Plan how ``total_tokens`` tokens, and the documents among them, are spread over the ranks of a context-parallel group.

    Every rank of the group must call this with the same arguments; one small all-gather checks that they do.

    Args:
        total_tokens: tokens of the whole sequence, before padding. It need not divide by anything.
        group: the cp group: a ProcessGroup, a 1-D DeviceMesh, or None for one device (the same script without torchrun). On
            GPUs its timeout covers also what torch waits for without end: NCCL's setting up, and the last rank's first call.
        cu_seqlens: int32 (documents + 1,) offsets of packed documents, from 0 to total_tokens, zero lengths included; a tensor
            on any device or a sequence of ints. None is one document.
        layout: "zigzag": rank r holds chunks r and 2·cp - 1 - r of 2·cp equal chunks. "balanced": more, smaller chunks, dealt
            out so that the ranks' work under a causal mask is nearly equal also for many short documents.
        transport: how keys travel: "nccl" or "gloo" (the group must have that backend), "symm_mem" (copies between the GPUs
            of one host that leave the SMs alone), or "auto": "symm_mem" where it can be set up and every GPU has NVLink, else the
            group's own backend, and then one warning on its first rank says why.

    Raises:
        TypeError, ValueError: on every rank, if an argument is invalid on any rank or the ranks differ; a ``group`` that is no
            group of this rank raises on this rank alone, as there is nothing to agree over.
        RuntimeError: transport="symm_mem", and it cannot be set up; the text says why.
    """
    process_group = _process_group(group)
    try:
        documents = _check_arguments(total_tokens, cu_seqlens, layout)
        _check_transport(transport, process_group)
    except Exception as error:
        if process_group is not None:
            agree(error, process_group, "make_cp_plan")
        raise
    if process_group is not None:
        record: dict[str, object] = {
            "total_tokens": total_tokens,
            "layout": layout,
            "transport": transport,
            "cu_seqlens (sha256)": _sha256(documents),
        }
        symmetric = _symmetric.get(process_group)
        if isinstance(symmetric, SymmetricMemory):
            record[_EXCHANGES] = symmetric.exchanges
        agree(record, process_group, "make_cp_plan")
        if isinstance(symmetric, SymmetricMemory):
            symmetric.resume()
        device = group_device(process_group)
    elif isinstance(cu_seqlens, Tensor):
        device = cu_seqlens.device
    else:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return CPPlan(total_tokens, documents, layout, process_group, device, _transport(transport, process_group))


class CPPlan:
    """Which tokens this rank holds, and how attention over all of them is computed. Made by :func:`make_cp_plan`.

    Attributes:
        total_tokens: tokens of the whole sequence, without padding.
        local_tokens: tokens of this rank, padding included; the same on every rank.
        pad_tokens: padding of the whole sequence: cp_size · local_tokens - total_tokens.
        position_ids: int64 (local_tokens,), each token's position within its document (0 on padding).
        token_mask: bool (local_tokens,), False on padding.
        real_tokens: tokens of this rank that are not padding; they come first.
        rank, cp_size: this rank within the cp group, and its size (0 and 1 without a group).
        group: the ProcessGroup, or None; the plan does not keep it alive.
        device: where position_ids and token_mask are: the group's (the current GPU for NCCL, the CPU for gloo); without a group
            that of cu_seqlens if it is a tensor, else the current GPU if there is one.
        transport: how keys travel, or None if they do not (one rank). Its name is what "auto" has chosen.

    """

    def __init__(
        self,
        total_tokens: int,
        documents: tuple[Range, ...],
        layout: str,
        group: ProcessGroup | None,
        device: torch.device,
        transport: Transport | None,
    ) -> None:
        self.total_tokens = total_tokens
        self.group_ref = None if group is None else GroupRef(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.cp_size = 1 if group is None else dist.get_world_size(group)
        self.layout: tuple[RankRanges, ...] = LAYOUTS[layout](total_tokens, self.cp_size, documents)
        self.transport = transport
        self.device = device
        self.documents = documents
        self.local_tokens = num_tokens(self.layout[self.rank])
        self.pad_tokens = self.cp_size * self.local_tokens - total_tokens
        token = torch.cat([torch.arange(lo, hi) for lo, hi in self.layout[self.rank]] or [torch.arange(0)])
        starts = torch.tensor([lo for lo, _ in documents] or [0])
        position = token - starts[torch.searchsorted(starts, token, right=True) - 1]
        real = token < total_tokens
        self.position_ids = torch.where(real, position, 0).to(device)
        self.token_mask = real.to(device)
        self.real_tokens = int(real.sum())
        self._digest = _sha256((total_tokens, layout, documents, None if transport is None else transport.name))
        # Call signatures that the ranks have agreed on for this plan, so that each is compared once and not once a step.
        self._agreed: set[str] = set()
        # Calls that have been checked (attention.py), by what was checked.
        self.calls: dict[tuple[object, ...], Any] = {}
        self._schedules: dict[tuple[Window, int, int, HeadStart | None, int | None], Schedule] = {}
        self._overlaps: dict[tuple[object, ...], Overlap] = {}

    @property
    def group(self) -> ProcessGroup | None:
        """The cp group.

        Raises:
            RuntimeError: it has been destroyed since the plan was made.
        """
        return None if self.group_ref is None else self.group_ref()

    def __repr__(self) -> str:
        return (
            f"CPPlan(total_tokens={self.total_tokens}, documents={len(self.documents)}, rank={self.rank}, cp_size={self.cp_size}, "
            f"local_tokens={self.local_tokens}, pad_tokens={self.pad_tokens})"
        )

    def shard(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's part of a tensor that every rank holds whole: total_tokens → local_tokens along ``dim``, padded with 0.

        The gradient of x is whole on every rank again: an all-gather, so every rank must run backward through it if any does.

        Raises:
            ValueError: the size along dim is not total_tokens, or a gradient is asked for and the group has no backend for x's
                device or x is on another GPU than the plan.
        """
        self._check_size(x, dim, self.total_tokens, "total_tokens")
        if x.requires_grad and torch.is_grad_enabled():
            self._check_can_travel(x)
        return _Shard.apply(x, dim, self)

    def unshard(self, x: Tensor, dim: int = 0) -> Tensor:
        """The inverse of :meth:`shard`: local_tokens → total_tokens along ``dim``, on every rank (an all-gather), padding stripped.

        The gradient is this rank's part of the incoming one, which must therefore be the same on every rank, as it is when every
        rank computes the same loss from the whole tensor.

        Raises:
            ValueError: the size along dim is not local_tokens, the group has no backend for x's device, or x or the current device
                is on another GPU than the plan.
        """
        try:
            self._check_size(x, dim, self.local_tokens, "local_tokens")
            self._check_can_travel(x)
            if x.is_cuda and self.group is not None:
                self.check_current_device()
        except Exception as error:
            self.agree(error, _UNSHARD)
            raise
        return _Unshard.apply(x, dim, self)

    def schedule(
        self,
        window_size: Window,
        overlap_degree: int,
        batch_size: int = 1,
        head_start: HeadStart | None = None,
        large_rows: int | None = None,
    ) -> Schedule:
        """This rank's stages, built once.

        Args:
            window_size: (left, right) as in attention_with_sink, with right 0 for causal.
            overlap_degree: how many stages travel behind another one's computation.
            batch_size: samples, each laid out and cut into documents as the plan says, back to back.
            head_start: what overlap_degree 0 computes while the keys travel.
            large_rows: neighbouring segments of so many rows are kernel calls of their own.
        """
        head_start = head_start if overlap_degree == 0 else None
        key = (window_size, min(overlap_degree, self.cp_size - 1), batch_size, head_start, large_rows)
        if key not in self._schedules:
            length = self.total_tokens + self.pad_tokens
            starts = [sample * length for sample in range(batch_size)]
            layout = [union([(lo + at, hi + at) for at in starts for lo, hi in ranges]) for ranges in self.layout]
            documents = [(lo + at, hi + at) for at in starts for lo, hi in self.documents]
            routed = self.transport is not None and self.transport.needs_route
            self._schedules[key] = build_schedule(
                layout, documents, window_size, self.rank, overlap_degree, head_start, large_rows, routed
            )
        return self._schedules[key]

    def overlap(
        self,
        window_size: Window,
        batch_size: int,
        heads: int,
        heads_kv: int,
        head_dim: int,
        element_size: int,
        sink_kernel_slower: float | None,
    ) -> Overlap:
        """What the cost model chooses (overlap.py); the same on every rank."""
        key = (window_size, batch_size, heads, heads_kv, head_dim, element_size, sink_kernel_slower)
        if key not in self._overlaps:
            left, right = window_size
            pairs = sum(visible_pairs(hi - lo, hi - lo, left, right) for lo, hi in self.documents)
            share = typical_share(self.layout, self.documents, window_size)
            work = Work(
                rows=batch_size * self.local_tokens,
                pairs=batch_size * pairs // self.cp_size,
                ranges=max(len(ranges) for ranges in self.layout) * batch_size,
                documents=len(self.documents) * batch_size,
                remote_keys=batch_size * share.remote_keys,
                remote_rows=batch_size * share.remote_rows,
                alone_pairs=batch_size * share.alone_pairs,
                heads=heads,
                heads_kv=heads_kv,
                head_dim=head_dim,
                element_size=element_size,
            )
            over_nvlink = isinstance(self.transport, SymmetricMemory) and self.transport.missing_nvlink is None
            self._overlaps[key] = choose_overlap(work, self.cp_size, "nvlink" if over_nvlink else "network", sink_kernel_slower)
        return self._overlaps[key]

    def agree(self, signature: Signature | Exception, what: str, always: bool = False) -> None:
        """Compare a call's signature over the ranks: every time, or on GPUs, unless ``always``, the first time.

        On GPUs an exception is exchanged only while the ranks have agreed on nothing yet: after that the others may be past this.
        """
        group = self.group
        if group is None:
            if isinstance(signature, Exception):
                raise signature
            return
        every_time = always or group_device(group).type == "cpu"
        if isinstance(signature, Exception):
            if self._agreed and not every_time:
                raise signature
            self._agree_on_its_device(signature, group, what)
        elif every_time or signature.key not in self._agreed:
            self._agree_on_its_device({"plan (sha256)": self._digest, **signature.content}, group, what)
            self._agreed.add(signature.key)

    def _agree_on_its_device(self, record: Mapping[str, object] | Exception, group: ProcessGroup, what: str) -> None:
        """Where the current device is another one, the ranks can still tell each other."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            agree(record, group, what)

    def check_current_device(self) -> None:
        """ValueError where the plan's GPU is not the current one, whose streams communication would then not be ordered with."""
        if self.device.type == "cuda" and torch.cuda.current_device() != self.device.index:
            raise ValueError(f"the current device must be the plan's, {self.device}, got cuda:{torch.cuda.current_device()}")

    def _check_can_travel(self, x: Tensor) -> None:
        if self.group is None:
            return
        backends = backends_of(self.group)
        if x.device.type not in backends:
            raise ValueError(f"x must be on a device for which the cp group has a backend, {sorted(backends)}, got {x.device}")
        if x.device.type == self.device.type == "cuda" and x.device != self.device:
            raise ValueError(f"x must be on the plan's device, {self.device}, got {x.device}")

    def _check_size(self, x: Tensor, dim: int, size: int, what: str) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if x.layout is not torch.strided:
            raise ValueError(f"x must be dense (torch.strided), got {x.layout}")
        if not isinstance(dim, int) or isinstance(dim, bool) or not -x.dim() <= dim < x.dim():
            raise ValueError(f"dim must be a dimension of x, whose shape is {tuple(x.shape)}, got {dim!r}")
        if x.shape[dim] != size:
            raise ValueError(f"x must have the plan's {what}, {size}, along dim {dim}, got shape {tuple(x.shape)}")


def _sha256(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Along:
    """A plan and the dimension along which a tensor is split."""

    plan: CPPlan
    dim: int

    def shard(self, x: Tensor) -> Tensor:
        plan, pieces = self.plan, []
        for lo, hi in plan.layout[plan.rank]:
            real = min(hi, plan.total_tokens)
            if real > lo:
                pieces.append(x.narrow(self.dim, lo, real - lo))
            if hi > max(lo, real):
                padding = list(x.shape)
                padding[self.dim] = hi - max(lo, real)
                pieces.append(x.new_zeros(padding))
        return torch.cat(pieces, self.dim) if pieces else x.clone()

    def unshard(self, x: Tensor) -> Tensor:
        plan = self.plan
        local = x.movedim(self.dim, 0).resolve_conj().resolve_neg().contiguous()  # the bytes that travel carry no lazy bits
        gathered = local
        if plan.group is not None:
            others = [size for dim, size in enumerate(x.shape) if dim != self.dim % x.dim()]
            plan.agree(Signature(_UNSHARD, {"dim": self.dim, "shape but for dim": others, "dtype": str(x.dtype)}), _UNSHARD)
            shape = plan.cp_size * plan.local_tokens, *local.shape[1:]
            if local.numel():
                every = all_gather(local.view(-1).view(torch.uint8), plan.group, f"{_UNSHARD}: all-gather over the cp group")
                gathered = every.view(-1).view(local.dtype).view(shape)
            else:
                gathered = local.new_empty(shape)
        pieces = []
        for rank, ranges in enumerate(plan.layout):
            base = rank * plan.local_tokens
            for lo, hi in ranges:
                pieces.append((lo, gathered[base : base + hi - lo]))
                base += hi - lo
        whole = torch.cat([piece for _, piece in sorted(pieces, key=lambda p: p[0])]) if pieces else local.clone()
        return whole[: plan.total_tokens].movedim(0, self.dim)


class _Shard(torch.autograd.Function):
    """forward: slice and pad. backward: all-gather and strip, as every rank needs the whole gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, plan: CPPlan) -> Tensor:
        ctx.along = _Along(plan, dim)
        return ctx.along.shard(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        return ctx.along.unshard(dx), None, None


class _Unshard(torch.autograd.Function):
    """forward: all-gather and strip. backward: slice and pad, as every rank holds the whole gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, plan: CPPlan) -> Tensor:
        ctx.along = _Along(plan, dim)
        return ctx.along.unshard(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        return ctx.along.shard(dx), None, None


def _process_group(group: ProcessGroup | DeviceMesh | None) -> ProcessGroup | None:
    if group is None:
        return None
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group must be a 1-D DeviceMesh (for example mesh['cp']), got one of shape {tuple(group.shape)}")
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must contain the calling rank, and this rank is not a member of it")
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup, a 1-D DeviceMesh or None, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError("group must contain the calling rank, and this rank is not a member of it")
    return group


def _check_transport(transport: str, group: ProcessGroup | None) -> None:
    if not isinstance(transport, str) or transport not in TRANSPORTS:
        raise ValueError(f"transport must be one of {TRANSPORTS}, got {transport!r}")
    if group is None or transport == "auto":
        return
    backend = backend_for(group, group_device(group).type)
    if transport == "symm_mem" and group_device(group).type != "cuda":
        raise ValueError(f"transport='symm_mem' is for GPUs, and the group's backend is {dist.get_backend_config(group)}")
    if transport != "symm_mem" and transport != backend:
        raise ValueError(
            f"transport={transport!r} needs a group with that backend for its device ({group_device(group).type}), got "
            f"{dist.get_backend_config(group)}"
        )


def _transport(name: str, group: ProcessGroup | None) -> Transport | None:
    """The transport of a name that _check_transport has let through. Every rank of the group must call this."""
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
            why = f"symmetric memory would not use NVLink in this group ({found.missing_nvlink}); transport='symm_mem' takes it"
        elif name == "symm_mem":
            raise RuntimeError(f"transport='symm_mem' is not possible in this group: {found}; use 'auto' or 'nccl'")
        else:
            why = f"symmetric memory is not possible in this group: {found}"
        if dist.get_rank(group) == 0 and group not in _warned:
            _warned.add(group)
            _log.warning("magi_sink_cp: keys travel by NCCL, as %s", why)
    return PointToPoint(group, backend_for(group, device_type) or device_type)


def _check_arguments(total_tokens: int, cu_seqlens: Tensor | Sequence[int] | None, layout: str) -> tuple[Range, ...]:
    """The non-empty documents, after every check that one rank can make alone."""
    if not isinstance(total_tokens, int) or isinstance(total_tokens, bool):
        raise TypeError(f"total_tokens must be an int, got {total_tokens!r}")
    if total_tokens < 0:
        raise ValueError(f"total_tokens must be >= 0, got {total_tokens}")
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {sorted(LAYOUTS)}, got {layout!r}")
    if cu_seqlens is None:
        offsets: tuple[int, ...] = (0, total_tokens)
    elif isinstance(cu_seqlens, Tensor):
        offsets = read_cu_seqlens(cu_seqlens, "cu_seqlens", total_tokens)
    elif isinstance(cu_seqlens, Sequence):
        for entry, value in enumerate(cu_seqlens):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"cu_seqlens must hold ints, got {value!r} at entry {entry}")
        offsets = check_offsets(tuple(cu_seqlens), "cu_seqlens", total_tokens)
    else:
        raise TypeError(f"cu_seqlens must be an int32 tensor, a sequence of ints or None, got {type(cu_seqlens).__name__}")
    return tuple((lo, hi) for lo, hi in itertools.pairwise(offsets) if hi > lo)
