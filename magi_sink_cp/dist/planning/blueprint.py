"""Everything of a plan that needs no process group and no GPU: numbers that one process can make
and another one use.

A blueprint knows the mask, the layout, and one rank's place in it. Schedules and choices are made
when they are asked for, and kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from magi_sink_cp.dist.planning.cost import CallSizes, Overlap, choose_overlap, make_work
from magi_sink_cp.dist.planning.exchange import Schedule
from magi_sink_cp.dist.planning.layout import LAYOUTS, OF_DOCUMENTS, RankRanges, num_tokens, union
from magi_sink_cp.dist.planning.mask import (
    CAUSAL,
    FULL,
    Bands,
    Ints,
    Range,
    Slice,
    Window,
    bands_of_documents,
    bands_of_slices,
    expand,
    join_bands,
)
from magi_sink_cp.dist.planning.packing import NO_GAPS, Gaps
from magi_sink_cp.dist.planning.schedule import Mask

# How many masks, schedules and choices a blueprint keeps. A model has a few kinds of layers.
_MOST = 64


class PlanInput(NamedTuple):
    """What is to be planned, checked.

    Attributes:
        total_tokens: tokens of the whole sequence, without padding.
        offsets: of the documents, from 0 to total_tokens.
        mask_slices: or None: documents and windows make the mask.
        position_ids: (total_tokens,), or None.
        layout: a name of :data:`LAYOUTS`.
    """

    total_tokens: int
    offsets: Sequence[int]
    mask_slices: tuple[Slice, ...] | None
    position_ids: Ints | None
    layout: str


class CPBlueprint:
    """One rank's part of a sequence. Made by :func:`magi_sink_cp.make_cp_blueprint`.

    It can be pickled, and holds no tensor.

    Attributes:
        total_tokens: tokens of the whole sequence, without padding.
        cp_size, rank: of the cp group that it is for.
        documents: non-empty (start, stop) ranges of the whole sequence.
        mask_slices: (queries, keys, type) of the mask, or None: documents and windows make it.
        position_ids: int64 (total_tokens,), or None: positions in the documents.
        layout_name: of :data:`LAYOUTS`.
        layout: the token ranges of every rank.
        local_tokens: tokens of this rank, padding included; the same on every rank.
        pad_tokens: padding of the whole sequence: cp_size · local_tokens - total_tokens.
        real_tokens: tokens of this rank that are not padding; they come first.
        digest: sha256 of what all ranks must have alike.
    """

    def __init__(
        self,
        what: PlanInput,
        cp_size: int,
        rank: int,
        layout: tuple[RankRanges, ...] | None = None,
    ) -> None:
        """``layout``: where something else has dealt the tokens; None follows ``what.layout``."""
        self.total_tokens, self.cp_size, self.rank = what.total_tokens, cp_size, rank
        self.mask_slices, self.layout_name = what.mask_slices, what.layout
        self.position_ids = what.position_ids
        edges = np.array(what.offsets, dtype=np.int64)
        documents = np.stack([edges[:-1], edges[1:]], axis=1)
        self._documents = documents[documents[:, 1] > documents[:, 0]]
        self._slices = None if what.mask_slices is None else bands_of_slices(what.mask_slices)
        if layout is None:
            bands = self.bands(CAUSAL)
            if what.layout in OF_DOCUMENTS:
                bands = bands_of_documents(self._documents, CAUSAL)
            layout = LAYOUTS[what.layout](what.total_tokens, cp_size, bands)
        self.layout: tuple[RankRanges, ...] = layout
        own = layout[rank]
        self.local_tokens = num_tokens(own)
        self.pad_tokens = cp_size * self.local_tokens - self.total_tokens
        self.real_tokens = sum(max(0, min(hi, self.total_tokens) - lo) for lo, hi in own)
        self.digest = self._digest()
        self._masks: dict[tuple[Window, int], Mask] = {}
        self._schedules: dict[tuple[Any, ...], Schedule] = {}
        self._overlaps: dict[tuple[Any, ...], Overlap] = {}
        self._asked: dict[Any, None] = {}

    @property
    def documents(self) -> tuple[Range, ...]:
        return tuple((lo, hi) for lo, hi in self._documents.tolist())

    def bands(self, window_size: Window) -> Bands:
        """The mask of a call, one sample. Slices need no window."""
        if self._slices is not None:
            return self._slices
        return bands_of_documents(self._documents, window_size)

    def mask(self, window_size: Window, batch_size: int = 1) -> Mask:
        """The mask of a call over this layout.

        Each of ``batch_size`` samples is laid out and masked alike; they stand back to back.
        """
        key = window_size, batch_size
        found = self._masks.get(key)
        if found is None:
            bands, layout = self.bands(window_size), self.layout
            if batch_size > 1:
                padded = self.total_tokens + self.pad_tokens
                starts = [sample * padded for sample in range(batch_size)]
                bands = join_bands([bands.shifted(at) for at in starts])
                layout = tuple(
                    union([(lo + at, hi + at) for at in starts for lo, hi in ranges])
                    for ranges in layout
                )
            found = _keep(self._masks, key, Mask(layout, bands))
        return found

    def schedule(
        self,
        window_size: Window,
        overlap_degree: int,
        batch_size: int = 1,
        large_rows: int | None = None,
        gaps: Gaps = NO_GAPS,
        routed: bool = False,
    ) -> Schedule:
        """This rank's schedule. The arguments are those of Mask.schedule."""
        degree = min(overlap_degree, self.cp_size - 1)
        key = window_size, degree, batch_size, large_rows, gaps, routed
        found = self._schedules.get(key)
        if found is None:
            mask = self.mask(window_size, batch_size)
            schedule = mask.schedule(self.rank, degree, large_rows, gaps, routed)
            found = _keep(self._schedules, key, schedule)
        return found

    def overlap(
        self,
        window_size: Window,
        sizes: CallSizes,
        sink_kernel_slower: float | None,
        link: str,
    ) -> Overlap:
        """What the cost model chooses; the same on every rank."""
        key = window_size, sizes, sink_kernel_slower, link
        found = self._overlaps.get(key)
        if found is None:
            mask = self.mask(window_size, sizes.batch_size)
            work = make_work(mask, sizes)
            chosen = choose_overlap(work, self.cp_size, link, sink_kernel_slower, mask.buffers)
            found = _keep(self._overlaps, key, chosen)
        return found

    def rows_without_owner(self, schedule: Schedule, batch_size: int) -> tuple[Range, ...]:
        """Rows of tokens (no padding) that no call of the schedule owns.

        They see nothing, or, in the first stage of several, others' keys alone. Documents have
        none.
        """
        if self.mask_slices is None:
            return ()
        edges = [0]
        for lo, hi in schedule.owned:
            edges += [lo, hi]
        edges.append(batch_size * self.local_tokens)
        gaps = list(zip(edges[::2], edges[1::2], strict=True))
        found = []
        for sample in range(batch_size):
            first = sample * self.local_tokens
            for lo, hi in gaps:
                start, stop = max(lo, first), min(hi, first + self.real_tokens)
                if start < stop:
                    found.append((start, stop))
        return tuple(found)

    def prepare(self, asked: Iterable[tuple[Any, ...]]) -> None:
        """Make ahead what the calls of another blueprint have asked for: its ``asked``.

        Degrees that a call was given itself are its own; the others follow the cost model.
        """
        for window, sizes, slower, link, degrees, routed in asked:
            overlap = self.overlap(window, sizes, slower, link)
            self.pass_schedules(window, sizes, overlap, degrees, routed)
            self.asks(window, sizes, slower, link, degrees, routed)

    @property
    def asked(self) -> list[tuple[Any, ...]]:
        """What calls have asked for; another thread may read it."""
        return list(self._asked.copy())

    def forget_masks(self) -> None:
        """They are large, and are made again where they are asked for."""
        self._masks.clear()

    def pass_schedules(
        self,
        window_size: Window,
        sizes: CallSizes,
        overlap: Overlap,
        overlap_degree: int | None,
        routed: bool,
    ) -> tuple[tuple[int, int], Schedule, Schedule]:
        """The degrees, and the schedules of forward and backward, of one kind of call.

        ``overlap_degree`` is None where the cost model chooses.
        """
        degrees = overlap.degrees if overlap_degree is None else (overlap_degree, overlap_degree)
        batch, gaps = sizes.batch_size, Gaps(sizes.leaves_gaps and not overlap.sink_in_kernel)
        forward = self.schedule(window_size, degrees[0], batch, overlap.large_rows, gaps, routed)
        backward = self.schedule(
            window_size,
            degrees[1],
            batch,
            None,
            Gaps(sizes.leaves_gaps, overlap.idle_tiles),
            routed,
        )
        return degrees, forward, backward

    def asks(self, *what: Any) -> None:
        """Remember that a call asked for ``what``, the arguments of :meth:`prepare`'s loop."""
        if len(self._asked) < _MOST:
            self._asked[what] = None

    def position_runs(self) -> tuple[Ints, Ints]:
        """(first position, length) of the runs of this rank's positions, padding left out."""
        starts = self._documents[:, 0] if len(self._documents) else np.zeros(1, dtype=np.int64)
        own = np.array(self.layout[self.rank], dtype=np.int64).reshape(-1, 2)
        lo, hi = (np.minimum(edge, self.total_tokens) for edge in own.T)
        # Where a new document begins inside a range, a new run begins.
        first = np.searchsorted(starts, lo, side="right")
        more = np.maximum(np.searchsorted(starts, hi, side="left") - first, 0)
        _, inner = expand(first, more)
        cuts = np.sort(np.concatenate([lo[hi > lo], starts[inner]]))
        ends = np.concatenate([cuts[1:], hi[-1:]])
        of_range = np.searchsorted(lo, cuts, side="right") - 1
        ends = np.minimum(ends, hi[of_range])
        document = np.searchsorted(starts, cuts, side="right") - 1
        return cuts - starts[document], ends - cuts

    def _digest(self) -> str:
        digest = hashlib.sha256(repr((self.total_tokens, self.cp_size, self.layout_name)).encode())
        digest.update(self._documents.tobytes())
        digest.update(repr(self.mask_slices).encode())
        if self.position_ids is not None:
            digest.update(self.position_ids.tobytes())
        return digest.hexdigest()


def _keep(cache: dict[Any, Any], key: Any, value: Any) -> Any:
    """Remember ``value``; the oldest entry goes when there are many."""
    if len(cache) >= _MOST:
        del cache[next(iter(cache))]
    cache[key] = value
    return value


def make_blueprint(
    what: PlanInput, cp_size: int, rank: int, windows: Iterable[Window] = ()
) -> CPBlueprint:
    """The blueprint; what calls with ``windows`` will ask is made ahead."""
    blueprint = CPBlueprint(what, cp_size, rank)
    for window in windows:
        blueprint.mask(FULL if what.mask_slices is not None else window)
    return blueprint
