"""Losses of a sequence of which every rank holds a part.

Gradients of parameters are *averaged* over the cp group, as DDP and FSDP do over the group that
they are given. So what a rank contributes to a sum over the ranks counts cp_size times in its own
backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from magi_sink_cp.dist.guard.watchdog import Communication
from magi_sink_cp.dist.plan import CPPlan


def global_loss(loss: Tensor, plan: CPPlan) -> Tensor:
    """The sum of every rank's ``loss``; its gradient is cp_size times that of this rank's own.

    Every rank of the plan's group must call this. Divide the local sum of losses by the number of
    labels of the whole batch first (``num_items_in_batch``). After an average of the gradients over
    the cp group they are those of the whole batch.
    """
    if plan.group is None or plan.cp_size == 1:
        return loss
    return scale_gradient(_SumOverRanks.apply(loss, plan.group), plan.cp_size)


class _SumOverRanks(torch.autograd.Function):
    """The sum; the gradient goes to this rank's own addend."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        total = x.clone()
        reduction = Communication(
            "the loss: all-reduce over the cp group",
            group,
            total.is_cuda,
            lambda: [dist.all_reduce(total, group=group, async_op=True)],
        )
        reduction.wait()
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x; its gradient is ``factor`` times what comes."""
    scaled: Tensor = _ScaleGradient.apply(x, factor)
    return scaled


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def cp_load_balancing_loss(
    router_logits: Sequence[Tensor], num_experts: int, top_k: int, plan: CPPlan
) -> Tensor:
    """transformers' load_balancing_loss_func over the tokens of all ranks, padding left out.

    It is E · Σ_e f_e · P_e with f the share of the choices and P the mean probability of expert e
    (Switch Transformer, arXiv:2101.03961, equations 4 to 6), over layers and tokens. It is no mean
    of the ranks' own losses, as it is not linear. Every rank of the plan's group must call this.

    Args:
        router_logits: (local_tokens, num_experts) of each layer, as a model returns them.
    """
    mask = plan.token_mask
    counts, probabilities = [], []
    for logits in router_logits:
        weights = torch.softmax(logits.float(), dim=-1)[mask]
        chosen = torch.topk(weights.detach(), top_k, dim=-1).indices.flatten()
        counts.append(torch.bincount(chosen, minlength=num_experts).to(weights.dtype))
        probabilities.append(weights.sum(0))
    rows = plan.total_tokens * len(router_logits)
    sums = torch.stack([torch.stack(each).sum(0) for each in (counts, probabilities)])
    both = global_loss(sums, plan) / rows
    return num_experts * (both[0].detach() * both[1]).sum()
