"""Token layouts: which global token ranges each rank holds, as data.

A layout is, for each rank, a sorted tuple of disjoint global ranges. Local order is global order:
the tokens of a packed document stay contiguous on every rank, and a causal mask over local tokens
is a plain causal mask. All ranks hold equally many tokens. Tokens behind the end of the sequence
are padding.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

Range = tuple[int, int]
RankRanges = tuple[Range, ...]

# Chunks per rank that the balanced layout tries, and how much more work than the mean the busiest
# rank may have.
BALANCED_CHUNKS = (2, 3, 4, 6, 8, 12, 16)
BALANCED_LEAD = 0.02


def zigzag(
    total_tokens: int, cp_size: int, documents: Sequence[Range] = ()
) -> tuple[RankRanges, ...]:
    """Head-tail layout: 2·cp equal chunks, of which rank r holds chunks r and 2·cp - 1 - r.

    Under a causal mask over one document every rank then does the same work; ``documents`` do not
    matter. The sequence is padded at its end to a multiple of 2·cp; for one rank it is not padded.
    cp_size = 2, 8 tokens:

        chunk    0    1    2    3
        tokens  0 1  2 3  4 5  6 7
        rank     0    1    1    0         → rank 0: (0, 2), (6, 8); rank 1: (2, 6)

    >>> zigzag(7, 2)
    (((0, 2), (6, 8)), ((2, 6),))
    """
    if cp_size == 1:
        return (union([(0, total_tokens)]),)
    size = -(-total_tokens // (2 * cp_size))
    pairs = ((rank, 2 * cp_size - 1 - rank) for rank in range(cp_size))
    return tuple(union([_chunk(first, size), _chunk(last, size)]) for first, last in pairs)


def balanced(
    total_tokens: int, cp_size: int, documents: Sequence[Range] = ()
) -> tuple[RankRanges, ...]:
    """Equal chunks, equally many per rank, dealt so that the ranks' work is nearly equal.

    A chunk's work is its (query, key) pairs under a causal mask. The heaviest chunk goes first, to
    the rank with the least work that has room. Where documents are short, a chunk's work depends on
    where they are cut, which zigzag ignores. Fewer chunks mean fewer kernel calls: the smallest
    number of chunks whose busiest rank exceeds the mean by BALANCED_LEAD at most is taken, else the
    best one.

    >>> balanced(16, 1)
    (((0, 16),),)
    """
    if cp_size == 1:
        return zigzag(total_tokens, 1)
    best: tuple[float, tuple[RankRanges, ...]] | None = None
    for chunks in BALANCED_CHUNKS:
        lead, layout = _dealt(total_tokens, cp_size, documents, chunks)
        if best is None or lead < best[0]:
            best = lead, layout
        if lead <= BALANCED_LEAD:
            break
    assert best is not None, "there are numbers of chunks to try"
    return best[1]


def _dealt(
    total_tokens: int, cp_size: int, documents: Sequence[Range], chunks: int
) -> tuple[float, tuple[RankRanges, ...]]:
    """(the busiest rank's work over the mean - 1, layout) with ``chunks`` chunks per rank."""
    size = -(-total_tokens // (chunks * cp_size))
    work = [causal_pairs(_chunk(index, size), documents) for index in range(chunks * cp_size)]
    free = [(0, rank) for rank in range(cp_size)]
    held: list[list[Range]] = [[] for _ in range(cp_size)]
    busiest = 0
    for index in sorted(range(len(work)), key=lambda index: -work[index]):
        load, rank = heappop(free)
        held[rank].append(_chunk(index, size))
        busiest = max(busiest, load + work[index])
        if len(held[rank]) < chunks:
            heappush(free, (load + work[index], rank))
    lead = busiest * cp_size / max(1, sum(work)) - 1
    return lead, tuple(union(ranges) for ranges in held)


Layout = Callable[[int, int, Sequence[Range]], tuple[RankRanges, ...]]
LAYOUTS: dict[str, Layout] = {"zigzag": zigzag, "balanced": balanced}


def causal_pairs(rows: Range, documents: Sequence[Range]) -> int:
    """(query, key) pairs of these rows under a causal mask: row i of a document sees i + 1 keys."""
    pairs = 0
    first_document = max(0, bisect_right(documents, (rows[0], rows[0])) - 1)
    for index in range(first_document, len(documents)):
        lo, hi = documents[index]
        if lo >= rows[1]:
            break
        first, last = max(lo, rows[0]) - lo, min(hi, rows[1]) - lo
        if first < last:
            pairs += (last * (last + 1) - first * (first + 1)) // 2
    return pairs


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


def intersection(ranges: Sequence[Range], others: Sequence[Range]) -> list[Range]:
    """The tokens of both: one range for each pair that overlaps. Both are sorted and disjoint."""
    found = []
    for lo, hi in others:
        for index in range(max(0, bisect_right(ranges, (lo, lo)) - 1), len(ranges)):
            start, stop = ranges[index]
            if start >= hi:
                break
            if max(start, lo) < min(stop, hi):
                found.append((max(start, lo), min(stop, hi)))
    return found


def _chunk(index: int, size: int) -> Range:
    return index * size, (index + 1) * size
