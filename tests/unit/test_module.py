"""SinkAttention, and the one-device fallback of the plan."""

from __future__ import annotations

import torch

from magi_sink_cp import SinkAttention, attention_with_sink, cp_attention_with_sink, make_cp_plan


def test_owns_its_sink_and_calls_one_of_the_two():
    torch.manual_seed(0)
    module = SinkAttention(4, 2, causal=True)
    assert dict(module.named_parameters()).keys() == {"sink"}
    assert module.sink.shape == (2, 4)
    assert module.sink.dtype == torch.float32
    with torch.device("meta"):
        assert SinkAttention(4, dtype=None).sink.dtype == torch.get_default_dtype()
    assert module.sink.abs().min() > 0, "zero sinks would hide a dropped one"
    q, k = torch.randn(12, 4, 8), torch.randn(12, 2, 8)
    dense = module(q[None], k[None], k[None])
    assert torch.equal(
        dense, attention_with_sink(q[None], k[None], k[None], module.sink, causal=True)
    )
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    packed, lse = module(q, k, k, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, return_lse=True)
    plan = make_cp_plan(12, cu_seqlens=cu_seqlens)
    planned, planned_lse = module(q, k, k, plan=plan, return_lse=True)
    torch.testing.assert_close(planned, packed)
    torch.testing.assert_close(planned_lse, lse)
    planned.sum().backward()
    assert module.sink.grad.abs().min() > 0


def test_state_dict_and_repr():
    module = SinkAttention(4, 1, window_size=(128, 0), softcap=30.0)
    other = SinkAttention(4)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.sink, module.sink)
    assert "num_heads=4, num_sinks=1" in repr(module)
    assert "window_size=(128, 0)" in repr(module)


def test_plan_on_one_device():
    cu_seqlens = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    plan = make_cp_plan(7, cu_seqlens=cu_seqlens)
    assert (plan.rank, plan.cp_size, plan.local_tokens, plan.pad_tokens) == (0, 1, 7, 0), (
        "one rank needs no padding"
    )
    assert plan.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert plan.token_mask.tolist() == [True] * 7
    assert "documents=2, rank=0, cp_size=1, local_tokens=7, pad_tokens=0" in repr(plan)
    x = torch.arange(14.0).view(2, 7).requires_grad_()
    local = plan.shard(x, dim=1)
    assert local.tolist() == [[*map(float, range(7))], [*map(float, range(7, 14))]]
    whole = plan.unshard(local * 2, dim=-1)
    assert torch.equal(whole, 2 * x)
    whole.backward(torch.ones_like(whole))
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
    assert plan.shard(torch.arange(7)).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_dsink_reduce_is_the_identity_on_one_device():
    q, k = torch.randn(9, 4, 8), torch.randn(9, 2, 8)
    grads = []
    for reduce in ("none", "sum", "avg"):
        sink = torch.ones(1, 4, requires_grad=True)
        cp_attention_with_sink(
            *(make_cp_plan(9, cu_seqlens=[0, 9]).shard(x) for x in (q, k, k)),
            sink,
            plan=make_cp_plan(9),
            dsink_reduce=reduce,
        ).sum().backward()
        grads.append(sink.grad)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
