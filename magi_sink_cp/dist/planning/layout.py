"""Token layouts: which global token ranges each rank holds, as data.

A layout is, for each rank, a sorted tuple of disjoint global ranges. Local order is global order:
the tokens of a packed document stay contiguous on every rank, and a causal mask over local tokens
is a plain causal mask. All ranks hold equally many tokens. Tokens behind the end of the sequence
are padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heapreplace
from typing import NamedTuple

import numpy as np

from magi_sink_cp.dist.planning.mask import Bands, Ints, Range, pairs_of_rows, runs, take

RankRanges = tuple[Range, ...]

# Chunks per rank that the balanced layout tries, and how much more work than the mean the busiest
# rank may have.
BALANCED_CHUNKS = (2, 3, 4, 6, 8, 12, 16)
BALANCED_LEAD = 0.02


def zigzag(total_tokens: int, cp_size: int, bands: Bands) -> tuple[RankRanges, ...]:
    """Head-tail layout: 2·cp equal chunks, of which rank r holds chunks r and 2·cp - 1 - r.

    Under a causal mask over one document every rank then does the same work; ``bands`` do not
    matter. The sequence is padded at its end to a multiple of 2·cp; for one rank it is not padded.
    cp_size = 2, 8 tokens:

        chunk    0    1    2    3
        tokens  0 1  2 3  4 5  6 7
        rank     0    1    1    0         → rank 0: (0, 2), (6, 8); rank 1: (2, 6)
    """
    if cp_size == 1 or total_tokens == 0:
        return _undivided(total_tokens, cp_size)
    ranks = np.arange(cp_size)
    held = np.stack([ranks, 2 * cp_size - 1 - ranks], axis=1)
    return _ranges(held, _edges(total_tokens, cp_size, 2))


def balanced(total_tokens: int, cp_size: int, bands: Bands) -> tuple[RankRanges, ...]:
    """Chunks, equally many per rank, dealt so that the ranks' work is nearly equal.

    A chunk's work is the (query, key) pairs of its rows. The heaviest chunk goes first, to the rank
    with the least work that has room. Fewer chunks mean fewer kernel calls: the smallest number of
    chunks whose busiest rank exceeds the mean by BALANCED_LEAD at most is taken, else the best one.

    Ranks hold as many tokens as in zigzag, whatever the mask. If these do not divide into the
    chunks, the last chunks of the sequence, one for each rank, are shorter than the others.
    """
    if cp_size == 1 or total_tokens == 0:
        return _undivided(total_tokens, cp_size)
    return _best_deal(total_tokens, cp_size, bands)[1]


def auto(total_tokens: int, cp_size: int, bands: Bands) -> tuple[RankRanges, ...]:
    """Zigzag where its busiest rank has at most BALANCED_LEAD more pairs than the mean.

    Else the better of zigzag and balanced. So one document is zigzag, and documents or slices of a
    mask that would let ranks wait are balanced.
    """
    if cp_size == 1 or total_tokens == 0:
        return _undivided(total_tokens, cp_size)
    work = pairs_of_rows(bands, _edges(total_tokens, cp_size, 2))
    lead = _lead(work[:cp_size] + work[cp_size:][::-1])
    if lead > BALANCED_LEAD:
        balanced_lead, layout = _best_deal(total_tokens, cp_size, bands)
        if balanced_lead < lead:
            return layout
    return zigzag(total_tokens, cp_size, bands)


def contiguous(total_tokens: int, cp_size: int, bands: Bands) -> tuple[RankRanges, ...]:
    """Rank r holds chunk r of cp_size equal ones, as loaders for Ulysses cut a sequence.

    Under a causal mask later ranks have more to do. The sequence is padded at its end.
    """
    if cp_size == 1 or total_tokens == 0:
        return _undivided(total_tokens, cp_size)
    size = -(-total_tokens // cp_size)
    return tuple(((rank * size, (rank + 1) * size),) for rank in range(cp_size))


def zigzag_documents(total_tokens: int, cp_size: int, bands: Bands) -> tuple[RankRanges, ...]:
    """Zigzag in each document: the order of Transformer Engine's packed sequences (THD).

    Of each document's 2·cp equal chunks rank r holds r and 2·cp - 1 - r.

    Args:
        bands: of the documents.

    Raises:
        ValueError: a document's tokens are no multiple of 2·cp_size.
    """
    if cp_size == 1 or total_tokens == 0:
        return _undivided(total_tokens, cp_size)
    chunks = 2 * cp_size
    start, tokens = bands.q_lo, bands.q_hi - bands.q_lo
    if len(uneven := np.flatnonzero(tokens % chunks)):
        lo, hi = int(start[uneven[0]]), int(bands.q_hi[uneven[0]])
        raise ValueError(
            "layout='zigzag_documents' must be given documents of a multiple of 2·cp_size tokens, "
            f"{chunks}, got one from {lo} to {hi}; pad them, as cu_seqlens_q_padded of "
            "Transformer Engine does"
        )
    size = tokens // chunks

    def held_by(rank: int) -> RankRanges:
        lo = np.stack([start + rank * size, start + (chunks - 1 - rank) * size], axis=1)
        hi = (lo + size[:, None]).ravel()
        first, last = runs(lo.ravel()[1:] == hi[:-1])
        return tuple(zip(lo.ravel()[first].tolist(), hi[last].tolist(), strict=True))

    return tuple(map(held_by, range(cp_size)))


Layout = Callable[[int, int, Bands], tuple[RankRanges, ...]]
LAYOUTS: dict[str, Layout] = {
    "auto": auto,
    "zigzag": zigzag,
    "balanced": balanced,
    "contiguous": contiguous,
    "zigzag_documents": zigzag_documents,
}
# Those that follow the documents, whatever the mask.
OF_DOCUMENTS = ("zigzag_documents",)


def _edges(total_tokens: int, cp_size: int, chunks: int) -> Ints:
    """(chunks · cp_size + 1,): where the chunks begin and end.

    Empty if the last ones would have no token, which two chunks never do.
    """
    local = 2 * -(-total_tokens // (2 * cp_size))
    size = -(-local // chunks)
    last = local - (chunks - 1) * size
    if last <= 0:
        return np.zeros(0, dtype=np.int64)
    sizes = np.full(chunks * cp_size, size, dtype=np.int64)
    sizes[-cp_size:] = last
    return np.concatenate([[0], np.cumsum(sizes)])


def _best_deal(
    total_tokens: int, cp_size: int, bands: Bands
) -> tuple[float, tuple[RankRanges, ...]]:
    """(the busiest rank's lead, layout) of :func:`balanced`."""
    cuts = [_edges(total_tokens, cp_size, chunks) for chunks in BALANCED_CHUNKS]
    cuts = [edges for edges in cuts if len(edges)]
    best: tuple[float, tuple[RankRanges, ...]] | None = None
    for number, edges in enumerate(cuts):
        work = pairs_of_rows(bands, edges)
        at_least = float(work.max(initial=0)) * cp_size / max(1.0, float(work.sum())) - 1
        if at_least > BALANCED_LEAD and number < len(cuts) - 1:
            continue  # one chunk alone is too much for a rank
        held = _dealt(work, cp_size, edges[1] == edges[-1] - edges[-2])
        lead = _lead(work[held].sum(axis=1))
        if best is None or lead < best[0]:
            best = lead, _ranges(held, edges)
        if lead <= BALANCED_LEAD:
            break
    assert best is not None, "two chunks always fit"
    return best


def _dealt(work: Ints, cp_size: int, equal: bool) -> Ints:
    """(ranks, chunks per rank): which chunks each rank holds.

    Unless all chunks are ``equal`` in size, every rank gets one of the last cp_size chunks.
    """
    held: list[list[int]] = [[] for _ in range(cp_size)]
    room = len(work) // cp_size
    # load · cp_size + rank, of each rank that has room.
    least = list(range(cp_size))
    dealt = len(work)
    if not equal:
        dealt -= cp_size
        for rank, chunk in enumerate(range(dealt, len(work))):
            held[rank].append(chunk)
            least[rank] += int(work[chunk]) * cp_size
        heapify(least)
    order = np.argsort(-work[:dealt], kind="stable")
    for chunk, more in zip(order.tolist(), (work[order] * cp_size).tolist(), strict=True):
        mine = held[least[0] % cp_size]
        mine.append(chunk)
        if len(mine) < room:
            heapreplace(least, least[0] + more)
        else:
            heappop(least)
    return np.array(held, dtype=np.int64)


def _lead(load: Ints) -> float:
    """How much more work than the mean the busiest rank has, as a part of the mean."""
    return float(load.max(initial=0)) * len(load) / max(1.0, float(load.sum())) - 1


def _undivided(total_tokens: int, cp_size: int) -> tuple[RankRanges, ...]:
    """One rank holds everything, or all hold nothing."""
    return (((0, total_tokens),) if total_tokens else (),) * cp_size


def _ranges(held: Ints, edges: Ints) -> tuple[RankRanges, ...]:
    """Each rank's chunks (rank, chunks) as ranges; neighbours are joined."""
    chunks = np.sort(held, axis=1)
    begins = np.diff(chunks, axis=1, prepend=-2) != 1
    ends = np.diff(chunks, axis=1, append=held.size + 1) != 1
    starts, stops = edges[chunks[begins]], edges[chunks[ends] + 1]
    ranges = list(zip(starts.tolist(), stops.tolist(), strict=True))
    counts = [0, *np.cumsum(begins.sum(axis=1)).tolist()]
    return tuple(tuple(ranges[lo:hi]) for lo, hi in itertools.pairwise(counts))


class Places(NamedTuple):
    """The ranges of all ranks, in the order of the sequence, as arrays.

    Attributes:
        lo, hi: of each range.
        rank: who holds it.
        start: local index of its first token there.
    """

    lo: Ints
    hi: Ints
    rank: Ints
    start: Ints

    def of(self, rank: int) -> Places:
        """Those of one rank."""
        return take(self, self.rank == rank)


def places(layout: Sequence[RankRanges]) -> Places:
    """The layout as arrays."""
    edges = np.array([edge for ranges in layout for edge in ranges], dtype=np.int64).reshape(-1, 2)
    counts = np.array([len(ranges) for ranges in layout], dtype=np.int64)
    rank = np.repeat(np.arange(len(layout)), counts)
    stops = np.cumsum(edges[:, 1] - edges[:, 0])
    starts = stops - (edges[:, 1] - edges[:, 0])
    before = np.concatenate([[0], stops])[np.cumsum(counts) - counts]  # tokens of earlier ranks
    order = np.argsort(edges[:, 0], kind="stable")
    return Places(edges[order, 0], edges[order, 1], rank[order], (starts - before[rank])[order])


def num_tokens(ranges: Sequence[Range]) -> int:
    """How many tokens the ranges hold together."""
    return sum(hi - lo for lo, hi in ranges)


def union(ranges: Sequence[Range]) -> RankRanges:
    """Sorted disjoint non-empty ranges that cover the same tokens; neighbours are joined."""
    joined: list[Range] = []
    for lo, hi in sorted(ranges):
        if joined and lo <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], hi))
        elif hi > lo:
            joined.append((lo, hi))
    return tuple(joined)
