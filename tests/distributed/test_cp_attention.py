"""cp_attention_with_sink against the fp64 reference on the whole sequence, on 1 to 4 gloo ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from magi_sink_cp import attention_with_sink, cp_attention_with_sink, make_cp_plan
from magi_sink_cp.dist.methods import gradients, partials, ring
from magi_sink_cp.dist.methods.lanes import Lanes
from magi_sink_cp.dist.planning import cost
from magi_sink_cp.kernels.backends import fa4
from magi_sink_cp.kernels.backends.cpu import CpuBackend
from magi_sink_cp.kernels.protocol import KernelRequest, Partial
from tests.support.cases import Case, assert_close, errors, make_case, run, truth
from tests.support.ranks import run_on_ranks
from tests.support.reference import document_mask, reference_attention
from tests.unit.test_packages import flash_attn_4


def cp_results(
    case: Case,
    group,
    device: torch.device,
    layout: str = "zigzag",
    transport: str = "auto",
    **arguments,
) -> dict[str, torch.Tensor]:
    """Results of the sharded call, put together again.

    A shared dsink is summed over the ranks; padding is checked and cut off.
    """
    cu_seqlens = torch.tensor(case.cu_seqlens_q, dtype=torch.int32)
    plan = make_cp_plan(
        case.q.shape[0], group=group, cu_seqlens=cu_seqlens, layout=layout, transport=transport
    )
    sharded = Case(
        *(plan.shard(x) for x in (case.q, case.k, case.v)),
        sink=plan.shard(case.sink) if case.sink_layout == "ssh" else case.sink,
        dout=plan.shard(case.dout),
        dlse=None if case.dlse is None else plan.shard(case.dlse, dim=1),
        cu_seqlens_q=case.cu_seqlens_q,
        cu_seqlens_k=case.cu_seqlens_k,
        options=case.options,
    )
    local = run(cp_attention_with_sink, sharded, plan=plan, **arguments)
    padding = ~plan.token_mask
    assert not local["lse"][:, padding].any(), "lse of padding is not zero"
    for name in ("out", "dq", "dk", "dv"):
        assert not local[name][padding].any(), f"{name} of padding is not zero"
    whole = {name: plan.unshard(local[name]) for name in ("out", "dq", "dk", "dv")}
    whole["lse"] = plan.unshard(local["lse"], dim=1)
    if case.sink is not None:
        if case.sink_layout == "ssh":
            whole["dsink"] = plan.unshard(local["dsink"])
        else:
            whole["dsink"] = local["dsink"].clone()
            if group is not None and arguments.get("dsink_reduce", "none") == "none":
                dist.all_reduce(whole["dsink"], group=group)
    return whole


def body_matches_reference(
    group, device, *, arguments: dict, lengths: list[int], tolerance: float = 1e-5, **case_arguments
) -> None:
    case = make_case(lengths, lengths, **case_arguments)
    assert_close(cp_results(case, group, device, **arguments), truth(case), tolerance)


LENGTHS = {
    "one document": [37],
    "divides evenly": [48],
    "packed": [5, 17, 1, 0, 23, 9],
    "many short": [1, 2, 1, 3, 1, 1, 2, 4, 1],
    "fewer tokens than chunks": [3],
    "one token": [1],
    "no tokens": [0],
    "empty first and last": [0, 0, 12, 0],
}


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sink_layout", ["sh", "ssh", None])
@pytest.mark.parametrize("overlap_degree", [0, 1, "auto"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_matches_reference(num_ranks, causal, sink_layout, overlap_degree, lengths):
    run_on_ranks(
        num_ranks,
        body_matches_reference,
        arguments={"overlap_degree": overlap_degree},
        lengths=lengths,
        causal=causal,
        sink_layout=sink_layout,
        s_sink=2,
        with_dlse=False,
    )


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"softmax_scale": 0.3},
        {"with_dlse": True},
        {"dtype": torch.float64, "tolerance": 1e-12},
    ],
)
@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
def test_options(num_ranks, options, sink_layout):
    run_on_ranks(
        num_ranks,
        body_matches_reference,
        arguments={"deterministic": True},
        lengths=[30, 11],
        causal=True,
        sink_layout=sink_layout,
        **options,
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("options", [
    {"causal": True, "window_size": (0, -1)},  # each query sees itself alone
    {"causal": True, "window_size": (3, -1)},  # smaller than a chunk
    {"causal": True, "window_size": (12, 0)},  # larger than a chunk, not than a document
    {"causal": True, "window_size": (500, 0)},  # larger than everything
    {"causal": False, "window_size": (5, 2)},
    {"causal": False, "window_size": (-1, 4)},
    {"causal": False, "window_size": (7, -1), "softcap": 2.0},
    {"causal": False, "window_size": (0, 9), "with_dlse": True},
])  # fmt: skip
@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
@pytest.mark.parametrize("overlap_degree", [0, "auto"])
def test_windows(num_ranks, options, sink_layout, overlap_degree):
    arguments = {
        "arguments": {"overlap_degree": overlap_degree},
        "lengths": [31, 2, 0, 14],
        "s_sink": 2,
        "sink_layout": sink_layout,
    }
    run_on_ranks(num_ranks, body_matches_reference, **arguments, **options)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_one_plan_serves_window_and_full_layers(num_ranks):
    run_on_ranks(num_ranks, body_alternating_layers)


def body_alternating_layers(group, device) -> None:
    """Layers as in gpt-oss, window 6 and full in turns, on one plan.

    Forward and all gradients as on one device.
    """
    torch.manual_seed(0)
    x, dout = (torch.randn(40, 4, 8, dtype=torch.float64) for _ in range(2))
    sinks = [torch.randn(1, 4, dtype=torch.float64) for _ in range(4)]
    cu_seqlens = torch.tensor([0, 27, 40], dtype=torch.int32)
    plan = make_cp_plan(40, group=group, cu_seqlens=cu_seqlens)

    def stack(x, attention, **arguments):
        leaves = [x.clone().requires_grad_(), *(sink.clone().requires_grad_() for sink in sinks)]
        hidden = leaves[0]
        for layer, sink in enumerate(leaves[1:]):
            window_size = (6, 0) if layer % 2 == 0 else (-1, 0)
            hidden = hidden + attention(
                hidden, hidden, hidden, sink, causal=True, window_size=window_size, **arguments
            )
        return hidden, leaves

    whole, exact = stack(x, attention_with_sink, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
    whole.backward(dout)
    local, leaves = stack(plan.shard(x), cp_attention_with_sink, plan=plan, dsink_reduce="sum")
    local.backward(plan.shard(dout))
    torch.testing.assert_close(plan.unshard(local.detach()), whole.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(plan.unshard(leaves[0].grad), exact[0].grad, rtol=1e-10, atol=1e-10)
    for ours, true in zip(leaves[1:], exact[1:], strict=True):
        torch.testing.assert_close(ours.grad, true.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
@pytest.mark.parametrize("value", [float("-inf"), -1e4, -30.0, 100.0])
def test_extreme_sinks(num_ranks, sink_layout, value):
    run_on_ranks(num_ranks, body_extreme_sinks, sink_layout=sink_layout, value=value)


def body_extreme_sinks(group, device, *, sink_layout, value) -> None:
    case = make_case([19, 8], [19, 8], s_sink=2, sink_layout=sink_layout, causal=True)
    case.sink[..., 0, :] = value
    case.sink[..., 1, 1] = value
    assert_close(cp_results(case, group, device), truth(case), 1e-5)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("first_seed", range(0, 125, 25))
def test_random_cases(num_ranks, first_seed):
    """500 cases in all; `make stress` draws more.

    Documents, windows, layouts, overlap, GQA, sinks of every size, -inf too. A failure names its
    seed.
    """
    run_on_ranks(
        num_ranks,
        body_random,
        seeds=range(1000 * num_ranks + first_seed, 1000 * num_ranks + first_seed + 25),
    )


def body_random(
    group, device, *, seeds, dtype=torch.float32, check=None, longest=30, **fixed
) -> None:
    for seed in seeds:
        draw = random.Random(seed)
        lengths = [draw.randint(0, longest) for _ in range(draw.randint(1, 6))]
        heads_kv = draw.randint(1, 2)
        case = make_case(
            lengths,
            lengths,
            heads=heads_kv * draw.randint(1, 3),
            heads_kv=heads_kv,
            head_dim=draw.choice([4, 8, 16]) if dtype == torch.float32 else draw.choice([64, 128]),
            s_sink=draw.randint(1, 3),
            sink_layout=draw.choice(["sh", "ssh"]),
            sink_scale=draw.choice([1.0, 1.0, 30.0]),
            with_dlse=draw.random() < 0.5,
            causal=draw.random() < 0.6,
            window_size=(-1, -1)
            if draw.random() < 0.4
            else (draw.randint(-1, longest), draw.randint(-1, longest)),
            dtype=dtype,
            device=str(device),
            seed=seed,
        )
        for _ in range(draw.choice([0, 0, 2])):  # extreme logits, in places that all ranks agree on
            case.sink[
                ..., draw.randrange(case.sink.shape[-2]), draw.randrange(case.sink.shape[-1])
            ] = draw.choice([float("-inf"), -1e4, 100.0])
        arguments = {
            "layout": draw.choice(["zigzag", "balanced", "contiguous"]),
            "overlap_degree": draw.choice([0, 1, 2, 3, "auto"]),
            **fixed,
        }
        if case.sink_layout == "sh" and seed % 2:
            arguments["dsink_reduce"] = "sum"
        fine = draw.random() < 0.5  # large_rows of single rows, where a GPU takes hundreds
        try:
            with mock.patch.multiple(
                cost,
                TILE_ROWS=1 if fine else cost.TILE_ROWS,
                PROCESSORS=1 if fine else cost.PROCESSORS,
            ):
                result = cp_results(case, group, device, **arguments)
            if check is None:
                assert_close(result, truth(case), 1e-5)
            else:
                check(case, result)
        except Exception as error:
            raise AssertionError(
                f"seed {seed}: documents {lengths}, {case.options}, {arguments}: {error}"
            ) from error


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
@pytest.mark.parametrize("overlap_degree", [0, 1, "auto"])
@pytest.mark.parametrize("options", [{"causal": True}, {"causal": False, "window_size": (5, 3)}])
def test_batches(num_ranks, sink_layout, overlap_degree, options):
    run_on_ranks(
        num_ranks,
        body_batches,
        sink_layout=sink_layout,
        overlap_degree=overlap_degree,
        options=options,
    )


def body_batches(group, device, *, sink_layout, overlap_degree, options) -> None:
    """(batch, seq) inputs: every sample is laid out as the plan says, padding included."""
    for length, cu_seqlens in ((29, None), (32, [0, 9, 32])):
        case = make_case(
            [length],
            [length],
            batch=3,
            s_sink=2,
            sink_layout=sink_layout,
            with_dlse=True,
            **options,
        )
        plan = make_cp_plan(length, group=group, cu_seqlens=cu_seqlens)
        leaves = [plan.shard(x, dim=1).requires_grad_() for x in (case.q, case.k, case.v)]
        sink = (
            plan.shard(case.sink, dim=1) if sink_layout == "ssh" else case.sink.clone()
        ).requires_grad_()
        reduce = "sum" if sink_layout == "sh" else "none"
        out, lse = cp_attention_with_sink(
            *leaves,
            sink,
            plan=plan,
            sink_layout=sink_layout,
            dsink_reduce=reduce,
            overlap_degree=overlap_degree,
            return_lse=True,
            **options,
        )
        assert (out.shape, lse.shape) == (leaves[0].shape, (3, 4, plan.local_tokens))
        torch.autograd.backward(
            (out, lse), (plan.shard(case.dout, dim=1), plan.shard(case.dlse, dim=2))
        )
        dsink = plan.unshard(sink.grad, dim=1) if sink_layout == "ssh" else sink.grad
        ours = {
            "out": plan.unshard(out.detach(), dim=1),
            "lse": plan.unshard(lse.detach(), dim=2),
            "dsink": dsink,
            **{
                name: plan.unshard(x.grad, dim=1)
                for name, x in zip(("dq", "dk", "dv"), leaves, strict=True)
            },
        }
        exact = [x.double().requires_grad_() for x in (case.q, case.k, case.v, case.sink)]
        totals: dict[str, list[torch.Tensor]] = {}
        offsets = [0, length] if cu_seqlens is None else cu_seqlens
        mask = document_mask(
            offsets, offsets, options["causal"], options.get("window_size", (-1, -1))
        )
        for sample in range(3):
            sample_sink = exact[3][sample] if sink_layout == "ssh" else exact[3]
            results = reference_attention(*(x[sample] for x in exact[:3]), sample_sink, mask)
            torch.autograd.backward(
                results, (case.dout[sample].double(), case.dlse[sample].double())
            )
            for name, value in zip(("out", "lse"), results, strict=True):
                totals.setdefault(name, []).append(value.detach())
        expected = {name: torch.stack(values) for name, values in totals.items()}
        expected |= {
            name: x.grad for name, x in zip(("dq", "dk", "dv", "dsink"), exact, strict=True)
        }
        for name, value in expected.items():
            torch.testing.assert_close(
                ours[name].double(),
                value,
                rtol=1e-4,
                atol=1e-5,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_grad_reduce_dtype(num_ranks):
    run_on_ranks(num_ranks, body_grad_reduce_dtype)


def body_grad_reduce_dtype(group, device) -> None:
    """None is fp32. From three contributions on, fp32 sums are nearer to the truth than bf16."""
    case = make_case([256], [256], dtype=torch.bfloat16, causal=False)
    expected = truth(case)
    by_default, in_fp32, in_bf16 = (
        cp_results(case, group, device, grad_reduce_dtype=dtype, overlap_degree=7)
        for dtype in (None, torch.float32, torch.bfloat16)
    )
    for name in ("dk", "dv"):
        assert torch.equal(by_default[name], in_fp32[name])
        assert torch.equal(in_fp32[name], in_bf16[name]) == (plan_size(group) == 2)
    exact, rounded = errors(in_fp32, expected), errors(in_bf16, expected)
    for name in ("dk", "dv"):
        assert rounded[name] < 1e-2
        assert (rounded[name] > exact[name]) == (plan_size(group) > 2)
    assert rounded["dq"] == exact["dq"]


def plan_size(group) -> int:
    return dist.get_world_size(group)


@pytest.mark.parametrize("layout", ["zigzag", "balanced", "contiguous"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_more_ranks_do_not_move_the_result(layout, num_ranks):
    run_on_ranks(num_ranks, body_more_ranks, layout=layout)


def body_more_ranks(group, device, *, layout) -> None:
    """cp 1, 2, 4 and every degree lie within the kernel's own error of each other.

    Each of two results has that error.
    """
    case = make_case(
        [150, 50], [150, 50], heads=8, head_dim=32, dtype=torch.bfloat16, causal=True, s_sink=2
    )
    expected = truth(case)
    one_rank = cp_results(case, None, device)
    own_error = errors(one_rank, expected)
    for degree in (0, 1, 2, 3):
        for name, value in cp_results(
            case, group, device, overlap_degree=degree, layout=layout
        ).items():
            apart = (value.double() - one_rank[name].double()).norm() / expected.values[name].norm()
            # Each rank that computes a share of dk and dv rounds it once more.
            most = 2.5 if name in ("dk", "dv") else 2
            assert apart <= most * max(own_error[name], 1e-6), (
                f"{name}: {apart:.3g} apart at degree {degree}, error {own_error[name]:.3g}"
            )


@pytest.mark.parametrize("window_size", [(-1, -1), (7, 0)])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_layouts_of_other_frameworks(num_ranks, window_size):
    run_on_ranks(num_ranks, body_other_layouts, window_size=window_size)


def body_other_layouts(group, device, *, window_size) -> None:
    lengths = [24, 12, 0, 36]  # multiples of 2·cp
    case = make_case(lengths, lengths, causal=True, window_size=window_size, s_sink=2)
    for layout in ("contiguous", "zigzag_documents"):
        for degree in ("auto", 0, 2):
            results = cp_results(case, group, device, layout=layout, overlap_degree=degree)
            assert_close(results, truth(case), 1e-5)
    with pytest.raises(ValueError, match=r"multiple of 2·cp_size tokens, .* from 0 to 25"):
        make_cp_plan(50, group=group, cu_seqlens=[0, 25, 50], layout="zigzag_documents")


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("reduce", ["none", "sum", "avg"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dsink_reduce(num_ranks, reduce, dtype):
    run_on_ranks(num_ranks, body_dsink_reduce, reduce=reduce, dtype=dtype)


def body_dsink_reduce(group, device, *, reduce, dtype) -> None:
    case = make_case([41], [41], s_sink=2, causal=True)
    case.sink = case.sink.to(dtype)
    expected = truth(case).values["dsink"]
    plan = make_cp_plan(41, group=group)
    leaves = [plan.shard(x) for x in (case.q, case.k, case.v)]
    sink = case.sink.clone().requires_grad_()
    out = cp_attention_with_sink(*leaves, sink, plan=plan, dsink_reduce=reduce)
    out.backward(plan.shard(case.dout))
    assert sink.grad.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    if reduce == "none":
        partial = sink.grad.double()
        assert (partial - expected).norm() > 0.05 * expected.norm(), (
            "one rank's share is not the whole"
        )
        dist.all_reduce(partial, group=group)
        torch.testing.assert_close(
            partial, expected, rtol=tolerance, atol=tolerance * expected.norm().item()
        )
    else:
        scale = 1 if reduce == "sum" else plan.cp_size
        torch.testing.assert_close(
            sink.grad.double() * scale,
            expected,
            rtol=tolerance,
            atol=tolerance * expected.norm().item(),
        )


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_padding_reaches_no_loss_on_lse(num_ranks):
    """A z-loss over lse sees the tokens of the sequence and nothing else, whatever the padding."""
    run_on_ranks(num_ranks, body_z_loss)


def body_z_loss(group, device) -> None:
    case = make_case([5], [5], causal=True)
    exact = [x.double().requires_grad_() for x in (case.q, case.k, case.v, case.sink)]
    expected = reference_attention(*exact, case.mask())[1].square().sum()
    expected.backward()
    plan = make_cp_plan(5, group=group, cu_seqlens=[0, 5])
    assert plan.pad_tokens > 0 or plan.cp_size == 1
    sink = case.sink.clone().requires_grad_()
    _, lse = cp_attention_with_sink(
        *(plan.shard(x) for x in (case.q, case.k, case.v)), sink, plan=plan, return_lse=True
    )
    loss = lse.square().sum()
    loss.backward()
    if group is not None:
        for x in (loss := loss.detach(), sink.grad):
            dist.all_reduce(x, group=group)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sink.grad.double(), exact[3].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_bf16_within_twice_the_error_of_one_rank(causal):
    run_on_ranks(4, body_bf16, causal=causal)


def body_bf16(group, device, *, causal) -> None:
    case = make_case(
        [200, 56], [200, 56], heads=8, head_dim=32, dtype=torch.bfloat16, causal=causal
    )
    expected = truth(case)
    one_rank, four_ranks = (errors(cp_results(case, g, device), expected) for g in (None, group))
    for name, error in four_ranks.items():
        assert error <= 2 * max(one_rank[name], 2e-7), (
            f"{name}: {error:.3g} over four ranks, {one_rank[name]:.3g} on one"
        )


@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("folds", [True, False])
def test_gradients_are_summed_in_fp32(count, folds):
    """Any number of bf16 contributions is rounded once, bit for bit the fp32 sum.

    In bf16, five would be rounded four times.
    """
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(40, 2, 16, generator=generator).bfloat16() for _ in range(count)]
    total = gradients.GradientSum(parts[0], torch.float32, Lanes())
    total.add(parts[0].clone(), [((0, 40), (0, 40))])
    expected = parts[0].float()
    for part in parts[1:]:
        total.add(part, [((5, 15), (0, 10)), ((20, 40), (10, 30))])
        if folds:
            total.fold()
        expected[5:15] += part[:10].float()
        expected[20:40] += part[10:30].float()
    assert torch.equal(total.result(), expected.bfloat16())


def test_folding_partials():
    """With more partials than one merge takes, the earlier ones are folded in fp32.

    Memory does not grow with cp.
    """
    run_on_ranks(4, body_folding)


def body_folding(group, device) -> None:
    folded = []
    original = partials.merge

    def recording(partials, sink=None, out=None, out_dtype=None):
        folded.append(out_dtype)
        return original(partials, sink, out, out_dtype)

    with (
        mock.patch.object(partials, "MAX_PARTIALS", 3),
        mock.patch.object(partials, "merge", recording),
    ):
        low = make_case([64], [64], dtype=torch.bfloat16, causal=False)
        cp_results(low, group, device, overlap_degree=7)
        assert folded == [torch.float32, None], (
            "of three stages' partials two are folded, in fp32, before the last merge"
        )
        for causal in (True, False):
            body_matches_reference(
                group, device, arguments={"overlap_degree": 7}, lengths=[50, 3, 20], causal=causal
            )


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("mutant", ["twice", "dropped", "per stage"])
def test_a_sink_counted_twice_or_not_at_all_is_noticed(num_ranks, mutant):
    run_on_ranks(num_ranks, body_mutated_merge, mutant=mutant)


def body_mutated_merge(group, device, *, mutant) -> None:
    case = make_case([40], [40], causal=True)
    expected = truth(case)
    original, forward_kernel = partials.merge, ring.run_forward

    def mutated_merge(partials, sink=None, out=None, out_dtype=None):
        changed = {
            "twice": None if sink is None else torch.cat([sink, sink]),
            "dropped": None,
            "per stage": sink,
        }[mutant]
        return original(partials, changed, out, out_dtype)

    def sink_in_every_partial(*arguments):
        """What a kernel with a sink of its own would do on each rank's keys."""
        partial = forward_kernel(*arguments)
        return Partial(*original([partial], case.sink)) if mutant == "per stage" else partial

    with (
        mock.patch.object(partials, "merge", mutated_merge),
        mock.patch.object(ring, "run_forward", sink_in_every_partial),
    ):
        result = cp_results(case, group, device)
    for name in ("out", "lse", "dq", "dsink"):
        with pytest.raises(AssertionError, match=f"{name}: relative error"):
            assert_close({name: result[name]}, expected, 1e-2)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_runs_are_bit_identical(num_ranks):
    run_on_ranks(num_ranks, body_bit_identical)


@pytest.mark.parametrize("deterministic", [False, True])
def test_every_kernel_is_asked_to_be_deterministic(deterministic):
    """The CPU's kernels always are: what is lost on the way would not show in their bits."""
    run_on_ranks(2, body_asked, deterministic=deterministic)


def body_asked(group, device, *, deterministic) -> None:
    asked = []

    def noting(method):
        def wrapped(this, *arguments, **options):
            requests = (a for a in arguments if isinstance(a, KernelRequest))
            asked.extend(request.params.deterministic for request in requests)
            return method(this, *arguments, **options)

        return wrapped

    case = make_case([61, 14], [61, 14], causal=True)
    with (
        mock.patch.object(CpuBackend, "forward", noting(CpuBackend.forward)),
        mock.patch.object(CpuBackend, "backward", noting(CpuBackend.backward)),
    ):
        for degree in (0, 1):
            cp_results(case, group, device, deterministic=deterministic, overlap_degree=degree)
    assert len(asked) >= 4
    assert set(asked) == {deterministic}


def body_bit_identical(group, device) -> None:
    case = make_case([61, 14], [61, 14], dtype=torch.bfloat16, causal=True, s_sink=2)
    for degree in (0, 1, 2):
        first, second = (
            cp_results(case, group, device, deterministic=True, overlap_degree=degree)
            for _ in range(2)
        )
        for name, value in first.items():
            assert torch.equal(value, second[name]), f"{name} differs between two runs"


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_one_plan_serves_both_masks_and_many_calls(num_ranks):
    run_on_ranks(num_ranks, body_one_plan)


def body_one_plan(group, device) -> None:
    """Two calls in flight before either backward, on one plan, with different masks and head
    counts.
    """
    plan = make_cp_plan(33, group=group, cu_seqlens=[0, 20, 33])
    cases = [
        make_case([20, 13], [20, 13], heads=h, causal=c, seed=h) for h, c in ((2, True), (6, False))
    ]
    outs, leaves = [], []
    for case in cases:
        inputs = [plan.shard(x).requires_grad_() for x in (case.q, case.k, case.v)]
        outs.append(cp_attention_with_sink(*inputs, case.sink, plan=plan, **case.options))
        leaves.append(inputs)
    for case, out, inputs in zip(cases, outs, leaves, strict=True):
        grads = torch.autograd.grad(out, inputs, plan.shard(case.dout))
        whole = {name: plan.unshard(g) for name, g in zip(("dq", "dk", "dv"), grads, strict=True)}
        assert_close(whole, truth(case), 1e-5)


def test_leaves_that_need_no_gradient():
    run_on_ranks(2, body_frozen)


def body_frozen(group, device) -> None:
    case = make_case([24], [24], causal=True)
    expected = truth(case)
    plan = make_cp_plan(24, group=group)
    q, k, v = (plan.shard(x) for x in (case.q, case.k, case.v))
    sink = case.sink.clone().requires_grad_()
    cp_attention_with_sink(q, k, v, sink, plan=plan, dsink_reduce="sum").backward(
        plan.shard(case.dout)
    )
    assert_close({"dsink": sink.grad}, expected, 1e-5)
    with torch.no_grad():
        assert_close(
            {"out": plan.unshard(cp_attention_with_sink(q, k, v, sink, plan=plan))}, expected, 1e-5
        )


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"causal": True}, {"causal": 1}),
        ({"deterministic": False}, {"deterministic": 0}),
        ({"overlap_degree": 1}, {"overlap_degree": True}),
        ({"window_size": (1, 0)}, {"window_size": (1.0, 0)}),
        ({"window_size": (1, 0)}, {"window_size": (True, 0)}),
        ({"softcap": 0.0}, {"softcap": False}),
    ],
)
def test_a_checked_call_excuses_no_other(good, bad):
    """Calls are looked up by their arguments, among which 1, 1.0 and True are equal."""
    plan = make_cp_plan(10)
    q, k = torch.randn(10, 4, 8), torch.randn(10, 2, 8)
    cp_attention_with_sink(q, k, k, plan=plan, **good)
    with pytest.raises((TypeError, ValueError)):
        cp_attention_with_sink(q, k, k, plan=plan, **bad)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("overlap_degree", [0, 1, 3])
@pytest.mark.parametrize("tile_rows", [1, 128])
def test_kernels_that_add_the_sink(num_ranks, overlap_degree, tile_rows):
    run_on_ranks(num_ranks, body_native_sink, overlap_degree=overlap_degree, tile_rows=tile_rows)


def body_native_sink(group, device, *, overlap_degree, tile_rows) -> None:
    """FlashAttention-4's forward (a stand-in) adds the sink once a row, and only rows with
    several partial results are merged.
    """
    arguments = {"overlap_degree": overlap_degree}
    with (
        adding_kernels(tile_rows) as seen,
        mock.patch.object(partials, "merge", mock.Mock(wraps=partials.merge)) as merge,
    ):
        for lengths, options in (
            ([44], {"causal": True}),
            ([44], {"causal": True, "with_dlse": True}),
            ([23, 1, 0, 30, 9], {"causal": True, "window_size": (7, 0)}),
            ([5, 17, 1, 0, 23, 9], {"causal": False}),
            ([3], {"causal": True}),
        ):
            for value in (None, float("-inf"), 100.0, -200.0):
                case = make_case(lengths, lengths, s_sink=1, **options)
                if value is not None:
                    case.sink[0, 1] = value
                seen.clear()
                merge.reset_mock()
                assert_close(cp_results(case, group, device, **arguments), truth(case), 1e-5)
                assert all(call["learnable_sink"] is not None for call in seen), (
                    "other keys are the other backend's"
                )
                sinks = [
                    sink
                    for call in merge.call_args_list
                    for sink in (*call.args[1:2], call.kwargs.get("sink"))
                ]
                assert all(sink is None for sink in sinks), "the sink again"
                if overlap_degree == 0 and tile_rows == 128:
                    assert not merge.called, "no row has two partial results"
                elif (
                    lengths == [44]
                    and group is not None
                    and dist.get_world_size(group) > 1
                    and overlap_degree > 0
                ):
                    assert merge.called, "rows have two partial results"
        case = make_case([30], [30], s_sink=2, causal=True)
        seen.clear()
        assert_close(cp_results(case, group, device, **arguments), truth(case), 1e-5)
        assert not seen, "two sinks a head are the merge's"


@contextlib.contextmanager
def adding_kernels(tile_rows: int = 128, slower: float = 0.0) -> Iterator[list[dict]]:
    """A stand-in for FlashAttention-4 beside the cpu backend.

    Yields what its forward is called with.
    """
    library, seen = flash_attn_4()
    backend = fa4.Fa4Backend()

    def one_a_head(name, q, call, sink):
        return backend if sink is not None and sink.dim() == 2 and sink.shape[0] == 1 else None

    with (
        mock.patch.object(fa4, "_library", return_value=library),
        mock.patch.object(ring, "find_adding_sink", one_a_head),
        mock.patch.object(ring, "SINK_KERNEL_SLOWER", slower),
        mock.patch.multiple(cost, TILE_ROWS=tile_rows, PROCESSORS=1),
    ):
        yield seen


class LateLanes(Lanes):
    """Stands in for two streams. What every other call makes is NaN until the lanes join, as it may
    be on a GPU; what such a call reads must not change until then, and what travels must not be
    read before it has arrived or after it has been released.
    """

    def __init__(self) -> None:
        self.turns = 0
        self.absent: set[int] = set()  # storages of transfers' buffers
        self._buffers: list[torch.Tensor] = []  # all of them, so that no other tensor gets theirs
        self._in_turn = False
        self._made: list[torch.Tensor] = []
        self._late: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._read: list[tuple[torch.Tensor, torch.Tensor]] = []

    def arrive(self, transfer):
        transfer.wait()
        self.absent -= set(map(storage, transfer.buffers))

    @contextlib.contextmanager
    def turn(self):
        self.turns += 1
        self._in_turn = True
        yield
        self._in_turn = False
        if self.turns % 2 == 0:
            for x in self._made:
                self._late.append((x, x.clone()))
                x.fill_(float("nan"))
        self._made = []

    def join(self):
        for x, value in self._read:
            assert torch.equal(x.nan_to_num(), value.nan_to_num()), (
                "written while a call beside may read it"
            )
        for x, value in self._late:
            x.copy_(value)
        self.turns, self._read, self._late = 0, [], []

    def run(self, function, written, *arguments):
        """A kernel call, whose argument number ``written`` is filled by it."""
        assert self._in_turn, "a kernel call outside the lanes"
        read = [x for number, x in enumerate(arguments) if torch.is_tensor(x) and number != written]
        assert self.absent.isdisjoint(map(storage, read)), (
            "read before it has arrived, or after it has been released"
        )
        if self.turns % 2 == 0:
            self._read += [(x, x.clone()) for x in read]
        result = function(*arguments)
        made = [result] if torch.is_tensor(result) else vars(result).values()
        gap = getattr(arguments[0], "gap", None)
        for x in filter(torch.is_tensor, made):
            into = None if written is None else arguments[written]
            if gap is None or into is None or storage(x) != storage(into):
                self._made.append(x)
            else:
                self._made += [x[row] for row in torch.where(~gap)[0].tolist()]
        return result

    def start(self, function, flight, tensors, exchange, own=()):
        assert not own or self.turns == 0, (
            "own keys are put beside the others' while calls are under way"
        )
        transfer = function(flight, tensors, exchange, own)
        self.absent |= set(map(storage, transfer.buffers))
        self._buffers += transfer.buffers
        release = transfer.release

        def after_the_join():
            assert self.turns == 0, "released while calls are under way"
            self.absent |= set(map(storage, transfer.buffers))
            release()

        transfer.release = after_the_join
        return transfer


def storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


@contextlib.contextmanager
def late_lanes():
    made: list[LateLanes] = []

    def lanes(*_):
        made.append(LateLanes())
        return made[-1]

    def running(function, written):
        return lambda *arguments: made[-1].run(function, written, *arguments)

    def starting(function):
        return lambda *arguments: made[-1].start(function, *arguments)

    with (
        mock.patch.object(ring.RingState, "lanes", side_effect=lanes),
        mock.patch.object(ring, "run_forward", running(ring.run_forward, 5)),
        mock.patch.object(ring, "run_forward_with_sink", running(ring.run_forward_with_sink, 7)),
        mock.patch.object(ring, "run_backward", running(ring.run_backward, 9)),
        mock.patch.object(gradients, "sink_gradient", running(gradients.sink_gradient, None)),
        mock.patch.object(ring.InFlight, "start", starting(ring.InFlight.start)),
    ):
        yield


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("own_sink", [False, True])
@pytest.mark.parametrize("first_seed", [0])
def test_what_runs_beside_is_waited_for(num_ranks, own_sink, first_seed):
    run_on_ranks(num_ranks, body_lanes, own_sink=own_sink, seeds=range(first_seed, first_seed + 40))


def body_lanes(group, device, *, own_sink, seeds) -> None:
    with (
        late_lanes(),
        mock.patch.object(cost, "LARGE_WAVES", 1),
        adding_kernels(1) if own_sink else contextlib.nullcontext(),
    ):
        body_random(group, device, seeds=seeds)


@pytest.mark.parametrize("overlap_degree", [0, 1])
def test_a_sink_that_overflows_without_lse(overlap_degree):
    """lse is +inf then in FlashAttention-4, which only a caller who asks for it, or a merge, has
    to have put right.
    """
    run_on_ranks(2, body_overflow, overlap_degree=overlap_degree)


def body_overflow(group, device, *, overlap_degree) -> None:
    case = make_case([64], [64], s_sink=1, causal=True)
    case.sink[0, :2] = torch.tensor([100.0, 1e4])
    expected = truth(case)
    with adding_kernels(tile_rows=1):
        plan = make_cp_plan(64, group=group)
        leaves = [plan.shard(x).requires_grad_() for x in (case.q, case.k, case.v)]
        sink = case.sink.clone().requires_grad_()
        out = cp_attention_with_sink(
            *leaves, sink, plan=plan, causal=True, overlap_degree=overlap_degree, dsink_reduce="sum"
        )
        grads = torch.autograd.grad(out, (*leaves, sink), plan.shard(case.dout))
    result = {"out": plan.unshard(out.detach()), "lse": expected.values["lse"], "dsink": grads[3]}
    result |= {
        name: plan.unshard(grad) for name, grad in zip(("dq", "dk", "dv"), grads, strict=False)
    }
    assert_close(result, expected, 1e-5)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_out_is_contiguous_whatever_the_kernel_gives(num_ranks):
    run_on_ranks(num_ranks, body_contiguous)


def body_contiguous(group, device) -> None:
    """FlashAttention-2's kernels lay out like q and write into no tensor that they are given."""
    forward = CpuBackend._forward

    def laid_out_like_q(self, q, k, v, call, out, want_probs):
        partial = forward(self, q, k, v, call, None, want_probs)
        return dataclasses.replace(partial, out=torch.empty_like(q).copy_(partial.out))

    case = make_case([48], [48], causal=True)
    plan = make_cp_plan(48, group=group)
    k, v = plan.shard(case.k), plan.shard(case.v)
    q = plan.shard(case.q).transpose(0, 1).contiguous().transpose(0, 1)
    for degree in (0, 1):
        for sink in (None, case.sink):
            expected = cp_attention_with_sink(q, k, v, sink, plan=plan, overlap_degree=degree)
            with mock.patch.object(CpuBackend, "_forward", laid_out_like_q):
                out = cp_attention_with_sink(q, k, v, sink, plan=plan, overlap_degree=degree)
            assert out.is_contiguous()
            assert torch.equal(out, expected)


def test_one_merge_adds_the_sink_to_all_rows():
    run_on_ranks(2, body_one_merge)


def body_one_merge(group, device) -> None:
    """Of 64 tokens, rank 0 has the first 16, which see own keys alone, and the last 16.

    Rank 1's rows all see keys of rank 0.
    """
    plan = make_cp_plan(64, group=group)
    q, k, v = (torch.randn(plan.local_tokens, heads, 8) for heads in (4, 2, 2))
    for sink, rows in ((torch.randn(1, 4), (32, 32)), (None, (16, 32))):
        with mock.patch.object(partials, "merge", mock.Mock(wraps=partials.merge)) as merge:
            cp_attention_with_sink(q, k, v, sink, plan=plan, overlap_degree=1)
        merged = [(len(call.args[0]), call.kwargs["out"].shape[0]) for call in merge.call_args_list]
        assert merged == [(2, rows[dist.get_rank(group)])], "partial results and rows of each merge"


def test_which_kernels_add_the_sink():
    run_on_ranks(2, body_which_kernels)


def body_which_kernels(group, device) -> None:
    case = make_case([30], [30], s_sink=1, causal=True)
    with adding_kernels(slower=1e9) as seen:
        assert_close(cp_results(case, group, device), truth(case), 1e-5)
        assert not seen, "the cost model says that the merge is cheaper"
        with mock.patch.object(ring, "select_backend", return_value=fa4.Fa4Backend()) as chosen:
            with mock.patch.object(ring, "find_adding_sink", return_value=chosen.return_value):
                assert_close(cp_results(case, group, device), truth(case), 1e-5)
            assert any(call["learnable_sink"] is not None for call in seen), (
                "kernels that are used anyway add it for nothing"
            )
    plan = make_cp_plan(30, group=group)
    with (
        adding_kernels() if dist.get_rank(group) == 1 else contextlib.nullcontext(),
        pytest.raises(ValueError, match="the sink is added by"),
    ):
        cp_attention_with_sink(
            *(plan.shard(x) for x in (case.q, case.k, case.v)), case.sink, plan=plan
        )


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_head_dim_of_its_own_for_v(num_ranks):
    run_on_ranks(num_ranks, body_head_dim_of_v)


def body_head_dim_of_v(group, device) -> None:
    """Smaller and larger than q's, in a batch too; ranks that differ are told."""
    total, offsets = 53, [0, 20, 53]
    plan = make_cp_plan(total, group=group, cu_seqlens=offsets)
    generator = torch.Generator().manual_seed(0)
    for head_dim_v in (8, 40):
        q, k, v = (
            torch.randn(total, heads, d, generator=generator).requires_grad_()
            for heads, d in ((4, 24), (2, 24), (2, head_dim_v))
        )
        sink = torch.randn(2, 4, generator=generator, requires_grad=True)
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
        truth, true_lse = attention_with_sink(
            q, k, v, sink, causal=True, window_size=(9, 0), return_lse=True,
            cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
        )  # fmt: skip
        (truth.square().sum() + true_lse.sum()).backward()
        local = [plan.shard(x.detach()).requires_grad_() for x in (q, k, v)]
        own_sink = sink.detach().clone().requires_grad_()
        out, lse = cp_attention_with_sink(
            *local, own_sink, plan=plan, window_size=(9, 0), return_lse=True, dsink_reduce="sum"
        )
        assert out.shape[-1] == head_dim_v
        assert out.is_contiguous()
        (out.square().sum() + lse.sum()).backward()
        pairs = [(plan.unshard(out), truth), (own_sink.grad, sink.grad)]
        pairs += [(plan.unshard(x.grad), y.grad) for x, y in zip(local, (q, k, v), strict=True)]
        for ours, true in pairs:
            torch.testing.assert_close(ours, true, rtol=1e-5, atol=1e-5)
        samples = [x.detach()[None] for x in local]
        whole = cp_attention_with_sink(*samples, plan=plan, window_size=(9, 0))
        one = cp_attention_with_sink(*(x[0] for x in samples), plan=plan, window_size=(9, 0))
        assert torch.equal(whole[0], one)
    if plan.cp_size > 1:
        mine = 8 if dist.get_rank(group) == 0 else 16
        v = torch.randn(plan.local_tokens, 2, mine)
        with pytest.raises(ValueError, match="head_dim of v.*rank 0: 8, rank 1: 16"):
            cp_attention_with_sink(local[0].detach(), local[1].detach(), v, plan=plan)
        v = torch.randn(plan.local_tokens, 2, 24 if mine == 8 else 40)
        with pytest.raises(ValueError, match="head_dim of v.*rank 0: 24, rank 1: 40"):
            cp_attention_with_sink(local[0].detach(), local[1].detach(), v, plan=plan)
