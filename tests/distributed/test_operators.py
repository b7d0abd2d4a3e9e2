"""Attention across ranks as an operator: checkpointing policies, torch.compile, opcheck, order."""

from __future__ import annotations

import contextlib
import functools
import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from magi_sink_cp import attention_with_sink, cp_attention_with_sink, make_cp_plan
from magi_sink_cp.dist.transport import p2p
from tests.distributed.test_frameworks import CU_SEQLENS, TOKENS, Stack, compare, whole_sequence
from tests.support.ranks import run_on_ranks

devices = pytest.mark.parametrize(
    "device_type", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(ranks=2))]
)
ATTENTION = torch.ops.magi_sink_cp.cp_attention_forward.default
MATMULS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
)


def every_second_matmul():
    """torchtitan's selective policy: expensive operators, and of the matmuls every other one."""
    counts = {False: itertools.count(1), True: itertools.count(1)}

    def policy(ctx, op, *args, **kwargs):
        number = next(counts[ctx.is_recompute]) if op in MATMULS else 0
        saves = op is ATTENTION or (op in MATMULS and number % 2 == 0)
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def saving(*operators):
    def policy(ctx, op, *args, **kwargs):
        saves = op in operators or "everything" in operators
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    return lambda: policy


# The policy of a layer, and how often it runs forward's messages: once more where attention is
# recomputed.
POLICIES = {
    "save nothing": (saving(), 2),
    "save the matmuls": (saving(*MATMULS), 2),
    "save the attention": (saving(ATTENTION), 1),
    "save everything": (saving("everything"), 1),
    "torchtitan's": (every_second_matmul, 1),
}


class Messages:
    """Counts the exchanges that start while it is active."""

    def __enter__(self):
        self.count = 0
        original = p2p.PointToPoint.start

        def start(this, *arguments):
            self.count += 1
            return original(this, *arguments)

        self._patch = mock.patch.object(p2p.PointToPoint, "start", start)
        self._patch.start()
        return self

    def __exit__(self, *_):
        self._patch.stop()


@devices
@pytest.mark.parametrize("policy", POLICIES)
def test_selective_checkpointing(device_type, policy):
    run_on_ranks(2, body_selective, device_type, policy=policy)


def body_selective(group, device, *, policy) -> None:
    """Every policy gives right gradients, and a saved attention lets no key travel again."""
    make_policy, forwards = POLICIES[policy]
    x, dout, expected = whole_sequence(device)
    transport = "gloo" if device.type == "cpu" else "nccl"
    plan = make_cp_plan(TOKENS, group=group, cu_seqlens=CU_SEQLENS, transport=transport)
    model = Stack(plan).to(device, x.dtype)

    def step(around) -> int:
        model.around = around
        model.zero_grad()
        with Messages() as messages:
            model(plan.shard(x).requires_grad_()).backward(plan.shard(dout))
        compare(model, expected, device, group)
        return messages.count

    def around(block, x):
        contexts = functools.partial(create_selective_checkpoint_contexts, make_policy())
        return checkpoint(block, x, use_reentrant=False, context_fn=contexts)

    plain = step(lambda block, x: block(x))
    backward = plain * 2 // 3  # a stage's keys travel once forward; backward, they and gradients do
    assert step(around) == forwards * (plain - backward) + backward


@devices
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_new_documents_each_step_compile_once(device_type, backend):
    run_on_ranks(2, body_compiled, device_type, backend=backend)


def body_compiled(group, device, *, backend) -> None:
    """fullgraph: shard, attention of two layers, lse and unshard; one graph for 10 plans."""
    torch._dynamo.reset()
    dtype, tolerance = (torch.float32, 1e-5) if device.type == "cpu" else (torch.bfloat16, 2e-2)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(TOKENS, 3, 4, 64, generator=generator).to(device, dtype)
    sink = torch.randn(4, generator=generator).to(device)

    def layers(x, sink, plan):
        q, k, v = plan.shard(x).unbind(1)
        out, lse = cp_attention_with_sink(
            q, k, v, sink, plan=plan, return_lse=True, deterministic=True
        )
        out = cp_attention_with_sink(
            out, k, v, sink, plan=plan, window_size=(9, 0), deterministic=True
        )
        return plan.unshard(out), lse

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layers, fullgraph=True, backend=counter)
    for cut in range(1, 11):
        plan = make_cp_plan(TOKENS, group=group, cu_seqlens=[0, cut, 30 + cut, TOKENS])
        results = []
        for run in (compiled, layers):
            leaves = whole.clone().requires_grad_(), sink.clone().requires_grad_()
            out, lse = run(*leaves, plan)
            (out.float().square().sum() + lse.sum()).backward()
            results.append([out.detach(), lse.detach(), *(leaf.grad for leaf in leaves)])
        for ours, true in zip(*results, strict=True):
            torch.testing.assert_close(ours, true, rtol=tolerance, atol=tolerance)
        assert counter.frame_count == 1, f"plan {cut} compiled again"


def test_plans_of_other_sizes_compile_twice():
    run_on_ranks(2, body_other_sizes)


def body_other_sizes(group, device) -> None:
    """Once for the first size, once for all others: sizes become symbols."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def layer(x, plan):
        local = plan.shard(x)
        return plan.unshard(cp_attention_with_sink(local, local, local, plan=plan))

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for total in (24, 40, 56, 48, 64):
        plan, x = make_cp_plan(total, group=group), torch.randn(total, 2, 8)
        dist.broadcast(x, src=0, group=group)
        torch.testing.assert_close(compiled(x, plan), layer(x, plan))
    assert counter.frame_count <= 3


def test_communication_keeps_its_order_in_a_compiled_graph():
    run_on_ranks(2, body_compiled_order)


def body_compiled_order(group, device) -> None:
    """Two calls that do not depend on each other: messages of both ranks match by order alone."""
    torch._dynamo.reset()
    plans = [make_cp_plan(48, group=group), make_cp_plan(48, group=group, cu_seqlens=[0, 31, 48])]
    generator = torch.Generator().manual_seed(dist.get_rank(group))
    x = torch.randn(2, 24, 2, 8, generator=generator)

    def branches(x, first, second):
        a = cp_attention_with_sink(x[0], x[0], x[0], plan=first)
        b = cp_attention_with_sink(x[1], x[1], x[1], plan=second, window_size=(5, 0))
        return (a.sin() * b.cos()).sum()

    gradients = []
    for run in (branches, torch.compile(branches, fullgraph=True, backend="inductor")):
        leaf = x.clone().requires_grad_()
        run(leaf, *plans).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("sink_layout", ["sh", "ssh", None])
def test_opcheck(sink_layout):
    run_on_ranks(2, body_opcheck, sink_layout=sink_layout)


def body_opcheck(group, device, *, sink_layout) -> None:
    """Schema, fakes and autograd registration of all four operators, with gradients asked for."""
    plan = make_cp_plan(13, group=group)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, plan.local_tokens, heads, 8) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(s, generator=generator).requires_grad_() for s in shapes)
    sink = None
    if sink_layout is not None:
        rows = () if sink_layout == "sh" else (2, plan.local_tokens)
        sink = torch.randn(*rows, 2, 4, generator=generator).requires_grad_()
    options = [
        [True] * 3 + [sink is not None], True, sink_layout or "sh", None, (-1, 0), 0.0, True,
        "none", None, None, False, "auto", None,
    ]  # fmt: skip
    forward = q, k, v, sink, plan.handle, *options
    plan.calls = itertools.repeat(0)  # the number of a call is no function of its inputs
    torch.library.opcheck(torch.ops.magi_sink_cp.cp_attention_forward.default, forward)
    with torch.no_grad():
        out, lse, number = torch.ops.magi_sink_cp.cp_attention_forward(*forward)
        detached = [x if x is None else x.detach() for x in (q, k, v, sink)]
        needs = sink is not None
        backward = out, lse, out, lse, number, needs, *detached, plan.handle, *options
    static = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    operator = torch.ops.magi_sink_cp.cp_attention_backward.default
    torch.library.opcheck(operator, backward, test_utils=static)
    x = torch.randn(3, 13, generator=generator).requires_grad_()
    torch.library.opcheck(
        torch.ops.magi_sink_cp.shard.default, (x, plan.handle, 1, plan.local_tokens, 0.0)
    )
    local = plan.shard(x, dim=1).detach().requires_grad_()
    torch.library.opcheck(torch.ops.magi_sink_cp.unshard.default, (local, plan.handle, 1, 13))


def test_backwards_in_another_order_raise_on_every_rank():
    run_on_ranks(2, body_backward_order)


def body_backward_order(group, device) -> None:
    """What no rank can see alone: dk would be that of another call."""
    plan = make_cp_plan(24, group=group)
    x = torch.randn(plan.local_tokens, 2, 8, requires_grad=True)
    outs = [cp_attention_with_sink(x, x, x, plan=plan, checks="always") for _ in range(2)]
    first, second = outs if dist.get_rank(group) == 0 else outs[::-1]
    with pytest.raises(
        ValueError, match="backward of cp_attention_with_sink: all ranks .* the same number of the"
    ):
        first.sum().backward()
    del second


def test_a_skipped_backward_raises_on_every_rank():
    run_on_ranks(2, body_skipped)


def body_skipped(group, device) -> None:
    plan = make_cp_plan(24, group=group)
    x = torch.randn(plan.local_tokens, 2, 8, requires_grad=True)
    out = cp_attention_with_sink(x, x, x, plan=plan)
    goes_on = functools.partial(cp_attention_with_sink, x, x, x, plan=plan)
    step = out.sum().backward if dist.get_rank(group) == 0 else goes_on
    with pytest.raises(ValueError, match="all ranks of the cp group must be given the same call"):
        step()


# What rank 0 gives in place of (q, sink, options), and whether a dispatch mode watches it.
WRONG_ON_ONE_RANK = {
    "a list": lambda q, sink, mesh: (q.tolist(), sink, {}),
    "a NumPy array": lambda q, sink, mesh: (q.detach().numpy(), sink, {}),
    "a float as sink": lambda q, sink, mesh: (q, 0.5, {}),
    "a DTensor": lambda q, sink, mesh: (DTensor.from_local(q, mesh), sink, {}),
    "a DTensor as sink": lambda q, sink, mesh: (q, DTensor.from_local(sink, mesh), {}),
    "a meta tensor": lambda q, sink, mesh: (q.to("meta"), sink, {}),
    "sink_layout None": lambda q, sink, mesh: (q, sink, {"sink_layout": None}),
    "sink_layout []": lambda q, sink, mesh: (q, sink, {"sink_layout": []}),
    "3 heads": lambda q, sink, mesh: (q[:, :1].expand(-1, 3, -1), sink, {}),
}


@pytest.mark.parametrize("watched", [False, True])
def test_a_wrong_argument_on_one_rank_raises_on_every_rank(watched):
    run_on_ranks(2, body_wrong, watched=watched)


def body_wrong(group, device, *, watched) -> None:
    mesh = DeviceMesh.from_group(group, "cpu")
    plan = make_cp_plan(24, group=group)
    q, sink = torch.randn(plan.local_tokens, 2, 8), torch.zeros(1, 2)
    for what, replace in WRONG_ON_ONE_RANK.items():
        is_wrong = dist.get_rank(group) == 0
        given_q, given_sink, options = replace(q, sink, mesh) if is_wrong else (q, sink, {})
        mode = FlopCounterMode(display=False) if watched else contextlib.nullcontext()
        with mode, pytest.raises((TypeError, ValueError)) as caught:
            cp_attention_with_sink(given_q, q, q, given_sink, plan=plan, **options)
        text = str(caught.value)
        assert "must" in text, (what, text)
        assert is_wrong or "rank 0" in text, (what, text)


def test_shard_is_differentiable_twice():
    run_on_ranks(2, body_twice)


def body_twice(group, device) -> None:
    plan = make_cp_plan(7, group=group)
    x = torch.arange(7.0, dtype=torch.float64, requires_grad=True)
    whole = plan.unshard(plan.shard(x) ** 3)
    (first,) = torch.autograd.grad(whole.sum(), x, create_graph=True)
    torch.testing.assert_close(first, 3 * x**2)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), x)[0], 6 * x)


def test_a_second_derivative_across_ranks_raises():
    run_on_ranks(2, body_second)


def body_second(group, device) -> None:
    plan = make_cp_plan(24, group=group)
    x = torch.randn(plan.local_tokens, 2, 8, requires_grad=True)
    out = cp_attention_with_sink(x, x, x, plan=plan)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True)
    with pytest.raises(RuntimeError, match="attention with sinks has no second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_whatever_stands_in_padding_reaches_nothing(num_ranks, sink_layout, bad):
    run_on_ranks(num_ranks, body_padding, sink_layout=sink_layout, bad=bad)


def body_padding(group, device, *, sink_layout, bad, dtype=torch.float32, head_dim=8) -> None:
    """q, k, v, sink, dout and dlse on padding, of single sequences and of batches."""
    plan = make_cp_plan(13, group=group, cu_seqlens=[0, 5, 13])
    for batch in ((), (3,)):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape, generator=generator, batch=batch):
            return torch.randn(*batch, plan.local_tokens, *shape, generator=generator)

        shared = torch.randn(2, 4, generator=generator)
        inputs = [draw(4, head_dim), draw(2, head_dim), draw(2, head_dim), draw(4, head_dim)]
        inputs.append(draw(2, 4) if sink_layout == "ssh" else shared)
        dlse = draw(4).transpose(-1, -2).contiguous()
        results = []
        for value in (0.0, bad):
            tensors = [x.clone() for x in inputs]
            for x in tensors[: 5 if sink_layout == "ssh" else 4]:
                x[..., plan.real_tokens :, :, :] = value
            q, k, v, dout, sink = (x.to(device, dtype) for x in tensors)
            sink, row_dlse = sink.float(), dlse.clone().to(device)
            row_dlse[..., plan.real_tokens :] = value
            leaves = [x.requires_grad_() for x in (q, k, v, sink)]
            out, lse = cp_attention_with_sink(
                *leaves, plan=plan, sink_layout=sink_layout, return_lse=True, deterministic=True,
                dsink_reduce="sum" if sink_layout == "sh" else "none",
            )  # fmt: skip
            grads = torch.autograd.grad((out, lse), leaves, (dout, row_dlse))
            results.append((out.detach(), lse.detach(), *grads))
        for clean, other in zip(*results, strict=True):
            assert clean.isfinite().all()
            assert torch.equal(clean, other)


def test_flops_across_ranks_add_up():
    run_on_ranks(3, body_flops)


def body_flops(group, device) -> None:
    q, k = torch.randn(40, 4, 8), torch.randn(40, 2, 8)
    offsets = torch.tensor([0, 23, 40], dtype=torch.int32)
    plan = make_cp_plan(40, group=group, cu_seqlens=offsets)
    for window_size in ((-1, -1), (7, 0), (3, 5)):
        with FlopCounterMode(display=False) as whole:
            attention_with_sink(
                q, k, k, cu_seqlens_q=offsets, cu_seqlens_k=offsets, window_size=window_size
            )
        with FlopCounterMode(display=False) as local:
            cp_attention_with_sink(
                *(plan.shard(x) for x in (q, k, k)), plan=plan, causal=False,
                window_size=window_size,
            )  # fmt: skip
        counts = torch.tensor(local.get_total_flops())
        dist.all_reduce(counts, group=group)
        assert counts == whole.get_total_flops()
