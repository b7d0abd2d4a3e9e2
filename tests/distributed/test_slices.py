"""Masks of slices over ranks, against a dense mask in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_sink_cp import cp_attention_with_sink, make_cp_plan, masks
from tests.support.ranks import run_on_ranks
from tests.support.reference import reference_attention
from tests.support.slices import dense, slices_of

NAMES = ("out", "lse", "dq", "dk", "dv", "dsink")


def weigh(out, lse):
    """A loss that reaches every row of out and lse; -inf depends on nothing."""
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return (out * weight).sum() + lse.masked_fill(torch.isinf(lse), 0).square().sum()


def check(group, slices, total, *, layout="auto", degree="auto", sink_layout="sh", s_sink=2):
    generator = torch.Generator().manual_seed(total)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    q, k, v = (draw(total, heads, 16) for heads in (4, 2, 2))
    sink = draw(s_sink, 4) if sink_layout == "sh" else draw(total, s_sink, 4)
    if s_sink == 0:
        sink = None
    inputs = [x.requires_grad_() for x in (q, k, v, sink) if x is not None]
    expected = reference_attention(q, k, v, sink, dense(slices, total).bool())
    expected_grads = torch.autograd.grad(weigh(*expected), inputs)
    plan = make_cp_plan(total, group=group, mask_slices=slices, layout=layout)
    local = [plan.shard(x) for x in (q, k, v)]
    local_sink = plan.shard(sink, fill=0) if sink_layout == "ssh" and sink is not None else sink
    out, lse = cp_attention_with_sink(
        *local, local_sink, plan=plan, sink_layout=sink_layout, overlap_degree=degree,
        dsink_reduce="sum" if sink_layout == "sh" and sink is not None else "none",
        return_lse=True,
    )  # fmt: skip
    whole = plan.unshard(out), plan.unshard(lse, dim=1)
    grads = list(torch.autograd.grad(weigh(*whole), inputs))
    results = zip(NAMES, (*whole, *grads), (*expected, *expected_grads), strict=False)
    for name, value, truth in results:
        torch.testing.assert_close(value, truth, msg=lambda text, name=name: f"{name}: {text}")


MASKS = {
    "shared_prefix": (64, masks.shared_prefix(20, [9, 0, 19, 16])),
    "block_causal": (64, masks.block_causal(7, 64)),
    "global_tokens": (64, masks.global_tokens([0, 25, 64], 3, 5)),
    "prefix_lm": (61, masks.prefix_lm([0, 25, 61], [11, 4])),
    "rows that see nothing": (
        24, [((3, 7), (5, 12), "inv_causal"), ((7, 9), (0, 8), "bi_causal")]
    ),
    "others' keys alone": (32, [((0, 16), (16, 32), "full"), ((16, 32), (0, 16), "causal")]),
    "rows that see nothing between others": (
        24, [((lo, lo + 2), (lo, lo + 2), "causal") for lo in range(0, 24, 4)]
    ),
    "nothing": (10, []),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_masks(num_ranks, name):
    run_on_ranks(num_ranks, body_masks, name=name)


def body_masks(group, device, *, name) -> None:
    total, slices = MASKS[name]
    for layout in ("auto", "zigzag"):
        for degree in ("auto", 0, 1, 3):
            check(group, slices, total, layout=layout, degree=degree)
    check(group, slices, total, sink_layout="ssh", degree=1)
    check(group, slices, total, s_sink=0, degree=1)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_random_slices(num_ranks):
    run_on_ranks(num_ranks, body_random)


def body_random(group, device) -> None:
    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(
        data=st.data(),
        total=st.integers(1, 40),
        degree=st.sampled_from(["auto", 0, 1, 2]),
        layout=st.sampled_from(["auto", "zigzag", "balanced"]),
        sinks=st.sampled_from([("sh", 1), ("sh", 0), ("ssh", 2)]),
    )
    def run(data, total, degree, layout, sinks):
        slices = data.draw(slices_of(total))
        sink_layout, s_sink = sinks
        check(
            group, slices, total, layout=layout, degree=degree, sink_layout=sink_layout,
            s_sink=s_sink,
        )  # fmt: skip

    run()


def test_ranks_that_are_given_other_slices_are_told():
    run_on_ranks(2, body_differ)


def body_differ(group, device) -> None:
    rank = torch.distributed.get_rank(group)
    slices = masks.block_causal(4 + rank, 16)
    with pytest.raises(ValueError, match=r"same cu_seqlens, mask_slices and position_ids"):
        make_cp_plan(16, group=group, mask_slices=slices)
    with pytest.raises(ValueError, match="must not share|was given something invalid"):
        make_cp_plan(16, group=group, mask_slices=masks.documents([0, 16]) * (1 + rank))
