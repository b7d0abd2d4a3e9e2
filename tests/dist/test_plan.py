"""The plan across ranks: sharding and its gradients, and agreement on every argument."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from magi_sink_cp import cp_attention_with_sink, make_cp_plan
from magi_sink_cp.dist import plan as plan_module
from tests.dist.ranks import run_on_ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("total", [0, 1, 5, 12, 37])
def test_shard_and_unshard(num_ranks, total):
    run_on_ranks(num_ranks, body_shard, total=total)


def body_shard(group, device, *, total) -> None:
    plan = make_cp_plan(total, group=group, cu_seqlens=[0, total // 3, total // 3, total])
    assert plan.cp_size == dist.get_world_size(group)
    assert plan.rank == dist.get_rank(group)
    assert plan.local_tokens * plan.cp_size - plan.pad_tokens == total
    assert plan.local_tokens % 2 == 0
    positions = torch.cat([torch.arange(total // 3), torch.arange(total - total // 3)])
    assert torch.equal(plan.unshard(plan.position_ids), positions)
    assert torch.equal(plan.shard(positions), plan.position_ids)
    assert plan.unshard(plan.token_mask).all()
    assert int(plan.token_mask.sum()) <= plan.local_tokens
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        x = torch.arange(total * 6).view(2, total, 3).to(dtype)
        local = plan.shard(x, dim=1)
        assert local.shape == (2, plan.local_tokens, 3)
        assert not local[:, ~plan.token_mask].any()
        assert torch.equal(plan.unshard(local, dim=-2), x)

    # Gradients of a loss that every rank computes from the whole tensor: the same, whole, on every rank.
    x, weight = (torch.randn(total, 2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    x.requires_grad_()
    (plan.unshard(plan.shard(x) * 3) * weight).sum().backward()
    torch.testing.assert_close(x.grad, 3 * weight)


def test_device_mesh():
    run_on_ranks(4, body_device_mesh)


def body_device_mesh(group, device) -> None:
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("dp", "cp"))
    with pytest.raises(ValueError, match=r"group must be a 1-D DeviceMesh .* got one of shape \(2, 2\)"):
        make_cp_plan(8, group=mesh)
    plan = make_cp_plan(8, group=mesh["cp"])
    assert plan.cp_size == 2
    assert plan.rank == dist.get_rank() % 2
    x = torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(dist.get_rank() // 2))  # differs between cp groups
    local = plan.shard(x)
    assert torch.equal(plan.unshard(local), x)
    out = cp_attention_with_sink(local, local, local, torch.zeros(1, 2), plan=plan)
    alone = make_cp_plan(8)
    torch.testing.assert_close(plan.unshard(out), cp_attention_with_sink(x, x, x, torch.zeros(1, 2), plan=alone))


def forget_agreements() -> None:
    """As if the ranks had called nothing on any group yet."""
    plan_module._agreed.clear()


DISAGREEMENTS = {
    "total_tokens": lambda rank: {"total_tokens": 10 + (rank == 1)},
    "cu_seqlens": lambda rank: {"total_tokens": 10, "cu_seqlens": [0, 4 + (rank == 0), 10]},
}


@pytest.mark.parametrize("what", DISAGREEMENTS)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_plans_that_disagree_raise_on_every_rank(num_ranks, what):
    run_on_ranks(num_ranks, body_plan_disagreement, what=what)


def body_plan_disagreement(group, device, *, what) -> None:
    with pytest.raises(ValueError, match=rf"make_cp_plan: all ranks .* the same {what}.* got rank 0: .*, rank 1: "):
        make_cp_plan(group=group, **DISAGREEMENTS[what](dist.get_rank(group)))
    assert make_cp_plan(10, group=group).local_tokens > 0, "the group still works"


@pytest.mark.parametrize("wrong_rank", [0, 1])
def test_an_invalid_argument_on_one_rank_raises_on_every_rank(wrong_rank):
    run_on_ranks(2, body_plan_error, wrong_rank=wrong_rank)


def body_plan_error(group, device, *, wrong_rank) -> None:
    rank = dist.get_rank(group)
    cu_seqlens = torch.tensor([0, 7 if rank == wrong_rank else 10], dtype=torch.int32)
    own = "^cu_seqlens must end at the number of tokens, 10, got 7"
    other = f"make_cp_plan: cp rank {wrong_rank} was given something invalid, .* ValueError: cu_seqlens must end"
    with pytest.raises(ValueError, match=own if rank == wrong_rank else other):
        make_cp_plan(10, group=group, cu_seqlens=cu_seqlens)


CALLS = {
    "head counts": (lambda rank: {"heads": 4 if rank else 2}, "heads, heads_kv, head_dim"),
    "dtype": (lambda rank: {"dtype": torch.float32 if rank else torch.float64}, "dtype"),
    "sinks": (lambda rank: {"s_sink": 1 + rank}, r"sink \(s_sink, dtype\)"),
    "causal": (lambda rank: {"causal": bool(rank)}, "mask and scores"),
    "dsink_reduce": (lambda rank: {"dsink_reduce": "sum" if rank else "none"}, "dsink_reduce"),
    "requires_grad": (lambda rank: {"requires_grad": bool(rank)}, "requires_grad of q, k, v, sink"),
}


@pytest.mark.parametrize("what", CALLS)
def test_calls_that_disagree_raise_on_every_rank(what):
    run_on_ranks(2, body_call_disagreement, what=what)


def call(plan, *, heads=2, dtype=torch.float32, s_sink=1, requires_grad=False, tokens=None, **arguments):
    q = torch.randn(plan.local_tokens if tokens is None else tokens, heads, 4, dtype=dtype, requires_grad=requires_grad)
    return cp_attention_with_sink(q, q, q, torch.zeros(s_sink, heads), plan=plan, **arguments)


def body_call_disagreement(group, device, *, what) -> None:
    change, named = CALLS[what]
    forget_agreements()
    plan = make_cp_plan(12, group=group)
    with pytest.raises(ValueError, match=rf"cp_attention_with_sink: all ranks .* the same {named}, got rank 0: .*, rank 1: "):
        call(plan, **change(dist.get_rank(group)))
    assert call(plan).shape == (plan.local_tokens, 2, 4), "the group still works"


def test_an_invalid_call_on_one_rank_raises_on_every_rank():
    run_on_ranks(2, body_call_error)


def body_call_error(group, device) -> None:
    forget_agreements()
    plan = make_cp_plan(12, group=group)
    own = "^q must have the plan's local_tokens, 6, as its first size, got"
    other = "cp_attention_with_sink: cp rank 1 was given something invalid, .* ValueError: q must have the plan's local_tokens"
    rank = dist.get_rank(group)
    with pytest.raises(ValueError, match=own if rank else other):
        call(plan, tokens=5 if rank else None)


def test_a_signature_is_compared_once():
    run_on_ranks(2, body_compared_once)


def body_compared_once(group, device) -> None:
    forget_agreements()
    compared = []
    original = plan_module.agree
    plan_module.agree = lambda record, *rest: (compared.append(record), original(record, *rest))[1]
    try:
        for _ in range(2):
            plan = make_cp_plan(12, group=group)
            for heads in (2, 4, 2):
                call(plan, heads=heads)
    finally:
        plan_module.agree = original
    assert [("total_tokens" in record) for record in compared] == [True, False, False, True]


def test_a_rank_outside_the_group():
    run_on_ranks(3, body_outside)


def body_outside(group, device) -> None:
    """What new_group gives to a rank that is not in it is refused there, and the members go on."""
    with pytest.raises((ValueError, TypeError), match="group must"):
        make_cp_plan(8, group=dist.GroupMember.NON_GROUP_MEMBER)
