"""Token layouts: which global token ranges each rank holds, as data.

A layout is, per rank, a sorted tuple of disjoint global ranges. Local order is global order, so the tokens of a packed
document stay contiguous on every rank, and causal masking of local tokens against each other is plain causal masking.
"""

from __future__ import annotations

from collections.abc import Callable

Range = tuple[int, int]
RankRanges = tuple[Range, ...]


def zigzag(total_tokens: int, cp_size: int) -> tuple[RankRanges, ...]:
    """Head-tail layout: 2·cp equal chunks, of which rank r holds chunks r and 2·cp - 1 - r, padded at the very end.

    Under a causal mask every rank then does the same work. cp_size = 2, 8 tokens:

        chunk    0    1    2    3
        tokens  0 1  2 3  4 5  6 7
        rank     0    1    1    0         → rank 0: (0, 2), (6, 8); rank 1: (2, 6)

    >>> zigzag(7, 2)
    (((0, 2), (6, 8)), ((2, 6),))
    """
    chunk = -(-total_tokens // (2 * cp_size))
    return tuple(_join([_chunk(rank, chunk), _chunk(2 * cp_size - 1 - rank, chunk)]) for rank in range(cp_size))


LAYOUTS: dict[str, Callable[[int, int], tuple[RankRanges, ...]]] = {"zigzag": zigzag}


def num_tokens(ranges: RankRanges) -> int:
    """How many tokens the ranges hold together."""
    return sum(hi - lo for lo, hi in ranges)


def pack(ranges: RankRanges) -> RankRanges:
    """The positions of the ranges in a buffer that holds them back to back."""
    packed, base = [], 0
    for lo, hi in ranges:
        packed.append((base, base + hi - lo))
        base += hi - lo
    return tuple(packed)


def _chunk(index: int, size: int) -> Range:
    return index * size, (index + 1) * size


def _join(ranges: list[Range]) -> RankRanges:
    """Sorted ranges with empty ones dropped and neighbours joined."""
    joined: list[Range] = []
    for lo, hi in ranges:
        if joined and joined[-1][1] == lo:
            joined[-1] = (joined[-1][0], hi)
        elif hi > lo:
            joined.append((lo, hi))
    return tuple(r for r in joined if r[1] > r[0])
