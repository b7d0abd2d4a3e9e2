"""The cost model behind overlap_degree="auto": its choices where the answer is plain, its bound."""

from __future__ import annotations

import dataclasses
from unittest.mock import ANY

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_sink_cp.dist.planning.cost import (
    CALL_ON_TWO_LANES_S,
    MAX_SHARDS,
    MEMORY,
    SINK_KERNEL_SLOWER,
    CallSizes,
    Overlap,
    Work,
    choose_overlap,
    cost_s,
    make_work,
)
from magi_sink_cp.dist.planning.layout import zigzag
from magi_sink_cp.dist.planning.mask import CAUSAL, FULL, bands_of_documents
from magi_sink_cp.dist.planning.schedule import Mask, Share


def mask(tokens: int, cp_size: int, window=CAUSAL, documents: int = 1) -> Mask:
    length = tokens // documents
    ranges = [(i * length, (i + 1) * length) for i in range(documents)]
    bands = bands_of_documents(ranges, window)
    return Mask(zigzag(tokens, cp_size, bands), bands)


def work(tokens: int, cp_size: int, window=CAUSAL, documents: int = 1) -> Work:
    return make_work(mask(tokens, cp_size, window, documents), CallSizes(1, 64, 8, 128, 2, True))


def choose(
    share: Work,
    cp_size: int,
    link: str,
    sink_kernel_slower: float | None = None,
    buffers=lambda degree: (0, 0),
) -> Overlap:
    return choose_overlap(share, cp_size, link, sink_kernel_slower, buffers)


@pytest.mark.parametrize("tokens", [8192, 16384, 32768, 65536, 131072])
def test_two_gpus_over_nvlink(tokens):
    """Degree 0 was measured better (docs/benchmarks.md), and fa4's forward was not."""
    chosen = choose(work(tokens, 2), 2, "nvlink", SINK_KERNEL_SLOWER)
    assert (chosen.degrees, chosen.sink_in_kernel) == ((0, 0), False)


def test_kernels_add_the_sink_where_rows_see_few_keys():
    """They win under a window of 128 and over packed documents, and lose over a long document."""
    assert choose(work(131072, 2, window=(128, 0)), 2, "nvlink", SINK_KERNEL_SLOWER).sink_in_kernel
    assert choose(work(65536, 2, documents=64), 2, "nvlink", SINK_KERNEL_SLOWER).sink_in_kernel
    assert not choose(work(32768, 2), 2, "nvlink", SINK_KERNEL_SLOWER).sink_in_kernel
    assert not choose(work(131072, 2, window=(128, 0)), 2, "nvlink").sink_in_kernel, (
        "there are none"
    )
    assert choose(work(32768, 2), 2, "nvlink", 0.0).sink_in_kernel, "they are used anyway"


def test_rows_that_are_merged_cost_more_where_the_merge_need_not_see_all():
    """A merge that adds the sink reads and writes all rows anyway.

    Without it stages pay for the read and write of theirs.
    """
    share = work(32768, 4)
    one_pass = share.remote_rows * 64 * 128 * 4 / MEMORY + share.rows * 64 * 16 / MEMORY
    for degree in (1, 2):
        with_merge, with_kernel = (
            cost_s(share, 4, degree, "nvlink", "forward", native) for native in (False, True)
        )
        assert with_kernel - with_merge == pytest.approx(
            one_pass + degree * CALL_ON_TWO_LANES_S, rel=1e-6
        )
    assert cost_s(share, 4, 0, "nvlink", "forward", True) == cost_s(
        share, 4, 0, "nvlink", "forward", False
    )


def test_a_slow_link_is_hidden():
    """Between hosts a transfer takes as long as a good part of the computation."""
    assert choose(work(65536, 2), 2, "network").degrees == (1, 1)
    share, buffers = work(262144, 8), mask(262144, 8).buffers
    forward, backward = choose(share, 8, "network", buffers=buffers).degrees
    assert forward > 1
    assert backward > 1


def test_rows_that_see_a_halo_wait_for_it_alone():
    """Each of two chunks has 128 such rows; one of rank 1's sees what it holds itself."""
    share = mask(131072, 2, (128, 0)).share()
    assert share == Share(128, 128, 128, share.alone_pairs)
    assert share.alone_pairs > 0.99 * mask(131072, 2, (128, 0)).pairs(0)
    measured = work(131072, 2, window=(128, 0))
    assert choose(measured, 2, "nvlink").degrees == (0, 0)
    narrow = dataclasses.replace(measured, head_dim=64)
    assert choose(narrow, 2, "nvlink", SINK_KERNEL_SLOWER) == Overlap((0, 0), True, 4224, ANY, ANY)


@given(
    cp_size=st.integers(2, 64),
    tokens=st.integers(64, 4096).map(lambda n: n * 64),
    window=st.sampled_from([CAUSAL, FULL, (100, 0)]),
    link=st.sampled_from(["nvlink", "network"]),
)
def test_buffers_do_not_grow_with_the_ranks(cp_size, tokens, window, link):
    share, buffers = work(tokens, cp_size, window), mask(tokens, cp_size, window).buffers
    chosen = choose(share, cp_size, link, buffers=buffers).degrees
    for way, degree in zip(("forward", "backward"), chosen, strict=True):
        assert 0 <= degree < cp_size
        keys, gradients = buffers(degree)
        tokens_held = keys if way == "forward" else keys + gradients
        assert min(2, max(1, degree)) * tokens_held <= MAX_SHARDS[way] * share.rows
        if window == (100, 0) and tokens >= 400 * cp_size:
            assert degree <= 1, "a halo needs no second stage"


def test_rows_that_see_own_keys_alone_hide_what_travels():
    few = work(32768, 4)
    more = dataclasses.replace(few, alone_pairs=few.pairs // 2)
    for way in ("forward", "backward"):
        assert cost_s(more, 4, 0, "network", way) < cost_s(few, 4, 0, "network", way)
        assert cost_s(more, 4, 1, "network", way) == cost_s(few, 4, 1, "network", way)


def test_passes_that_are_neither_short_nor_long_take_turns_on_two_streams():
    assert choose(work(4096, 2), 2, "nvlink").two_lanes == (False, False)
    assert choose(work(8192, 2), 2, "nvlink").two_lanes == (False, True)
    assert choose(work(16384, 2), 2, "nvlink").two_lanes == (True, True)
    assert choose(work(32768, 2), 2, "nvlink").two_lanes == (True, False)
    assert choose(work(131072, 2), 2, "nvlink").two_lanes == (False, False)


def test_more_to_move_costs_more():
    few = work(32768, 4)
    more = dataclasses.replace(few, remote_keys=2 * few.remote_keys)
    for degree in range(4):
        for way in ("forward", "backward"):
            assert cost_s(more, 4, degree, "network", way) >= cost_s(few, 4, degree, "network", way)
    assert cost_s(more, 4, 0, "nvlink", "forward") > cost_s(few, 4, 0, "nvlink", "forward")
