"""Layouts and schedules against a brute-force dense mask: every visible pair is computed once, and no key travels in vain."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_sink_cp.dist.layout import LAYOUTS, num_tokens, pack, zigzag
from magi_sink_cp.dist.schedule import CAUSAL, FULL, Schedule, build_schedule
from magi_sink_cp.kernels.reference import document_mask
from tests.helpers import offsets


def documents_of(lengths):
    cu = offsets(lengths)
    return [(lo, hi) for lo, hi in itertools.pairwise(cu) if hi > lo]


def local_tokens(layout, rank) -> list[int]:
    return [t for lo, hi in layout[rank] for t in range(lo, hi)]


def simulate(lengths: list[int], cp_size: int, window_size: tuple[int, int], layout) -> tuple[torch.Tensor, list[Schedule]]:
    """How often each (query, key) pair of the whole sequence is computed, following every rank's schedule with real buffers."""
    total = sum(lengths)
    schedules = [build_schedule(layout, documents_of(lengths), window_size, rank) for rank in range(cp_size)]
    counts = torch.zeros(total, total, dtype=torch.int64)
    for rank, schedule in enumerate(schedules):
        rows = local_tokens(layout, rank)
        for step, stage in enumerate(schedule.stages):
            if step == 0:
                keys = rows
                assert not stage.send
                assert not stage.receive
            else:
                sender = schedules[stage.receive_from].stages[step]
                assert sender.send_to == rank
                theirs = local_tokens(layout, stage.receive_from)
                keys = [theirs[i] for lo, hi in sender.send for i in range(lo, hi)]
                assert stage.receive == pack(sender.send), "the receiver's buffer is not what the sender fills"
            seen_by_stage = set()
            for call in stage.calls:
                call_rows, call_keys = rows[slice(*call.rows)], keys[slice(*call.keys)]
                assert call.cu_seqlens_q[-1] == len(call_rows)
                assert call.cu_seqlens_k[-1] == len(call_keys)
                pairs = 0
                for b in range(len(call.cu_seqlens_q) - 1):
                    block_rows = call_rows[call.cu_seqlens_q[b] : call.cu_seqlens_q[b + 1]]
                    block_keys = call_keys[call.cu_seqlens_k[b] : call.cu_seqlens_k[b + 1]]
                    if not block_rows or not block_keys:
                        continue
                    mask = document_mask([0, len(block_rows)], [0, len(block_keys)], False, call.window_size)
                    counts[torch.tensor(block_rows)[:, None], torch.tensor(block_keys)[None, :]] += mask
                    pairs += int(mask.sum())
                    seen_by_stage.update(key for key, seen in zip(block_keys, mask.any(0).tolist(), strict=True) if seen)
                assert call.pairs == pairs
            if step > 0:
                assert seen_by_stage == set(keys), "a key travels to a rank where no query sees it"
                assert len(keys) == len(set(keys)), "a key travels twice"
    return counts, schedules


def check(lengths, cp_size, window_size, layout):
    counts, schedules = simulate(lengths, cp_size, window_size, layout)
    cu = offsets(lengths)
    assert torch.equal(counts, document_mask(cu, cu, False, window_size).long())
    for schedule, ranges in zip(schedules, layout, strict=True):
        real = num_tokens([(lo, min(hi, sum(lengths))) for lo, hi in ranges if lo < sum(lengths)])
        assert not real or schedule.local.calls[0].rows == (0, real), "dsink takes delta from the first local call"
    return schedules


windows = st.tuples(st.integers(-1, 30), st.integers(-1, 30))


@settings(max_examples=400, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6), cp_size=st.integers(1, 5), window_size=windows)
def test_windows_of_any_size_against_any_chunk(lengths, cp_size, window_size):
    check(lengths, cp_size, window_size, zigzag(sum(lengths), cp_size))


@pytest.mark.parametrize("cp_size", [2, 4, 8])
def test_what_a_window_sends_does_not_grow_with_the_sequence(cp_size):
    """gpt-oss: each of a rank's two chunks needs the 128 tokens before it, whatever the length."""
    sent = {}
    for total in (2**14, 2**17, 2**20):
        layout = zigzag(total, cp_size)
        schedules = [build_schedule(layout, [(0, total)], (128, 0), rank) for rank in range(cp_size)]
        sent[total] = [sum(stage.sent_tokens for stage in schedule.remote) for schedule in schedules]
        for schedule in schedules:
            assert sum(len(stage.calls) for stage in schedule.stages) <= 3
    assert len(set(map(tuple, sent.values()))) == 1
    assert max(sent[2**20]) <= 2 * 128


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(0, 25), min_size=1, max_size=8), cp_size=st.integers(1, 5), causal=st.booleans())
def test_zigzag_computes_every_pair_once_and_sends_no_key_too_many(lengths, cp_size, causal):
    schedules = check(lengths, cp_size, (-1, 0 if causal else -1), zigzag(sum(lengths), cp_size))
    for schedule in schedules:
        for stage in schedule.remote:
            assert len(stage.calls) <= (1 if causal else 2), "a remote stage takes more kernel calls than it needs"


@settings(max_examples=200, deadline=None)
@given(data=st.data(), window_size=st.one_of(st.sampled_from([FULL, CAUSAL]), windows))
def test_any_layout(data, window_size):
    """Layouts are data: arbitrary disjoint ranges per rank work too, with equal counts or not."""
    lengths = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=5))
    total, cp_size = sum(lengths), data.draw(st.integers(1, 4))
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=8))})
    owners = data.draw(st.lists(st.integers(0, cp_size - 1), min_size=len(cuts), max_size=len(cuts)))
    pieces = list(itertools.pairwise(cuts))
    layout = tuple(tuple(p for p, owner in zip(pieces, owners, strict=False) if owner == rank) for rank in range(cp_size))
    check(lengths, cp_size, window_size, layout)


def test_zigzag_by_hand():
    assert zigzag(8, 2) == (((0, 2), (6, 8)), ((2, 6),))
    assert zigzag(7, 2) == zigzag(8, 2)
    assert zigzag(0, 2) == ((), ())
    assert zigzag(5, 1) == (((0, 6),),)
    schedule = build_schedule(zigzag(8, 2), [(0, 8)], CAUSAL, rank=0)
    (remote,) = schedule.remote
    assert remote.send == ((0, 2),), "rank 1 sees chunk 0, and never chunk 3"
    (call,) = remote.calls
    assert (call.rows, call.keys, call.window_size) == ((2, 4), (0, 4), FULL), "row chunk 3 sees chunks 1 and 2"


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=50, deadline=None)
@given(total=st.integers(0, 200), cp_size=st.integers(1, 9))
def test_a_layout_holds_every_token_once(layout, total, cp_size):
    ranks = LAYOUTS[layout](total, cp_size)
    tokens = sorted(t for rank in range(cp_size) for t in local_tokens(ranks, rank))
    assert tokens == list(range(len(tokens)))
    assert len(tokens) >= total
    assert len({num_tokens(r) for r in ranks}) == 1
    assert len(tokens) - total < 2 * cp_size
    assert all(r == tuple(sorted(r)) for r in ranks)


@pytest.mark.parametrize("cp_size", [2, 3, 4, 8])
def test_zigzag_balances_a_causal_document(cp_size):
    layout = zigzag(cp_size * 64, cp_size)
    work = [
        [sum(call.pairs for call in stage.calls) for stage in build_schedule(layout, [(0, cp_size * 64)], CAUSAL, rank).stages]
        for rank in range(cp_size)
    ]
    assert all(w == work[0] for w in work), "ranks would wait for each other"


def test_plans_for_1024_ranks_on_one_core():
    """16M tokens in 10,000 documents, one rank of 1,024: pure functions over ints, in about a second."""
    lengths = [1 + (i * 7919) % 3200 for i in range(10_000)]
    lengths.append(2**24 - sum(lengths))
    started = time.perf_counter()
    schedule = build_schedule(zigzag(2**24, 1024), documents_of(lengths), CAUSAL, rank=511)
    assert time.perf_counter() - started < 10
    assert len(schedule.stages) == 1024
    assert sum(stage.received_tokens > 0 for stage in schedule.remote) >= 1
