"""The cost model behind overlap_degree="auto": what it must choose where the answer is plain, and that it keeps its bound."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_sink_cp.dist.layout import zigzag
from magi_sink_cp.dist.overlap import MAX_SHARDS, Work, buffer_tokens, choose_overlap_degrees, cost_s
from magi_sink_cp.dist.schedule import CAUSAL, FULL, mean_remote, visible_pairs


def work(tokens: int, cp_size: int, window=CAUSAL, documents: int = 1) -> Work:
    length = tokens // documents
    ranges = [(i * length, (i + 1) * length) for i in range(documents)]
    remote_keys, remote_rows = mean_remote(zigzag(tokens, cp_size), ranges, window)
    return Work(
        rows=tokens // cp_size,
        pairs=documents * visible_pairs(length, length, *window) // cp_size,
        remote_keys=remote_keys,
        remote_rows=remote_rows,
        ranges=2,
        documents=documents,
        heads=64,
        heads_kv=8,
        head_dim=128,
        element_size=2,
    )


@pytest.mark.parametrize("tokens", [8192, 16384, 32768, 65536, 131072])
def test_two_gpus_over_nvlink(tokens):
    """Measured (docs/benchmarks.md): in forward degree 0 from 16k on, in backward 1 from 32k on; below there is no difference."""
    forward, backward = choose_overlap_degrees(work(tokens, 2), 2, "nvlink")
    assert forward == 0 or tokens < 16384
    assert backward == 1 or tokens < 32768


def test_a_slow_link_is_hidden():
    """Between hosts a transfer takes as long as a good part of the computation."""
    assert choose_overlap_degrees(work(65536, 2), 2, "network") == (1, 1)
    forward, backward = choose_overlap_degrees(work(262144, 8), 8, "network")
    assert forward > 1
    assert backward > 1


def test_a_halo_is_worth_no_copy_of_the_own_keys():
    assert choose_overlap_degrees(work(131072, 2, window=(128, 0)), 2, "nvlink") == (1, 1)
    assert mean_remote(zigzag(131072, 2), [(0, 131072)], (128, 0)) == (128, 128)


@given(
    cp_size=st.integers(2, 64),
    tokens=st.integers(64, 4096).map(lambda n: n * 64),
    window=st.sampled_from([CAUSAL, FULL, (100, 0)]),
    link=st.sampled_from(["nvlink", "network"]),
)
def test_buffers_do_not_grow_with_the_ranks(cp_size, tokens, window, link):
    share = work(tokens, cp_size, window)
    for degree in choose_overlap_degrees(share, cp_size, link):
        assert 0 <= degree < cp_size
        assert buffer_tokens(share, degree) <= MAX_SHARDS * share.rows
        if window == (100, 0) and tokens >= 400 * cp_size:
            assert degree <= 1, "a halo needs no second stage"


def test_more_to_move_costs_more():
    few = work(32768, 4)
    more = dataclasses.replace(few, remote_keys=2 * few.remote_keys)
    for degree in range(4):
        for way in ("forward", "backward"):
            assert cost_s(more, 4, degree, "network", way) >= cost_s(few, 4, degree, "network", way)
    assert cost_s(more, 4, 0, "nvlink", "forward") > cost_s(few, 4, 0, "nvlink", "forward")
