"""Who needs which keys, when they travel, and which kernel calls consume them: pure functions over ints.

Words: a *document* is a half-open global token range; *rows* and *keys* are local indices of a rank's tokens; a stage's *buffer*
holds the keys that arrive for it, in the order of the sender's tokens. Stage 0 is the rank's own keys; in stage t it receives from
rank (r - t) mod cp while it sends to (r + t) mod cp, and computes on what arrived.

Under zigzag and a causal mask, cp_size = 2, one document (rows × keys by chunk; own causal part \\, remote rectangle #):

              chunk 0  1  2  3                    rank 0 holds chunks 0 and 3: row chunk 3 sees the remote chunks 1 and 2.
    rank 0  0       \\                             rank 1 holds chunks 1 and 2: both see the remote chunk 0, and chunk 3 never
    rank 1  1       #  \\                          travels, because no query there sees it.
    rank 1  2       #  \\  \\
    rank 0  3       \\  #  #  \\

Under a sliding window only the keys within it travel: of each chunk at most the last ``left`` and the first ``right`` (a halo). A
kernel call knows nothing of where its rows and keys stand; its window is aligned to the bottom right of each segment, so that
rows that end at global index r and keys that end at k see, under the global window (left, right), the kernel's
(left + k - r, right + r - k).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from magi_sink_cp.dist.layout import Range, RankRanges, num_tokens, pack

Window = tuple[int, int]
FULL: Window = (-1, -1)
CAUSAL: Window = (-1, 0)


@dataclass(frozen=True)
class Segment:
    """Query rows × keys of one document under a kernel's window (left, right), aligned to the bottom right; -1 is unlimited."""

    rows: Range
    keys: Range
    window_size: Window


@dataclass(frozen=True)
class KernelCall:
    """Segments for one varlen kernel call: rows ``rows`` of q, keys ``keys`` of the stage's K/V, offsets relative to both.

    The rows of its segments are disjoint, and so are the keys, so that backward can write dQ, dK and dV without overlap. Rows
    or keys between two segments appear as documents without keys or without rows.
    """

    rows: Range
    keys: Range
    cu_seqlens_q: tuple[int, ...]
    cu_seqlens_k: tuple[int, ...]
    window_size: Window

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs: the kernel's work."""
        left, right = self.window_size
        total = 0
        for b in range(len(self.cu_seqlens_q) - 1):
            num_q = self.cu_seqlens_q[b + 1] - self.cu_seqlens_q[b]
            num_k = self.cu_seqlens_k[b + 1] - self.cu_seqlens_k[b]
            highest = num_k if right < 0 else num_k - num_q + right
            total += _pairs_up_to(num_q, num_k, highest)
            if left >= 0:
                total -= _pairs_up_to(num_q, num_k, num_k - num_q - left - 1)
        return total


def _pairs_up_to(num_q: int, num_k: int, offset: int) -> int:
    """How many pairs (p, s), 0 <= p < num_q, 0 <= s < num_k, have s - p <= offset."""

    def below(rows: int) -> int:  # Σ min(num_k, u) for u = 1 … rows
        beyond = max(0, rows - num_k)
        return rows * (rows + 1) // 2 - beyond * (beyond + 1) // 2 if rows > 0 else 0

    return below(num_q + offset) - below(offset)


@dataclass(frozen=True)
class Stage:
    """One step of the schedule. ``send`` are local key ranges for ``send_to``; ``receive`` are the buffer ranges they fill here."""

    calls: tuple[KernelCall, ...]
    send_to: int
    send: tuple[Range, ...]
    receive_from: int
    receive: tuple[Range, ...]

    @property
    def sent_tokens(self) -> int:
        return num_tokens(self.send)

    @property
    def received_tokens(self) -> int:
        return num_tokens(self.receive)


@dataclass(frozen=True)
class Schedule:
    """All stages of one rank under one mask. ``stages[0]`` is local and moves nothing."""

    stages: tuple[Stage, ...]

    @property
    def local(self) -> Stage:
        """The rank's own keys."""
        return self.stages[0]

    @property
    def remote(self) -> tuple[Stage, ...]:
        """What other ranks bring, in order."""
        return self.stages[1:]


def build_schedule(layout: Sequence[RankRanges], documents: Sequence[Range], window_size: Window, rank: int) -> Schedule:
    """The schedule of ``rank``.

    Args:
        layout: global token ranges per rank; padding lies behind the last document.
        documents: sorted, disjoint, non-empty global ranges that tile the real tokens.
        window_size: (left, right) tokens that a query sees around itself in its document; -1 is unlimited, right 0 is causal.
    """
    cp_size = len(layout)
    index = _DocumentIndex(documents)
    longest = max((hi - lo for lo, hi in documents), default=1)
    left, right = (-1 if size >= longest - 1 and size > 0 else size for size in window_size)
    window = left, right
    stages = [Stage(_local_calls(layout[rank], index, window), rank, (), rank, ())]
    for step in range(1, cp_size):
        source, target = (rank - step) % cp_size, (rank + step) % cp_size
        segments, needed = _remote_segments(layout[rank], layout[source], index, window)
        _, asked = _remote_segments(layout[target], layout[rank], index, window)
        stages.append(
            Stage(
                calls=_group(segments),
                send_to=target,
                send=asked,
                receive_from=source,
                receive=pack(needed),
            )
        )
    return Schedule(tuple(stages))


class _DocumentIndex:
    """Finds the document of a token."""

    def __init__(self, documents: Sequence[Range]) -> None:
        self.documents = list(documents)
        self._starts = [lo for lo, _ in self.documents]

    def at(self, token: int) -> Range | None:
        """The document that holds the token, or None for padding."""
        position = bisect_right(self._starts, token) - 1
        if position < 0 or token >= self.documents[position][1]:
            return None
        return self.documents[position]

    def within(self, tokens: Range) -> list[Range]:
        """The documents that hold at least one of the tokens."""
        first = max(0, bisect_right(self._starts, tokens[0]) - 1)
        last = bisect_right(self._starts, tokens[1] - 1)
        return [d for d in self.documents[first:last] if d[1] > tokens[0]]


def _local_calls(ranges: RankRanges, index: _DocumentIndex, window: Window) -> tuple[KernelCall, ...]:
    """The calls on a rank's own keys; the first one holds each document's rows over their own keys, so all of the rank's rows.

    Under a mask that ignores distance a document that spans two of the rank's ranges is one segment, as it is contiguous locally.
    Under a window, ranges that are not neighbours see each other as two ranks' would.
    """
    if window not in (FULL, CAUSAL):
        ranges = _union(ranges)
    segments: list[Segment] = []
    last_document: Range | None = None
    for base, (lo, hi) in _with_base(ranges):
        for document in index.within((lo, hi)):
            first, last = base + max(lo, document[0]) - lo, base + min(hi, document[1]) - lo
            if document == last_document and window in (FULL, CAUSAL):
                first = segments.pop().rows[0]
            segments.append(Segment((first, last), (first, last), window))
            last_document = document
    across = _rectangles(ranges, ranges, index, window) if window not in (FULL, CAUSAL) else []
    return _group(segments) + _group(across)


def _remote_segments(
    query_ranges: RankRanges, key_ranges: RankRanges, index: _DocumentIndex, window: Window
) -> tuple[list[Segment], RankRanges]:
    """(segments, needed): rows local to the query rank × keys as buffer positions, and the needed keys local to the key rank."""
    found = _rectangles(query_ranges, key_ranges, index, window)
    needed = _union([s.keys for s in found])
    starts = [lo for lo, _ in needed]
    packed = pack(needed)

    def to_buffer(keys: Range) -> Range:
        which = bisect_right(starts, keys[0]) - 1
        shift = packed[which][0] - needed[which][0]
        return keys[0] + shift, keys[1] + shift

    segments = [Segment(s.rows, to_buffer(s.keys), s.window_size) for s in found]
    whole = [s for s in segments if s.window_size == FULL]
    return _merge_rectangles(whole) + [s for s in segments if s.window_size != FULL], needed


def _rectangles(query_ranges: RankRanges, key_ranges: RankRanges, index: _DocumentIndex, window: Window) -> list[Segment]:
    """Rows × keys, each local to its own rank, of every two different ranges, without rows and keys that see nothing of the other.

    Two disjoint ranges share at most one document, the one that reaches from the end of the first into the start of the second.
    """
    left, right = window
    found: list[Segment] = []
    for row_base, rows in _with_base(query_ranges):
        for key_base, keys in _with_base(key_ranges):
            if rows == keys:
                continue
            earlier, later = (keys, rows) if keys[1] <= rows[0] else (rows, keys)
            document = index.at(earlier[1] - 1)
            if document is None or document != index.at(later[0]):
                continue
            row_lo, row_hi = max(rows[0], document[0]), min(rows[1], document[1])
            key_lo, key_hi = max(keys[0], document[0]), min(keys[1], document[1])
            row_lo, row_hi = _reach((row_lo, row_hi), (key_lo, key_hi), right, left)
            key_lo, key_hi = _reach((key_lo, key_hi), (row_lo, row_hi), left, right)
            if row_lo >= row_hi or key_lo >= key_hi:
                continue
            # The kernel's limits, and none where they hide no pair.
            lag = row_hi - key_hi
            kernel_left = -1 if left < 0 or left - lag >= key_hi - key_lo - 1 else left - lag
            kernel_right = -1 if right < 0 or right + lag >= row_hi - row_lo - 1 else right + lag
            found.append(
                Segment(
                    (row_base + row_lo - rows[0], row_base + row_hi - rows[0]),
                    (key_base + key_lo - keys[0], key_base + key_hi - keys[0]),
                    (kernel_left, kernel_right),
                )
            )
    return found


def _reach(tokens: Range, others: Range, before: int, after: int) -> Range:
    """Those of ``tokens`` that stand at most ``before`` before or ``after`` after one of the others; -1 is any distance."""
    lo = tokens[0] if before < 0 else max(tokens[0], others[0] - before)
    hi = tokens[1] if after < 0 else min(tokens[1], others[1] + after)
    return lo, hi


def _with_base(ranges: RankRanges) -> list[tuple[int, Range]]:
    """(first local index, global range) of each range."""
    result, base = [], 0
    for lo, hi in ranges:
        result.append((base, (lo, hi)))
        base += hi - lo
    return result


def _union(ranges: Sequence[Range]) -> RankRanges:
    """Sorted disjoint ranges that cover the same integers; neighbours are joined."""
    merged: list[Range] = []
    for lo, hi in sorted(ranges):
        if merged and lo <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], hi))
        else:
            merged.append((lo, hi))
    return tuple(merged)


def _merge_rectangles(segments: Sequence[Segment]) -> list[Segment]:
    """Fewer, larger full rectangles with the same pairs: joined along the keys, then along the rows, where they touch."""
    along_keys: list[Segment] = []
    for s in sorted(segments, key=lambda s: (s.rows, s.keys)):
        if along_keys and along_keys[-1].rows == s.rows and along_keys[-1].keys[1] == s.keys[0]:
            s = Segment(s.rows, (along_keys.pop().keys[0], s.keys[1]), s.window_size)
        along_keys.append(s)
    along_rows: list[Segment] = []
    for s in sorted(along_keys, key=lambda s: (s.keys, s.rows)):
        if along_rows and along_rows[-1].keys == s.keys and along_rows[-1].rows[1] == s.rows[0]:
            s = Segment((along_rows.pop().rows[0], s.rows[1]), s.keys, s.window_size)
        along_rows.append(s)
    return along_rows


def _group(segments: Sequence[Segment]) -> tuple[KernelCall, ...]:
    """Kernel calls whose segments have one window and ascend in rows and in keys: the first that a segment fits behind takes it."""
    groups: list[list[Segment]] = []
    for s in sorted(segments, key=lambda s: (s.rows, s.keys)):
        for group in groups:
            last = group[-1]
            if last.window_size == s.window_size and last.rows[1] <= s.rows[0] and last.keys[1] <= s.keys[0]:
                group.append(s)
                break
        else:
            groups.append([s])
    return tuple(_call(group) for group in groups)


def _call(segments: Sequence[Segment]) -> KernelCall:
    first, last = segments[0], segments[-1]
    cu_q, cu_k = [first.rows[0]], [first.keys[0]]
    for s in segments:
        if s.rows[0] > cu_q[-1]:  # rows that see none of these keys
            cu_q.append(s.rows[0])
            cu_k.append(cu_k[-1])
        if s.keys[0] > cu_k[-1]:  # keys that none of these rows sees
            cu_q.append(cu_q[-1])
            cu_k.append(s.keys[0])
        cu_q.append(s.rows[1])
        cu_k.append(s.keys[1])
    return KernelCall(
        rows=(first.rows[0], last.rows[1]),
        keys=(first.keys[0], last.keys[1]),
        cu_seqlens_q=tuple(x - first.rows[0] for x in cu_q),
        cu_seqlens_k=tuple(x - first.keys[0] for x in cu_k),
        window_size=first.window_size,
    )
