"""CPPlan, a token layout attached to a cp group, and make_cp_plan, which makes one."""

from __future__ import annotations

import hashlib
import itertools
import numbers
import weakref
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from magi_sink_cp.dist.bookkeeping import plain_tensors
from magi_sink_cp.dist.guard.agreement import (
    Agreement,
    GroupRef,
    agree,
    backends_of,
    group_device,
)
from magi_sink_cp.dist.guard.watchdog import ON_HANG, set_on_hang
from magi_sink_cp.dist.planning.layout import LAYOUTS, Range, RankRanges, num_tokens
from magi_sink_cp.dist.transport.base import Transport
from magi_sink_cp.dist.transport.choose import (
    check_transport,
    choose_transport,
    known_symmetric_memory,
)
from magi_sink_cp.kernels.caching import BoundedCache
from magi_sink_cp.kernels.checks import (
    as_int,
    as_ints,
    check_dense,
    refuse_dtensor,
    refuse_forward_mode,
)
from magi_sink_cp.kernels.lengths import as_cu_seqlens, check_offsets, read_cu_seqlens

UNSHARD = "CPPlan.unshard (or shard's backward)"

_EXCHANGES = (
    "number of exchanges so far (which differs where a call failed on some ranks alone: start the "
    "job again)"
)


def make_cp_plan(
    total_tokens: int,
    *,
    group: ProcessGroup | DeviceMesh | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    layout: str = "zigzag",
    transport: str = "auto",
    on_hang: str = "abort",
) -> CPPlan:
    """Plan how a sequence, and the documents in it, are spread over the ranks of a cp group.

    Every rank of the group must call this with the same arguments. One small all-gather checks that
    they do.

    Args:
        total_tokens: tokens of the whole sequence, before padding. Any number.
        group: the cp group: a ProcessGroup, a 1-D DeviceMesh, or None for one device (the same
            script without torchrun). On GPUs its timeout must exceed NCCL's set-up and the slowest
            first call.
        cu_seqlens: (documents + 1,) offsets of packed documents, from 0 to total_tokens: an int32
            or int64 tensor on any device, a NumPy array, or a sequence of ints. Empty documents are
            allowed. None is one document.
        layout: "zigzag": rank r holds chunks r and 2·cp - 1 - r of 2·cp equal chunks. "balanced":
            more and smaller chunks, dealt so that the ranks' work under a causal mask is nearly
            equal also for many short documents.
        transport: how keys travel. "nccl" or "gloo": the group must have that backend. "symm_mem":
            copies between the GPUs of one host that use no SM. "auto": "symm_mem" where it can be
            set up and every GPU has NVLink, else the group's own backend; one warning on the
            group's first rank then says why.
        on_hang: what a GPU rank does when others do not come within the group's timeout. "abort":
            name the operation on stderr and abort the process. "log": name it and go on, for jobs
            that recover by themselves. "off": nothing. It holds for the whole group from now on.
            Over gloo a hang always raises an exception.

    Raises:
        TypeError, ValueError: on every rank, if an argument is invalid on any rank or the ranks
            differ. A ``group`` that is no group of this rank raises on this rank alone.
        RuntimeError: transport="symm_mem", and it cannot be set up. The text says why.
    """
    process_group = _process_group(group)
    try:
        total_tokens, documents = _check_arguments(total_tokens, cu_seqlens, layout)
        check_transport(transport, process_group)
        if not isinstance(on_hang, str) or on_hang not in ON_HANG:
            raise ValueError(f"on_hang must be one of {ON_HANG}, got {on_hang!r}")
    except Exception as error:
        if process_group is not None:
            agree(error, process_group, "make_cp_plan")
        raise
    if process_group is None:
        device = _device_without_group(cu_seqlens)
    else:
        device = group_device(process_group)
        if device.type == "cuda":
            set_on_hang(process_group, on_hang)
        _agree_on_plan(process_group, total_tokens, documents, layout, transport)
    chosen = choose_transport(transport, process_group)
    return CPPlan(total_tokens, documents, layout, process_group, device, chosen)


def _agree_on_plan(
    group: ProcessGroup,
    total_tokens: int,
    documents: tuple[Range, ...],
    layout: str,
    transport: str,
) -> None:
    record: dict[str, object] = {
        "total_tokens": total_tokens,
        "layout": layout,
        "transport": transport,
        "cu_seqlens (sha256)": _sha256(documents),
    }
    symmetric = known_symmetric_memory(group)
    if symmetric is not None:
        record[_EXCHANGES] = symmetric.exchanges
    agree(record, group, "make_cp_plan")
    if symmetric is not None:
        symmetric.resume()


class CPPlan:
    """Which tokens this rank holds. Made by :func:`make_cp_plan`.

    A plan belongs to its process and group: it cannot be pickled or copied.

    Attributes:
        total_tokens: tokens of the whole sequence, without padding.
        local_tokens: tokens of this rank, padding included; the same on every rank.
        pad_tokens: padding of the whole sequence: cp_size · local_tokens - total_tokens.
        position_ids: int64 (local_tokens,), each token's position in its document (0 on padding).
        token_mask: bool (local_tokens,), False on padding.
        real_tokens: tokens of this rank that are not padding; they come first.
        rank, cp_size: this rank in the cp group, and its size (0 and 1 without a group).
        group: the ProcessGroup, or None. The plan does not keep it alive.
        device: of position_ids and token_mask: the group's (the current GPU for NCCL, the CPU for
            gloo). Without a group that of cu_seqlens if it is a tensor, else the current GPU if
            there is one.
        documents: non-empty (start, stop) ranges of the whole sequence.
        layout: the token ranges of every rank.
        transport: how keys travel, or None if they do not (one rank). Its name is what "auto"
            chose.
        calls, agreement, group_ref: internal. What calls resolved to and ranks compared; the group.
        handle: int64 0-dim CPU tensor that stands for the plan in operators and compiled graphs.
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
        with plain_tensors():
            held = [torch.arange(lo, hi) for lo, hi in self.layout[self.rank]]
            token = torch.cat(held or [torch.arange(0)])
            starts = torch.tensor([lo for lo, _ in documents] or [0])
            position = token - starts[torch.searchsorted(starts, token, right=True) - 1]
            is_real = token < total_tokens
            self.position_ids = torch.where(is_real, position, 0).to(device)
            self.token_mask = is_real.to(device)
            self.real_tokens = int(is_real.sum())
            self.handle = torch.tensor(next(_numbers), dtype=torch.int64)
        transport_name = None if transport is None else transport.name
        digest = _sha256((total_tokens, layout, documents, transport_name))
        self.agreement = Agreement(self.group_ref, device, digest)
        # Calls of this plan that may have a backward, counted alike on all ranks.
        self.calls = itertools.count()
        _plans[int(self.handle)] = self

    @property
    def group(self) -> ProcessGroup | None:
        """The cp group.

        Raises:
            RuntimeError: it has been destroyed since the plan was made.
        """
        return None if self.group_ref is None else self.group_ref()

    def __repr__(self) -> str:
        return (
            f"CPPlan(total_tokens={self.total_tokens}, documents={len(self.documents)}, "
            f"rank={self.rank}, cp_size={self.cp_size}, local_tokens={self.local_tokens}, "
            f"pad_tokens={self.pad_tokens})"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a CPPlan cannot be pickled or copied: it belongs to this process and its cp group. "
            "Send total_tokens and cu_seqlens, and call make_cp_plan on every rank"
        )

    def shard(self, x: Tensor, dim: int = 0, *, fill: float = 0) -> Tensor:
        """This rank's part of a tensor that every rank holds whole.

        total_tokens → local_tokens along ``dim``. Padding holds ``fill``: -100 suits labels.

        The gradient of x is whole on every rank again (an all-gather): if any rank runs backward
        through it, all must.

        Raises:
            TypeError: x is not a plain tensor, or fill is not a number.
            ValueError: the size along dim is not total_tokens; fill is not 0 for an x that requires
                a gradient; or a gradient is needed and the group has no backend for x's device, or
                x is on another GPU than the plan.
        """
        if isinstance(fill, bool) or not isinstance(fill, numbers.Real):
            raise TypeError(f"fill must be a number, got {fill!r}")
        fill = float(fill)
        if not torch.compiler.is_compiling():
            self.check_size(x, dim, self.total_tokens, "total_tokens")
            _check_fill(fill, x.dtype)
        if x.requires_grad and torch.is_grad_enabled():
            if fill != 0:
                raise ValueError(
                    f"fill must be 0 for a tensor that requires a gradient, got {fill!r}"
                )
            if not torch.compiler.is_compiling():
                self._check_can_travel(x)
        return torch.ops.magi_sink_cp.shard(x, self.handle, dim, self.local_tokens, fill)

    def unshard(self, x: Tensor, dim: int = 0) -> Tensor:
        """The inverse of :meth:`shard`, on every rank (an all-gather). Padding is cut off.

        local_tokens → total_tokens along ``dim``. The gradient of x is this rank's part of the
        incoming one, which must be the same on every rank. It is, if every rank computes the same
        loss from the whole tensor.

        Raises:
            TypeError: x is not a plain tensor.
            ValueError: the size along dim is not local_tokens, the group has no backend for x's
                device, or x or the current device is on another GPU than the plan.
        """
        if not torch.compiler.is_compiling():
            self.check_unshard(x, dim)
        return torch.ops.magi_sink_cp.unshard(x, self.handle, dim, self.total_tokens)

    def check_unshard(self, x: Tensor, dim: int) -> None:
        """Raise, on every rank, unless x can be unsharded along ``dim``."""
        try:
            refuse_forward_mode(UNSHARD)
            self.check_size(x, dim, self.local_tokens, "local_tokens")
            self._check_can_travel(x)
            if x.is_cuda and self.group is not None:
                self.check_current_device()
        except Exception as error:
            self.agreement.report_error(error, UNSHARD)
            raise

    def check_current_device(self) -> None:
        """Raise ValueError if the plan's GPU is not the current one.

        Communication would not be ordered with the current streams.
        """
        if self.device.type == "cuda" and torch.cuda.current_device() != self.device.index:
            raise ValueError(
                f"the current device must be the plan's, {self.device}, got "
                f"cuda:{torch.cuda.current_device()}"
            )

    def _check_can_travel(self, x: Tensor) -> None:
        """Raise ValueError if the group cannot move x."""
        if self.group is None:
            return
        backends = backends_of(self.group)
        if x.device.type not in backends:
            raise ValueError(
                "x must be on a device for which the cp group has a backend, "
                f"{sorted(backends)}, got {x.device}"
            )
        if x.device.type == self.device.type == "cuda" and x.device != self.device:
            raise ValueError(f"x must be on the plan's device, {self.device}, got {x.device}")

    def check_size(self, x: Tensor, dim: int, size: int, what: str) -> None:
        """Raise unless x is a dense tensor with ``size``, called ``what``, along ``dim``."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        refuse_dtensor("x", x)
        check_dense("x", x)
        if as_int(dim) is None or not -x.dim() <= dim < x.dim():
            raise ValueError(
                f"dim must be a dimension of x, whose shape is {tuple(x.shape)}, got {dim!r}"
            )
        if x.shape[dim] != size:
            raise ValueError(
                f"x must have the plan's {what}, {size}, along dim {dim}, got shape "
                f"{tuple(x.shape)}"
            )


_numbers = itertools.count(1)
_plans: weakref.WeakValueDictionary[int, CPPlan] = weakref.WeakValueDictionary()
# Plans that an operator has used lately, the latest last. In a compiled graph its backward may come
# after the caller has let them go.
_used_lately: BoundedCache[CPPlan, None] = BoundedCache(64)


def plan_of(handle: Tensor) -> CPPlan:
    """The plan that ``handle`` stands for, kept alive for a while.

    Raises:
        ValueError: ``handle`` is no handle, or its plan is gone.
    """
    if handle.dim() != 0 or handle.dtype != torch.int64 or handle.device.type != "cpu":
        raise ValueError(
            "plan must be the handle of a CPPlan, an int64 0-dim CPU tensor (plan.handle), got "
            f"{handle.dtype} {tuple(handle.shape)} on {handle.device}"
        )
    plan = _plans.get(int(handle))
    if plan is None:
        raise ValueError(
            f"the CPPlan of handle {int(handle)} is gone: keep a reference to the plan until its "
            "last backward"
        )
    _used_lately.pop(plan, None)
    _used_lately[plan] = None
    return plan


def keep_plan(ctx: Any, handle: Tensor) -> None:
    """Keep the plan alive until the backward of ``ctx``. A tracer's handle stands for no plan."""
    if type(handle) is Tensor:
        ctx.plan = plan_of(handle)


def _check_fill(fill: float, dtype: torch.dtype) -> None:
    """Raise unless ``dtype`` can hold ``fill``, on ranks without padding too."""
    if dtype == torch.bool:
        fits = fill in (0, 1)
    elif dtype.is_floating_point or dtype.is_complex:
        fits = True
    else:
        info = torch.iinfo(dtype)
        fits = fill.is_integer() and info.min <= fill <= info.max
    if not fits:
        raise ValueError(f"fill must be a value that {dtype} can hold, got {fill!r}")


def _sha256(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _process_group(group: ProcessGroup | DeviceMesh | None) -> ProcessGroup | None:
    if group is None:
        return None
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                "group must be a 1-D DeviceMesh (for example mesh['cp']), got one of shape "
                f"{tuple(group.shape)}"
            )
        group = group.get_group()
    outside = group is dist.GroupMember.NON_GROUP_MEMBER
    if not outside and not isinstance(group, ProcessGroup):
        raise TypeError(
            f"group must be a ProcessGroup, a 1-D DeviceMesh or None, got {type(group).__name__}"
        )
    if outside or dist.get_rank(group) < 0:
        raise ValueError("group must contain the calling rank, and this rank is not a member of it")
    return group


def _device_without_group(cu_seqlens: object) -> torch.device:
    if isinstance(cu_seqlens, Tensor):
        return cu_seqlens.device
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _check_arguments(
    total_tokens: int, cu_seqlens: Tensor | Sequence[int] | None, layout: str
) -> tuple[int, tuple[Range, ...]]:
    """total_tokens and the non-empty documents, after the checks that one rank can make alone."""
    total = as_int(total_tokens)
    if total is None:
        raise TypeError(f"total_tokens must be an int, got {total_tokens!r}")
    if total < 0:
        raise ValueError(f"total_tokens must be >= 0, got {total_tokens}")
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {sorted(LAYOUTS)}, got {layout!r}")
    if cu_seqlens is None:
        offsets: tuple[int, ...] = (0, total)
    elif isinstance(cu_seqlens, Tensor):
        refuse_dtensor("cu_seqlens", cu_seqlens)
        given = as_cu_seqlens(cu_seqlens, "cu_seqlens")
        offsets = read_cu_seqlens(given, "cu_seqlens", total)
    else:
        offsets = check_offsets(_ints(cu_seqlens), "cu_seqlens", total)
    return total, tuple((lo, hi) for lo, hi in itertools.pairwise(offsets) if hi > lo)


def _ints(cu_seqlens: object) -> tuple[int, ...]:
    values = cu_seqlens.tolist() if hasattr(cu_seqlens, "tolist") else cu_seqlens
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(
            "cu_seqlens must be an int32 tensor, a sequence of ints or None, got "
            f"{type(cu_seqlens).__name__}"
        )
    return as_ints("cu_seqlens", values)
