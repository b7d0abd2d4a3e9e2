"""From the partial results of kernel calls to out and lse: the one place where the sink enters.

A row has at most one call that owns it; each row of a document has exactly one. Such calls write
their rows of out directly, but for those in a gap. Other calls give further partial results of some
rows. The merge adds these, and the sink to every row, unless the owning kernels have added it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from magi_sink_cp.dist.methods.kernel_calls import BoundCall
from magi_sink_cp.dist.methods.lanes import Lanes
from magi_sink_cp.dist.planning.layout import union
from magi_sink_cp.dist.planning.mask import Range
from magi_sink_cp.kernels.merge import MAX_PARTIALS, merge
from magi_sink_cp.kernels.protocol import Partial, nothing_seen, stat_dtype


class Partials:
    """Collects the partial results of one forward pass."""

    def __init__(
        self, q: Tensor, is_padded: bool, rows_missing: bool, sink: Tensor | None, lanes: Lanes
    ) -> None:
        """Begin with nothing seen.

        Args:
            is_padded: some rows are padding.
            rows_missing: some rows of tokens have no owner.
            sink: what the merge has to add, once, to every row; None if the kernels add it.
        """
        self._q, self._sink, self._lanes = q, sink, lanes
        # A merge that adds the sink makes padding 0.
        zeroed = rows_missing or (is_padded and sink is None)
        new = torch.zeros_like if zeroed else torch.empty_like
        self.out = new(q, memory_format=torch.contiguous_format)
        self._rows_missing = rows_missing or is_padded
        self._owned: list[tuple[Partial, Tensor | None]] = []
        self._others: list[Partial] = []

    def add(self, partial: Partial, call: BoundCall) -> None:
        """The partial result of a call; no other call owns the rows that it owns."""
        if call.owns_rows:
            self._owned.append((partial, call.gap))
            return
        if len(self._others) == MAX_PARTIALS - 1:
            self._lanes.join()
            self._others = [self._folded()]
        self._others.append(partial)

    def _folded(self) -> Partial:
        """The further partial results as one, in exact dtype."""
        start = min(partial.start for partial in self._others)
        exact = stat_dtype(self._q.dtype)
        return Partial(*merge(_seen_from(self._others, start), out_dtype=exact), start)

    def finish(self) -> tuple[Tensor, Tensor]:
        """out and lse of all rows, after the lanes have joined."""
        owned, sink = self._put_together(), self._sink
        out, lse = owned.out, owned.lse
        spans = [_span(partial) for partial in self._others]
        parts = clusters(spans) if sink is None else [((0, out.shape[0]), range(len(spans)))]
        for (start, stop), indices in parts:
            _merge_rows(out, lse, start, stop, [self._others[i] for i in indices], sink)
        return out, lse

    def _put_together(self) -> Partial:
        """The owned partials as one of all rows, in ``self.out``."""
        rows = self._q.shape[0]
        if not self._owned:
            return nothing_seen(self._q, self.out)
        owned = sorted(self._owned, key=lambda each: each[0].start)
        partials = [partial for partial, _ in owned]
        first, _ = owned[0]
        has_gaps = any(gap is not None for _, gap in owned)  # where lse is undefined
        are_all = not has_gaps and _are_all(partials, rows)
        if len(owned) == 1 and first.out.is_contiguous() and are_all:
            return first
        for partial, gap in owned:
            target = self.out[slice(*_span(partial))]
            if partial.out.data_ptr() != target.data_ptr():  # a kernel that cannot choose where
                assert gap is None, "kernels that leave gaps write where they are told to"
                target.copy_(partial.out)
        if are_all:
            return Partial(self.out, torch.cat([partial.lse for partial in partials], dim=1))
        if _span(first) == (0, rows) and not self._rows_missing:
            lse, owned = first.lse, owned[1:]
        else:
            lse = first.lse.new_full((self._q.shape[1], rows), float("-inf"))
        for partial, gap in owned:
            target = lse[:, slice(*_span(partial))]
            if gap is None:
                target.copy_(partial.lse)
            else:
                torch.where(gap, target, partial.lse, out=target)
        return Partial(self.out, lse)


def _are_all(partials: Sequence[Partial], rows: int) -> bool:
    """Whether the partials, one after the other, are those of all ``rows``."""
    spans = [_span(partial) for partial in partials]
    return [0, *(stop for _, stop in spans)] == [*(start for start, _ in spans), rows]


def _merge_rows(
    out: Tensor,
    lse: Tensor,
    start: int,
    stop: int,
    others: Sequence[Partial],
    sink: Tensor | None,
) -> None:
    """Merge ``others`` and the sink into rows start … stop, in place."""
    owned = Partial(out[start:stop], lse[:, start:stop])
    row_sink = None if sink is None else sink_of_rows(sink, slice(start, stop))
    merge([owned, *_seen_from(others, start)], row_sink, out=owned.out)


def sink_of_rows(sink: Tensor, rows: slice) -> Tensor:
    """The sink of these rows: all of an "sh" sink, the rows' own of an "ssh" sink."""
    return sink if sink.dim() == 2 else sink[rows]


def _span(partial: Partial) -> Range:
    """The rows that the partial has."""
    return partial.start, partial.start + partial.out.shape[0]


def _seen_from(partials: Sequence[Partial], start: int) -> list[Partial]:
    """The partials with rows counted from row ``start``."""
    return [replace(partial, start=partial.start - start) for partial in partials]


def clusters(spans: Sequence[Range]) -> list[tuple[Range, list[int]]]:
    """Ranges that cover spans which overlap, each with the indices of its spans in their order."""
    return [
        (rows, [i for i, (start, _) in enumerate(spans) if rows[0] <= start < rows[1]])
        for rows in union(spans)
    ]
