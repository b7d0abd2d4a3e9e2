"""Segments packed into few varlen kernel calls."""

from __future__ import annotations

import itertools
from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from magi_sink_cp.dist.planning.layout import union
from magi_sink_cp.dist.planning.mask import (
    FAR,
    Flags,
    Ints,
    Range,
    Window,
    covered,
    runs,
    take,
)

# How many calls a segment is offered to before it begins a new one.
_OPEN_CALLS = 16


class Gaps(NamedTuple):
    """Which gaps calls may have.

    Attributes:
        allowed: for kernels that can leave rows out.
        idle_tiles: a gap may join two parts of a call if the kernel then starts at most so many
            more tiles without keys, in each head; None is any number. FlashAttention-3's backward
            starts as many tiles of keys for each document as the longest one has.
    """

    allowed: bool = False
    idle_tiles: int | None = None


NO_GAPS = Gaps()
# Keys of one tile.
_TILE_KEYS = 128


class Segments(NamedTuple):
    """Query rows × keys of one band under a kernel's window, as arrays.

    Attributes:
        row_lo, row_hi, key_lo, key_hi: local indices of the rank's queries, and of the stage's
            keys.
        left, right: the window, aligned to the bottom right; -1 is unlimited.
        diagonal: the rows are among the keys.
    """

    row_lo: Ints
    row_hi: Ints
    key_lo: Ints
    key_hi: Ints
    left: Ints
    right: Ints
    diagonal: Flags


@dataclass(frozen=True, eq=False)
class KernelCall:
    """Segments for one varlen kernel call.

    The rows of its segments are disjoint, and so are their keys: backward writes dq, dk and dv
    without overlap. Rows or keys between two segments appear as documents without keys or rows; so
    out and dq, or dk and dv, become 0 there. Rows of a document that ``seqused_q`` leaves out are
    a *gap*: they are nothing to the call, and it does not write them.

    Attributes:
        rows: rows of q that the call reads.
        keys: keys of the stage that the call reads.
        cu_seqlens_q, cu_seqlens_k: int32 offsets of the documents, from the first row and the first
            key.
        seqused_q: int32 rows of each document that are its own: all, or none in a gap. None where
            there is no gap.
        window_size: of every segment.
        owns_rows: of all calls of a pass this one writes out, dq and delta of these rows, but for
            those in a gap. Others only add to them.
    """

    rows: Range
    keys: Range
    cu_seqlens_q: NDArray[np.int32]
    cu_seqlens_k: NDArray[np.int32]
    seqused_q: NDArray[np.int32] | None
    window_size: Window
    owns_rows: bool

    @property
    def written_rows(self) -> list[Range]:
        """Sorted disjoint ranges: ``rows`` without the gaps."""
        if self.seqused_q is None:
            return [self.rows]
        there = self.seqused_q > 0
        edges = self.cu_seqlens_q.astype(np.int64) + self.rows[0]
        starts, stops = covered(edges[:-1][there], edges[1:][there])
        return list(zip(starts.tolist(), stops.tolist(), strict=True))


class Packed(NamedTuple):
    """The kernel calls of a pass.

    Attributes:
        stages: the calls of each stage; those that own their rows come first.
        owned: sorted disjoint ranges of rows that a call owns, rows between its segments included
            unless they are a gap.
    """

    stages: tuple[tuple[KernelCall, ...], ...]
    owned: tuple[Range, ...]


def pack(
    stages: Sequence[Segments],
    owning_stages: int,
    large_rows: int | None = None,
    gaps: Gaps = NO_GAPS,
) -> Packed:
    """The kernel calls for the segments of each stage.

    Args:
        owning_stages: only calls of so many first stages may own their rows.
        large_rows: neighbouring segments of at least so many rows stay in calls of their own. Dense
            calls are faster than packed ones (FlashAttention-4's by a sixth under a window of 128).
        gaps: what gaps calls that own their rows may have.
    """
    joined = [_join(segments) for segments in stages]
    owners = _choose_owners(joined[:owning_stages])
    owners += [np.zeros(len(s.row_lo), dtype=bool) for s in joined[owning_stages:]]
    # Where rows see something, in any stage.
    seen = covered(*(np.concatenate([s[edge] for s in joined]) for edge in range(2)))
    calls = tuple(
        tuple(_calls(segments, owns, seen, large_rows, gaps))
        for segments, owns in zip(joined, owners, strict=True)
    )
    owning = [call for stage in calls for call in stage if call.owns_rows]
    owned = union([rows for call in owning for rows in call.written_rows])
    return Packed(calls, owned)


def _join(segments: Segments) -> Segments:
    """Fewer, larger segments with the same pairs: joined along the keys, then along the rows."""
    order = np.lexsort((segments.key_hi, segments.key_lo, segments.row_hi, segments.row_lo))
    s = take(segments, order)
    # The same rows see all keys of one segment and then those of the next, without a left limit.
    continues = (
        (s.row_lo[1:] == s.row_lo[:-1])
        & (s.row_hi[1:] == s.row_hi[:-1])
        & (s.key_lo[1:] == s.key_hi[:-1])
        & (s.left[:-1] == -1)
        & (s.right[:-1] == -1)
        & (s.left[1:] == -1)
    )
    s = _merged(s, continues)
    s = take(s, np.lexsort((s.row_hi, s.row_lo, s.key_lo)))
    # The next rows under the same full or causal mask.
    full = (s.left[1:] == -1) & (s.right[1:] == -1) & (s.key_hi[1:] == s.key_hi[:-1])
    grown = s.key_hi[1:] - s.key_hi[:-1]
    causal = (s.left[1:] == -1) & (s.right[1:] == 0) & (grown == s.row_hi[1:] - s.row_lo[1:])
    continues = (
        (s.row_lo[1:] == s.row_hi[:-1])
        & (s.key_lo[1:] == s.key_lo[:-1])
        & (s.left[1:] == s.left[:-1])
        & (s.right[1:] == s.right[:-1])
        & (full | causal)
    )
    return _merged(s, continues)


def _merged(s: Segments, continues: Flags) -> Segments:
    """Each segment that continues the one before it becomes one with it."""
    if not continues.any():
        return s
    first, last = runs(continues)
    return Segments(
        s.row_lo[first],
        s.row_hi[last],
        s.key_lo[first],
        s.key_hi[last],
        s.left[last],
        s.right[last],
        np.logical_or.reduceat(s.diagonal, first),
    )


def _choose_owners(stages: Sequence[Segments]) -> list[Flags]:
    """For each stage, which segments own their rows: no row has two owners.

    Those whose rows are among their keys come first: under documents they are all rows. Then the
    largest of what is left. A row without an owner gets 0, and what others add.
    """
    owners = [segments.diagonal.copy() for segments in stages]
    diagonal = [take(segments, segments.diagonal) for segments in stages]
    edges = sorted(
        (lo, hi)
        for s in diagonal
        for lo, hi in zip(s.row_lo.tolist(), s.row_hi.tolist(), strict=True)
    )
    disjoint = all(b[0] >= a[1] for a, b in itertools.pairwise(edges))
    if not disjoint:
        for owns in owners:
            owns[:] = False
        edges = []
    if disjoint and all(segments.diagonal.all() for segments in stages):
        return owners
    candidates = sorted(
        (not is_diagonal, number, lo - hi, index, lo, hi)
        for number, s in enumerate(stages)
        for index, (lo, hi, is_diagonal) in enumerate(
            zip(s.row_lo.tolist(), s.row_hi.tolist(), s.diagonal.tolist(), strict=True)
        )
        if not owners[number][index]
    )
    starts, stops = [lo for lo, _ in edges], [hi for _, hi in edges]
    for _, number, _, index, lo, hi in candidates:
        place = bisect_right(starts, lo)
        free = (place == 0 or stops[place - 1] <= lo) and (
            place == len(starts) or hi <= starts[place]
        )
        if free:
            owners[number][index] = True
            insort(starts, lo)
            insort(stops, hi)
    return owners


def _calls(
    segments: Segments,
    owners: Flags,
    seen: tuple[Ints, Ints],
    large_rows: int | None,
    gaps: Gaps,
) -> Iterator[KernelCall]:
    """The calls of one stage."""
    s = segments
    if not len(s.row_lo):
        return
    order = np.lexsort((s.key_hi, s.key_lo, s.row_hi, s.row_lo, s.right, s.left, ~owners))
    s, owns = take(s, order), owners[order]
    groups = _group(s, owns, seen, large_rows, gaps)
    groups.sort(key=lambda group: (not owns[group[0]], s.row_lo[group[0]], s.key_lo[group[0]]))
    for group in groups:
        yield _call(take(s, group), bool(owns[group[0]]), gaps.allowed)


def _group(
    s: Segments, owns: Flags, seen: tuple[Ints, Ints], large_rows: int | None, gaps: Gaps
) -> list[NDArray[np.intp]]:
    """Segments of one window that ascend in rows and keys.

    Rows between two segments of a call are computed for nothing, so there may be no more of them
    than the two segments hold. A call that owns its rows also owns those between, unless they are a
    gap, so there they may see nothing, in any stage: ``seen`` are the (starts, stops) of rows that
    do.

    Segments that fit their neighbour make a run. A run goes to the first of the latest calls that
    it fits, so this takes n log n steps.
    """
    rows = s.row_hi - s.row_lo
    # With idle_tiles, a run has no gaps, and whole runs are joined over gaps below.
    closed = owns & (not gaps.allowed or gaps.idle_tiles is not None)
    ends = _Ends(
        kind=np.cumsum(
            np.diff(s.left, prepend=s.left[:1]).astype(bool)
            | np.diff(s.right, prepend=s.right[:1]).astype(bool)
            | np.diff(owns, prepend=owns[:1])
        ),
        row_lo=s.row_lo,
        row_hi=s.row_hi,
        key_lo=s.key_lo,
        key_hi=s.key_hi,
        begun=np.where(closed, np.searchsorted(seen[0], s.row_lo), 0),
        ended=np.where(closed, np.searchsorted(seen[1], s.row_hi, side="right"), 0),
        room=np.where(owns, FAR, rows),
        small=np.full(len(rows), True) if large_rows is None else rows < large_rows,
    )
    first, last = runs(_fits(take(ends, slice(-1)), take(ends, slice(1, None))))
    documents, longest = _documents_of_runs(s, first)
    one_by_one = [
        _Ends(*values) for values in zip(*(array.tolist() for array in ends), strict=True)
    ]

    def follows(group: _Group, new: _Group) -> bool:
        before, behind = group.last(one_by_one), one_by_one[new.runs[0][0]]
        if _fits(before, behind):
            return True
        if not gaps.allowed or gaps.idle_tiles is None or not _fits(before.open(), behind.open()):
            return False
        return group.idle_tiles(new, behind.key_lo - before.key_hi) <= gaps.idle_tiles

    groups: list[_Group] = []
    each_run = (array.tolist() for array in (first, last + 1, documents, longest))
    for lo, hi, number, most in zip(*each_run, strict=True):
        new = _Group([(lo, hi)], number, most)
        for group in groups[-_OPEN_CALLS:]:
            if follows(group, new):
                group.add(new, one_by_one[lo].key_lo - group.last(one_by_one).key_hi)
                break
        else:
            groups.append(new)
    return [np.concatenate([np.arange(lo, hi) for lo, hi in group.runs]) for group in groups]


@dataclass
class _Group:
    """Runs of segments for one call.

    Attributes:
        runs: (start, stop) among the segments.
        documents: of the call: segments, and rows and keys between them.
        longest: the most tiles of keys that one of them has.
    """

    runs: list[Range]
    documents: int
    longest: int

    def last(self, segments: Sequence[_Ends]) -> _Ends:
        return segments[self.runs[-1][1] - 1]

    def idle_tiles(self, other: _Group, keys_between: int) -> int:
        """Tiles without keys that a kernel starts more if ``other`` joins behind a gap."""
        documents, longest = self._with(other, keys_between)
        apart = self.documents * self.longest + other.documents * other.longest
        return documents * longest - apart

    def add(self, other: _Group, keys_between: int) -> None:
        self.documents, self.longest = self._with(other, keys_between)
        self.runs += other.runs

    def _with(self, other: _Group, keys_between: int) -> tuple[int, int]:
        """The documents, and the longest, with the rows and keys between the two."""
        documents = self.documents + 1 + (keys_between > 0) + other.documents
        return documents, max(self.longest, other.longest, -(-keys_between // _TILE_KEYS))


def _documents_of_runs(s: Segments, first: NDArray[np.intp]) -> tuple[Ints, Ints]:
    """How many documents each run of segments is in a call, and the most tiles that one has.

    ``first``: where the runs begin. Rows and keys between two segments are documents too.
    """
    if not len(first):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    rows_before = np.append(0, s.row_lo[1:] - s.row_hi[:-1])
    keys_before = np.append(0, s.key_lo[1:] - s.key_hi[:-1])
    rows_before[first] = keys_before[first] = 0
    keys = np.maximum(s.key_hi - s.key_lo, keys_before)
    documents = 1 + (rows_before > 0) + (keys_before > 0)
    return np.add.reduceat(documents, first), np.maximum.reduceat(-(-keys // _TILE_KEYS), first)


class _Ends(NamedTuple):
    """What decides whether segments can follow each other in one call; arrays, or one segment.

    Attributes:
        kind: equal where window and ownership are.
        row_lo, row_hi, key_lo, key_hi: of the segment.
        begun, ended: how many ranges of rows that see something begin before it, and end up to its
            end; 0 if it owns no rows, or if any gap may be beside it.
        room: how many rows without a segment it allows beside it.
        small: not a call of its own.
    """

    kind: Any
    row_lo: Any
    row_hi: Any
    key_lo: Any
    key_hi: Any
    begun: Any
    ended: Any
    room: Any
    small: Any

    def open(self) -> _Ends:
        """The same segment if rows that see something may lie beside it."""
        return self._replace(begun=0, ended=0)


def _fits(last: _Ends, new: _Ends) -> Any:
    """Whether ``new`` can follow ``last`` in one call."""
    gap = new.row_lo - last.row_hi
    return (
        (last.kind == new.kind)
        & (gap >= 0)
        & (gap <= last.room + new.room)
        & ((gap == 0) | (last.ended == new.begun))
        & (new.key_lo >= last.key_hi)
        & (last.small | new.small)
    )


def _call(s: Segments, owns_rows: bool, gaps: bool) -> KernelCall:
    """One call for segments that ascend in rows and keys."""
    rows, keys = (int(s.row_lo[0]), int(s.row_hi[-1])), (int(s.key_lo[0]), int(s.key_hi[-1]))
    window = int(s.left[0]), int(s.right[0])
    if len(s.row_lo) == 1:  # most calls, and the rest takes ten times as long
        of_q, of_k = (np.array([0, hi - lo], dtype=np.int32) for lo, hi in (rows, keys))
        return KernelCall(rows, keys, of_q, of_k, None, window, owns_rows)
    row_before = np.concatenate([s.row_lo[:1], s.row_hi[:-1]])
    key_before = np.concatenate([s.key_lo[:1], s.key_hi[:-1]])
    there = np.ones((len(s.row_lo), 3), dtype=bool)
    there[:, 0] = s.row_lo > row_before  # rows that see none of these keys
    there[:, 1] = s.key_lo > key_before  # keys that none of these rows sees
    ends_q = np.stack([s.row_lo, s.row_lo, s.row_hi], axis=1)[there]
    ends_k = np.stack([key_before, s.key_lo, s.key_hi], axis=1)[there]
    seqused_q = None
    if gaps and owns_rows and there[:, 0].any():
        used = np.zeros(there.shape, dtype=np.int32)
        used[:, 2] = s.row_hi - s.row_lo
        seqused_q = used[there]
    return KernelCall(
        rows=rows,
        keys=keys,
        cu_seqlens_q=np.concatenate([[0], ends_q - rows[0]]).astype(np.int32),
        cu_seqlens_k=np.concatenate([[0], ends_k - keys[0]]).astype(np.int32),
        seqused_q=seqused_q,
        window_size=window,
        owns_rows=owns_rows,
    )
