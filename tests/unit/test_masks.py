"""Builders of mask slices against their dense definitions, and against cu_seqlens and windows."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import magi_sink_cp
from magi_sink_cp import attention_with_sink, make_cp_plan, masks
from tests.support.cases import offsets
from tests.support.reference import document_mask, reference_attention
from tests.support.slices import dense

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=5)


def same_document(lengths) -> torch.Tensor:
    cu = offsets(lengths)
    return document_mask(cu, cu, False)


def positions(lengths) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, left=st.integers(0, 9), n=st.integers(0, 9), data=st.data())
def test_builders_of_documents(lengths, left, n, data):
    cu, total = offsets(lengths), sum(lengths)
    inside, causal = same_document(lengths), torch.ones(total, total).tril().bool()
    near = (torch.arange(total)[:, None] - torch.arange(total)) <= left
    first = positions(lengths) < n
    prefixes = [data.draw(st.integers(0, length)) for length in lengths]
    document = torch.cat([torch.full((m,), i) for i, m in enumerate(lengths)])
    in_prefix = positions(lengths) < torch.tensor(prefixes)[document] if total else first
    for slices, expected in (
        (masks.documents(cu), inside & causal),
        (masks.documents(cu, causal=False), inside),
        (masks.sliding_window(cu, left), inside & causal & near),
        (masks.global_tokens(torch.tensor(cu), n, left), inside & causal & (near | first)),
        (masks.prefix_lm(cu, prefixes), inside & (causal | in_prefix)),
    ):
        assert torch.equal(dense(slices, total), expected.long())


@settings(max_examples=100, deadline=None)
@given(prefix=st.integers(0, 9), lengths=LENGTHS)
def test_shared_prefix(prefix, lengths):
    total = prefix + sum(lengths)
    expected = same_document([prefix, *lengths])
    expected[:, :prefix] = True
    slices = masks.shared_prefix(prefix, lengths)
    assert torch.equal(dense(slices, total), expected.tril().long())


@settings(max_examples=100, deadline=None)
@given(block=st.integers(1, 9), total=st.integers(0, 30))
def test_block_causal(block, total):
    number = torch.arange(total) // block
    expected = number[:, None] >= number
    assert torch.equal(dense(masks.block_causal(block, total), total), expected.long())
    plan = make_cp_plan(total, mask_slices=masks.block_causal(block, total))
    (stage,) = plan.blueprint.schedule((-1, -1), 0).stages
    # The end of the last block may be one pair, which needs no window.
    assert len(stage.calls) <= (2 if total % block != 2 else 3)


def test_pictures_are_what_the_builders_build():
    """Each docstring's picture, drawn by its own call."""
    for name in masks.__all__:
        if name == "draw":
            continue
        text = getattr(masks, name).__doc__
        call, rows = re.search(r"::\n\n +(\w+\(.+\))\n((?: +[x.] .*\n)+)", text).groups()
        slices = eval(call, vars(masks))
        assert masks.draw(slices) == "\n".join(line.strip() for line in rows.splitlines())


def test_large_masks_are_drawn_smaller():
    drawn = masks.draw(masks.block_causal(100, 700)).splitlines()
    assert len(drawn) == 64
    assert {c for line in drawn for c in line} == {"x", "o", ".", " "}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: masks.documents([1, 2]), ValueError, "cu_seqlens must start at 0 and never fall"),
        (lambda: masks.documents("01"), TypeError, "cu_seqlens must be a sequence of ints, got st"),
        (lambda: masks.sliding_window([0, 2], -1), ValueError, "left must be >= 0, got -1"),
        (lambda: masks.sliding_window([0, 2], 1.5), TypeError, "left must be an int, got 1.5"),
        (lambda: masks.prefix_lm([0, 2], [3]), ValueError, r"prefix_lengths\[0\] must be from 0"),
        (lambda: masks.prefix_lm([0, 2], []), ValueError, "one entry for each of 1 documents"),
        (lambda: masks.block_causal(0, 4), ValueError, "block must be >= 1, got 0"),
        (lambda: masks.draw([((0, 2), (0, 2), "banded")]), ValueError, "one of the types"),
        (lambda: masks.shared_prefix(True, [1]), TypeError, "prefix must be an int, got True"),
        (lambda: masks.shared_prefix(3, 3), TypeError, "completions must be a sequence of ints"),
        (
            lambda: masks.prefix_lm([0, 2], 3),
            TypeError,
            "prefix_lengths must be a sequence of ints",
        ),
        (lambda: masks.documents([0, 2], "full"), TypeError, "causal must be a bool, got 'full'"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def tensors(total, dtype=torch.float64, batch=()):
    generator = torch.Generator().manual_seed(total)
    shapes = (*batch, total, 4, 16), (*batch, total, 2, 16), (*batch, total, 2, 16)
    made = [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]
    sink = torch.randn(2, 4, dtype=dtype, generator=generator)
    return [x.requires_grad_() for x in (*made, sink)]


def results(call, inputs):
    out, lse = call(*inputs)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    seen = lse.masked_fill(torch.isinf(lse), 0)
    grads = torch.autograd.grad((out * weight).sum() + (seen * seen).sum(), inputs)
    return dict(zip(("out", "lse", "dq", "dk", "dv", "dsink"), (out, lse, *grads), strict=True))


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize(
    ("total", "slices"),
    [
        (40, masks.shared_prefix(12, [9, 0, 19])),
        (40, masks.block_causal(7, 40)),
        (40, masks.global_tokens([0, 25, 40], 3, 5)),
        (40, masks.prefix_lm([0, 25, 40], [11, 4])),
        (12, [((3, 7), (5, 12), "inv_causal"), ((7, 9), (0, 8), "bi_causal")]),  # rows see nothing
        (3, [((0, 1), (0, 1), "causal"), ((2, 3), (2, 3), "causal")]),  # one call for both
        (6, [((0, 2), (0, 2), "causal"), ((4, 6), (4, 6), "causal")]),
        (5, []),
    ],
)
def test_one_device_against_the_dense_mask(total, slices, batch):
    inputs = tensors(total, batch=batch)
    got = results(
        lambda q, k, v, sink: attention_with_sink(
            q, k, v, sink, mask_slices=slices, return_lse=True
        ),
        inputs,
    )
    mask = dense(slices, total).bool()
    expected = results(lambda *x: reference_attention(*x, mask), inputs)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("window", [None, 5])
def test_slices_equal_documents_bit_for_bit(window):
    cu = [0, 17, 17, 30, 64]
    inputs = tensors(64, torch.float32)
    left = -1 if window is None else window
    slices = masks.documents(cu) if window is None else masks.sliding_window(cu, window)
    by_slices = results(
        lambda q, k, v, sink: attention_with_sink(
            q, k, v, sink, mask_slices=slices, return_lse=True
        ),
        inputs,
    )
    plan = make_cp_plan(64, cu_seqlens=cu)
    by_documents = results(
        lambda q, k, v, sink: magi_sink_cp.cp_attention_with_sink(
            q, k, v, sink, plan=plan, window_size=(left, 0), return_lse=True
        ),
        inputs,
    )
    for name, value in by_documents.items():
        assert torch.equal(by_slices[name], value), name


def test_what_slices_do_not_go_with():
    q, k, v, sink = tensors(6)
    slices = masks.documents([0, 6])
    plan = make_cp_plan(6, mask_slices=slices)
    for options in ({"causal": True}, {"causal": False}, {"window_size": (2, 0)}):
        with pytest.raises(ValueError, match="causal and window_size must be left out with a plan"):
            magi_sink_cp.cp_attention_with_sink(q, k, v, sink, plan=plan, **options)
    for options in (
        {"causal": True},
        {"window_size": (2, 0)},
        {"cu_seqlens_q": [0, 6], "cu_seqlens_k": [0, 6]},
    ):
        with pytest.raises(ValueError, match="must be left out beside mask_slices"):
            attention_with_sink(q, k, v, sink, mask_slices=slices, **options)
    for unordered in ({}, {((0, 6), (0, 6), "full")}):
        with pytest.raises(TypeError, match="mask_slices must be a sequence"):
            attention_with_sink(q, k, v, sink, mask_slices=unordered)
    with pytest.raises(TypeError, match="causal must be a bool, got None"):
        attention_with_sink(q, k, v, sink, mask_slices=slices, causal=None)
    with pytest.raises(ValueError, match="q and k must have the same tokens beside mask_slices"):
        attention_with_sink(q, k[:5], v[:5], sink, mask_slices=slices)
    for wrong, error, message in (
        ([((0, 6), (0, 6), "diagonal")], ValueError, "must have one of the types"),
        ([((4, 2), (0, 6), "full")], ValueError, r"mask_slices\[0\] must have a range of queries"),
        ([((0, 6), (0, 7), "full")], ValueError, r"range of keys .* got \(0, 7\)"),
        ([((0, 6), 6, "full")], TypeError, r"mask_slices\[0\] must be \(\(q0, q1\)"),
        ([*slices, ((3, 4), (0, 2), "full")], ValueError, r"both hold \(3, 0\)"),
        (6, TypeError, "mask_slices must be a sequence"),
        ({}, TypeError, "mask_slices must be a sequence"),
        ([((False, True), (0, 1), "full")], TypeError, r"mask_slices\[0\] must be .* int ranges"),
        ([((0, torch.tensor(True)), (0, 1), "full")], TypeError, r"must be .* int ranges"),
    ):
        with pytest.raises(error, match=message):
            make_cp_plan(6, mask_slices=wrong)


def test_slices_are_read_once_and_planned_as_they_are_now():
    q, k, v, sink = tensors(6)
    slices = masks.documents([0, 6])
    expected = attention_with_sink(q, k, v, sink, causal=False, mask_slices=slices)
    for same in ((x for x in slices), [[[0, 6], [0, 6], "causal"]], tuple(slices)):
        assert torch.equal(attention_with_sink(q, k, v, sink, mask_slices=same), expected)
    end = torch.tensor(4)
    by_tensor = [((0, end), (0, end), "full")]
    before = attention_with_sink(q, k, v, sink, mask_slices=by_tensor)
    end.fill_(6)
    assert not torch.equal(attention_with_sink(q, k, v, sink, mask_slices=by_tensor), before)
    with pytest.raises(TypeError, match=r"mask_slices\[0\] must be"):
        attention_with_sink(q, k, v, sink, mask_slices=[((0.0, 6.0), (0, 6), "causal")])
    with pytest.raises(TypeError, match="mask_slices must be a sequence"):
        attention_with_sink(q, k, v, sink, mask_slices=6)
    assert "x" in masks.draw(x for x in slices)
    with pytest.raises(TypeError, match=r"mask_slices\[0\] must be"):
        masks.draw([(0, 1)])


def test_positions_of_slices():
    slices = masks.shared_prefix(3, [2, 2])
    ids = [0, 1, 2, 3, 4, 3, 4]
    plan = make_cp_plan(7, mask_slices=slices, position_ids=ids)
    assert plan.position_ids.tolist() == ids
    small = torch.tensor(ids, dtype=torch.uint16)
    assert make_cp_plan(7, mask_slices=slices, position_ids=small).position_ids.tolist() == ids
    assert make_cp_plan(7, mask_slices=slices).position_ids.tolist() == list(range(7))
    by_documents = make_cp_plan(7, mask_slices=slices, cu_seqlens=[0, 3, 5, 7])
    assert by_documents.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1]
    bad_tensors = (
        torch.empty(7, dtype=torch.int64, device="meta"),
        torch.ones(7, dtype=torch.bfloat16),
        [torch.ones((), dtype=torch.bfloat16)] * 7,
    )
    for wrong in (ids[:3], [0.5] * 7, "abc", *bad_tensors):
        with pytest.raises(ValueError, match="position_ids must be total_tokens, 7, ints, got"):
            make_cp_plan(7, position_ids=wrong)
    with pytest.raises(ValueError, match=r"position_ids must be at most 2\^63 - 1, got 92233"):
        make_cp_plan(7, position_ids=np.full(7, 1 << 63, dtype=np.uint64))
