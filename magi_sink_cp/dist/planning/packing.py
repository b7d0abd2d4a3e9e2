"""Segments packed into few varlen kernel calls."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from magi_sink_cp.dist.planning.layout import Range
from magi_sink_cp.dist.planning.mask import CAUSAL, FULL, Segment, Window


@dataclass(frozen=True)
class KernelCall:
    """Segments for one varlen kernel call.

    The rows of its segments are disjoint, and so are their keys: backward writes dq, dk and dv
    without overlap. Rows or keys between two segments appear as documents without keys or rows.

    Attributes:
        rows: rows of q that the call reads.
        keys: keys of the stage that the call reads.
        cu_seqlens_q, cu_seqlens_k: offsets of the documents, from the first row and the first key.
        window_size: of every segment.
        owns_rows: each of its rows is on its own diagonal here. Of all calls of a pass this one
            writes out, dq and delta of these rows; others only add to them.
    """

    rows: Range
    keys: Range
    cu_seqlens_q: tuple[int, ...]
    cu_seqlens_k: tuple[int, ...]
    window_size: Window
    owns_rows: bool


def make_kernel_calls(
    segments: Sequence[Segment], piece_starts: Sequence[int] | None, large_rows: int | None
) -> tuple[KernelCall, ...]:
    """The calls of one stage; those that own their rows come first.

    Args:
        piece_starts: sorted first rows of all pieces of documents on the rank. If given, rows
            between two segments of a call must be padding, so that a call which owns its rows
            writes no rows of another one.
        large_rows: neighbouring segments of at least so many rows stay in calls of their own.
    """
    calls = [_call(group) for group in _group(_join(segments), piece_starts, large_rows)]
    return tuple(sorted(calls, key=lambda call: not call.owns_rows))


def _join(segments: Sequence[Segment]) -> list[Segment]:
    """Fewer, larger segments with the same pairs: joined along the keys, then along the rows."""
    along_keys: list[Segment] = []
    for s in sorted(segments, key=lambda s: (s.rows, s.keys)):
        last = along_keys[-1] if along_keys else None
        if last is not None and _continues_keys(last, s):
            keys = last.keys[0], s.keys[1]
            along_keys[-1] = Segment(s.rows, keys, s.window_size, last.diagonal or s.diagonal)
        else:
            along_keys.append(s)
    along_rows: list[Segment] = []
    for s in sorted(along_keys, key=lambda s: (s.keys[0], s.rows)):
        last = along_rows[-1] if along_rows else None
        if last is not None and _continues_rows(last, s):
            rows = last.rows[0], s.rows[1]
            along_rows[-1] = Segment(rows, s.keys, s.window_size, last.diagonal or s.diagonal)
        else:
            along_rows.append(s)
    return along_rows


def _continues_keys(last: Segment, s: Segment) -> bool:
    """The same rows see all keys of ``last`` and then those of ``s``, without a left limit."""
    touch = last.rows == s.rows and last.keys[1] == s.keys[0]
    return touch and last.window_size == FULL and s.window_size[0] == -1


def _continues_rows(last: Segment, s: Segment) -> bool:
    """The rows of ``s`` follow those of ``last`` under the same full or causal mask."""
    touch = last.rows[1] == s.rows[0] and last.keys[0] == s.keys[0]
    if not touch or last.window_size != s.window_size:
        return False
    if s.window_size == FULL:
        return last.keys == s.keys
    return s.window_size == CAUSAL and s.keys[1] - last.keys[1] == s.num_rows


def _group(
    segments: Sequence[Segment], piece_starts: Sequence[int] | None, large_rows: int | None
) -> list[list[Segment]]:
    """Segments of one window that ascend in rows and keys, first fit.

    Rows between two segments of a call are computed for nothing, so there may be no more of them
    than the two segments hold.
    """

    def fits(group: list[Segment], s: Segment) -> bool:
        last = group[-1]
        if (last.window_size, last.diagonal) != (s.window_size, s.diagonal):
            return False
        if large_rows is not None and min(last.num_rows, s.num_rows) >= large_rows:
            return False
        gap = s.rows[0] - last.rows[1]
        if gap < 0 or s.keys[0] < last.keys[1]:
            return False
        if piece_starts is not None:
            return bisect_left(piece_starts, last.rows[1]) == bisect_left(piece_starts, s.rows[0])
        return gap <= last.num_rows + s.num_rows

    groups: list[list[Segment]] = []
    for s in sorted(segments, key=lambda s: (s.rows, s.keys)):
        for group in groups:
            if fits(group, s):
                group.append(s)
                break
        else:
            groups.append([s])
    return groups


def _call(segments: Sequence[Segment]) -> KernelCall:
    first, last = segments[0], segments[-1]
    offsets_q, offsets_k = [first.rows[0]], [first.keys[0]]
    for s in segments:
        if s.rows[0] > offsets_q[-1]:  # rows that see none of these keys
            offsets_q.append(s.rows[0])
            offsets_k.append(offsets_k[-1])
        if s.keys[0] > offsets_k[-1]:  # keys that none of these rows sees
            offsets_q.append(offsets_q[-1])
            offsets_k.append(s.keys[0])
        offsets_q.append(s.rows[1])
        offsets_k.append(s.keys[1])
    return KernelCall(
        rows=(first.rows[0], last.rows[1]),
        keys=(first.keys[0], last.keys[1]),
        cu_seqlens_q=tuple(x - first.rows[0] for x in offsets_q),
        cu_seqlens_k=tuple(x - first.keys[0] for x in offsets_k),
        window_size=first.window_size,
        owns_rows=first.diagonal,
    )
