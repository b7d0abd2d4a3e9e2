"""Who needs which keys, when they travel, and which kernel calls use them.

Words: a *band* is a part of the mask (mask.py), for example a document under a window. *Rows* and
*keys* are local indices of a rank's tokens. A *piece* is the part of a band in one of a rank's
ranges. A *stage* brings the keys of some ranks together in a *buffer*, in the order of the whole
sequence, and computes with them, while the next stage's keys travel. The first stage is *local*: it
reads the rank's own keys where they are, and nothing travels for it. *Step* s brings rank r the
keys of rank (r - s) mod cp.

All of it is arrays over the pieces, or the messages, of all ranks at once.

``overlap_degree`` n > 0: the local stage computes all rows with the rank's own keys. The other
steps come in n groups, one stage each. ``overlap_degree`` 0: one stage gathers all keys that rows
see which see others' keys, and computes each of these rows once. Rows that see own keys alone do
not wait for it: they are in the local stage. Under a window that is all but a halo's.

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

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from magi_sink_cp.dist.planning.exchange import Exchange, Message, Route, Schedule, Stage
from magi_sink_cp.dist.planning.layout import Places, RankRanges, num_tokens, places
from magi_sink_cp.dist.planning.mask import (
    FAR,
    Bands,
    Flags,
    Ints,
    band_pairs,
    covered,
    overlaps,
    runs,
    take,
)
from magi_sink_cp.dist.planning.packing import NO_GAPS, Gaps, Packed, Segments, pack


@dataclass(frozen=True)
class Share:
    """What of a sequence concerns one rank.

    Attributes:
        remote_keys: keys that travel to it.
        own_keys: its own keys that rows see which also see some of these.
        remote_rows: rows that see any of the remote keys.
        alone_pairs: visible pairs of rows that see own keys alone.
    """

    remote_keys: int
    own_keys: int
    remote_rows: int
    alone_pairs: int


class _Pieces(NamedTuple):
    """Pieces of bands (global), in the order of ranks and rows.

    Attributes:
        rank: who holds the rows.
        row_lo, row_hi: the rows that see something.
        start: local index of the first row.
        key_lo, key_hi: what the rows see.
        lo, hi: of the band.
    """

    rank: Ints
    row_lo: Ints
    row_hi: Ints
    start: Ints
    key_lo: Ints
    key_hi: Ints
    lo: Ints
    hi: Ints

    def pairs(self) -> Ints:
        """Visible pairs of each piece."""
        return band_pairs(Bands(*self[1:3], *self[4:]))


class _Arrivals(NamedTuple):
    """What the rows of a rank that see others' keys see, by the ranges of those who hold it; in the
    order of ranks and keys.

    Attributes:
        target: who sees them.
        source: who holds them; maybe the target itself.
        lo: the first token (global).
        size: how many they are.
        start: local index of the first one at the source.
        step: (target - source) mod cp; 0 for own keys.
    """

    target: Ints
    source: Ints
    lo: Ints
    size: Ints
    start: Ints
    step: Ints


class Mask:
    """A mask over a layout, seen from any rank. What all schedules share is computed once.

    Attributes:
        cp_size: ranks.
        local_tokens: tokens of the first rank, padding included.
        most_ranges: of the layout on any rank.
        num_bands: of the mask.
    """

    def __init__(self, layout: Sequence[RankRanges], bands: Bands) -> None:
        self.cp_size = len(layout)
        self.local_tokens = num_tokens(layout[0]) if layout else 0
        self.most_ranges = max(map(len, layout), default=0)
        self.num_bands = len(bands.lo)
        self._layout = layout
        self._places = places(layout)
        self._bands = bands
        self._pieces = _find_pieces(self._places, bands)
        self._own = _OwnTokens(self._places)
        # Pieces, or parts of them, whose rows see own keys alone; and those that wait for others'.
        alone = self._own.suffices(self._pieces)
        parts = self._own.split(take(self._pieces, ~alone))
        alone_too = self._own.suffices(parts)
        self._alone = _Pieces(
            *(
                np.concatenate(both)
                for both in zip(take(self._pieces, alone), take(parts, alone_too), strict=True)
            )
        )
        self._waiting = take(parts, ~alone_too)
        self._arrivals = self._find_arrivals()
        self._buffers: dict[int, tuple[int, int]] = {}

    def schedule(
        self,
        rank: int,
        overlap_degree: int,
        large_rows: int | None = None,
        gaps: Gaps = NO_GAPS,
        routed: bool = False,
    ) -> Schedule:
        """The schedule of ``rank``.

        Args:
            overlap_degree: how many stages travel behind another one's computation; at most
                cp_size - 1 count.
            large_rows, gaps: as in :func:`~magi_sink_cp.dist.planning.packing.pack`.
            routed: add the routes of the exchanges.
        """
        pieces, own = _of_rank(self._pieces, rank), self._places.of(rank)
        if self.cp_size == 1:
            return self._put_together(rank, [], pack([_segments(pieces, own)], 1, large_rows, gaps))
        traffic = self._traffic(overlap_degree, None if routed else rank)
        if traffic.degree == 0:
            local, travelling = _of_rank(self._alone, rank), _of_rank(self._waiting, rank)
        else:
            local = travelling = pieces
        stages = traffic.of(rank, self.buffers(traffic.degree) if routed else None)
        segments = [_segments(local, own)]
        segments += [_segments(travelling, buffer) for _, buffer in stages]
        # The first stage sees every row, so that dsink can be reduced behind the others.
        owning = 1 if traffic.degree else 2
        packed = pack(segments, owning, large_rows, gaps)
        return self._put_together(rank, [stage for stage, _ in stages], packed)

    def _put_together(self, rank: int, travelling: Sequence[Stage], packed: Packed) -> Schedule:
        cast = Exchange("group_cast of stage 0", (), (), num_tokens(self._layout[rank]))
        reduce = Exchange("group_reduce of stage 0", (), (), 0)
        stages = [Stage(True, (), cast, (), reduce), *travelling]
        return Schedule(
            tuple(
                replace(stage, calls=calls)
                for stage, calls in zip(stages, packed.stages, strict=True)
            ),
            packed.owned,
        )

    def share(self) -> Share:
        """The mean over the ranks of what travels, and the smallest alone_pairs.

        The smallest, as the rank with least to compute meanwhile waits longest for its keys.
        """
        arrivals, alone, waiting = self._arrivals, self._alone, self._waiting
        pairs = np.bincount(alone.rank, alone.pairs().astype(float), minlength=self.cp_size)
        return Share(
            int(arrivals.size[arrivals.step > 0].sum()) // self.cp_size,
            int(arrivals.size[arrivals.step == 0].sum()) // self.cp_size,
            int((waiting.row_hi - waiting.row_lo).sum()) // self.cp_size,
            int(pairs.min()),
        )

    def pairs(self, rank: int | None = None) -> int:
        """Visible pairs of the rank's rows, or of all."""
        if rank is None:
            return int(band_pairs(self._bands).sum())
        return int(_of_rank(self._pieces, rank).pairs().sum())

    def buffers(self, overlap_degree: int) -> tuple[int, int]:
        """Tokens of the largest buffer of any rank and stage: for keys, and for gradients."""
        degree = min(overlap_degree, self.cp_size - 1)
        if degree not in self._buffers:
            self._buffers[degree] = self._largest_buffers(degree) if self.cp_size > 1 else (0, 0)
        return self._buffers[degree]

    def _largest_buffers(self, degree: int) -> tuple[int, int]:
        stages = max(1, degree)
        target, source, tokens = self._tokens_between
        step = (target - source) % self.cp_size
        stage = _stage_of_step(self.cp_size, degree)[step]
        travels = step > 0
        arrives = travels if degree else slice(None)
        cast = np.bincount((target * stages + stage)[arrives], tokens[arrives])
        reduce = np.bincount((source * stages + stage)[travels], tokens[travels])
        return int(cast.max(initial=0)), int(reduce.max(initial=0))

    @functools.cached_property
    def _tokens_between(self) -> tuple[Ints, Ints, NDArray[np.float64]]:
        """(target, source, tokens) for all pairs of ranks of which one sees keys of the other."""
        a = self._arrivals
        pair, at = np.unique(a.target * self.cp_size + a.source, return_inverse=True)
        tokens = np.bincount(at, a.size).astype(np.float64)
        return pair // self.cp_size, pair % self.cp_size, tokens

    def _traffic(self, overlap_degree: int, rank: int | None) -> _Traffic:
        """The messages of all ranks, or of one: what routes need, or all else."""
        degree = min(overlap_degree, self.cp_size - 1)
        arrivals = self._remote if degree else self._arrivals
        if rank is not None:
            arrivals = take(arrivals, (arrivals.target == rank) | (arrivals.source == rank))
        return _Traffic(arrivals, self.cp_size, degree)

    @functools.cached_property
    def _remote(self) -> _Arrivals:
        """The arrivals that travel."""
        return take(self._arrivals, self._arrivals.step > 0)

    def _find_arrivals(self) -> _Arrivals:
        """What every rank's waiting rows see, cut where its holder changes."""
        p = self._waiting
        span = int(self._places.hi.max(initial=0)) + 1  # apart: the ranks' tokens
        lo, hi = covered(p.rank * span + p.key_lo, p.rank * span + p.key_hi)
        target = lo // span
        lo, hi = lo - target * span, hi - target * span
        seen, at = overlaps(lo, hi, self._places.lo, self._places.hi)
        start, stop = (
            np.maximum(lo[seen], self._places.lo[at]),
            np.minimum(hi[seen], self._places.hi[at]),
        )
        target, source = target[seen], self._places.rank[at]
        place = self._places.start[at] + start - self._places.lo[at]
        step = (target - source) % self.cp_size
        return _Arrivals(target, source, start, stop - start, place, step)


def _of_rank(pieces: _Pieces, rank: int) -> _Pieces:
    return take(pieces, pieces.rank == rank)


def _find_pieces(held: Places, bands: Bands) -> _Pieces:
    """All pieces of all ranks."""
    # Rows that see something, and what these see.
    q_lo = np.maximum(bands.q_lo, bands.k_lo - bands.hi)
    q_hi = np.minimum(bands.q_hi, bands.k_hi - bands.lo)
    q_hi = np.where(bands.lo > bands.hi, q_lo, q_hi)
    band, place = overlaps(q_lo, q_hi, held.lo, held.hi)
    row_lo = np.maximum(q_lo[band], held.lo[place])
    row_hi = np.minimum(q_hi[band], held.hi[place])
    pieces = _Pieces(
        held.rank[place],
        row_lo,
        row_hi,
        held.start[place] + row_lo - held.lo[place],
        np.maximum(bands.k_lo[band], row_lo + bands.lo[band]),
        np.minimum(bands.k_hi[band], row_hi + bands.hi[band]),
        bands.lo[band],
        bands.hi[band],
    )
    pieces = take(pieces, pieces.key_lo < pieces.key_hi)
    return take(pieces, np.lexsort((pieces.row_lo, pieces.rank)))


class _OwnTokens:
    """Which tokens a rank holds itself, for many ranks at once."""

    def __init__(self, held: Places) -> None:
        self._held = take(held, np.argsort(held.rank, kind="stable"))
        self._span = int(held.hi.max(initial=0)) + 1
        self._keys = self._held.rank * self._span + self._held.lo

    def _before(self, rank: Ints, token: Ints) -> tuple[Ints, Ints]:
        """How many tokens before ``token`` the rank holds; and its last range that begins there."""
        index = np.searchsorted(self._keys, rank * self._span + token, side="right") - 1
        index = np.where((index >= 0) & (self._held.rank[index] == rank), index, -1)
        inside = np.minimum(token, self._held.hi[index]) - self._held.lo[index]
        return np.where(index < 0, 0, self._held.start[index] + inside), index

    def suffices(self, pieces: _Pieces) -> Flags:
        """Which pieces see keys of their own rank alone."""
        if not len(pieces.rank):
            return np.zeros(0, dtype=bool)
        own = (
            self._before(pieces.rank, pieces.key_hi)[0]
            - self._before(pieces.rank, pieces.key_lo)[0]
        )
        return own == pieces.key_hi - pieces.key_lo

    def split(self, pieces: _Pieces) -> _Pieces:
        """The pieces, cut where rows begin or end to see others' keys.

        A rank's other ranges between the first and the last key that a piece sees are taken for
        others' keys. Under documents there are none that would matter.
        """
        if not len(pieces.rank):
            return pieces
        p, held = pieces, self._held
        # The range that holds the rows, and those that hold the first and the last key, if any.
        _, rows_at = self._before(p.rank, p.row_lo)
        _, first_at = self._before(p.rank, p.key_lo)
        _, last_at = self._before(p.rank, p.key_hi - 1)
        first_own = (first_at >= 0) & (held.hi[first_at] > p.key_lo)
        first = np.where(first_own, held.hi[first_at], p.key_lo)
        last_own = (last_at >= 0) & (held.hi[last_at] > p.key_hi - 1)
        last = np.where(last_own, held.lo[last_at], p.key_hi)

        def rows_of(lo: Ints, hi: Ints) -> tuple[Ints, Ints]:  # that see keys [lo, hi)
            start, stop = np.maximum(p.row_lo, lo - p.hi), np.minimum(p.row_hi, hi - p.lo)
            return start, np.where(lo < hi, np.maximum(start, stop), start)

        cuts = np.stack(
            [
                p.row_lo,
                *rows_of(first, np.minimum(p.key_hi, held.lo[rows_at])),
                *rows_of(np.maximum(p.key_lo, held.hi[rows_at]), last),
                p.row_hi,
            ],
            axis=1,
        )
        cuts = np.sort(np.clip(cuts, p.row_lo[:, None], p.row_hi[:, None]), axis=1)
        row_lo, row_hi = cuts[:, :-1].ravel(), cuts[:, 1:].ravel()
        p = _Pieces(*(np.repeat(x, cuts.shape[1] - 1) for x in p))
        parts = p._replace(
            row_lo=row_lo,
            row_hi=row_hi,
            start=p.start + row_lo - p.row_lo,
            key_lo=np.maximum(p.key_lo, row_lo + p.lo),
            key_hi=np.minimum(p.key_hi, row_hi + p.hi),
        )
        return take(parts, (row_lo < row_hi) & (parts.key_lo < parts.key_hi))


class _Traffic:
    """The messages of all ranks in the stages of one overlap_degree.

    Stages that travel are counted from 0 here.
    """

    def __init__(self, arrivals: _Arrivals, cp_size: int, degree: int) -> None:
        """``arrivals``: all of degree 0, else those that travel."""
        self.degree = degree
        self._cp_size = cp_size
        self._num_stages = max(1, degree)
        self._arrivals = arrivals
        self._stage = _stage_of_step(cp_size, degree)[arrivals.step]

    @functools.cached_property
    def _cast_places(self) -> Ints:
        """For each arrival, where it stands in the buffer of its target's stage."""
        a = self._arrivals
        group = a.target * self._num_stages + self._stage
        if self._num_stages == 1:
            return _offsets_of_groups(group, a.size)
        order = np.argsort(group, kind="stable")
        places = np.empty_like(group)
        places[order] = _offsets_of_groups(group[order], a.size[order])
        return places

    @functools.cached_property
    def _reduce_places(self) -> Ints:
        """For each arrival, where its gradients stand in the buffer of its source's stage."""
        a = self._arrivals
        order = np.argsort(a.source * self._cp_size + a.step, kind="stable")
        group = (a.source * self._num_stages + self._stage)[order]
        size = np.where(a.step > 0, a.size, 0)[order]
        places = np.empty_like(size)
        places[order] = _offsets_of_groups(group, size)
        return places

    def of(self, rank: int, largest: tuple[int, int] | None) -> list[tuple[Stage, Places]]:
        """The travelling stages of a rank, without calls, and what stands in their buffers.

        With ``largest``, Mask.buffers, the exchanges have routes.
        """
        a = self._arrivals
        travels = a.step > 0
        into = np.flatnonzero(a.target == rank)
        sent = np.flatnonzero((a.source == rank) & travels)
        sent = sent[np.argsort(a.step[sent], kind="stable")]
        slots = min(2, self._num_stages)

        def route(places: Ints, number: int, first_part: int) -> Route | None:
            if largest is None:
                return None
            parts = tuple(tokens for tokens in largest for _ in range(slots))
            return Route(tuple(places.tolist()), parts, number % slots + first_part)

        def stage(number: int, into: Ints, sent: Ints) -> tuple[Stage, Places]:
            received, own = into[travels[into]], into[~travels[into]]
            arriving = self._cast_places[into]
            receives = _messages(a.source[received], self._cast_places[received], a.size[received])
            sends = _messages(a.target[sent], a.start[sent], a.size[sent])
            homeward = _messages(a.target[sent], self._reduce_places[sent], a.size[sent])
            cast = Exchange(
                f"group_cast of stage {number + 1}",
                sends,
                receives,
                int(a.size[into].sum()),
                route(self._cast_places[sent], number, 0),
            )
            reduce = Exchange(
                f"group_reduce of stage {number + 1}",
                receives,
                homeward,
                int(a.size[sent].sum()),
                route(self._reduce_places[received], number, slots),
            )
            copies = zip(
                _ranges(a.start[own], a.size[own]),
                _ranges(self._cast_places[own], a.size[own]),
                strict=True,
            )
            buffer = Places(a.lo[into], a.lo[into] + a.size[into], a.source[into], arriving)
            return Stage(False, (), cast, tuple(copies), reduce), buffer

        parts_of_into, parts_of_sent = self._by_stage(into), self._by_stage(sent)
        numbers = range(self._num_stages)
        return [stage(*each) for each in zip(numbers, parts_of_into, parts_of_sent, strict=True)]

    def _by_stage(self, index: Ints) -> list[Ints]:
        """The messages ``index`` of each stage, in their order."""
        stage = self._stage[index]
        order = np.argsort(stage, kind="stable")
        edges = np.searchsorted(stage[order], np.arange(self._num_stages + 1)).tolist()
        return [index[order[lo:hi]] for lo, hi in itertools.pairwise(edges)]


def _stage_of_step(cp_size: int, degree: int) -> Ints:
    """Which travelling stage, counted from 0, brings the keys of each step. Own keys (step 0) are
    in the first.
    """
    if degree == 0:
        return np.zeros(cp_size, dtype=np.int64)
    first = 1 + (cp_size - 1) * np.arange(1, degree + 1) // degree
    return np.searchsorted(first, np.arange(cp_size), side="right")


def _offsets_of_groups(group: Ints, size: Ints) -> Ints:
    """For each of the items, whose groups ascend, the sizes of the items before it in its group."""
    stops = np.cumsum(size)
    starts = stops - size
    first = np.flatnonzero(np.diff(group, prepend=-1))
    counts = np.diff(np.append(first, len(group)))
    return starts - np.repeat(starts[first], counts)


def _ranges(start: Ints, size: Ints) -> list[tuple[int, int]]:
    return list(zip(start.tolist(), (start + size).tolist(), strict=True))


def _messages(peer: Ints, start: Ints, size: Ints) -> tuple[Message, ...]:
    return tuple(map(Message, peer.tolist(), _ranges(start, size)))


def _segments(pieces: _Pieces, held: Places) -> Segments:
    """Rows × keys of every piece and every range of ``held`` of which it sees something."""
    held = _joined(held)
    piece, place = overlaps(pieces.key_lo, pieces.key_hi, held.lo, held.hi)
    p = take(pieces, piece)
    seen_lo = np.maximum(p.key_lo, held.lo[place])
    seen_hi = np.minimum(p.key_hi, held.hi[place])
    diagonal = (seen_lo <= p.row_lo) & (p.row_hi <= seen_hi)
    row_lo = np.maximum(p.row_lo, seen_lo - p.hi)
    row_hi = np.minimum(p.row_hi, seen_hi - p.lo)
    key_lo = np.maximum(seen_lo, row_lo + p.lo)
    key_hi = np.minimum(seen_hi, row_hi + p.hi)
    there = (row_lo < row_hi) & (key_lo < key_hi)
    left, right = _kernel_window(row_lo, row_hi, key_lo, key_hi, p.lo, p.hi, diagonal)
    start = p.start + row_lo - p.row_lo
    place_lo = held.start[place] + key_lo - held.lo[place]
    found = Segments(
        start, start + row_hi - row_lo, place_lo, place_lo + key_hi - key_lo, left, right, diagonal
    )
    return take(found, there)


def _kernel_window(
    row_lo: Ints, row_hi: Ints, key_lo: Ints, key_hi: Ints, lo: Ints, hi: Ints, diagonal: Flags
) -> tuple[Ints, Ints]:
    """The kernels' windows for global rows × keys of bands.

    Off the diagonal, a limit that hides no pair is left out, so that more segments share a call.
    """
    shift = key_hi - row_hi
    left, right = shift - lo, hi - shift
    left_hides = (lo > -FAR) & (diagonal | (left < key_hi - key_lo - 1))
    right_hides = (hi < FAR) & (diagonal | (right < row_hi - row_lo - 1))
    return np.where(left_hides, left, -1), np.where(right_hides, right, -1)


def _joined(held: Places) -> Places:
    """Neighbours in the sequence that are neighbours in memory too become one range."""
    touch = (held.lo[1:] == held.hi[:-1]) & (
        held.start[1:] == held.start[:-1] + held.hi[:-1] - held.lo[:-1]
    )
    if not touch.any():
        return held
    first, last = runs(touch)
    return Places(held.lo[first], held.hi[last], held.rank[first], held.start[first])
