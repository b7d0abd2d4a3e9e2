"""Who needs which keys, when they travel, and which kernel calls consume them: pure functions over ints.

Words: a *document* is a half-open global token range; *rows* and *keys* are local indices of a rank's tokens. A *stage* brings the
keys of some ranks together in a *buffer*, in the order of the whole sequence, and computes with them, while the next stage's keys
travel. The first stage is *local*: it reads the rank's own keys where they are, and nothing travels for it. *Step* s brings rank r
the keys of rank (r - s) mod cp. ``overlap_degree`` n > 0 computes all rows with the rank's own keys in the local stage, and the
other steps in n groups, one stage each. 0 gathers all keys in one stage and computes rows there with all that they see, but for
those that see own keys alone: the local stage has them. With a :class:`HeadStart` the local stage also has some rows' own keys,
which are then the only rows that are computed twice.

Under zigzag and a causal mask, cp_size = 2, one document (rows × keys by chunk; own causal part \\, remote rectangle #):

              chunk 0  1  2  3                    rank 0 holds chunks 0 and 3: row chunk 3 sees the remote chunks 1 and 2.
    rank 0  0       \\                             rank 1 holds chunks 1 and 2: both see the remote chunk 0, and chunk 3 never
    rank 1  1       #  \\                          travels, because no query there sees it.
    rank 1  2       #  \\  \\
    rank 0  3       \\  #  #  \\                    With overlap_degree 0 rank 1 has one causal call: its rows over chunks 0 to 2.

Under a sliding window only the keys within it travel: of each chunk at most the last ``left`` and the first ``right`` (a halo). A
kernel call knows nothing of where its rows and keys stand; its window is aligned to the bottom right of each segment, so that
rows that end at global index r and keys that end at k see, under the global window (left, right), the kernel's
(left + k - r, right + r - k).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from magi_sink_cp.dist.layout import Range, RankRanges, intersection, num_tokens, union

Window = tuple[int, int]
FULL: Window = (-1, -1)
CAUSAL: Window = (-1, 0)


@dataclass(frozen=True)
class Segment:
    """Query rows × keys of one document under a kernel's window (left, right), aligned to the bottom right; -1 is unlimited.

    On the ``diagonal`` the rows are among the keys: every real row is in exactly one such segment of a schedule.
    """

    rows: Range
    keys: Range
    window_size: Window
    diagonal: bool


@dataclass(frozen=True)
class KernelCall:
    """Segments for one varlen kernel call: rows ``rows`` of q, keys ``keys`` of the stage's K/V, offsets relative to both.

    The rows of its segments are disjoint, and so are the keys, so that backward can write dQ, dK and dV without overlap. Rows
    or keys between two segments appear as documents without keys or without rows. ``first`` says that no call before it has its
    rows, so that it can write their out and dQ and leave their delta.
    """

    rows: Range
    keys: Range
    cu_seqlens_q: tuple[int, ...]
    cu_seqlens_k: tuple[int, ...]
    window_size: Window
    first: bool


def visible_pairs(num_q: int, num_k: int, left: int, right: int) -> int:
    """(query, key) pairs that a window (left, right), aligned to the bottom right, lets through; -1 is unlimited."""
    total = _pairs_up_to(num_q, num_k, num_k if right < 0 else num_k - num_q + right)
    return total if left < 0 else total - _pairs_up_to(num_q, num_k, num_k - num_q - left - 1)


def _pairs_up_to(num_q: int, num_k: int, offset: int) -> int:
    """How many pairs (p, s), 0 <= p < num_q, 0 <= s < num_k, have s - p <= offset."""

    def below(rows: int) -> int:  # Σ min(num_k, u) for u = 1 … rows
        beyond = max(0, rows - num_k)
        return rows * (rows + 1) // 2 - beyond * (beyond + 1) // 2 if rows > 0 else 0

    return below(num_q + offset) - below(offset)


@dataclass(frozen=True)
class Message:
    """Token range ``tokens`` to or from a cp rank: of the tensor that is sent, or of the buffer that receives."""

    peer: int
    tokens: Range


@dataclass(frozen=True)
class Route:
    """What a rank must know of the others' buffers to write into them.

    The buffers of exchanges that can be in flight at once stand side by side in an arena, at the same place on every rank.

    Attributes:
        places: for each of the exchange's sends, the token of the peer's buffer where it begins.
        parts: tokens of each part of the arena: the largest buffer of any rank.
        part: which of them the exchange fills.
    """

    places: tuple[int, ...]
    parts: tuple[int, ...]
    part: int


@dataclass(frozen=True)
class Exchange:
    """What a rank sends and receives at once. Between two ranks the messages stand in one order at both ends.

    ``route`` is None unless :func:`build_schedule` was asked for it, for the transports that need it.
    """

    name: str
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]
    buffer_tokens: int
    route: Route | None = None

    @property
    def sent_tokens(self) -> int:
        return sum(m.tokens[1] - m.tokens[0] for m in self.sends)

    @property
    def received_tokens(self) -> int:
        return sum(m.tokens[1] - m.tokens[0] for m in self.receives)

    def __str__(self) -> str:
        sources, targets = (sorted({m.peer for m in messages}) for messages in (self.receives, self.sends))
        return f"{self.name} (from cp ranks {sources}, to cp ranks {targets})"


@dataclass(frozen=True)
class Stage:
    """Keys that come together, and the kernel calls over them.

    Attributes:
        local: it is the rank's own keys, as they are; nothing travels, on any rank.
        cast: brings the other ranks' keys into the buffer.
        own: (local keys, where they stand in the buffer) if the stage reads own keys beside the others'.
        reduce: brings home the gradients that other ranks computed for what this one sent, back to back in the order of
            ``cast.sends``.
    """

    local: bool
    calls: tuple[KernelCall, ...]
    cast: Exchange
    own: tuple[tuple[Range, Range], ...]
    reduce: Exchange


@dataclass(frozen=True)
class Schedule:
    """All stages of one rank under one mask, in order."""

    stages: tuple[Stage, ...]

    @property
    def sent_tokens(self) -> int:
        return sum(stage.cast.sent_tokens for stage in self.stages)

    @property
    def received_tokens(self) -> int:
        return sum(stage.cast.received_tokens for stage in self.stages)


@dataclass(frozen=True)
class HeadStart:
    """What overlap_degree 0 computes while the keys travel: ``pairs``, and ``pairs_per_key`` for each key that travels to the rank.

    Where rows that see own keys alone are fewer, the last rows of a document's part start with their own keys: a multiple of
    ``rows`` of them, and at most a quarter of the part.
    """

    pairs: int
    pairs_per_key: float
    rows: int


def build_schedule(
    layout: Sequence[RankRanges],
    documents: Sequence[Range],
    window_size: Window,
    rank: int,
    overlap_degree: int,
    head_start: HeadStart | None = None,
    large_rows: int | None = None,
    routed: bool = False,
) -> Schedule:
    """The schedule of ``rank``.

    Args:
        layout: global token ranges per rank.
        documents: sorted, disjoint, non-empty global ranges; tokens of none are padding.
        window_size: (left, right) tokens that a query sees around itself in its document; -1 is unlimited, right 0 is causal.
        overlap_degree: how many stages travel behind another one's computation; more than cp_size - 1 are as many.
        head_start: for overlap_degree 0.
        large_rows: neighbouring segments of so many rows are kernel calls of their own, as dense calls are faster than packed ones
            (FlashAttention-4's by a sixth under a window of 128).
        routed: with the routes of its exchanges, for which the schedules of all ranks are built.
    """
    sequence = _Sequence(layout, documents, window_size, large_rows)

    def of(which: int) -> Schedule:
        return Schedule(tuple(sequence.stages(which, overlap_degree, head_start)))

    return _add_routes([of(other) for other in range(len(layout))], rank) if routed else of(rank)


@dataclass(frozen=True)
class Share:
    """What of a sequence concerns one rank.

    Attributes:
        remote_keys: keys that travel to it.
        remote_rows: rows that see any of them.
        alone_pairs: visible pairs of rows in parts of documents that see own keys alone.
    """

    remote_keys: int
    remote_rows: int
    alone_pairs: int


def typical_share(layout: Sequence[RankRanges], documents: Sequence[Range], window_size: Window) -> Share:
    """What travels, on average over the ranks; pairs of the rank that has fewest, as the others wait for it."""
    sequence = _Sequence(layout, documents, window_size)
    shares = [sequence.share(rank) for rank in range(len(layout))]
    return Share(
        sum(share.remote_keys for share in shares) // len(shares),
        sum(share.remote_rows for share in shares) // len(shares),
        min(share.alone_pairs for share in shares),
    )


def _add_routes(schedules: Sequence[Schedule], rank: int) -> Schedule:
    """The schedule of ``rank`` with the routes of its exchanges, from the schedules of all ranks.

    A stage's buffer lies beside that of the stage before, which may still be read, and so do the gradients of two stages.
    """
    numbers = [n for n, stage in enumerate(schedules[rank].stages) if not stage.local]
    slots = min(2, len(numbers))
    parts: list[int] = []
    for way in ("cast", "reduce"):
        parts += [max((getattr(s.stages[n], way).buffer_tokens for s in schedules for n in numbers), default=0)] * slots

    def routed(number: int, way: str) -> Exchange:
        exchange: Exchange = getattr(schedules[rank].stages[number], way)
        waiting: dict[int, list[int]] = {}
        for peer in {message.peer for message in exchange.sends}:
            theirs = getattr(schedules[peer].stages[number], way).receives
            waiting[peer] = [m.tokens[0] for m in theirs if m.peer == rank]
        places = tuple(waiting[message.peer].pop(0) for message in exchange.sends)
        part = numbers.index(number) % slots + (0 if way == "cast" else slots)
        return replace(exchange, route=Route(places, tuple(parts), part))

    return Schedule(
        tuple(
            replace(stage, cast=routed(n, "cast"), reduce=routed(n, "reduce")) if n in numbers else stage
            for n, stage in enumerate(schedules[rank].stages)
        )
    )


@dataclass(frozen=True)
class _Piece:
    """Rows (global) of one document in one of a rank's ranges, the local index of the first, and the keys (global) they see."""

    rows: Range
    start: int
    keys: Range


class _Sequence:
    """The whole sequence under one mask, seen from any rank."""

    def __init__(
        self, layout: Sequence[RankRanges], documents: Sequence[Range], window_size: Window, large_rows: int | None = None
    ) -> None:
        self._layout = layout
        self._large_rows = large_rows
        self._documents = documents
        self._starts = [lo for lo, _ in documents]
        # A window that reaches across every document limits nothing.
        farthest = max((hi - lo for lo, hi in documents), default=1) - 1
        left, right = window_size
        self._window = (-1 if 0 < farthest <= left else left, -1 if 0 < farthest <= right else right)
        self._pieces_of: dict[int, list[_Piece]] = {}
        self._seen_by: dict[int, RankRanges] = {}

    def stages(self, rank: int, overlap_degree: int, head_start: HeadStart | None) -> Iterator[Stage]:
        """The stages of ``rank``."""
        cp_size = len(self._layout)
        pieces = self._pieces(rank)
        if overlap_degree > 0 or cp_size == 1:
            yield self._stage(rank, 0, range(1), pieces)
            groups = min(overlap_degree, cp_size - 1)
            for group in range(groups):
                steps = range(1 + (cp_size - 1) * group // groups, 1 + (cp_size - 1) * (group + 1) // groups)
                yield self._stage(rank, 1 + group, steps, pieces)
        else:
            alone, gathered = self._apart(rank)
            early: list[_Piece] = []
            if head_start is not None and gathered:
                gathered, early = self._split(rank, gathered, head_start)
            yield self._stage(rank, 0, range(1), [*alone, *early])
            yield self._stage(rank, 1, range(cp_size), gathered, early)

    def _split(self, rank: int, gathered: Sequence[_Piece], head_start: HeadStart) -> tuple[list[_Piece], list[_Piece]]:
        """``gathered`` without the rows that get the head start, and these."""
        left, right = self._window

        def cut(piece: _Piece, num_rows: int) -> tuple[_Piece, _Piece]:
            (lo, hi), at = piece.rows, piece.rows[1] - num_rows
            first, last = (_reach(piece.keys, rows, left, right) for rows in ((lo, at), (at, hi)))
            return _Piece((lo, at), piece.start, first), _Piece((at, hi), piece.start + at - lo, last)

        share = self.share(rank)
        missing = head_start.pairs + head_start.pairs_per_key * share.remote_keys - share.alone_pairs
        chosen = max(gathered, key=lambda piece: self._own_pairs(rank, [piece]))
        most = (chosen.rows[1] - chosen.rows[0]) // (4 * head_start.rows)
        steps = bisect_left(range(most), missing, key=lambda n: self._own_pairs(rank, [cut(chosen, n * head_start.rows)[1]]))
        if steps == 0:
            return list(gathered), []
        late, early = cut(chosen, steps * head_start.rows)
        return [late if piece is chosen else piece for piece in gathered], [early]

    def _stage(self, rank: int, number: int, steps: range, pieces: Sequence[_Piece], early: Sequence[_Piece] = ()) -> Stage:
        """Stage ``number``: ``pieces`` of ``rank`` with the keys that ``steps`` bring, ``early`` ones with the others' alone."""
        cp_size = len(self._layout)
        local = steps == range(1)
        mine = _local(self._layout[rank])
        own: list[tuple[Range, Range]] = []
        receives: list[Message] = []
        remote: RankRanges = ()
        if local:
            runs, to_buffer, size = union(self._layout[rank]), mine, num_tokens(self._layout[rank])
        else:
            sources = [(rank - step) % cp_size for step in steps]
            here, seen = (union([piece.keys for piece in seeing]) for seeing in (pieces, (*pieces, *early)))
            arrivals = sorted(
                (tokens, source)
                for source in sources
                for tokens in intersection(here if source == rank else seen, self._layout[source])
            )
            buffer = [tokens for tokens, _ in arrivals]
            runs, to_buffer, size = union(buffer), _local(buffer), num_tokens(buffer)
            remote = union([tokens for tokens, source in arrivals if source != rank])
            for tokens, source in arrivals:
                if source == rank:
                    own.append((mine(tokens), to_buffer(tokens)))
                else:
                    receives.append(Message(source, to_buffer(tokens)))
        sends: list[Message] = []
        homeward: list[Message] = []
        place = 0
        for step in steps:
            target = (rank + step) % cp_size
            if target == rank:
                continue
            for tokens in intersection(self._seen(target), self._layout[rank]):
                sends.append(Message(target, mine(tokens)))
                homeward.append(Message(target, (place, place + tokens[1] - tokens[0])))
                place += tokens[1] - tokens[0]
        segments = _join(list(self._segments(pieces, runs, to_buffer))) + _join(list(self._segments(early, remote, to_buffer)))
        starts = sorted({piece.start for piece in (*self._pieces(rank), *pieces, *early)})
        calls = _group(segments, starts if 0 in steps else None, self._large_rows)
        return Stage(
            local=local,
            calls=tuple(sorted(calls, key=lambda call: not call.first)),
            cast=Exchange(f"group_cast of stage {number}", tuple(sends), tuple(receives), size),
            own=tuple(own),
            reduce=Exchange(f"group_reduce of stage {number}", tuple(receives), tuple(homeward), place),
        )

    def _apart(self, rank: int) -> tuple[list[_Piece], list[_Piece]]:
        """The rank's pieces: those that see own keys alone, and the others."""
        own = union(self._layout[rank])
        alone: list[_Piece] = []
        gathered: list[_Piece] = []
        for piece in self._pieces(rank):
            sees_own_alone = num_tokens(intersection(own, (piece.keys,))) == piece.keys[1] - piece.keys[0]
            (alone if sees_own_alone else gathered).append(piece)
        return alone, gathered

    def _own_pairs(self, rank: int, pieces: Sequence[_Piece]) -> int:
        """Visible pairs of the pieces' rows and the rank's own keys."""
        segments = self._segments(pieces, union(self._layout[rank]), lambda keys: keys)
        return sum(visible_pairs(s.rows[1] - s.rows[0], s.keys[1] - s.keys[0], *s.window_size) for s in segments)

    def share(self, rank: int) -> Share:
        """What of the sequence concerns ``rank``."""
        left, right = self._window
        own, rows = union(self._layout[rank]), 0
        for piece in self._pieces(rank):
            held = [piece.keys[0], *(end for tokens in intersection(own, (piece.keys,)) for end in tokens), piece.keys[1]]
            reached = [_reach(piece.rows, (lo, hi), right, left) for lo, hi in zip(held[::2], held[1::2], strict=True) if lo < hi]
            rows += num_tokens(union(reached))
        seen = self._seen(rank)
        return Share(num_tokens(seen) - num_tokens(intersection(own, seen)), rows, self._own_pairs(rank, self._apart(rank)[0]))

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
                    pieces.append(_Piece(rows, base + rows[0] - lo, _reach(document, rows, left, right)))
            base += hi - lo
        self._pieces_of[rank] = pieces
        return pieces

    def _segments(self, pieces: Sequence[_Piece], runs: RankRanges, to_buffer: Callable[[Range], Range]) -> Iterator[Segment]:
        """Rows × keys of every piece and every run of neighbouring keys that it sees something of."""
        left, right = self._window
        for piece in pieces:
            for run in intersection(runs, (piece.keys,)):
                diagonal = run[0] <= piece.rows[0] and piece.rows[1] <= run[1]
                rows = _reach(piece.rows, run, right, left)
                keys = _reach(run, rows, left, right)
                if rows[0] >= rows[1] or keys[0] >= keys[1]:
                    continue
                # The kernel's limits. Beside the diagonal none where they hide no pair, so that more segments share a call.
                lag = rows[1] - keys[1]
                kernel_left = -1 if left < 0 or (not diagonal and left - lag >= keys[1] - keys[0] - 1) else left - lag
                kernel_right = -1 if right < 0 or (not diagonal and right + lag >= rows[1] - rows[0] - 1) else right + lag
                start = piece.start + rows[0] - piece.rows[0]
                yield Segment((start, start + rows[1] - rows[0]), to_buffer(keys), (kernel_left, kernel_right), diagonal)


def _reach(tokens: Range, others: Range, before: int, after: int) -> Range:
    """Those of ``tokens`` that stand at most ``before`` before or ``after`` after one of the others; -1 is any distance."""
    lo = tokens[0] if before < 0 else max(tokens[0], others[0] - before)
    hi = tokens[1] if after < 0 else min(tokens[1], others[1] + after)
    return lo, hi


def _local(ranges: Sequence[Range]) -> Callable[[Range], Range]:
    """Maps a part of the ranges, which are sorted, to its place where they stand back to back."""
    starts, bases, base = [lo for lo, _ in ranges], [], 0
    for lo, hi in ranges:
        bases.append(base)
        base += hi - lo

    def place(tokens: Range) -> Range:
        which = bisect_right(starts, tokens[0]) - 1
        shift = bases[which] - starts[which]
        return tokens[0] + shift, tokens[1] + shift

    return place


def _join(segments: Sequence[Segment]) -> list[Segment]:
    """Fewer, larger segments with the same pairs, joined where they touch: along the keys, then along the rows."""
    along_keys: list[Segment] = []
    for s in sorted(segments, key=lambda s: (s.rows, s.keys)):
        last = along_keys[-1] if along_keys else s
        if last.rows == s.rows and last.keys[1] == s.keys[0] and last.window_size == FULL and s.window_size[0] == -1:
            along_keys[-1] = Segment(s.rows, (last.keys[0], s.keys[1]), s.window_size, last.diagonal or s.diagonal)
        else:
            along_keys.append(s)
    along_rows: list[Segment] = []
    for s in sorted(along_keys, key=lambda s: (s.keys[0], s.rows)):
        last = along_rows[-1] if along_rows else s
        if last.rows[1] == s.rows[0] and last.keys[0] == s.keys[0] and last.window_size == s.window_size and (
            (s.window_size == FULL and last.keys == s.keys)
            or (s.window_size == CAUSAL and s.keys[1] - last.keys[1] == s.rows[1] - s.rows[0])
        ):  # fmt: skip
            along_rows[-1] = Segment((last.rows[0], s.rows[1]), s.keys, s.window_size, last.diagonal or s.diagonal)
        else:
            along_rows.append(s)
    return along_rows


def _group(segments: Sequence[Segment], starts: Sequence[int] | None, large_rows: int | None) -> list[KernelCall]:
    """Kernel calls whose segments have one window and ascend in rows and in keys: the first that a segment fits behind takes it.

    Neighbours of ``large_rows`` or more stay apart. Between two segments of a call lie no more rows than they hold themselves, as
    those are computed for nothing. With ``starts``, the sorted first rows of all pieces, they are padding: what a call writes is
    then nobody else's.
    """

    def fits(group: list[Segment], s: Segment) -> bool:
        last = group[-1]
        if (last.window_size, last.diagonal) != (s.window_size, s.diagonal):
            return False
        if large_rows is not None and min(x.rows[1] - x.rows[0] for x in (last, s)) >= large_rows:
            return False
        gap = s.rows[0] - last.rows[1]
        if gap < 0 or s.keys[0] < last.keys[1]:
            return False
        if starts is not None:
            return bisect_left(starts, last.rows[1]) == bisect_left(starts, s.rows[0])
        return gap <= last.rows[1] - last.rows[0] + s.rows[1] - s.rows[0]

    groups: list[list[Segment]] = []
    for s in sorted(segments, key=lambda s: (s.rows, s.keys)):
        for group in groups:
            if fits(group, s):
                group.append(s)
                break
        else:
            groups.append([s])
    return [_call(group) for group in groups]


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
        first=first.diagonal,
    )
