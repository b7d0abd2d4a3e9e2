"""Who needs which keys, when they travel, and which kernel calls use them.

Words: a *document* is a half-open global token range. *Rows* and *keys* are local indices of a
rank's tokens. A *piece* is the part of a document in one of a rank's ranges. A *stage* brings the
keys of some ranks together in a *buffer*, in the order of the whole sequence, and computes with
them, while the next stage's keys travel. The first stage is *local*: it reads the rank's own keys
where they are, and nothing travels for it. *Step* s brings rank r the keys of rank (r - s) mod cp.

``overlap_degree`` n > 0: the local stage computes all rows with the rank's own keys. The other
steps come in n groups, one stage each. ``overlap_degree`` 0: one stage gathers all keys and
computes each row once with all that it sees. Rows that see own keys alone do not wait for it: they
are in the local stage.

Zigzag, causal mask, cp_size = 2, one document (rows × keys by chunk; \\ is a causal part, # a full
rectangle):

              chunk 0  1  2  3         rank 0 holds chunks 0 and 3: its rows of chunk 3 see the
    rank 0  0       \\                  remote chunks 1 and 2.
    rank 1  1       #  \\               rank 1 holds chunks 1 and 2: both see the remote chunk 0.
    rank 1  2       #  \\  \\            Chunk 3 never travels: no query elsewhere sees it.
    rank 0  3       \\  #  #  \\

With overlap_degree 0, rank 1 has one causal call: its rows over chunks 0 to 2. Under a window only
the keys within it travel: of each chunk at most the last ``left`` and the first ``right`` (a halo).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from magi_sink_cp.dist.planning.exchange import Exchange, Message, Schedule, Stage
from magi_sink_cp.dist.planning.layout import Range, RankRanges, intersection, num_tokens, union
from magi_sink_cp.dist.planning.mask import (
    Segment,
    Window,
    effective_window,
    kernel_window,
    reach,
    visible_pairs,
)
from magi_sink_cp.dist.planning.packing import KernelCall, make_kernel_calls
from magi_sink_cp.dist.planning.routes import add_routes


def build_schedule(
    layout: Sequence[RankRanges],
    documents: Sequence[Range],
    window_size: Window,
    rank: int,
    overlap_degree: int,
    large_rows: int | None = None,
    routed: bool = False,
) -> Schedule:
    """The schedule of ``rank``.

    Args:
        layout: global token ranges of each rank.
        documents: sorted, disjoint, non-empty global ranges. Tokens outside them are padding.
        window_size: (left, right) tokens that a query sees around itself in its document; -1 is
            unlimited, right = 0 is causal.
        overlap_degree: how many stages travel behind another one's computation; at most
            cp_size - 1 count.
        large_rows: neighbouring segments of so many rows are kernel calls of their own. Dense calls
            are faster than packed ones (FlashAttention-4's by a sixth under a window of 128).
        routed: add the routes of the exchanges. They need the schedules of all ranks.
    """
    sequence = _Sequence(layout, documents, window_size, large_rows)
    if not routed:
        return sequence.schedule(rank, overlap_degree)
    schedules = [sequence.schedule(other, overlap_degree) for other in range(len(layout))]
    return add_routes(schedules, rank)


@dataclass(frozen=True)
class Share:
    """What of a sequence concerns one rank.

    Attributes:
        remote_keys: keys that travel to it.
        remote_rows: rows that see any of them.
        alone_pairs: visible pairs of rows in pieces that see own keys alone.
    """

    remote_keys: int
    remote_rows: int
    alone_pairs: int


def typical_share(
    layout: Sequence[RankRanges], documents: Sequence[Range], window_size: Window
) -> Share:
    """The mean over the ranks of what travels, and the smallest alone_pairs.

    The smallest, as the rank with least to compute meanwhile waits longest for its keys.
    """
    sequence = _Sequence(layout, documents, window_size)
    shares = [sequence.share(rank) for rank in range(len(layout))]
    return Share(
        sum(share.remote_keys for share in shares) // len(shares),
        sum(share.remote_rows for share in shares) // len(shares),
        min(share.alone_pairs for share in shares),
    )


def rank_pairs(
    layout: Sequence[RankRanges], documents: Sequence[Range], window_size: Window, rank: int
) -> int:
    """Visible (query, key) pairs of the rank's rows, over all keys of the sequence."""
    return _Sequence(layout, documents, window_size).pairs(rank)


@dataclass(frozen=True)
class _Piece:
    """A document's rows (global) in one of a rank's ranges.

    ``start`` is the local index of the first row; ``keys`` (global) are what the rows see.
    """

    rows: Range
    start: int
    keys: Range


class _Sequence:
    """The whole sequence under one mask, seen from any rank."""

    def __init__(
        self,
        layout: Sequence[RankRanges],
        documents: Sequence[Range],
        window_size: Window,
        large_rows: int | None = None,
    ) -> None:
        self._layout = layout
        self._large_rows = large_rows
        self._documents = documents
        self._starts = [lo for lo, _ in documents]
        self._window = effective_window(window_size, documents)
        self._pieces_of: dict[int, list[_Piece]] = {}
        self._seen_by: dict[int, RankRanges] = {}

    def schedule(self, rank: int, overlap_degree: int) -> Schedule:
        """The schedule of ``rank``, without routes."""
        cp_size = len(self._layout)
        if overlap_degree == 0 and cp_size > 1:
            alone, gathered = self._split_by_need(rank)
            local = self._local_stage(rank, alone)
            return Schedule((local, self._travelling_stage(rank, 1, range(cp_size), gathered)))
        pieces = self._pieces(rank)
        stages = [self._local_stage(rank, pieces)]
        groups = min(overlap_degree, cp_size - 1)
        for group in range(groups):
            first = 1 + (cp_size - 1) * group // groups
            last = 1 + (cp_size - 1) * (group + 1) // groups
            steps = range(first, last)
            stages.append(self._travelling_stage(rank, 1 + group, steps, pieces))
        return Schedule(tuple(stages))

    def _local_stage(self, rank: int, pieces: Sequence[_Piece]) -> Stage:
        """The stage of ``pieces`` over the rank's own keys."""
        own_ranges = union(self._layout[rank])
        calls = self._calls(rank, pieces, own_ranges, _to_local(self._layout[rank]), owns=True)
        size = num_tokens(self._layout[rank])
        cast = Exchange("group_cast of stage 0", (), (), size)
        return Stage(True, calls, cast, (), Exchange("group_reduce of stage 0", (), (), 0))

    def _travelling_stage(
        self, rank: int, number: int, steps: range, pieces: Sequence[_Piece]
    ) -> Stage:
        """Stage ``number``: ``pieces`` of ``rank`` over the keys that ``steps`` bring.

        Step 0 stands for own keys, which are copied beside the others'.
        """
        cp_size = len(self._layout)
        to_local = _to_local(self._layout[rank])
        sources = [(rank - step) % cp_size for step in steps]
        seen = union([piece.keys for piece in pieces])
        arrivals = sorted(
            (tokens, source)
            for source in sources
            for tokens in intersection(seen, self._layout[source])
        )
        buffer = [tokens for tokens, _ in arrivals]
        to_buffer = _to_local(buffer)
        own = [(to_local(t), to_buffer(t)) for t, source in arrivals if source == rank]
        receives = [Message(source, to_buffer(t)) for t, source in arrivals if source != rank]
        sends, homeward = self._sends(rank, [(rank + step) % cp_size for step in steps])
        calls = self._calls(rank, pieces, union(buffer), to_buffer, owns=0 in steps)
        homeward_tokens = homeward[-1].tokens[1] if homeward else 0
        return Stage(
            local=False,
            calls=calls,
            cast=Exchange(
                f"group_cast of stage {number}", tuple(sends), tuple(receives), num_tokens(buffer)
            ),
            own=tuple(own),
            reduce=Exchange(
                f"group_reduce of stage {number}", tuple(receives), tuple(homeward), homeward_tokens
            ),
        )

    def _sends(self, rank: int, targets: Sequence[int]) -> tuple[list[Message], list[Message]]:
        """What ``rank`` sends to ``targets``, and where their gradients for it arrive."""
        to_local = _to_local(self._layout[rank])
        sends: list[Message] = []
        homeward: list[Message] = []
        place = 0
        for target in targets:
            if target == rank:
                continue
            for tokens in intersection(self._seen(target), self._layout[rank]):
                size = tokens[1] - tokens[0]
                sends.append(Message(target, to_local(tokens)))
                homeward.append(Message(target, (place, place + size)))
                place += size
        return sends, homeward

    def _calls(
        self,
        rank: int,
        pieces: Sequence[_Piece],
        key_ranges: RankRanges,
        to_buffer: Callable[[Range], Range],
        owns: bool,
    ) -> tuple[KernelCall, ...]:
        """The kernel calls of ``pieces`` over the keys of ``key_ranges``."""
        segments = list(self._segments(pieces, key_ranges, to_buffer))
        starts = [piece.start for piece in self._pieces(rank)] if owns else None
        return make_kernel_calls(segments, starts, self._large_rows)

    def _segments(
        self,
        pieces: Sequence[_Piece],
        key_ranges: RankRanges,
        to_buffer: Callable[[Range], Range],
    ) -> Iterator[Segment]:
        """Rows × keys of every piece and every key range of which it sees something."""
        left, right = self._window
        for piece in pieces:
            for visible in intersection(key_ranges, (piece.keys,)):
                diagonal = visible[0] <= piece.rows[0] and piece.rows[1] <= visible[1]
                rows = reach(piece.rows, visible, right, left)
                keys = reach(visible, rows, left, right)
                if rows[0] >= rows[1] or keys[0] >= keys[1]:
                    continue
                window = kernel_window(rows, keys, self._window, diagonal)
                start = piece.start + rows[0] - piece.rows[0]
                local_rows = start, start + rows[1] - rows[0]
                yield Segment(local_rows, to_buffer(keys), window, diagonal)

    def pairs(self, rank: int) -> int:
        """Visible pairs of the rank's rows."""
        whole = (0, max((hi for _, hi in self._documents), default=0))
        segments = self._segments(self._pieces(rank), (whole,), lambda keys: keys)
        return sum(visible_pairs(s.num_rows, s.num_keys, *s.window_size) for s in segments)

    def _split_by_need(self, rank: int) -> tuple[list[_Piece], list[_Piece]]:
        """The rank's pieces: those that see own keys alone, and those that wait for others'."""
        own_ranges = union(self._layout[rank])
        alone: list[_Piece] = []
        gathered: list[_Piece] = []
        for piece in self._pieces(rank):
            seen_here = num_tokens(intersection(own_ranges, (piece.keys,)))
            all_here = seen_here == piece.keys[1] - piece.keys[0]
            (alone if all_here else gathered).append(piece)
        return alone, gathered

    def share(self, rank: int) -> Share:
        """What of the sequence concerns ``rank``."""
        left, right = self._window
        own_ranges, rows = union(self._layout[rank]), 0
        for piece in self._pieces(rank):
            held = [end for t in intersection(own_ranges, (piece.keys,)) for end in t]
            ends = [piece.keys[0], *held, piece.keys[1]]
            gaps = zip(ends[::2], ends[1::2], strict=True)
            rows += num_tokens(
                union([reach(piece.rows, t, right, left) for t in gaps if t[0] < t[1]])
            )
        seen = self._seen(rank)
        remote_keys = num_tokens(seen) - num_tokens(intersection(own_ranges, seen))
        alone, _ = self._split_by_need(rank)
        segments = self._segments(alone, own_ranges, lambda keys: keys)
        pairs = sum(visible_pairs(s.num_rows, s.num_keys, *s.window_size) for s in segments)
        return Share(remote_keys, rows, pairs)

    def _seen(self, rank: int) -> RankRanges:
        """All keys that the rank sees."""
        if rank not in self._seen_by:
            self._seen_by[rank] = union([piece.keys for piece in self._pieces(rank)])
        return self._seen_by[rank]

    def _pieces(self, rank: int) -> list[_Piece]:
        """The rows of each document in each of the rank's ranges, in order."""
        if rank in self._pieces_of:
            return self._pieces_of[rank]
        left, right = self._window
        pieces, base = [], 0
        for lo, hi in self._layout[rank]:
            first = max(0, bisect_right(self._starts, lo) - 1)
            for document in self._documents[first : bisect_left(self._starts, hi)]:
                rows = max(lo, document[0]), min(hi, document[1])
                if rows[0] < rows[1]:
                    keys = reach(document, rows, left, right)
                    pieces.append(_Piece(rows, base + rows[0] - lo, keys))
            base += hi - lo
        self._pieces_of[rank] = pieces
        return pieces


def _to_local(ranges: Sequence[Range]) -> Callable[[Range], Range]:
    """Maps a part of the sorted ``ranges`` to its place where they stand back to back."""
    starts, bases, base = [lo for lo, _ in ranges], [], 0
    for lo, hi in ranges:
        bases.append(base)
        base += hi - lo

    def place(tokens: Range) -> Range:
        index = bisect_right(starts, tokens[0]) - 1
        shift = bases[index] - starts[index]
        return tokens[0] + shift, tokens[1] + shift

    return place
