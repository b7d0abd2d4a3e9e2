"""make_cp_plan and make_cp_blueprint: their checks, the agreement of the ranks, the engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from magi_sink_cp.dist.guard.agreement import group_device
from magi_sink_cp.dist.guard.late import agree_outside_plans
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
from magi_sink_cp.dist.plan import CPPlan
from magi_sink_cp.dist.planning.blueprint import CPBlueprint, PlanInput, make_blueprint
from magi_sink_cp.dist.planning.layout import LAYOUTS
from magi_sink_cp.dist.planning.mask import CAUSAL, Slice, check_slices
from magi_sink_cp.dist.planning.worker import Request, make_ahead
from magi_sink_cp.dist.transport.choose import (
    check_transport,
    choose_transport,
    known_symmetric_memory,
)
from magi_sink_cp.kernels.checks import (
    as_int,
    as_ints,
    check_dense,
    refuse_dtensor,
    window_limits,
)
from magi_sink_cp.kernels.lengths import as_cu_seqlens, check_offsets, read_cu_seqlens

_MAKE = "make_cp_plan"
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
    if isinstance(windows, str) or not isinstance(windows, Iterable):
        raise TypeError(f"windows must be a sequence of (left, right) pairs, got {windows!r}")
    ahead = [window_limits(window, "each of windows") for window in windows]
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
        check_attachment(transport, on_hang, cp_group)
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


def check_attachment(transport: str, on_hang: str, group: ProcessGroup | None) -> None:
    """Raise ValueError unless plans of the group can have these."""
    check_transport(transport, group)
    if not isinstance(on_hang, str) or on_hang not in ON_HANG:
        raise ValueError(f"on_hang must be one of {ON_HANG}, got {on_hang!r}")


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
        offsets = check_offsets(as_ints("cu_seqlens", _sequence(cu_seqlens)), "cu_seqlens", total)
    slices = None if mask_slices is None else check_slices(total, mask_slices)
    return PlanInput(total, offsets, slices, _positions(position_ids, total), layout)


def _positions(position_ids: Any, total_tokens: int) -> NDArray[np.int64] | None:
    """position_ids as an array of its own, or None."""
    if position_ids is None:
        return None
    if isinstance(position_ids, Tensor):
        refuse_dtensor("position_ids", position_ids)
        dtype = position_ids.dtype
        not_ints = dtype.is_floating_point or dtype.is_complex or dtype == torch.bool
        if position_ids.is_meta or not_ints:
            raise ValueError(
                f"position_ids must be total_tokens, {total_tokens}, ints, got a tensor of "
                f"{dtype} on {position_ids.device}"
            )
        check_dense("position_ids", position_ids)
        position_ids = position_ids.detach().cpu().numpy()
    try:
        values = np.array(position_ids)
    except (TypeError, ValueError):
        values = np.array(None)
    if values.dtype.kind not in "iu" or values.shape != (total_tokens,):
        raise ValueError(
            f"position_ids must be total_tokens, {total_tokens}, ints, got {values.dtype} of shape "
            f"{values.shape}"
        )
    if values.dtype == np.uint64 and (values > np.iinfo(np.int64).max).any():
        raise ValueError(f"position_ids must be at most 2^63 - 1, got {values.max()}")
    return values.astype(np.int64)


def last_offset(cu_seqlens: Any) -> int:
    """The end of the last document, from what a function of prefetch_plans returned.

    Raises:
        TypeError, ValueError: these are no offsets.
    """
    if isinstance(cu_seqlens, Tensor):
        refuse_dtensor("cu_seqlens", cu_seqlens)
        return int(as_cu_seqlens(cu_seqlens, "cu_seqlens")[-1])
    offsets = () if cu_seqlens is None else _sequence(cu_seqlens)
    if not offsets:
        raise ValueError(
            "cu_seqlens must return offsets for each batch, or total_tokens be given, got "
            f"{cu_seqlens!r}"
        )
    last = as_int(offsets[-1])  # the others are looked at where the plan is made
    if last is None:
        raise TypeError(f"cu_seqlens must hold ints, got {offsets[-1]!r} as the last")
    return last


def _sequence(cu_seqlens: object) -> Sequence[object]:
    values = cu_seqlens.tolist() if hasattr(cu_seqlens, "tolist") else cu_seqlens
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(
            "cu_seqlens must be an int32 or int64 tensor, a NumPy array, a sequence of ints or "
            f"None, got {type(cu_seqlens).__name__}"
        )
    return values
