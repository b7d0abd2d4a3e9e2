"""attention_with_sink on the CPU against the fp64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_sink_cp import attention_with_sink
from magi_sink_cp.kernels.backends import cpu
from tests.support.cases import (
    Case,
    assert_close,
    assert_within_plain,
    errors,
    make_case,
    run,
    truth,
)
from tests.support.reference import reference_attention, visible_mask

FP32_TOLERANCE = 1e-5

lengths = st.integers(0, 40)
windows = st.tuples(st.integers(-1, 12), st.integers(-1, 12))
sink_values = st.one_of(st.just(float("-inf")), st.floats(-1e4, 100.0))


@st.composite
def cases(draw) -> Case:
    heads_kv = draw(st.integers(1, 3))
    common = {
        "heads_kv": heads_kv,
        "heads": heads_kv * draw(st.integers(1, 4)),
        "head_dim": draw(st.sampled_from([1, 5, 8, 16])),
        "s_sink": draw(st.integers(1, 3)),
        "sink_layout": draw(st.sampled_from(["sh", "ssh"])),
        "causal": draw(st.booleans()),
        "window_size": draw(windows),
        "softcap": draw(st.sampled_from([0.0, 2.0])),
        "with_dlse": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }
    if draw(st.booleans()):
        documents = draw(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=5))
        case = make_case([q for q, _ in documents], [k for _, k in documents], **common)
    else:
        case = make_case([draw(lengths)], [draw(lengths)], batch=draw(st.integers(1, 3)), **common)
    special = draw(st.lists(sink_values, min_size=0, max_size=4))
    flat = case.sink.view(-1)
    for i, value in enumerate(special):
        if flat.numel():
            flat[(i * 7) % flat.numel()] = value
    return case


def offsets_of(case: Case) -> dict:
    if case.q.dim() == 4:
        return {}
    pairs = (("cu_seqlens_q", case.cu_seqlens_q), ("cu_seqlens_k", case.cu_seqlens_k))
    return {name: torch.tensor(values, dtype=torch.int32) for name, values in pairs}


@settings(max_examples=300, deadline=None)
@given(cases())
def test_matches_reference(case):
    result, expected = run(attention_with_sink, case, **offsets_of(case)), truth(case)
    # An lse of -1e4 (a row that sees such a sink alone) is known to fp32's last bit, 1e-3, and so
    # is exp(z - lse).
    largest = (
        expected.values["lse"].nan_to_num(neginf=0.0).abs().max().item()
        if result["lse"].numel()
        else 0.0
    )
    assert_close({"dsink": result.pop("dsink")}, expected, max(FP32_TOLERANCE, 2**-22 * largest))
    assert_close(result, expected, FP32_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
def test_low_precision_within_twice_the_plain_error(dtype, sink_layout):
    case = make_case(
        [300],
        [300],
        batch=2,
        heads=8,
        head_dim=64,
        s_sink=2,
        sink_layout=sink_layout,
        dtype=dtype,
        causal=True,
    )
    plain_case = Case(**{**vars(case), "sink": None})
    plain = errors(run(attention_with_sink, plain_case), truth(plain_case))
    assert_within_plain(run(attention_with_sink, case), truth(case), plain)


@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (3, 1), "softcap": 1.5}])
def test_gradcheck_in_fp64(sink_layout, options):
    case = make_case(
        [5],
        [7],
        batch=1,
        heads=4,
        heads_kv=2,
        head_dim=3,
        s_sink=2,
        sink_layout=sink_layout,
        dtype=torch.float64,
    )
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v, case.sink)]

    def function(*inputs):
        return attention_with_sink(*inputs, sink_layout=sink_layout, return_lse=True, **options)

    assert torch.autograd.gradcheck(function, leaves)


def test_by_hand():
    """One query, two keys, two sinks: the numbers of the definition."""
    q, v = torch.tensor([[[[2.0]]]]), torch.tensor([[[[10.0]], [[20.0]]]])
    k = torch.tensor([[[[0.5]], [[1.5]]]])
    sink = torch.tensor([[0.25], [-1.0]])
    out, lse = attention_with_sink(q, k, v, sink, softmax_scale=0.5, return_lse=True)
    total = math.exp(0.5) + math.exp(1.5) + math.exp(0.25) + math.exp(-1.0)
    assert lse.item() == pytest.approx(math.log(total), rel=1e-6)
    assert out.item() == pytest.approx((10 * math.exp(0.5) + 20 * math.exp(1.5)) / total, rel=1e-6)


def test_no_sink_and_a_switched_off_sink_are_plain_attention():
    case = make_case([20], [20], batch=2, causal=True)
    expected = run(attention_with_sink, Case(**{**vars(case), "sink": None}))
    case.sink.fill_(float("-inf"))
    result = run(attention_with_sink, case)
    assert not result.pop("dsink").any()
    for name, value in result.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)
    expected_out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (case.q, case.k, case.v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(result["out"], expected_out.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_rows_without_a_key():
    """causal, sq > sk: the first rows see nothing.

    Their lse is the sink's, out and gradients are 0.
    """
    case = make_case([6], [2], batch=1, causal=True)
    result = run(attention_with_sink, case)
    sink_lse = torch.logsumexp(case.sink, 0)
    torch.testing.assert_close(result["lse"][0, :, :4], sink_lse[:, None].expand(-1, 4))
    assert not result["out"][0, :4].any()
    assert not result["dq"][0, :4].any()
    without = run(attention_with_sink, Case(**{**vars(case), "sink": None}))
    assert torch.isneginf(without["lse"][0, :, :4]).all()
    assert not any(value.isnan().any() for value in without.values())


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_empty_inputs(sizes, batch):
    case = make_case([sizes[0]], [sizes[1]], batch=batch, s_sink=2)
    assert_close(run(attention_with_sink, case, **offsets_of(case)), truth(case), FP32_TOLERANCE)


def test_empty_batch():
    q, k = torch.randn(0, 4, 2, 8), torch.randn(0, 3, 2, 8)
    sink = torch.randn(1, 2, requires_grad=True)
    out, lse = attention_with_sink(q, k, k, sink, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (0, 2, 4)
    (out.sum() + lse.sum()).backward()
    assert not sink.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sinks_are_computed_in_fp32(dtype):
    case = make_case([30], [30], batch=1, s_sink=2)
    low = case.sink.to(dtype)
    expected = attention_with_sink(case.q, case.k, case.v, low.float())
    assert torch.equal(attention_with_sink(case.q, case.k, case.v, low), expected)
    low.requires_grad_()
    attention_with_sink(case.q, case.k, case.v, low).sum().backward()
    assert low.grad.dtype == dtype


def test_only_lse_is_used():
    case = make_case([9], [9], batch=1, causal=True)
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.sink)]
    attention_with_sink(*leaves, causal=True, return_lse=True)[1].sum().backward()
    double = [x.detach().double().requires_grad_() for x in leaves]
    reference_attention(*double, visible_mask(9, 9, causal=True))[1].sum().backward()
    for ours, exact in zip(leaves, double, strict=True):
        # lse does not depend on v.
        expected = torch.zeros_like(exact) if exact.grad is None else exact.grad
        torch.testing.assert_close(ours.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_inputs_are_left_alone_and_need_not_be_contiguous():
    packed = torch.randn(2, 10, 3, 4, 8)
    q, k, v = packed.unbind(2)
    before = packed.clone()
    sink = torch.randn(1, 4)
    out = attention_with_sink(q, k, v, sink)
    assert torch.equal(packed, before)
    assert torch.equal(
        out, attention_with_sink(q.contiguous(), k.contiguous(), v.contiguous(), sink)
    )


def test_memory_stays_small_at_16k_tokens(monkeypatch):
    """No tile of scores is larger than the tile limit, for forward and backward of a 16k
    sequence.
    """
    largest = 0
    original = cpu._scores

    def recording(*arguments):
        nonlocal largest
        scores, slope = original(*arguments)
        largest = max(largest, scores.numel())
        return scores, slope

    monkeypatch.setattr(cpu, "_scores", recording)
    q = torch.randn(1, 16384, 2, 4, requires_grad=True)
    k = torch.randn(1, 16384, 1, 4, requires_grad=True)
    window = (20_000, 0)  # a left limit: not for PyTorch's flash kernels
    attention_with_sink(q, k, k, torch.randn(1, 2), window_size=window).sum().backward()
    assert 0 < largest <= cpu._TILE_ELEMENTS


def test_deterministic():
    case = make_case([70], [70], batch=2, s_sink=2, causal=True)
    first, second = (run(attention_with_sink, case, deterministic=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_autocast_changes_nothing():
    """Under autocast torch's own products would run in bf16.

    The statistics and products here stay what the inputs ask for.
    """
    case = make_case([40], [40], batch=2, head_dim=32, causal=True)
    expected = run(attention_with_sink, case)
    with torch.autocast("cpu", torch.bfloat16):
        result = run(attention_with_sink, case)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


@pytest.mark.parametrize("gradient", [float("inf"), float("nan"), 3.0])
def test_a_row_that_sees_nothing_gives_no_gradient_through_lse(gradient):
    case = make_case([4], [2], batch=1, causal=True, sink_layout=None, with_dlse=True)
    case.dlse[..., :2] = 0.0
    expected = run(attention_with_sink, case)
    case.dlse[..., :2] = gradient
    result = run(attention_with_sink, case)
    assert all(torch.equal(result[name], expected[name]) for name in expected)
