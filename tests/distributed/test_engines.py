"""One body on both engines, against a dense mask in fp64.

Here MagiAttention is a twin in plain torch (tests/support/magi_twin.py); tests/gpu/test_engines.py
runs the same body on MagiAttention itself.
"""

from __future__ import annotations

import os
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from magi_sink_cp import cp_attention_with_sink, make_cp_blueprint, make_cp_plan, masks
from magi_sink_cp.dist import magi_engine
from magi_sink_cp.kernels import magi_attention
from tests.support import magi_twin
from tests.support.ranks import run_on_ranks
from tests.support.reference import reference_attention
from tests.support.slices import dense

NAMES = ("out", "lse", "dq", "dk", "dv", "dsink")
OFFSETS = [0, 70, 70, 71, 203]
FOUR = [
    ((0, 50), (0, 60), "full"), ((50, 90), (20, 80), "causal"),
    ((90, 130), (60, 160), "inv_causal"), ((140, 200), (100, 200), "bi_causal"),
]  # fmt: skip
# name → (plan's arguments, call's arguments, the mask as slices), of 203 tokens.
MASKS = {
    "full": ({}, {"causal": False}, [((0, 203), (0, 203), "full")]),
    "causal": ({}, {}, masks.documents([0, 203])),
    "packed": ({"cu_seqlens": OFFSETS}, {}, masks.documents(OFFSETS)),
    "window": (
        {"cu_seqlens": OFFSETS}, {"window_size": (40, 0)}, masks.sliding_window(OFFSETS, 40)
    ),
    "four types, and rows that see nothing": ({"mask_slices": FOUR}, {}, FOUR),
} | {
    name: ({"mask_slices": slices}, {}, slices)
    for name, slices in {
        "shared_prefix": masks.shared_prefix(60, [30, 0, 41, 72]),
        "block_causal": masks.block_causal(31, 203),
        "global_tokens": masks.global_tokens(OFFSETS, 5, 20),
        "prefix_lm": masks.prefix_lm([0, 83, 203], [31, 10]),
    }.items()
}  # fmt: skip
# layout, number, factor, dtype
SINKS = [
    ("sh", 1, 1.0, None), ("sh", 4, 1.0, None), ("sh", 12, 1.0, None), ("ssh", 1, 1.0, None),
    ("ssh", 3, 1.0, None), ("sh", 0, 1.0, None), ("sh", 2, 100.0, None),
    ("sh", 1, 1.0, torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize("engine", ["native", "magi"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_masks_and_sinks(num_ranks, engine):
    run_on_ranks(num_ranks, body, engine=engine)


def body(group, device, *, engine) -> None:
    with magi_twin.installed():
        check_masks_and_sinks(group, device, engine, torch.float64, 1e-9, head_dim=16)


def check_masks_and_sinks(group, device, engine, dtype, tolerance, head_dim) -> None:
    """Every mask, each with some of the sinks, so that every sink comes with several masks."""
    for number, (plan_arguments, arguments, slices) in enumerate(MASKS.values()):
        plan = make_cp_plan(203, group=group, engine=engine, **plan_arguments)
        assert plan.engine == engine
        chosen = SINKS if number == 1 else [SINKS[(number + i) % len(SINKS)] for i in (0, 3)]
        for sinks in chosen:
            check(plan, slices, device, dtype, tolerance, head_dim, sinks, **arguments)


def check(
    plan, slices, device, dtype, tolerance, head_dim, sinks, attend=None, scores=None, **arguments
) -> None:
    """Out, lse and all gradients of a loss on both, padding, and dsink summed over the ranks."""
    layout, number, factor, sink_dtype = sinks
    generator = torch.Generator().manual_seed(number)
    total = plan.total_tokens

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(device)

    q, k, v = (draw(total, heads, head_dim).to(dtype) for heads in (4, 2, 2))
    weight, lse_weight = draw(total, 4, head_dim).to(dtype), draw(4, total)
    if plan.cp_size > 1:  # each rank's of another magnitude, and none of the last one's
        loud = torch.tensor([8.0**rank for rank in range(plan.cp_size - 1)] + [0.0], device=device)
        lse_weight *= plan.unshard(loud[plan.rank].expand(plan.local_tokens).contiguous())
    sink = None
    if number:
        sink = draw(number, 4) if layout == "sh" else draw(total, number, 4)
        usual = torch.float64 if dtype == torch.float64 else torch.float32
        sink = (factor * sink).to(sink_dtype or usual)
    whole = [None if x is None else x.requires_grad_() for x in (q, k, v, sink)]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in whole]
    mask = dense(slices, total).bool().to(device)
    truth = reference_attention(*exact, mask, **(scores or {}))
    expected = results(*truth, weight, lse_weight, exact)
    local = [plan.shard(x.detach()).requires_grad_() for x in (q, k, v)]
    own_sink = None
    if sink is not None:
        own_sink = plan.shard(sink.detach()) if layout == "ssh" else sink.detach().clone()
        own_sink = torch.nn.Parameter(own_sink)
    shared = layout == "sh" and sink is not None
    out, lse = (attend or cp_attention_with_sink)(
        *local, own_sink, plan=plan, sink_layout=layout, return_lse=True,
        dsink_reduce="sum" if shared else "none", **(scores or {}), **arguments,
    )  # fmt: skip
    own_weights = plan.shard(weight), plan.shard(lse_weight, dim=1)
    found = results(out, lse, *own_weights, [*local, own_sink])
    padding = ~plan.token_mask
    for name in ("out", "dq", "dk", "dv"):
        assert not found[name][padding].any(), f"{name} of padding is not zero"
    found = {
        name: x if name == "dsink" and shared else plan.unshard(x, dim=1 if name == "lse" else 0)
        for name, x in found.items()
    }
    for name, truth in expected.items():
        value = found[name].double()
        assert torch.equal(value.isinf(), truth.isinf()), name
        finite = truth.isfinite()
        scale = max(float(truth[finite].norm()), 1e-3 * truth.numel() ** 0.5)
        error = float((value - truth)[finite].norm()) / scale
        allowed = min(tolerance, 1e-5) if name == "lse" else tolerance
        if name == "dsink" and sink_dtype is not None:
            allowed = 1e-2  # it is rounded to the sink's dtype
        assert error < allowed, f"{name}, {sinks}: {error:.3g}"


def results(out, lse, weight, lse_weight, leaves):
    seen = lse.double().masked_fill(torch.isinf(lse), 0)
    loss = (out.double() * weight).sum() + (seen * lse_weight).sum()
    grads = torch.autograd.grad(loss, [x for x in leaves if x is not None])
    return dict(zip(NAMES, (out.detach(), lse.detach(), *grads), strict=False))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_a_caller_may_ask(num_ranks):
    run_on_ranks(num_ranks, body_options)


def body_options(group, device) -> None:
    with magi_twin.installed():
        check_options(group, device, torch.float64, 1e-9, 16)
        for engine in ("native", "magi"):
            check_softcap(group, device, engine, torch.float64, 1e-9, 16)


def check_softcap(group, device, engine, dtype, tolerance, head_dim) -> None:
    plan = make_cp_plan(203, group=group, engine=engine, cu_seqlens=OFFSETS)
    slices, scores = masks.documents(OFFSETS), {"softcap": 2.0, "softmax_scale": 0.7}
    check(plan, slices, device, dtype, tolerance, head_dim, ("sh", 2, 1.0, None), scores=scores)


def check_options(group, device, dtype, tolerance, head_dim) -> None:
    """One plan for several windows, samples, checkpointing, compiling, overlap, no gradient."""
    plan = make_cp_plan(203, group=group, engine="magi", cu_seqlens=OFFSETS)
    rest = plan, masks.documents(OFFSETS), device, dtype, tolerance, head_dim

    def checkpointed(q, k, v, sink, **arguments):
        return checkpoint(cp_attention_with_sink, q, k, v, sink, use_reentrant=False, **arguments)

    check(*rest, ("sh", 2, 1.0, None), attend=checkpointed)
    compiled = torch.compile(cp_attention_with_sink, backend="aot_eager", fullgraph=True)
    check(*rest, ("sh", 3, 1.0, None), attend=compiled)
    for policy in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE):

        def selective(q, k, v, sink, policy=policy, **arguments):
            contexts = partial(create_selective_checkpoint_contexts, lambda *_, **__: policy)
            return checkpoint(
                cp_attention_with_sink, q, k, v, sink, use_reentrant=False, context_fn=contexts,
                **arguments,
            )  # fmt: skip

        check(*rest, ("sh", 2, 1.0, None), attend=selective)
    for window in (30, 7):
        slices = masks.sliding_window(OFFSETS, window)
        sinks = "ssh", 1, 1.0, None
        check(plan, slices, *rest[2:], sinks, window_size=(window, 0))
    for degree in (0, 2):
        check(*rest, ("sh", 1, 1.0, None), overlap_degree=degree)
    generator = torch.Generator().manual_seed(0)
    samples = [
        plan.shard(
            torch.randn(3, 203, h, head_dim, generator=generator).to(device, dtype), dim=1
        ).requires_grad_()
        for h in (4, 2, 2)
    ]
    sink = torch.randn(1, 4, generator=generator).to(device).requires_grad_()
    out, lse = cp_attention_with_sink(*samples, sink, plan=plan, return_lse=True)
    grads = torch.autograd.grad((out.double() ** 2).sum() + lse.double().sum(), [*samples, sink])
    dsink = torch.zeros_like(sink)
    for n in range(3):
        one = [x.detach()[n].requires_grad_() for x in samples]
        own, own_lse = cp_attention_with_sink(*one, sink, plan=plan, return_lse=True)
        loss = (own.double() ** 2).sum() + own_lse.double().sum()
        own_grads = torch.autograd.grad(loss, [*one, sink])
        dsink += own_grads[3]
        for whole, alone in zip((out, lse, *grads[:3]), (own, own_lse, *own_grads), strict=False):
            torch.testing.assert_close(whole[n], alone, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(grads[3], dsink, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(cp_attention_with_sink(*samples, sink, plan=plan), out)


@pytest.mark.parametrize("engine", ["native", "magi"])
def test_a_loss_that_reaches_lse_on_one_rank_alone(engine):
    run_on_ranks(2, body_lonely, engine=engine)


def body_lonely(group, device, *, engine) -> None:
    with magi_twin.installed():
        check_lonely_lse(group, device, engine, torch.float64, 1e-9, 16)


def check_lonely_lse(group, device, engine, dtype, tolerance, head_dim) -> None:
    """The others know nothing of it; they take part. NaN in a key is no reason to stop."""
    plan = make_cp_plan(203, group=group, engine=engine)
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(203, h, head_dim, generator=generator).to(device, dtype) for h in (4, 2, 2)
    ]
    exact = [x.double().requires_grad_() for x in tensors]
    mask = torch.ones(203, 203, device=device).tril().bool()
    out, lse = reference_attention(*exact, None, mask)
    mine = plan.unshard((plan.token_mask & (plan.rank == 0)).double())
    expected = torch.autograd.grad((out**2).sum() + (lse * mine).sum(), exact)
    local = [plan.shard(x).requires_grad_() for x in tensors]
    out, lse = cp_attention_with_sink(*local, plan=plan, return_lse=True)
    loss = (out.double() ** 2).sum()
    if plan.rank == 0:
        loss = loss + lse.double().sum()
    for grad, truth in zip(torch.autograd.grad(loss, local), expected, strict=True):
        error = (plan.unshard(grad).double() - truth).norm() / truth.norm()
        assert error < tolerance, error
    plan = make_cp_plan(203, group=group, engine=engine)
    local[1] = torch.full_like(local[1], torch.nan if plan.rank else 0.0).requires_grad_()
    cp_attention_with_sink(*local, plan=plan).sum().backward()


OPERATIONS = [None, "none", "sum", "avg"]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_dsink_reduce_whatever_magi_attention_is_told(num_ranks):
    run_on_ranks(num_ranks, body_reduce)


def body_reduce(group, device) -> None:
    with magi_twin.installed():
        check_dsink_reduce(group, device, torch.float64, 16)


def check_dsink_reduce(group, device, dtype, head_dim) -> None:
    """As on the native engine; the variable stays as it was."""
    name = "MAGI_ATTENTION_DSINK_ALL_REDUCE_OP"
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(203, h, head_dim, generator=generator).to(device, dtype) for h in (4, 2, 2)
    )
    sinks = torch.randn(4, 4, generator=generator).to(device)
    for operation in OPERATIONS:
        environment = {} if operation is None else {name: operation}
        with mock.patch.dict(os.environ, environment):
            dsinks = {}
            for engine in ("native", "magi"):
                plan = make_cp_plan(203, group=group, engine=engine)
                local = [plan.shard(x) for x in (q, k, v)]
                for reduce in ("none", "sum", "avg"):
                    sink = sinks.clone().requires_grad_()
                    out = cp_attention_with_sink(*local, sink, plan=plan, dsink_reduce=reduce)
                    (out.double() ** 2).sum().backward()
                    if reduce == "none":
                        dist.all_reduce(sink.grad, group=group)
                    dsinks[engine, reduce] = sink.grad
            assert os.environ.get(name) == operation
        for reduce in ("none", "sum", "avg"):
            torch.testing.assert_close(
                dsinks["magi", reduce], dsinks["native", reduce], rtol=2e-2, atol=1e-3
            )
        ranks = dist.get_world_size(group)
        torch.testing.assert_close(dsinks["magi", "avg"] * ranks, dsinks["magi", "sum"])


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_key_that_the_caller_holds(num_ranks):
    run_on_ranks(num_ranks, body_key)


def body_key(group, device) -> None:
    with magi_twin.installed() as api:
        check_key(api, group, device, torch.float64, 1e-9, 16)


def check_key(api, group, device, dtype, tolerance, head_dim) -> None:
    """Its mask, its dispatch."""
    ranges = [api.AttnRanges.from_ranges([list(one[i]) for one in FOUR]) for i in range(2)]
    key = api.magi_attn_flex_key(
        *ranges, [kind for *_, kind in FOUR], total_seqlen_q=203, total_seqlen_k=203,
        num_heads_q=4, num_heads_kv=2, head_dim=head_dim, pad_size=0, cp_group_or_mesh=group,
    )  # fmt: skip
    plan = make_cp_plan(magi_key=key, cu_seqlens=OFFSETS)
    assert plan.dispatch.key is key
    assert (plan.engine, plan.total_tokens) == ("magi", 203)
    assert plan.mask_slices == tuple(FOUR)
    x = torch.randn(203, 3, device=device, generator=torch.Generator(device).manual_seed(0))
    assert torch.equal(plan.shard(x), api.dispatch(x, key))
    numbers = api.dispatch(torch.arange(203, device=device), key, pad_value=-1)
    assert torch.equal(plan.token_mask, numbers >= 0)
    starts = torch.tensor(OFFSETS, device=device)
    document = torch.searchsorted(starts, numbers, right=True) - 1
    positions = torch.where(numbers < 0, 0, numbers - starts[document])
    assert torch.equal(plan.position_ids, positions)
    assert torch.equal(plan.unshard(plan.shard(x)), x)
    check(plan, FOUR, device, dtype, tolerance, head_dim, ("sh", 9, 1.0, None))
    with pytest.raises(ValueError, match="causal and window_size must be left out"):
        cp_attention_with_sink(x, x, x, plan=plan, causal=True)
    for wrong, message in (
        ({"magi_key": key, "total_tokens": 203}, "total_tokens must be left out beside magi_key"),
        ({"magi_key": key, "engine": "native"}, "engine must be 'magi' or 'auto' beside magi_key"),
    ):
        with pytest.raises(ValueError, match=message):
            make_cp_plan(**wrong)
    with pytest.raises(TypeError, match="magi_key must be a DistAttnRuntimeKey"):
        make_cp_plan(magi_key="key")


def test_what_it_refuses():
    run_on_ranks(2, body_refusals)


def body_refusals(group, device) -> None:
    with magi_twin.installed():
        check_refusals(group, device, torch.float64, 16)


def check_refusals(group, device, dtype, head_dim) -> None:
    """On every rank, by name."""
    for wrong, message in (
        ({"layout": "zigzag"}, "layout must be left at 'auto' with engine='magi'"),
        ({"transport": "nccl"}, "transport must be left at 'auto' with engine='magi'"),
        ({"mask_slices": []}, "must be given a mask in which some query sees a key"),
        ({"mask_slices": [((0, 4), (0, 2), "bi_causal")]}, "in which some query sees a key"),
        ({"engine": "megatron"}, "engine must be 'auto' or one of"),
    ):
        with pytest.raises(ValueError, match=message):
            make_cp_plan(203, **{"group": group, "engine": "magi"} | wrong)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    blueprint = make_cp_blueprint(203, cp_size=size, rank=rank)
    with pytest.raises(ValueError, match="engine='magi' must be given total_tokens"):
        make_cp_plan(blueprint, group=group, engine="magi")
    with pytest.raises(ValueError, match="engine='magi' must have a cp group with NCCL"):
        make_cp_plan(203, engine="magi")
    with pytest.raises(ValueError, match=r"same engine, got rank 0: 'native', rank 1: 'magi'"):
        make_cp_plan(203, group=group, engine="magi" if rank else "native")
    plan = make_cp_plan(203, group=group, engine="magi")
    x = torch.zeros(plan.local_tokens, 2, head_dim, dtype=dtype, device=device)
    for wrong, message in (
        ({"backend": "fa3"}, "backend must be 'auto' or 'ffa' with engine='magi'"),
        ({"deterministic": True}, f"must come with {magi_engine.DETERMINISTIC}=1"),
    ):
        with pytest.raises(ValueError, match=message):
            cp_attention_with_sink(x, x, x, plan=plan, **wrong)
    odd = x[..., :12].contiguous()
    with pytest.raises(ValueError, match="it takes a head_dim that is a multiple of 8, at most"):
        cp_attention_with_sink(odd, odd, odd, plan=plan)
    if dtype == torch.float64:  # on a GPU its deterministic kernels would be compiled first
        with mock.patch.dict(os.environ, {magi_engine.DETERMINISTIC: "1"}):
            cp_attention_with_sink(x, x, x, plan=plan, deterministic=True)
    else:
        with pytest.raises(ValueError, match="grad_reduce_dtype must be None or torch.bfloat16"):
            cp_attention_with_sink(x, x, x, plan=plan, grad_reduce_dtype=torch.float32)
    plan = make_cp_plan(
        203, group=group, engine="magi"
    )  # on which the ranks agree for the first time
    message = "cp rank 1 was given something invalid|must be 'auto' or 'ffa'"
    with pytest.raises(ValueError, match=message):
        cp_attention_with_sink(x, x, x, plan=plan, backend="cpu" if rank else "auto")


def test_a_backward_that_is_not_known_is_refused():
    run_on_ranks(1, body_unknown)


def body_unknown(group, device) -> None:
    """Whatever else MagiAttention saves for its backward could be computed from a wrong lse."""
    original = magi_twin.DistAttnFunc.forward

    def saves_more(ctx, *arguments):
        found = original(ctx, *arguments)
        ctx.save_for_backward(*ctx.to_save, found[1].exp())
        return found

    with magi_twin.installed():
        plan = make_cp_plan(20, group=group, engine="magi")
        x = torch.randn(plan.local_tokens, 2, 16, requires_grad=True)
        with (
            mock.patch.object(magi_twin.DistAttnFunc, "forward", staticmethod(saves_more)),
            pytest.raises(magi_attention.NotUsableError, match="that is not known here"),
        ):
            cp_attention_with_sink(x, x, x, plan=plan)
