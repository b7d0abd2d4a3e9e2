"""Token layouts: which global token ranges each rank holds, as data.

A layout is, per rank, a sorted tuple of disjoint global ranges. Local order is global order, so the tokens of a packed
document stay contiguous on every rank, and causal masking of local tokens against each other is plain causal masking. Every rank
holds equally many tokens; those from the length of the sequence on are padding.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

Range = tuple[int, int]
RankRanges = tuple[Range, ...]

# Chunks a rank that the balanced layout tries, and the lead of the busiest rank over the mean that is good enough.
BALANCED_CHUNKS = (2, 3, 4, 6, 8, 12, 16)
BALANCED_LEAD = 0.02


def zigzag(total_tokens: int, cp_size: int, documents: Sequence[Range] = ()) -> tuple[RankRanges, ...]:
    """Head-tail layout: 2·cp equal chunks, of which rank r holds chunks r and 2·cp - 1 - r, padded at the very end.

    Under a causal mask over one document every rank then does the same work; ``documents`` do not matter. cp_size = 2, 8 tokens:

        chunk    0    1    2    3
        tokens  0 1  2 3  4 5  6 7
        rank     0    1    1    0         → rank 0: (0, 2), (6, 8); rank 1: (2, 6)

    >>> zigzag(7, 2)
    (((0, 2), (6, 8)), ((2, 6),))
    """
    chunk = -(-total_tokens // (2 * cp_size))
    return tuple(union([_chunk(rank, chunk), _chunk(2 * cp_size - 1 - rank, chunk)]) for rank in range(cp_size))


def balanced(total_tokens: int, cp_size: int, documents: Sequence[Range] = ()) -> tuple[RankRanges, ...]:
    """Equal chunks, as many on each rank, dealt out so that the ranks' (query, key) pairs under a causal mask are nearly equal.

    Heaviest chunk first, each goes to the rank that has least and room left. Where documents are short, a chunk's work depends on
    how they are cut, which zigzag ignores. Fewer chunks mean fewer kernel calls: the fewest whose busiest rank leads the mean by
    BALANCED_LEAD at most are taken, else those whose busiest rank leads least.

    >>> balanced(16, 1)
    (((0, 16),),)
    """
    best: tuple[float, tuple[RankRanges, ...]] | None = None
    for chunks in BALANCED_CHUNKS:
        lead, layout = _dealt(total_tokens, cp_size, documents, chunks)
        if best is None or lead < best[0]:
            best = lead, layout
        if lead <= BALANCED_LEAD:
            break
    assert best is not None, "there are numbers of chunks to try"
    return best[1]


def _dealt(total_tokens: int, cp_size: int, documents: Sequence[Range], chunks: int) -> tuple[float, tuple[RankRanges, ...]]:
    """(how much more work than the mean the busiest rank has, layout) with ``chunks`` chunks a rank."""
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
    return busiest * cp_size / max(1, sum(work)) - 1, tuple(union(ranges) for ranges in held)


LAYOUTS: dict[str, Callable[[int, int, Sequence[Range]], tuple[RankRanges, ...]]] = {"zigzag": zigzag, "balanced": balanced}


def causal_pairs(rows: Range, documents: Sequence[Range]) -> int:
    """(query, key) pairs of the rows under a causal mask within sorted documents: row i of a document sees i + 1 keys."""
    pairs = 0
    for which in range(max(0, bisect_right(documents, (rows[0], rows[0])) - 1), len(documents)):
        lo, hi = documents[which]
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
    """The tokens of both, which are sorted and disjoint, as one range for each two that overlap."""
    found = []
    for lo, hi in others:
        for which in range(max(0, bisect_right(ranges, (lo, lo)) - 1), len(ranges)):
            start, stop = ranges[which]
            if start >= hi:
                break
            if max(start, lo) < min(stop, hi):
                found.append((max(start, lo), min(stop, hi)))
    return found


def _chunk(index: int, size: int) -> Range:
    return index * size, (index + 1) * size
