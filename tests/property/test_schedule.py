"""Layouts and schedules against a brute-force dense mask.

Every visible pair is computed once, and no key travels in vain.
"""

from __future__ import annotations

import itertools
import re
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_sink_cp import make_cp_blueprint
from magi_sink_cp.dist.planning import mask
from magi_sink_cp.dist.planning.exchange import Schedule
from magi_sink_cp.dist.planning.layout import (
    LAYOUTS,
    num_tokens,
)
from magi_sink_cp.dist.planning.layout import (
    zigzag as zigzag_of_bands,
)
from magi_sink_cp.dist.planning.mask import (
    CAUSAL,
    FULL,
    Bands,
    bands_of_documents,
    bands_of_slices,
    check_slices,
    pairs_of_rows,
    visible_pairs,
)
from magi_sink_cp.dist.planning.packing import NO_GAPS, Gaps, KernelCall
from magi_sink_cp.dist.planning.schedule import Mask
from tests.support.cases import offsets
from tests.support.reference import document_mask
from tests.support.slices import KINDS, dense, slices_of

# Layouts that take documents of any length.
ANY_DOCUMENTS = sorted({*LAYOUTS} - {"zigzag_documents"})


def documents_of(lengths):
    cu = offsets(lengths)
    return [(lo, hi) for lo, hi in itertools.pairwise(cu) if hi > lo]


def causal_bands(documents) -> Bands:
    return bands_of_documents(documents, CAUSAL)


def zigzag(total: int, cp_size: int):
    return zigzag_of_bands(total, cp_size, causal_bands([]))


def build_schedule(
    layout,
    documents,
    window_size,
    rank,
    overlap_degree,
    large_rows=None,
    gaps=NO_GAPS,
    routed=False,
) -> Schedule:
    mask = Mask(layout, bands_of_documents(documents, window_size))
    return mask.schedule(rank, overlap_degree, large_rows, gaps, routed)


def pairs_of(call: KernelCall) -> int:
    """Visible (query, key) pairs: the kernel's work."""
    lengths = (
        (hi - lo for lo, hi in itertools.pairwise(offsets))
        for offsets in (call.cu_seqlens_q, call.cu_seqlens_k)
    )
    return sum(
        visible_pairs(num_q, num_k, *call.window_size)
        for num_q, num_k in zip(*lengths, strict=True)
    )


def local_tokens(layout, rank) -> list[int]:
    return [t for lo, hi in layout[rank] for t in range(lo, hi)]


def simulate(
    total: int, bands: Bands, layout, overlap_degree: int, large_rows: int | None, gaps: Gaps
) -> tuple[torch.Tensor, list[Schedule]]:
    """How often each (query, key) pair of the whole sequence is computed, following every rank's
    schedule with real buffers.
    """
    mask = Mask(layout, bands)
    schedules = [
        mask.schedule(rank, overlap_degree, large_rows, gaps) for rank in range(len(layout))
    ]
    counts = torch.zeros(total, total, dtype=torch.int64)
    for rank, schedule in enumerate(schedules):
        rows = local_tokens(layout, rank)
        written: list[int] = []
        for number, stage in enumerate(schedule.stages):
            keys = received(layout, schedules, rank, number)
            seen_by_stage = set()
            for call in stage.calls:
                call_rows, call_keys = rows[slice(*call.rows)], keys[slice(*call.keys)]
                assert call.cu_seqlens_q[-1] == len(call_rows)
                assert call.cu_seqlens_k[-1] == len(call_keys)
                pairs, seen_by_call = 0, set()
                for b in range(len(call.cu_seqlens_q) - 1):
                    block_rows = call_rows[call.cu_seqlens_q[b] : call.cu_seqlens_q[b + 1]]
                    block_keys = call_keys[call.cu_seqlens_k[b] : call.cu_seqlens_k[b + 1]]
                    if not block_rows or not block_keys:
                        continue
                    mask = document_mask(
                        [0, len(block_rows)], [0, len(block_keys)], False, call.window_size
                    )
                    counts[
                        torch.tensor(block_rows)[:, None], torch.tensor(block_keys)[None, :]
                    ] += mask
                    pairs += int(mask.sum())
                    seen_by_call.update(block_rows)
                    seen_by_stage.update(
                        key
                        for key, seen in zip(block_keys, mask.any(0).tolist(), strict=True)
                        if seen
                    )
                assert pairs_of(call) == pairs
                assert call.seqused_q is None or (gaps.allowed and call.owns_rows)
                if call.owns_rows:
                    owns = [rows[i] for lo, hi in call.written_rows for i in range(lo, hi)]
                    assert not set(owns) & set(written), "a call writes rows that another one wrote"
                    assert seen_by_call <= set(owns), "a call computes rows of its gap"
                    written += owns
            travelled = [
                key for message in stage.cast.receives for key in keys[slice(*message.tokens)]
            ]
            assert seen_by_stage >= set(travelled), "a key travels to a rank where no query sees it"
            assert len(travelled) == len(set(travelled)), "a key travels twice"
            copied = {key for _, place in stage.own for key in keys[slice(*place)]}
            assert seen_by_stage >= copied, "an own key is copied for nothing"
        owned = [rows[i] for lo, hi in schedule.owned for i in range(lo, hi)]
        assert len(written) == len(set(written))
        assert set(written) >= set(owned)
    return counts, schedules


def received(layout, schedules: list[Schedule], rank: int, number: int) -> list[int]:
    """The tokens in a stage's buffer, as the senders fill it.

    Checks that the way home is the way back.
    """
    stage = schedules[rank].stages[number]
    keys = local_tokens(layout, rank)
    assert stage.reduce.sends == stage.cast.receives
    assert [m.peer for m in stage.reduce.receives] == [m.peer for m in stage.cast.sends]
    assert (
        num_tokens([m.tokens for m in stage.reduce.receives])
        == stage.reduce.buffer_tokens
        == stage.cast.sent_tokens
    )
    if stage.local:
        assert not stage.own
        assert not stage.cast.sends
        assert not stage.cast.receives
        return keys
    buffer: list[int | None] = [None] * stage.cast.buffer_tokens
    for (lo, hi), (start, stop) in stage.own:
        buffer[start:stop] = keys[lo:hi]
    for peer in {m.peer for m in stage.cast.receives}:
        sends = [m.tokens for m in schedules[peer].stages[number].cast.sends if m.peer == rank]
        receives = [m.tokens for m in stage.cast.receives if m.peer == peer]
        theirs = local_tokens(layout, peer)
        for (lo, hi), (start, stop) in zip(sends, receives, strict=True):
            assert buffer[start:stop] == [None] * (hi - lo), "two messages fill one place"
            buffer[start:stop] = theirs[lo:hi]
    assert None not in buffer, "a part of the buffer is never filled"
    assert buffer == sorted(buffer)
    return buffer


def check(lengths, cp_size, window_size, layout, overlap_degree, large_rows=None, gaps=NO_GAPS):
    bands = bands_of_documents(documents_of(lengths), window_size)
    counts, schedules = simulate(sum(lengths), bands, layout, overlap_degree, large_rows, gaps)
    for rank, schedule in enumerate(schedules):
        rows = local_tokens(layout, rank)
        owned = [rows[i] for lo, hi in schedule.owned for i in range(lo, hi)]
        assert owned == [row for row in rows if row < sum(lengths)], "a row has no owner"
    cu = offsets(lengths)
    assert torch.equal(counts, document_mask(cu, cu, False, window_size).long())
    return schedules


def degrees(cp_size: int) -> st.SearchStrategy[int]:
    return st.integers(0, max(1, cp_size - 1))


GAPS = st.sampled_from([NO_GAPS, Gaps(True), Gaps(True, 0)])
windows = st.tuples(st.integers(-1, 30), st.integers(-1, 30))


@settings(max_examples=400, deadline=None)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    cp_size=st.integers(1, 5),
    window_size=windows,
    large_rows=st.sampled_from([None, 1, 5]),
    gaps=GAPS,
)
def test_windows_of_any_size_against_any_chunk(
    data, lengths, cp_size, window_size, large_rows, gaps
):
    layout = zigzag(sum(lengths), cp_size)
    check(lengths, cp_size, window_size, layout, data.draw(degrees(cp_size)), large_rows, gaps)


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    cp_size=st.integers(2, 5),
    window_size=windows,
    name=st.sampled_from(ANY_DOCUMENTS),
)
def test_routes_fill_every_place_once(data, lengths, cp_size, window_size, name):
    """Where each rank writes in its peers' buffers, from what it knows itself."""
    documents, overlap_degree = documents_of(lengths), data.draw(degrees(cp_size))
    layout = LAYOUTS[name](sum(lengths), cp_size, causal_bands(documents))
    routed = [
        build_schedule(layout, documents, window_size, rank, overlap_degree, routed=True)
        for rank in range(cp_size)
    ]
    for number, stage in enumerate(routed[0].stages):
        for way in () if stage.local else ("cast", "reduce"):
            exchanges = [getattr(schedule.stages[number], way) for schedule in routed]
            assert (
                len({(exchange.route.parts, exchange.route.part) for exchange in exchanges}) == 1
            ), "ranks use other parts"
            filled = [[0] * exchange.buffer_tokens for exchange in exchanges]
            for rank, exchange in enumerate(exchanges):
                assert exchange.buffer_tokens <= exchange.route.parts[exchange.route.part]
                writes = [
                    (m.peer, at, m.tokens)
                    for m, at in zip(exchange.sends, exchange.route.places, strict=True)
                ]
                if way == "cast":
                    writes += [
                        (rank, at, tokens) for tokens, (at, _) in routed[rank].stages[number].own
                    ]
                for peer, at, (lo, hi) in writes:
                    for place in range(at, at + hi - lo):
                        filled[peer][place] += 1
            assert all(times == [1] * len(times) for times in filled)


@pytest.mark.parametrize("cp_size", [2, 4, 8])
@pytest.mark.parametrize("overlap_degree", [0, 1, 7])
def test_what_a_window_sends_does_not_grow_with_the_sequence(cp_size, overlap_degree):
    """gpt-oss: each of a rank's two chunks needs the 128 tokens before it, whatever the length."""
    sent = {}
    for total in (2**14, 2**17, 2**20):
        layout = zigzag(total, cp_size)
        schedules = [
            build_schedule(layout, [(0, total)], (128, 0), rank, overlap_degree, gaps=Gaps(True))
            for rank in range(cp_size)
        ]
        sent[total] = [schedule.sent_tokens for schedule in schedules]
        for schedule in schedules:
            calls = sum(len(stage.calls) for stage in schedule.stages)
            assert calls <= (2 if overlap_degree == 0 else 3)
            copied = sum(hi - lo for stage in schedule.stages for (lo, hi), _ in stage.own)
            assert copied <= 2 * 128, "own keys that no row sees beside others'"
    assert len(set(map(tuple, sent.values()))) == 1
    assert max(sent[2**20]) <= 2 * 128


def test_large_segments_run_by_themselves():
    def segments(lengths: list[int], large_rows: int | None) -> list[int]:
        (stage,) = build_schedule(
            zigzag(sum(lengths), 1), documents_of(lengths), CAUSAL, 0, 0, large_rows=large_rows
        ).stages
        return [len(call.cu_seqlens_q) - 1 for call in stage.calls]

    assert segments([50, 50], 50) == [1, 1]
    assert segments([50, 50], 51) == [2]
    assert segments([50, 50], None) == [2]
    assert segments([50, 3, 50], 50) == [3], "a small one between them is in nobody's way"


def test_gaps_join_calls():
    """Documents that end in a rank's ranges: one call for those that are all its own, one for the
    others.
    """
    lengths = [5, 6, 7, 4, 5, 3, 6, 4, 8, 2, 9, 5]
    documents, total = documents_of(lengths), sum(lengths)
    layout = tuple(
        tuple((lo, min(lo + 8, total)) for lo in range(8 * rank, total, 16)) for rank in range(2)
    )
    mask = Mask(layout, bands_of_documents(documents, CAUSAL))
    for rank in range(2):
        for gaps, most in ((NO_GAPS, 3), (Gaps(True), 1), (Gaps(True, 1), 3), (Gaps(True, 2), 1)):
            stages = mask.schedule(rank, 0, gaps=gaps).stages
            assert max(len(stage.calls) for stage in stages) == most


def test_no_gap_over_many_keys_where_tiles_would_idle():
    """Every document of a call gets as many tiles as its longest, and so would the keys between."""
    lengths = [1000] * 32 + [1500] * 43 + [31572] + [1000] * 3
    documents, total = documents_of(lengths), sum(lengths)
    mask = Mask(zigzag(total, 2), bands_of_documents(documents, CAUSAL))
    for gaps, calls in ((Gaps(True), 1), (Gaps(True, 104), 2)):
        local, _ = mask.schedule(0, 0, gaps=gaps).stages
        assert len(local.calls) == calls


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(0, 25), min_size=1, max_size=8),
    cp_size=st.integers(1, 5),
    causal=st.booleans(),
    layout=st.sampled_from(ANY_DOCUMENTS),
    gaps=GAPS,
)
def test_every_pair_is_computed_once_and_no_key_sent_too_many(
    data, lengths, cp_size, causal, layout, gaps
):
    degree = data.draw(degrees(cp_size))
    ranges = LAYOUTS[layout](sum(lengths), cp_size, causal_bands(documents_of(lengths)))
    window_size = (-1, 0 if causal else -1)
    for schedule in check(lengths, cp_size, window_size, ranges, degree, gaps=gaps):
        for stage in schedule.stages[1:]:
            if layout == "zigzag" and degree >= cp_size - 1:
                assert len(stage.calls) <= 2, (
                    "a stage of one remote rank takes more kernel calls than it needs"
                )


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    window_size=st.one_of(st.sampled_from([FULL, CAUSAL]), windows),
    gaps=GAPS,
)
def test_any_layout(data, window_size, gaps):
    """Layouts are data: arbitrary disjoint ranges per rank work too, with equal counts or not."""
    lengths = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=5))
    total, cp_size = sum(lengths), data.draw(st.integers(1, 4))
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=8))})
    owners = data.draw(
        st.lists(st.integers(0, cp_size - 1), min_size=len(cuts), max_size=len(cuts))
    )
    pieces = list(itertools.pairwise(cuts))
    layout = tuple(
        tuple(p for p, owner in zip(pieces, owners, strict=False) if owner == rank)
        for rank in range(cp_size)
    )
    check(lengths, cp_size, window_size, layout, data.draw(degrees(cp_size)), gaps=gaps)


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    total=st.integers(1, 40),
    cp_size=st.integers(1, 4),
    name=st.sampled_from(ANY_DOCUMENTS),
    large_rows=st.sampled_from([None, 3]),
    gaps=GAPS,
)
def test_slices_of_any_type(data, total, cp_size, name, large_rows, gaps):
    slices = data.draw(slices_of(total))
    bands = bands_of_slices(check_slices(total, slices))
    layout = LAYOUTS[name](total, cp_size, bands)
    degree = data.draw(degrees(cp_size))
    counts, _ = simulate(total, bands, layout, degree, large_rows, gaps)
    assert torch.equal(counts, dense(slices, total))


@settings(max_examples=300, deadline=None)
@given(data=st.data(), total=st.integers(1, 12), swept=st.booleans())
def test_slices_that_share_a_pair_are_refused(data, total, swept):
    edge = st.integers(0, total - 1).flatmap(
        lambda lo: st.tuples(st.just(lo), st.integers(lo + 1, total))
    )
    slices = data.draw(st.lists(st.tuples(edge, edge, KINDS), max_size=6))
    shared = dense(slices, total) > 1
    with mock.patch.object(mask, "_MANY_PAIRS", -1 if swept else 1 << 30):
        if not shared.any():
            assert check_slices(total, slices) == tuple(slices)
            return
        with pytest.raises(ValueError, match=r"must not share a \(query, key\) pair") as caught:
            check_slices(total, slices)
    text = str(caught.value)
    first, second = (slices[int(i)] for i in re.findall(r"mask_slices\[(\d+)\]", text))
    query, key = map(int, re.search(r"both hold \((\d+), (\d+)\)", text).groups())
    assert dense([first], total)[query, key] == dense([second], total)[query, key] == 1


def test_zigzag_by_hand():
    assert zigzag(8, 2) == (((0, 2), (6, 8)), ((2, 6),))
    assert zigzag(7, 2) == zigzag(8, 2)
    assert zigzag(0, 2) == ((), ())
    assert zigzag(5, 1) == (((0, 5),),), "nothing is padded for one rank"
    local, remote = build_schedule(zigzag(8, 2), [(0, 8)], CAUSAL, rank=0, overlap_degree=1).stages
    assert [(call.rows, call.keys, call.window_size) for call in local.calls] == [
        ((0, 4), (0, 4), CAUSAL)
    ]
    assert [m.tokens for m in remote.cast.sends] == [(0, 2)], (
        "rank 1 sees chunk 0, and never chunk 3"
    )
    (call,) = remote.calls
    assert (call.rows, call.keys, call.window_size) == ((2, 4), (0, 4), FULL), (
        "row chunk 3 sees chunks 1 and 2"
    )


def test_one_stage_by_hand():
    """Degree 0: no partial results, so no row is in two calls.

    What reads own keys alone does not wait.
    """
    local, together = build_schedule(
        zigzag(8, 2), [(0, 8)], CAUSAL, rank=0, overlap_degree=0
    ).stages
    assert [(call.rows, call.keys, call.window_size) for call in local.calls] == [
        ((0, 2), (0, 2), CAUSAL)
    ]
    assert [(call.rows, call.keys, call.window_size) for call in together.calls] == [
        ((2, 4), (0, 8), CAUSAL)
    ]
    assert together.own == (((0, 2), (0, 2)), ((2, 4), (6, 8)))
    local, together = build_schedule(
        zigzag(8, 2), [(0, 8)], CAUSAL, rank=1, overlap_degree=0
    ).stages
    assert not local.calls
    assert [(call.rows, call.keys, call.window_size) for call in together.calls] == [
        ((0, 4), (0, 6), CAUSAL)
    ]
    assert together.cast.buffer_tokens == 6


@pytest.mark.parametrize("cp_size", [2, 5, 8])
@pytest.mark.parametrize("overlap_degree", [0, 1, 2, 3, 4, 7, 100])
def test_overlap_degree_is_the_number_of_travelling_stages(cp_size, overlap_degree):
    layout = zigzag(cp_size * 32, cp_size)
    expected = 1 + max(1, min(overlap_degree, cp_size - 1))
    for rank in range(cp_size):
        schedule = build_schedule(layout, [(0, cp_size * 32)], FULL, rank, overlap_degree)
        assert len(schedule.stages) == expected
        assert schedule.received_tokens == (cp_size - 1) * 32
        bound = 32 * (
            cp_size
            if overlap_degree == 0
            else -(-(cp_size - 1) // min(overlap_degree, cp_size - 1))
        )
        assert max(stage.cast.buffer_tokens for stage in schedule.stages) <= bound


@pytest.mark.parametrize("layout", ANY_DOCUMENTS)
@settings(max_examples=100, deadline=None)
@given(data=st.data(), total=st.integers(0, 200), cp_size=st.integers(1, 9))
def test_a_layout_holds_every_token_once(layout, data, total, cp_size):
    """As many tokens on every rank, whatever the documents: steps and plans have one shape."""
    cuts = data.draw(st.lists(st.integers(0, total), max_size=6))
    documents = list(itertools.pairwise(sorted({0, total, *cuts})))
    ranks = LAYOUTS[layout](total, cp_size, causal_bands(documents))
    tokens = sorted(t for rank in range(cp_size) for t in local_tokens(ranks, rank))
    assert tokens == list(range(len(tokens)))
    assert len(tokens) >= total
    assert len({num_tokens(r) for r in ranks}) == 1
    assert len(tokens) - total < 2 * cp_size
    assert all(r == tuple(sorted(r)) for r in ranks)


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    cp_size=st.integers(2, 4),
    chunks=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    window_size=st.one_of(st.sampled_from([FULL, CAUSAL]), windows),
)
def test_zigzag_in_each_document(data, cp_size, chunks, window_size):
    """In the order of thd_get_partitioned_indices of Transformer Engine."""
    lengths = [2 * cp_size * tokens for tokens in chunks]
    documents = documents_of(lengths)
    layout = LAYOUTS["zigzag_documents"](sum(lengths), cp_size, causal_bands(documents))
    for rank in range(cp_size) if sum(lengths) else ():
        expected = []
        for lo, hi in documents:
            chunk = (hi - lo) // (2 * cp_size)
            for number in (rank, 2 * cp_size - 1 - rank):
                expected += range(lo + number * chunk, lo + (number + 1) * chunk)
        assert local_tokens(layout, rank) == expected
    check(lengths, cp_size, window_size, layout, data.draw(degrees(cp_size)))


def test_documents_that_are_no_multiple_are_named():
    with pytest.raises(ValueError, match=r"multiple of 2·cp_size tokens, 4, got one from 8 to 14"):
        make_cp_blueprint(
            20, cp_size=2, rank=0, cu_seqlens=[0, 8, 14, 20], layout="zigzag_documents"
        )


@pytest.mark.parametrize("cp_size", [2, 3, 4, 8])
def test_zigzag_balances_a_causal_document(cp_size):
    layout = zigzag(cp_size * 64, cp_size)
    work = [
        [
            sum(pairs_of(call) for call in stage.calls)
            for stage in build_schedule(
                layout, [(0, cp_size * 64)], CAUSAL, rank, cp_size - 1
            ).stages
        ]
        for rank in range(cp_size)
    ]
    assert all(w == work[0] for w in work), "ranks would wait for each other"


def worst_lead(layout, documents) -> float:
    """How much more pairs than the mean the busiest rank has."""
    work = [Mask(layout, causal_bands(documents)).pairs(rank) for rank in range(len(layout))]
    return max(work) * len(work) / sum(work) - 1


@pytest.mark.parametrize("cp_size", [4, 16])
def test_the_balanced_layout_balances_short_documents(cp_size):
    generator = torch.Generator().manual_seed(0)
    leads = []
    for _ in range(10):
        # log-normal
        lengths = (
            torch.randn(400, generator=generator)
            .mul(1.2)
            .add(7)
            .exp()
            .long()
            .clamp(1, 16_000)
            .tolist()
        )
        documents = documents_of(lengths)
        leads.append(
            [
                worst_lead(LAYOUTS[name](sum(lengths), cp_size, causal_bands(documents)), documents)
                for name in ("zigzag", "balanced")
            ]
        )
    zigzag_lead, balanced_lead = torch.tensor(leads).mean(0).tolist()
    assert balanced_lead < min(0.05, 0.3 * zigzag_lead)
    assert pairs_of_rows(causal_bands([(0, 3), (4, 9)]), np.array([2, 7])).tolist() == [
        3 + (1 + 2 + 3)
    ]


@pytest.mark.parametrize("layout", ANY_DOCUMENTS)
@pytest.mark.parametrize("mask", [CAUSAL, (128, 0)])
def test_plans_for_1024_ranks_on_one_core(layout, mask):
    """16M tokens in 10,000 documents, one rank of 1,024: pure functions over ints."""
    lengths = [1 + (i * 7919) % 3200 for i in range(9_999)]
    lengths.append(2**24 - sum(lengths))
    documents = documents_of(lengths)
    ranges = LAYOUTS[layout](2**24, 1024, causal_bands(documents))
    schedule = build_schedule(
        ranges, documents, mask, rank=511, overlap_degree=1023 if mask == CAUSAL else 1
    )
    assert len(schedule.stages) == (1024 if mask == CAUSAL else 2)
    assert sum(stage.cast.received_tokens > 0 for stage in schedule.stages) >= 1
