"""Two or more ranks on GPUs: cp_attention_with_sink against the fp64 reference.

Errors stay within twice the plain kernel's own.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed._symmetric_memory as symm_mem

from magi_sink_cp import attention_with_sink, backends, cp_attention_with_sink, make_cp_plan
from magi_sink_cp.dist import driver
from magi_sink_cp.dist.planning import cost
from magi_sink_cp.kernels.backends.fa4 import Fa4Backend
from tests.distributed.test_cp_attention import LENGTHS, body_random, cp_results
from tests.gpu.test_lanes import check_graph, check_lanes
from tests.support.cases import Case, assert_within_plain, errors, make_case, run, truth
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.gpu(ranks=2)

TRANSPORTS = ("nccl", "symm_mem")


def body_within_plain_error(
    group, device, *, backend: str, lengths: list[int], arguments: dict, **case_arguments
) -> None:
    reasons = {info.name: info.reason for info in backends()}
    assert not reasons[backend], reasons[backend]
    case = make_case(
        lengths, lengths, heads=8, dtype=torch.bfloat16, device=str(device), **case_arguments
    )
    plain_case = Case(**{**vars(case), "sink": None, "dlse": None})
    cu_seqlens = torch.tensor(case.cu_seqlens_q, dtype=torch.int32, device=device)
    plain_run = run(
        attention_with_sink,
        plain_case,
        backend=backend,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
    )
    plain = errors(plain_run, truth(plain_case))
    factor = 2.0
    if max(lengths) <= 4:  # rows that see few keys are nearly exact without a sink
        factor = 2 * 2**0.5
        options = {**case_arguments, "sink_layout": None, "with_dlse": False}
        usual = make_case([64], [64], heads=8, dtype=torch.bfloat16, device=str(device), **options)
        cu_seqlens = torch.tensor([0, 64], dtype=torch.int32, device=device)
        usual_run = run(
            attention_with_sink,
            usual,
            backend=backend,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
        )
        plain = {
            name: max(plain[name], error) for name, error in errors(usual_run, truth(usual)).items()
        }
    assert_within_plain(
        cp_results(case, group, device, backend=backend, **arguments), truth(case), plain, factor
    )


@pytest.mark.parametrize("backend", ["fa3", "aten"])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("overlap_degree", [0, 1])
@pytest.mark.parametrize("lengths", [*LENGTHS.values(), [1000], [300, 1, 0, 511, 64]])
def test_within_plain_error(backend, transport, overlap_degree, lengths):
    for number, (causal, sink_layout, head_dim) in enumerate(
        [(True, "sh", 128), (False, "ssh", 64), (True, "ssh", 64)]
    ):
        arguments = {"transport": transport, "overlap_degree": overlap_degree}
        case = {
            "causal": causal,
            "sink_layout": sink_layout,
            "head_dim": head_dim,
            "s_sink": 2,
            "with_dlse": number == 1,
        }
        run_on_ranks(
            2,
            body_within_plain_error,
            "cuda",
            backend=backend,
            lengths=lengths,
            arguments=arguments,
            **case,
        )


@pytest.mark.parametrize("backend", ["fa3", "aten"])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("overlap_degree", [0, 1])
@pytest.mark.parametrize(
    "window",
    [(True, (128, 0)), (True, (3, 0)), (True, (5000, 0)), (False, (100, 40)), (False, (-1, 200))],
)
def test_windows(backend, transport, overlap_degree, window):
    causal, window_size = window
    arguments = {"transport": transport, "overlap_degree": overlap_degree}
    case = {
        "causal": causal,
        "window_size": window_size,
        "head_dim": 64,
        "lengths": [300, 1, 0, 511, 64],
    }
    run_on_ranks(2, body_within_plain_error, "cuda", backend=backend, arguments=arguments, **case)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("head_dims", [(128, 64), (64, 128)])
def test_a_head_dim_of_its_own_for_v(transport, head_dims):
    run_on_ranks(2, body_head_dim_of_v, "cuda", transport=transport, head_dims=head_dims)


def body_head_dim_of_v(group, device, *, transport: str, head_dims: tuple[int, int]) -> None:
    """In bf16, near the fp64 result."""
    head_dim, head_dim_v = head_dims
    offsets = [0, 700, 701, 1500]
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(offsets[-1], heads, d, generator=generator).bfloat16()
        for heads, d in ((8, head_dim), (2, head_dim), (2, head_dim_v), (8, head_dim_v))
    ]
    sink = torch.randn(2, 8, generator=generator)
    arguments = {"causal": True, "window_size": (200, 0), "return_lse": True}
    true = [x.double().requires_grad_() for x in (*tensors[:3], sink)]
    out, lse = attention_with_sink(
        *true, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, **arguments
    )
    torch.autograd.backward([out, lse], [tensors[3].double(), torch.ones_like(lse)])
    plan = make_cp_plan(offsets[-1], group=group, cu_seqlens=cu_seqlens, transport=transport)
    local = [plan.shard(x.to(device)).requires_grad_() for x in tensors[:3]]
    own_sink = sink.to(device).requires_grad_()
    ours, our_lse = cp_attention_with_sink(
        *local, own_sink, plan=plan, dsink_reduce="sum", **arguments
    )
    real = plan.token_mask.to(our_lse.dtype).expand_as(our_lse)
    torch.autograd.backward([ours, our_lse], [plan.shard(tensors[3].to(device)), real])
    assert ours.shape[-1] == head_dim_v
    found = [plan.unshard(ours), *(plan.unshard(x.grad) for x in local), own_sink.grad]
    for got, want in zip(found, [out, *(x.grad for x in true)], strict=True):
        error = (got.cpu().double() - want).norm() / want.norm()
        assert error < 6e-3, error  # bf16 holds 8 bits: 2e-3 each for inputs, weights and result


@pytest.mark.parametrize("backend", ["fa4", "auto"])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("overlap_degree", [0, 1])
def test_flash_attention_4_adds_the_sink(backend, transport, overlap_degree):
    """One sink a head. "auto" takes fa4 in forward, as rows see few keys, and fa3 in backward."""
    if reason := {info.name: info.reason for info in backends()}["fa4"]:
        pytest.skip(f"fa4: {reason}")
    arguments = {"transport": transport, "overlap_degree": overlap_degree}
    for lengths, options in (
        ([1000], {"causal": True}),
        ([300, 1, 0, 511, 64], {"causal": True, "with_dlse": True}),
        ([300, 1, 0, 511, 64], {"causal": True, "window_size": (100, 0)}),
        ([900], {"causal": False, "sink_scale": 200.0}),
    ):
        case = {"head_dim": 64, "s_sink": 1, "lengths": lengths, **options}
        run_on_ranks(2, body_adds_the_sink, "cuda", backend=backend, arguments=arguments, **case)


def body_adds_the_sink(
    group, device, *, backend: str, lengths: list[int], arguments: dict, **case_arguments
) -> None:
    case = make_case(
        lengths, lengths, heads=8, dtype=torch.bfloat16, device=str(device), **case_arguments
    )
    with mock.patch.object(
        Fa4Backend, "forward_with_sink", autospec=True, side_effect=Fa4Backend.forward_with_sink
    ) as native:
        near_one_device(case, cp_results(case, group, device, backend=backend, **arguments))
    assert native.called, "the merge added the sink"


def near_one_device(case, result) -> None:
    """Within twice the error of the same call on one GPU."""
    cu_seqlens = torch.tensor(case.cu_seqlens_q, dtype=torch.int32, device=case.q.device)
    expected = truth(case)
    one = errors(
        run(attention_with_sink, case, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens), expected
    )
    for name, error in errors(result, expected).items():
        floor = 1e-6 if name == "lse" else 2e-3
        assert error <= 2 * max(one[name], floor), (
            f"{name}: {error:.3g} over two GPUs, {one[name]:.3g} on one"
        )


@pytest.mark.parametrize(
    "num_ranks", [2, *(pytest.param(n, marks=pytest.mark.gpu(ranks=n)) for n in (3, 4))]
)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("first_seed", range(0, 200, 25))
def test_random_cases(transport, first_seed, num_ranks):
    seeds = range(first_seed, first_seed + 25)
    arguments = {
        "dtype": torch.bfloat16,
        "check": near_one_device,
        "longest": 600,
        "transport": transport,
    }
    run_on_ranks(num_ranks, body_random, "cuda", seeds=seeds, **arguments)


@pytest.mark.parametrize("overlap_degree", [0, 1])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_runs_are_bit_identical(transport, overlap_degree):
    run_on_ranks(2, body_bit_identical, "cuda", transport=transport, overlap_degree=overlap_degree)


def body_bit_identical(group, device, *, transport, overlap_degree) -> None:
    case = make_case(
        [3000, 1096],
        [3000, 1096],
        heads=16,
        head_dim=128,
        dtype=torch.bfloat16,
        causal=True,
        s_sink=2,
        device=str(device),
    )
    arguments = {"deterministic": True, "transport": transport, "overlap_degree": overlap_degree}
    first = cp_results(case, group, device, **arguments)
    for _ in range(5):
        for name, value in cp_results(case, group, device, **arguments).items():
            assert torch.equal(value, first[name]), f"{name} differs between two runs"


def test_transports_give_the_same_bits():
    run_on_ranks(2, body_same_bits, "cuda")


def body_same_bits(group, device) -> None:
    case = make_case(
        [5000],
        [5000],
        heads=16,
        head_dim=128,
        dtype=torch.bfloat16,
        causal=True,
        device=str(device),
    )
    for degree in (0, 1):
        arguments = {"deterministic": True, "overlap_degree": degree}
        one, other = (
            cp_results(case, group, device, transport=transport, **arguments)
            for transport in TRANSPORTS
        )
        for name, value in one.items():
            assert torch.equal(value, other[name]), (
                f"{name} differs between transports at degree {degree}"
            )


def test_auto_takes_symmetric_memory_over_nvlink():
    run_on_ranks(2, body_auto, "cuda")


def body_auto(group, device) -> None:
    assert make_cp_plan(128, group=group).transport.name == (
        "nccl" if driver.missing_nvlink() else "symm_mem"
    )
    plan = make_cp_plan(128, group=group, transport="nccl")
    assert plan.transport.name == "nccl"
    with pytest.raises(
        ValueError, match="transport='gloo' needs a group with that backend for its device"
    ):
        make_cp_plan(128, group=group, transport="gloo")


def test_groups_that_overlap():
    """The first rank maps memory in which the second has no part, and then both of them do."""
    run_on_ranks(1, body_mapping_alone, "cuda")
    run_on_ranks(2, body_mapping_together, "cuda")


def body_mapping_alone(group, device) -> None:
    symm_mem.rendezvous(symm_mem.empty(1 << 20, dtype=torch.uint8, device=device), group)


def body_mapping_together(group, device) -> None:
    transport = make_cp_plan(256, group=group, transport="symm_mem").transport
    assert len(transport._streams.allocate(1 << 20).addresses) == 2


def test_a_graph_cannot_hold_counted_transfers():
    run_on_ranks(2, body_capture, "cuda")


def body_capture(group, device) -> None:
    plan = make_cp_plan(256, group=group, transport="symm_mem")
    q = torch.randn(plan.local_tokens, 2, 64, device=device, dtype=torch.bfloat16)
    cp_attention_with_sink(q, q, q, plan=plan)
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(
            RuntimeError,
            match="symm_mem counts its transfers and cannot be captured in a CUDA graph",
        ),
        torch.cuda.graph(graph),
    ):
        cp_attention_with_sink(q, q, q, plan=plan)
    torch.cuda.synchronize()
    # Others may not have captured.
    with pytest.raises(RuntimeError, match="the ranks may be out of step: make a new plan"):
        cp_attention_with_sink(q, q, q, plan=plan)
    again = make_cp_plan(256, group=group, transport="symm_mem")
    cp_attention_with_sink(q, q, q, plan=again)
    torch.cuda.synchronize()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("overlap_degree", [0, 1])
@pytest.mark.parametrize(
    "options", [{}, {"window_size": (128, 0)}, {"cu_seqlens": [0, 1500, 2800, 2840, 5840, 8192]}]
)
def test_two_lanes_change_nothing(transport, overlap_degree, options):
    run_on_ranks(
        2, body_lanes, "cuda", transport=transport, overlap_degree=overlap_degree, **options
    )


def body_lanes(
    group, device, *, transport, overlap_degree, window_size=(-1, -1), cu_seqlens=None
) -> None:
    plan = make_cp_plan(8192, group=group, transport=transport, cu_seqlens=cu_seqlens)
    leaves = [
        torch.randn(plan.local_tokens, h, 64, device=device, dtype=torch.bfloat16).requires_grad_()
        for h in (16, 2, 2)
    ]
    dout = torch.randn_like(leaves[0])

    def step() -> tuple[torch.Tensor, ...]:
        options = {
            "window_size": window_size,
            "overlap_degree": overlap_degree,
            "deterministic": True,
            "backend": "fa3",
        }
        out, lse = cp_attention_with_sink(*leaves, plan=plan, return_lse=True, **options)
        return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)

    with mock.patch.object(cost, "TWO_LANES_S", (0.0, float("inf"))):
        passes = check_lanes(leaves, step)
    assert passes == 20 or overlap_degree == 0, "of degree 0, a rank may have one call"


@pytest.mark.parametrize("overlap_degree", [0, 1])
def test_a_graph_holds_nccl(overlap_degree):
    run_on_ranks(2, body_graph, "cuda", overlap_degree=overlap_degree)


def body_graph(group, device, *, overlap_degree) -> None:
    plan = make_cp_plan(3000, group=group, transport="nccl")
    leaves = [
        torch.randn(plan.local_tokens, h, 64, device=device, dtype=torch.bfloat16).requires_grad_()
        for h in (8, 2, 2)
    ]
    dout = torch.randn_like(leaves[0])

    def step() -> tuple[torch.Tensor, ...]:
        out = cp_attention_with_sink(
            *leaves, plan=plan, overlap_degree=overlap_degree, deterministic=True
        )
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    check_graph(leaves, step)
