"""Sums of gradients that are computed in several places: dq, dk and dv, and dsink over ranks."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from magi_sink_cp.dist.guard.watchdog import Communication
from magi_sink_cp.dist.methods.base import Request
from magi_sink_cp.dist.methods.lanes import Lanes
from magi_sink_cp.dist.methods.partials import clusters, sink_of_rows
from magi_sink_cp.dist.planning.mask import Range
from magi_sink_cp.kernels.accumulate import MAX_TERMS, Term, accumulate
from magi_sink_cp.kernels.dsink import sink_gradient
from magi_sink_cp.kernels.protocol import RowDelta

_DSINK = "cp_attention_with_sink: all-reduce of dsink over the cp group"


class GradientSum:
    """The gradient of ``x`` as a sum of contributions along its first dimension.

    They are added in the order in which they come, and rounded once. Contributions are kept until
    :meth:`fold` or :meth:`result` adds them. What is folded is kept in ``dtype``.
    """

    def __init__(self, x: Tensor, dtype: torch.dtype, lanes: Lanes) -> None:
        self._like = x
        self._dtype = dtype
        self._lanes = lanes
        self._terms: list[Term] = []

    def add(self, contribution: Tensor, pieces: Sequence[tuple[Range, Range]]) -> None:
        """Add, for each (rows of x, rows of contribution), the second to the first."""
        for (start, stop), (first, _) in pieces:
            if len(self._terms) == MAX_TERMS:
                self.fold()
            self._terms.append(Term(contribution, first, start, stop))

    def add_rows(self, contribution: Tensor, rows: Range) -> None:
        """Add all of ``contribution`` to these rows of x."""
        self.add(contribution, [(rows, (0, contribution.shape[0]))])

    def add_first(self, contribution: Tensor) -> None:
        """Add, before all others, a contribution to all rows of x. The sum may be made in it."""
        if len(self._terms) == MAX_TERMS:
            self.fold()
        self._terms.insert(0, Term(contribution, 0, 0, self._like.shape[0]))

    def fold(self) -> None:
        """Add up what there is, so that the contributions can be freed."""
        if len(self._terms) > 1:
            self._terms = [Term(self._sum(self._dtype), 0, 0, self._like.shape[0])]

    def result(self) -> Tensor:
        """The sum in the dtype of x, contiguous. Rows without a contribution are 0."""
        if self._terms:
            return self._sum(self._like.dtype)
        return torch.zeros_like(self._like, memory_format=torch.contiguous_format)

    def _sum(self, dtype: torch.dtype) -> Tensor:
        """The sum in ``dtype``; in place of the first contribution if that has all rows in it."""
        self._lanes.join()
        first, *others = self._terms
        rows = self._like.shape[0]
        has_all_rows = (first.start, first.stop, first.tensor.shape[0]) == (0, rows, rows)
        if first.tensor.dtype != dtype or not has_all_rows:
            out = torch.empty_like(self._like, dtype=dtype, memory_format=torch.contiguous_format)
            accumulate(self._terms, out)
            return out
        for (start, stop), indices in clusters([(term.start, term.stop) for term in others]):
            target = first.tensor[start:stop]
            moved = [
                Term(term.tensor, term.first, term.start - start, term.stop - start)
                for term in (others[i] for i in indices)
            ]
            accumulate([Term(target, 0, 0, stop - start), *moved], target)
        return first.tensor


class SinkGradient:
    """dsink from the rows of each call, reduced over the ranks as ``dsink_reduce`` says."""

    def __init__(
        self, sink: Tensor | None, exact: torch.dtype, request: Request, lanes: Lanes
    ) -> None:
        """``exact``: the dtype of the sum of an "sh" sink's gradient, which is lse's."""
        assert sink is not None, "a gradient is asked for of a sink that is there"
        self._sink, self._exact, self._request, self._lanes = sink, exact, request, lanes
        self._parts: list[tuple[slice, Tensor]] = []
        self._dsink: Tensor | None = None
        self._reduction: Communication | None = None

    def add(
        self,
        delta: RowDelta | None,
        out: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        lse: Tensor,
        rows: slice,
    ) -> None:
        """Add what these rows contribute.

        lse is that of ``rows``, +inf where a row does not count; out, dout and dlse are those of
        all rows.
        """
        sink = sink_of_rows(self._sink, rows)
        row_dlse = None if dlse is None else dlse[:, rows]
        part = sink_gradient(sink, lse, delta, out[rows], dout[rows], row_dlse)
        self._parts.append((rows, part))

    def reduce(self) -> None:
        """Every row has been added: start the reduction over the ranks, if one was asked for."""
        request = self._request
        if request.options.dsink_reduce == "none" or request.group is None or request.cp_size == 1:
            return
        dsink, group = self._total(), request.group()
        self._reduction = Communication(
            _DSINK,
            group,
            dsink.is_cuda,
            lambda: [dist.all_reduce(dsink, group=group, async_op=True)],
        )
        self._dsink = dsink

    def result(self) -> Tensor:
        """dsink in the dtype of sink."""
        dsink = self._total() if self._dsink is None else self._dsink
        if self._reduction is not None:
            self._reduction.wait()
        if self._request.options.dsink_reduce == "avg":
            dsink = dsink / self._request.cp_size
        return dsink.to(self._sink.dtype)

    def _total(self) -> Tensor:
        """The sum of the parts for "sh"; for "ssh" each part has rows of its own."""
        self._lanes.join()
        shared = self._sink.dim() == 2
        if shared and self._parts:
            return functools.reduce(torch.add, (part for _, part in self._parts))
        dtype = self._exact if shared else self._sink.dtype
        dsink = torch.zeros(self._sink.shape, dtype=dtype, device=self._sink.device)
        for rows, part in self._parts:
            dsink[rows] += part  # 0 in a gap
        return dsink
