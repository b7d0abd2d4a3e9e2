"""CPPlan: a token layout that is attached to a cp group. make_plan.py makes one."""

from __future__ import annotations

import itertools
import numbers
import weakref
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from magi_sink_cp.dist.bookkeeping import plain_tensors, upload
from magi_sink_cp.dist.guard.agreement import GroupRef, backends_of
from magi_sink_cp.dist.guard.late import Agreement
from magi_sink_cp.dist.magi_engine import MagiDispatch
from magi_sink_cp.dist.planning.blueprint import CPBlueprint
from magi_sink_cp.dist.planning.mask import Range
from magi_sink_cp.dist.transport.base import Transport
from magi_sink_cp.kernels.caching import BoundedCache
from magi_sink_cp.kernels.checks import as_int, check_dense, refuse_dtensor, refuse_forward_mode

UNSHARD = "CPPlan.unshard (or shard's backward)"


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
