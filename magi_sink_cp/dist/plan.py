"""CPPlan, a token layout attached to a cp group, and make_cp_plan, which makes one."""

from __future__ import annotations

import itertools
import numbers
import weakref
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from magi_sink_cp.dist.bookkeeping import plain_tensors, upload
from magi_sink_cp.dist.guard.agreement import GroupRef, backends_of, group_device
from magi_sink_cp.dist.guard.late import Agreement, agree_outside_plans
from magi_sink_cp.dist.guard.watchdog import ON_HANG, set_on_hang
from magi_sink_cp.dist.magi_engine import (
    MagiDispatch,
    check_engine,
    check_key,
    check_plan,
    dispatch,
    slices_of_bands,
    variables,
    what_key_says,
)
from magi_sink_cp.dist.planning.blueprint import CPBlueprint, PlanInput, make_blueprint
from magi_sink_cp.dist.planning.layout import LAYOUTS
from magi_sink_cp.dist.planning.mask import CAUSAL, Range, Slice, check_slices
from magi_sink_cp.dist.planning.worker import Request, make_ahead
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
    window_limits,
)
from magi_sink_cp.kernels.lengths import as_cu_seqlens, check_offsets, read_cu_seqlens

_MAKE = "make_cp_plan"
UNSHARD = "CPPlan.unshard (or shard's backward)"

_EXCHANGES = (
    "number of exchanges so far (which differs where a call failed on some ranks alone: start the "
    "job again)"
)


def make_cp_blueprint(
    total_tokens: int,
    *,
    cp_size: int,
    rank: int,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    mask_slices: Sequence[Slice] | None = None,
    position_ids: Tensor | Sequence[int] | None = None,
    layout: str = "auto",
    windows: Sequence[Sequence[int | None]] = ((-1, 0),),
) -> CPBlueprint:
    """Plan one rank's part of a sequence, without a process group and without a GPU.

    The result can be pickled: another process may make it. :func:`make_cp_plan` attaches it to a cp
    group.

    Args:
        total_tokens, cu_seqlens, mask_slices, position_ids, layout: as in :func:`make_cp_plan`.
        cp_size, rank: of the cp group that the plan will be for.
        windows: (left, right) of the layers that will use the plan; -1 or None is unlimited. What
            they have in common is planned now. Other windows still work: they are planned when they
            are asked for.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    return make_ahead(
        check_blueprint_arguments(
            total_tokens,
            cp_size=cp_size,
            rank=rank,
            cu_seqlens=cu_seqlens,
            mask_slices=mask_slices,
            position_ids=position_ids,
            layout=layout,
            windows=windows,
        )
    )


def check_blueprint_arguments(
    total_tokens: int,
    *,
    cp_size: int,
    rank: int,
    layout: str,
    windows: Sequence[Sequence[int | None]],
    cu_seqlens: Tensor | Sequence[int] | None = None,
    mask_slices: Sequence[Slice] | None = None,
    position_ids: Tensor | Sequence[int] | None = None,
) -> Request:
    """The arguments of make_cp_blueprint, checked, as another process can be given them."""
    size, place = as_int(cp_size), as_int(rank)
    if size is None or size < 1:
        raise ValueError(f"cp_size must be an int >= 1, got {cp_size!r}")
    if place is None or not 0 <= place < size:
        raise ValueError(f"rank must be an int from 0 to cp_size - 1, {size - 1}, got {rank!r}")
    what = _check_arguments(total_tokens, cu_seqlens, mask_slices, position_ids, layout)
    ahead = [window_limits(window) for window in windows]
    return what, size, place, ahead, ()


def make_cp_plan(
    total_tokens: int | CPBlueprint | None = None,
    *,
    group: ProcessGroup | DeviceMesh | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    mask_slices: Sequence[Slice] | None = None,
    position_ids: Tensor | Sequence[int] | None = None,
    layout: str = "auto",
    transport: str = "auto",
    on_hang: str = "abort",
    engine: str = "auto",
    magi_key: Any = None,
) -> CPPlan:
    """Plan how a sequence, and its mask, are spread over the ranks of a cp group.

    Every rank of the group must call this with the same arguments. One small all-gather checks that
    they do. On GPUs its result is read late once the group has agreed on eight plans
    (docs/concepts.md).

    Args:
        total_tokens: tokens of the whole sequence, before padding. Any number. Or the blueprint of
            :func:`make_cp_blueprint` for this rank, which holds all that follows but group,
            transport and on_hang.
        group: the cp group: a ProcessGroup, a 1-D DeviceMesh, or None for one device (the same
            script without torchrun). On GPUs its timeout must exceed NCCL's set-up and the slowest
            first call.
        cu_seqlens: (documents + 1,) offsets of packed documents, from 0 to total_tokens: an int32
            or int64 tensor on any device, a NumPy array, or a sequence of ints. Empty documents are
            allowed. None is one document.
        mask_slices: [((q0, q1), (k0, k1), type), …], the whole mask as rectangles of queries × keys
            that share no (query, key) pair. With the types "full", "causal", "inv_causal" and
            "bi_causal" (docs/concepts.md draws them). Queries of no slice see the sink alone.
            ``magi_sink_cp.masks`` builds them. The plan's calls then take neither causal nor
            window_size, and cu_seqlens are for position_ids only. None: documents and each call's
            causal and window_size are the mask.
        position_ids: (total_tokens,) ints, the plan's positions instead of those in the documents.
        layout: "zigzag": rank r holds chunks r and 2·cp - 1 - r of 2·cp equal chunks. "balanced":
            more and smaller chunks, dealt so that the ranks' (query, key) pairs, under a causal
            mask or the slices, are nearly equal also for many short documents. "auto": zigzag where
            its busiest rank has at most 2% more pairs than the mean, as under one document; else
            the better of the two. For data that another framework has sharded: "contiguous", rank r
            holds chunk r of cp equal chunks; "zigzag_documents", zigzag in each document, the order
            of Transformer Engine's packed sequences.
        transport: how keys travel. "nccl" or "gloo": the group must have that backend. "symm_mem":
            copies between the GPUs of one host that use no SM. "auto": "symm_mem" where it can be
            set up and every GPU has NVLink, else the group's own backend; one warning on the
            group's first rank then says why.
        on_hang: what a GPU rank does when others do not come within the group's timeout. "abort":
            name the operation on stderr and abort the process. "log": name it and go on, for jobs
            that recover by themselves. "off": nothing. It holds for the whole group from now on.
            Over gloo a hang always raises an exception.
        engine: "native": this package plans and moves keys. "magi": MagiAttention does, where it is
            installed (:func:`magi_sink_cp.engines`; docs/engines.md). It needs a group with NCCL,
            also for one rank; it chooses layout and padding, and takes neither layout nor
            transport. "auto" is native.
        magi_key: a DistAttnRuntimeKey that holds group, total_tokens and the mask, for engine
            "magi". Its mask is the plan's ``mask_slices``. cu_seqlens and position_ids may be given
            beside it, for positions.

    Raises:
        TypeError, ValueError: on every rank, if an argument is invalid on any rank or the ranks
            differ. A ``group`` or ``magi_key`` that is none of this rank raises on this rank alone.
        RuntimeError: transport="symm_mem", and it cannot be set up. The text says why.
    """
    given_group = group
    if magi_key is not None:
        check_engine("magi", magi_key)
        check_key(magi_key)
        group = magi_key.cp_group
    cp_group = process_group(group)
    rank = 0 if cp_group is None else dist.get_rank(cp_group)
    cp_size = 1 if cp_group is None else dist.get_world_size(cp_group)
    try:
        chosen_engine = check_engine(engine, magi_key)
        if magi_key is not None:
            total_tokens, mask_slices = what_key_says(
                magi_key, total_tokens, given_group, mask_slices
            )
        if isinstance(total_tokens, CPBlueprint):
            blueprint = total_tokens
            _check_blueprint(
                blueprint, rank, cp_size, cu_seqlens, mask_slices, position_ids, layout
            )
        else:
            what = _check_arguments(total_tokens, cu_seqlens, mask_slices, position_ids, layout)
            if chosen_engine == "magi":
                what = what._replace(layout="magi")
                blueprint = CPBlueprint(
                    what, cp_size, rank, layout=((),) * cp_size
                )  # not yet dealt
            else:
                blueprint = make_blueprint(what, cp_size, rank)
        if chosen_engine == "magi":
            check_plan(total_tokens, layout, transport, cp_group, blueprint)
        check_transport(transport, cp_group)
        if not isinstance(on_hang, str) or on_hang not in ON_HANG:
            raise ValueError(f"on_hang must be one of {ON_HANG}, got {on_hang!r}")
    except Exception as error:
        if cp_group is not None:
            report_error(error, cp_group)
        raise
    if cp_group is None:
        device = _device_without_group(cu_seqlens)
    else:
        device = group_device(cp_group)
        if device.type == "cuda":
            set_on_hang(cp_group, on_hang)
        _agree_on_plan(cp_group, blueprint, transport, chosen_engine, magi_key is not None)
        if chosen_engine == "magi":
            return _dispatched_plan(blueprint, what, cp_group, device, magi_key)
    chosen = choose_transport(transport, cp_group)
    return CPPlan(blueprint, cp_group, device, chosen)


def _dispatched_plan(
    blueprint: CPBlueprint,
    what: PlanInput,
    group: ProcessGroup,
    device: torch.device,
    key: Any,
) -> CPPlan:
    """The plan that MagiAttention's dispatch makes of a checked input."""
    slices = slices_of_bands(blueprint.bands(CAUSAL))
    if key is None:
        dispatched = dispatch(what.total_tokens, slices, group)
    else:
        dispatched = MagiDispatch(key, slices, group)
    dealt = CPBlueprint(what, blueprint.cp_size, blueprint.rank, dispatched.layout)
    return CPPlan(dealt, group, device, None, dispatched)


def _check_blueprint(
    blueprint: CPBlueprint,
    rank: int,
    cp_size: int,
    cu_seqlens: object,
    mask_slices: object,
    position_ids: object,
    layout: str,
) -> None:
    """Raise ValueError unless the blueprint is for this rank and comes alone."""
    if (blueprint.rank, blueprint.cp_size) != (rank, cp_size):
        raise ValueError(
            f"the blueprint must be for this rank, {rank} of {cp_size}, got one for rank "
            f"{blueprint.rank} of {blueprint.cp_size}"
        )
    beside = {
        "cu_seqlens": cu_seqlens is not None,
        "mask_slices": mask_slices is not None,
        "position_ids": position_ids is not None,
        "layout": layout != "auto",
    }
    if given := [name for name, there in beside.items() if there]:
        raise ValueError(
            f"{' and '.join(given)} must be given to make_cp_blueprint, not beside a blueprint"
        )


def _agree_on_plan(
    group: ProcessGroup, blueprint: CPBlueprint, transport: str, engine: str, has_key: bool
) -> None:
    record: dict[str, object] = {
        "engine": f"{engine}, with a magi_key" if has_key else engine,
        "total_tokens": blueprint.total_tokens,
        "layout": blueprint.layout_name,
        "transport": transport,
        "MAGI_ATTENTION_… variables": variables() if engine == "magi" else None,
        "cu_seqlens, mask_slices and position_ids (sha256)": blueprint.digest[:16],
    }
    symmetric = known_symmetric_memory(group)
    if symmetric is not None:
        record[_EXCHANGES] = symmetric.exchanges
    failed = symmetric is not None and symmetric.has_failed
    agree_outside_plans(record, group, _MAKE, f"{_MAKE}, {transport}", at_once=failed)
    if symmetric is not None:
        symmetric.resume()


def agree_on_end(group: ProcessGroup) -> None:
    """Raise on every rank if this one has come to the end of its batches and others have not."""
    what = "prefetch_plans, at the end of the batches"
    agree_outside_plans({}, group, what, what, at_once=True)


def report_error(error: Exception, group: ProcessGroup) -> None:
    """Make the other ranks, which call make_cp_plan, raise too."""
    agree_outside_plans(error, group, _MAKE, _MAKE)


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
        mask_slices: the slices of the mask, or None: documents and each call's window make it.
        layout: the token ranges of every rank.
        transport: how keys travel, or None if they do not (one rank) or MagiAttention moves them.
            Its name is what "auto" chose.
        engine: "native" or "magi".
        blueprint: what was planned without the group.
        has_slices, calls, agreement, group_ref, dispatch: internal. What calls resolved to and
            ranks compared; the group; what MagiAttention has dealt.
        handle: int64 0-dim CPU tensor that stands for the plan in operators and compiled graphs.
    """

    def __init__(
        self,
        blueprint: CPBlueprint,
        group: ProcessGroup | None,
        device: torch.device,
        transport: Transport | None,
        dispatch: MagiDispatch | None = None,
    ) -> None:
        self.blueprint = blueprint
        self.dispatch = dispatch
        self.engine = "native" if dispatch is None else "magi"
        self.total_tokens = blueprint.total_tokens
        self.group_ref = None if group is None else GroupRef(group)
        self.rank, self.cp_size = blueprint.rank, blueprint.cp_size
        self.layout = blueprint.layout
        self.transport = transport
        self.device = device
        self.mask_slices = blueprint.mask_slices
        self.has_slices = blueprint.mask_slices is not None
        self.local_tokens, self.pad_tokens = blueprint.local_tokens, blueprint.pad_tokens
        self.real_tokens = blueprint.real_tokens
        with plain_tensors():
            self.position_ids = _position_ids(blueprint, device)
            self.token_mask = torch.arange(self.local_tokens, device=device) < self.real_tokens
            self.handle = torch.tensor(next(_numbers), dtype=torch.int64, device="cpu")
        transport_name = None if transport is None else transport.name
        self.agreement = Agreement(
            self.group_ref,
            device,
            f"{blueprint.digest[:16]}, {transport_name}, {self.engine}",
            at_once=dispatch is not None,  # whose first call makes a key, and so communicates
        )
        # Calls of this plan that may have a backward, counted alike on all ranks.
        self.calls = itertools.count()
        _plans[int(self.handle)] = self

    @property
    def documents(self) -> tuple[Range, ...]:
        """Non-empty (start, stop) ranges of the whole sequence."""
        return self.blueprint.documents

    @property
    def keys_travel(self) -> bool:
        """Whether calls communicate, and so run on the plan's device."""
        return self.transport is not None or self.dispatch is not None

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
            f"pad_tokens={self.pad_tokens}, engine={self.engine!r})"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a CPPlan cannot be pickled or copied: it belongs to this process and its cp group. "
            "Send the CPBlueprint of make_cp_blueprint, and call make_cp_plan on every rank"
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


def process_group(group: ProcessGroup | DeviceMesh | None) -> ProcessGroup | None:
    """The ProcessGroup of a cp group.

    Raises:
        TypeError, ValueError: it is none, or this rank is not in it.
    """
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
    total_tokens: object,
    cu_seqlens: Tensor | Sequence[int] | None,
    mask_slices: object,
    position_ids: object,
    layout: object,
) -> PlanInput:
    """What is to be planned, after the checks that one rank can make alone."""
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
        if cu_seqlens.is_meta:
            raise ValueError("cu_seqlens must hold numbers, got a tensor on the meta device")
        given = as_cu_seqlens(cu_seqlens, "cu_seqlens")
        offsets = read_cu_seqlens(given, "cu_seqlens", total)
    else:
        offsets = check_offsets(_ints(cu_seqlens), "cu_seqlens", total)
    slices = None if mask_slices is None else check_slices(total, mask_slices)
    return PlanInput(total, offsets, slices, _positions(position_ids, total), layout)


def _positions(position_ids: Any, total_tokens: int) -> NDArray[np.int64] | None:
    """position_ids as an array of its own, or None."""
    if position_ids is None:
        return None
    if isinstance(position_ids, Tensor):
        refuse_dtensor("position_ids", position_ids)
        position_ids = position_ids.detach().cpu().numpy()
    try:
        values = np.array(position_ids)
    except ValueError:
        values = np.array(None)
    if values.dtype.kind not in "iu" or values.shape != (total_tokens,):
        raise ValueError(
            f"position_ids must be total_tokens, {total_tokens}, ints, got {values.dtype} of shape "
            f"{values.shape}"
        )
    return values.astype(np.int64)


def _position_ids(blueprint: CPBlueprint, device: torch.device) -> Tensor:
    """Each local token's position, 0 on padding. Nothing waits for the GPU."""
    given = blueprint.position_ids
    if given is not None:
        own = blueprint.layout[blueprint.rank]
        held = np.zeros(blueprint.local_tokens, dtype=np.int64)
        real = [given[lo:hi] for lo, hi in own if lo < len(given)]
        held[: blueprint.real_tokens] = np.concatenate([given[:0], *real])
        return upload(torch.from_numpy(held), device)
    first, size = blueprint.position_runs()
    ends = np.cumsum(size)
    runs = upload(torch.from_numpy(np.stack([first - (ends - size), size])), device)
    shift = torch.repeat_interleave(runs[0], runs[1], output_size=blueprint.real_tokens)
    position = torch.arange(blueprint.real_tokens, device=device) + shift
    padding = blueprint.local_tokens - blueprint.real_tokens
    return torch.nn.functional.pad(position, (0, padding)) if padding else position


def _ints(cu_seqlens: object) -> tuple[int, ...]:
    values = cu_seqlens.tolist() if hasattr(cu_seqlens, "tolist") else cu_seqlens
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(
            "cu_seqlens must be an int32 or int64 tensor, a NumPy array, a sequence of ints or "
            f"None, got {type(cu_seqlens).__name__}"
        )
    return as_ints("cu_seqlens", values)
