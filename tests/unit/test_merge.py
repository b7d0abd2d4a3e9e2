"""The merge kernel and its twin, and what a wrong merge would do to the tests."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_sink_cp import attention_with_sink
from magi_sink_cp.kernels.merge import MAX_PARTIALS, merge, merge_torch, merge_triton
from magi_sink_cp.kernels.protocol import Partial, nothing_seen
from magi_sink_cp.ops import attention as ops
from tests.support.cases import assert_close, make_case, run, truth

KERNELS = {"torch": merge_torch, "triton": merge_triton}
if torch.cuda.is_available():  # there the Triton kernel is compiled, and tests/gpu runs it
    del KERNELS["triton"]


@pytest.fixture(params=KERNELS.keys())
def kernel(request):
    return KERNELS[request.param]


def split_attention(
    rows: int,
    spans: list[tuple[int, int, int]],
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    leading: tuple[int, ...],
):
    """Random partials (start, stop, keys) with the (out, lse) in fp64 of all their keys, without
    a sink, as a function of sink.
    """
    partials, all_scores, all_values = [], [], []
    for start, stop, keys in spans:
        scores = torch.randn(*leading, heads, rows, keys, dtype=torch.float64) * 3
        scores[..., :start, :] = float("-inf")
        scores[..., stop:, :] = float("-inf")
        values = torch.randn(*leading, heads, keys, head_dim, dtype=torch.float64)
        lse = torch.logsumexp(scores, -1)
        out = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]) @ values
        part = slice(start, stop)
        partials.append(
            Partial(
                out.transpose(-2, -3)[..., part, :, :].to(dtype).contiguous(),
                lse[..., part].float().contiguous(),
                start,
            )
        )
        all_scores.append(scores)
        all_values.append(values)

    def exact(sink: torch.Tensor | None):
        scores, values = torch.cat(all_scores, -1), torch.cat(all_values, -2)
        logits = scores
        if sink is not None:
            shared = sink.dim() == 2
            extra = (
                sink.double().T[:, None, :].expand(*scores.shape[:-1], -1)
                if shared
                else sink.double().movedim(-1, -3)
            )
            logits = torch.cat([scores, extra], -1)
        lse = torch.logsumexp(logits, -1)
        out = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]) @ values
        return out.transpose(-2, -3), lse

    return partials, exact


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_attention_over_all_keys(data):
    kernel = data.draw(st.sampled_from(list(KERNELS.values())))
    rows, heads, head_dim = (
        data.draw(st.integers(1, 40)),
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([1, 8, 24])),
    )
    leading = data.draw(st.sampled_from([(), (2,)]))
    spans = []
    for _ in range(data.draw(st.integers(1, MAX_PARTIALS))):
        start = data.draw(st.integers(0, rows - 1))
        spans.append((start, data.draw(st.integers(start + 1, rows)), data.draw(st.integers(1, 5))))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    partials, exact = split_attention(rows, spans, heads, head_dim, torch.float32, leading)
    s_sink = data.draw(st.integers(0, 3))
    shared = data.draw(st.booleans())
    sink = None
    if s_sink:
        sink = torch.randn(*(() if shared else (*leading, rows)), s_sink, heads) * data.draw(
            st.sampled_from([1.0, 100.0])
        )
        if data.draw(st.booleans()):
            sink[..., 0, :] = float("-inf")
    out = torch.full((*leading, rows, heads, head_dim), float("nan"))
    lse = torch.full((*leading, heads, rows), float("nan"))
    kernel(partials, sink, out, lse)
    expected_out, expected_lse = exact(sink)
    torch.testing.assert_close(out.double(), expected_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_rows_without_a_key_ignore_what_their_out_holds(kernel):
    """A kernel may leave anything in rows that saw no key.

    Their weight is 0, and 0 · NaN must not appear.
    """
    partial = Partial(torch.full((4, 2, 8), float("nan")), torch.full((2, 4), float("-inf")))
    out, lse = torch.empty(4, 2, 8), torch.empty(2, 4)
    kernel([partial], torch.zeros(1, 2), out, lse)
    assert not out.any()
    assert not lse.any()
    kernel([partial], None, out, lse)
    assert torch.isneginf(lse).all()


@pytest.mark.parametrize("value", [-1e4, -100.0, 100.0, 3e4])
def test_extreme_sinks_neither_overflow_nor_vanish(kernel, value):
    partial = Partial(torch.ones(3, 2, 4), torch.tensor([[0.0, 50.0, float("-inf")]] * 2))
    out, lse = torch.empty(3, 2, 4), torch.empty(2, 3)
    kernel([partial], torch.full((2, 2), value), out, lse)
    expected = torch.logaddexp(
        partial.lse.double(), torch.tensor(value).double() + torch.tensor(2.0).double().log()
    )
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(
        out[..., 0].T.double(), torch.exp(partial.lse.double() - expected), rtol=1e-4, atol=1e-7
    )


def test_in_place_where_it_can_be():
    first = Partial(torch.randn(5, 2, 4), torch.randn(2, 5))
    out, lse = merge([first], torch.randn(1, 2))
    assert out.data_ptr() == first.out.data_ptr()
    assert lse.data_ptr() == first.lse.data_ptr()
    plain = merge([first], None)
    assert plain[0] is first.out
    buffer = torch.full((8, 2, 4), float("nan"))
    inside = Partial(buffer[2:6].copy_(torch.randn(4, 2, 4)), torch.randn(2, 4), start=2)
    expected = torch.zeros(8, 2, 4)
    expected[2:6] = inside.out
    result, lse = merge([inside], None, out=buffer)
    assert result is buffer
    torch.testing.assert_close(result, expected)
    assert torch.isneginf(lse[:, [0, 1, 6, 7]]).all()


def test_folding_more_partials_than_one_launch_takes(kernel):
    partials, exact = split_attention(10, [(0, 10, 3)] * 6, 2, 8, torch.float32, ())
    folded = Partial(*merge(partials[:MAX_PARTIALS], out_dtype=torch.float32))
    out, lse = torch.empty(10, 2, 8), torch.empty(2, 10)
    kernel([folded, *partials[MAX_PARTIALS:]], None, out, lse)
    torch.testing.assert_close(out.double(), exact(None)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, MAX_PARTIALS + 1])
def test_number_of_partials(count):
    with pytest.raises(ValueError, match=f"1 to {MAX_PARTIALS} partials, got {count}"):
        merge([nothing_seen(torch.randn(2, 1, 4))] * count)


def sink_twice(partials, sink=None, **options):
    doubled = None if sink is None else torch.cat([sink, sink], dim=-2)
    return merge(partials, doubled, **options)


def sink_dropped(partials, sink=None, **options):
    return merge(partials, None, **options)


@pytest.mark.parametrize("mutant", [sink_twice, sink_dropped])
@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
def test_a_sink_counted_twice_or_not_at_all_is_noticed(monkeypatch, mutant, sink_layout):
    """The proof that the comparison with the reference can fail.

    It does, in out, lse and dsink, with a mutated merge.
    """
    case = make_case([20], [20], batch=1, sink_layout=sink_layout)
    expected = truth(case)
    assert_close(run(attention_with_sink, case), expected, 1e-5)
    monkeypatch.setattr(ops, "merge", mutant)
    result = run(attention_with_sink, case)
    for name in ("out", "lse", "dq", "dsink"):
        with pytest.raises(AssertionError, match=f"{name}: relative error"):
            assert_close({name: result[name]}, expected, 1e-2)


@pytest.mark.parametrize("function", [merge_torch, merge_triton])
def test_rows_behind_the_last_document_are_rows_without_a_key(function):
    """Kernels leave them unwritten: NaN there reaches neither out nor lse."""
    out, lse = torch.randn(10, 2, 8), torch.randn(2, 10)
    sink, cu_seqlens = torch.randn(1, 2), torch.tensor([0, 3, 7], dtype=torch.int32)
    expected, expected_lse = merge([Partial(out[:7].clone(), lse[:, :7].clone())], sink)
    out[7:], lse[:, 7:] = float("nan"), float("nan")
    function([Partial(out, lse)], sink, out, lse, cu_seqlens)
    torch.testing.assert_close(out[:7], expected)
    torch.testing.assert_close(lse[:, :7], expected_lse)
    assert not out[7:].any()
    torch.testing.assert_close(lse[:, 7:], sink.T.expand(-1, 3))
