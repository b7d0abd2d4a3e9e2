"""shard and unshard as registered operators.

They are opaque to torch.compile, and differentiable any number of times. They take a plan as its
handle, and the size that they make, so a compiled graph serves every plan of the same sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from magi_sink_cp.dist.guard.agreement import Signature, all_gather
from magi_sink_cp.dist.plan import UNSHARD, keep_plan, plan_of
from magi_sink_cp.kernels.checks import refuse_forward_mode


def _shard(x: Tensor, handle: Tensor, dim: int, local_tokens: int, fill: float) -> Tensor:
    """Slice and pad."""
    refuse_forward_mode("CPPlan.shard")
    plan, pieces = plan_of(handle), []
    plan.check_size(x, dim, plan.total_tokens, "total_tokens")
    for lo, hi in plan.layout[plan.rank]:
        end = max(lo, min(hi, plan.total_tokens))
        pieces.append(x.narrow(dim, lo, end - lo) if end > lo else None)
        if hi > end:
            padding = list(x.shape)
            padding[dim] = hi - end
            pieces.append(x.new_full(padding, fill))
    held = [piece for piece in pieces if piece is not None]
    return (torch.cat(held, dim) if held else x.clone()).contiguous()


def _unshard(x: Tensor, handle: Tensor, dim: int, total_tokens: int) -> Tensor:
    """All-gather and cut off the padding."""
    plan = plan_of(handle)
    plan.check_unshard(x, dim)
    # The bytes that travel must not depend on lazy conjugation or negation.
    local = x.movedim(dim, 0).resolve_conj().resolve_neg().contiguous()
    gathered = local
    if plan.group is not None:
        others = [size for d, size in enumerate(x.shape) if d != dim % x.dim()]
        record = {"dim": dim, "shape but for dim": others, "dtype": str(x.dtype)}
        plan.agreement.compare(Signature(UNSHARD, record), UNSHARD)
        shape = plan.cp_size * plan.local_tokens, *local.shape[1:]
        if local.numel():
            what = f"{UNSHARD}: all-gather over the cp group"
            every = all_gather(local.view(-1).view(torch.uint8), plan.group, what)
            gathered = every.view(-1).view(local.dtype).view(shape)
        else:
            gathered = local.new_empty(shape)
    pieces = []
    for rank, ranges in enumerate(plan.layout):
        base = rank * plan.local_tokens
        for lo, hi in ranges:
            pieces.append((lo, gathered[base : base + hi - lo]))
            base += hi - lo
    in_order = [piece for _, piece in sorted(pieces, key=lambda piece: piece[0])]
    whole = torch.cat(in_order) if in_order else local.clone()
    return whole[:total_tokens].movedim(0, dim).contiguous()


def _resized(x: Tensor, dim: int, size: Any) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return x.new_empty(shape)


def _fake_shard(x: Tensor, handle: Tensor, dim: int, local_tokens: Any, fill: float) -> Tensor:
    return _resized(x, dim, local_tokens)


def _fake_unshard(x: Tensor, handle: Tensor, dim: int, total_tokens: Any) -> Tensor:
    return _resized(x, dim, total_tokens)


def _save_shard(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, handle, ctx.dim, _, _ = inputs
    keep_plan(ctx, handle)
    ctx.size = x.shape[ctx.dim]
    ctx.save_for_backward(handle)


def _save_unshard(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, handle, ctx.dim, _ = inputs
    keep_plan(ctx, handle)
    ctx.size = x.shape[ctx.dim]
    ctx.save_for_backward(handle)


def _shard_backward(ctx: Any, dx: Tensor) -> tuple[Any, ...]:
    """Every rank needs the whole gradient: an all-gather."""
    (handle,) = ctx.saved_tensors
    return torch.ops.magi_sink_cp.unshard(dx, handle, ctx.dim, ctx.size), None, None, None, None


def _unshard_backward(ctx: Any, dx: Tensor) -> tuple[Any, ...]:
    """Every rank holds the whole gradient: its own part is the rank's."""
    (handle,) = ctx.saved_tensors
    return torch.ops.magi_sink_cp.shard(dx, handle, ctx.dim, ctx.size, 0.0), None, None, None


_library = torch.library.Library("magi_sink_cp", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "shard(Tensor x, Tensor plan, int dim, SymInt local_tokens, float fill) -> Tensor", tags=_TAGS
)
_library.define(
    "unshard(Tensor x, Tensor plan, int dim, SymInt total_tokens) -> Tensor", tags=_TAGS
)
for _name, _run, _fake, _save, _gradient in (
    ("shard", _shard, _fake_shard, _save_shard, _shard_backward),
    ("unshard", _unshard, _fake_unshard, _save_unshard, _unshard_backward),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"magi_sink_cp::{_name}", _fake, lib=_library)
    torch.library.register_autograd(
        f"magi_sink_cp::{_name}", _gradient, setup_context=_save, lib=_library
    )
