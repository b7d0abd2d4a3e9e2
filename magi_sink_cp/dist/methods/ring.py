"""The ``ring`` method: rows stay, keys travel to the ranks that see them, stage by stage.

forward, for each stage s and the keys A_s that it brings:

    (out_s, lse_s) = attention(q, A_s)                        while A_{s+1} travels
    then, once:  lse = (⊕_s lse_s) ⊕ log Σ_j exp z_j,   out = Σ_s exp(lse_s - lse) out_s

Kernels that can add the sink do so in the one call that owns a row. Then only rows with several
partial results are merged.

backward, for each stage, with the final lse and out:

    dq += dq_s;  dk_s and dv_s travel home                    while stage s + 1 computes

dsink needs only lse and delta. Its all-reduce starts after the first stage in which every row has
been seen, and is waited for at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from magi_sink_cp.dist.methods.base import CheckedCall, Method, Request
from magi_sink_cp.dist.methods.gradients import GradientSum, SinkGradient
from magi_sink_cp.dist.methods.kernel_calls import (
    BoundCall,
    BoundStage,
    bind,
    lse_of_rows,
    run_backward,
    run_forward,
    run_forward_with_sink,
)
from magi_sink_cp.dist.methods.lanes import Lanes, TwoLanes
from magi_sink_cp.dist.methods.partials import Partials
from magi_sink_cp.dist.plan import CPPlan
from magi_sink_cp.dist.planning.cost import (
    SINK_KERNEL_SLOWER,
    CallSizes,
)
from magi_sink_cp.dist.planning.exchange import Exchange
from magi_sink_cp.dist.planning.mask import Range
from magi_sink_cp.dist.transport.base import OwnCopies, Transfer, Transport
from magi_sink_cp.kernels.backends.fa4 import Fa4Backend
from magi_sink_cp.kernels.backends.registry import (
    BackendPolicy,
    find_adding_sink,
    log_choice,
    select_backend,
)
from magi_sink_cp.kernels.protocol import (
    Backend,
    Gradients,
    KernelRequest,
    Partial,
    stat_dtype,
)


@dataclass(frozen=True)
class RingState:
    """What the ring keeps for one kind of call.

    Attributes:
        transport: how keys travel, or None for one rank.
        forward, backward: the stages of each pass.
        overlap_degrees: of forward and backward.
        without_owner: of forward and backward, rows of tokens that no call owns.
        two_lanes: of forward and backward, whether calls run in turns on two streams.
        backend: whose kernels compute the attention.
        sink_backend: whose forward adds the sink in the calls that own their rows; if None, the
            merge adds it.
    """

    transport: Transport | None
    forward: tuple[BoundStage, ...]
    backward: tuple[BoundStage, ...]
    overlap_degrees: tuple[int, int]
    without_owner: tuple[tuple[Range, ...], tuple[Range, ...]]
    two_lanes: tuple[bool, bool]
    backend: Backend
    sink_backend: Fa4Backend | None

    @property
    def record(self) -> Mapping[str, object]:
        adds = "the merge" if self.sink_backend is None else self.sink_backend.name
        return {
            "backend": self.backend.name,
            "the sink is added by": adds,
            "overlap_degree (forward, backward)": self.overlap_degrees,
        }

    @property
    def leaves_gaps(self) -> bool:
        """Whether a call of backward leaves rows between its segments to others."""
        return any(call.gap is not None for stage in self.backward for call in stage.calls)

    @property
    def merges_partials(self) -> bool:
        """Whether any row has several partial results in forward."""
        return not all(call.owns_rows for stage in self.forward for call in stage.calls)

    def attend(
        self,
        call: BoundCall,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        exact_lse: bool,
        out: Tensor | None,
    ) -> Partial:
        """One kernel call's partial result. With ``sink``, a call that owns its rows adds it."""
        if sink is None or out is None:
            return run_forward(call, self.backend, q, k, v, out)
        assert self.sink_backend is not None, "kernels are given the sinks that they can add"
        return run_forward_with_sink(call, self.sink_backend, q, k, v, sink, exact_lse, out)

    def lanes(self, stages: Sequence[BoundStage], two: bool, device: torch.device) -> Lanes:
        """Where the calls of one pass run."""
        num_calls = sum(len(stage.calls) for stage in stages)
        return TwoLanes() if two and num_calls > 1 and device.type == "cuda" else Lanes()


class Ring(Method):
    """See the top of this file."""

    name = "ring"

    def resolve(self, plan: CPPlan, call: CheckedCall) -> RingState:
        q, k, params, options = call.q, call.k, call.params, call.options
        wanted = KernelRequest(params)
        backend = select_backend(BackendPolicy(options.backend), q, wanted)
        sink_backend = find_adding_sink(options.backend, q, wanted, call.sink)
        slower = None
        if plan.mask_slices is not None:
            sink_backend = None  # rows of several slices have no call that sees all their keys
        if sink_backend is not None:
            slower = 0.0 if sink_backend is backend else SINK_KERNEL_SLOWER
        sizes = CallSizes(
            call.batch_size, q.shape[-2], k.shape[-2], q.shape[-1], q.element_size(),
            "gaps" in backend.features,
        )  # fmt: skip
        transport, blueprint = plan.transport, plan.blueprint
        link = "network" if transport is None else transport.link
        routed = transport is not None and transport.needs_route
        overlap = blueprint.overlap(params.window_size, sizes, slower, link)
        if not overlap.sink_in_kernel:
            sink_backend = None
        if sink_backend is not None:
            log_choice(sink_backend)
        window, batch_size = params.window_size, call.batch_size
        degrees, forward, backward = blueprint.pass_schedules(
            window, sizes, overlap, options.overlap_degree, routed
        )
        blueprint.asks(window, sizes, slower, link, options.overlap_degree, routed)
        return RingState(
            transport=transport,
            forward=bind(forward, params, q.device),
            backward=bind(backward, params, q.device),
            overlap_degrees=degrees,
            without_owner=(
                blueprint.rows_without_owner(forward, batch_size),
                blueprint.rows_without_owner(backward, batch_size),
            ),
            two_lanes=overlap.two_lanes,
            backend=backend,
            sink_backend=sink_backend,
        )

    def forward(
        self, request: Request, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, want_lse: bool
    ) -> tuple[Tensor, Tensor]:
        state: RingState = request.state
        k, v = k.contiguous(), v.contiguous()
        kernel_sink, merge_sink = (None, sink) if state.sink_backend is None else (sink, None)
        exact_lse = want_lse or state.merges_partials  # what is merged must be finite
        lanes = state.lanes(state.forward, state.two_lanes[0], q.device)
        rows_missing = bool(state.without_owner[0])
        partials = Partials(q, request.is_padded, rows_missing, merge_sink, lanes)
        with InFlight(state.transport) as flight, lanes:
            for stage, k_stage, v_stage in stages_in_order(k, v, state.forward, flight, lanes):
                for call in stage.calls:
                    out = partials.out[call.rows] if call.owns_rows else None
                    with lanes.turn():
                        partial = state.attend(
                            call, q, k_stage, v_stage, kernel_sink, exact_lse, out
                        )
                    partials.add(partial, call)
        return partials.finish()

    def backward(
        self,
        request: Request,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        out: Tensor,
        lse: Tensor,
        needs_dsink: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        state: RingState = request.state
        k, v = k.contiguous(), v.contiguous()
        # A gradient of lse makes kernels rewrite what stands in their gaps: then in order.
        two_lanes = state.two_lanes[1] and (dlse is None or not state.leaves_gaps)
        lanes = state.lanes(state.backward, two_lanes, q.device)
        with InFlight(state.transport) as flight, lanes:
            dsink = SinkGradient(sink, lse.dtype, request, lanes) if needs_dsink else None
            if dsink is not None:
                for start, stop in state.without_owner[1]:
                    dsink.add(None, out, dout, dlse, lse[:, start:stop], slice(start, stop))
            sums = _RingGradients(request, q, k, v, dsink, flight, lanes)
            for stage, k_stage, v_stage in stages_in_order(k, v, state.backward, flight, lanes):
                sums.begin(stage, k_stage, v_stage)
                for call in stage.calls:
                    with lanes.turn():
                        call_lse = lse_of_rows(call, lse)
                        grads = run_backward(
                            call, state.backend, dout, dlse, q, k_stage, v_stage, out, call_lse,
                            sums.owned_dq if call.owns_rows else None,
                        )  # fmt: skip
                        if call.owns_rows and dsink is not None:
                            dsink.add(grads.delta, out, dout, dlse, call_lse, call.rows)
                    sums.add(call, grads)
                sums.end(stage)
            return sums.results()


class _RingGradients:
    """dq, dk and dv of one backward pass, stage by stage."""

    def __init__(
        self,
        request: Request,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dsink: SinkGradient | None,
        flight: InFlight,
        lanes: Lanes,
    ) -> None:
        state: RingState = request.state
        self._dtype, self._lanes, self._flight = request.grad_reduce_dtype, lanes, flight
        # Some rows have no call that writes them: padding, and those that see no key at first.
        missing = request.is_padded or bool(state.without_owner[1])
        new = torch.zeros_like if missing else torch.empty_like
        self.owned_dq = new(q, memory_format=torch.contiguous_format)
        self._dq = GradientSum(q, stat_dtype(q.dtype), lanes)
        self._dk, self._dv = self._sums(k, v)
        self._dsink = dsink
        # The last stage whose calls own rows. It is the same on every rank: collectives match by
        # order.
        self._owning_stage = state.backward[0 if state.overlap_degrees[1] > 0 else -1]
        self._last_stage = state.backward[-1]
        self._stage_sums = self._dk, self._dv
        self._coming_home: _ComingHome | None = None

    def _sums(self, k: Tensor, v: Tensor) -> tuple[GradientSum, GradientSum]:
        return GradientSum(k, self._dtype, self._lanes), GradientSum(v, self._dtype, self._lanes)

    def begin(self, stage: BoundStage, k_stage: Tensor, v_stage: Tensor) -> None:
        """Gradients of others' keys are put together to travel; own keys' go where they belong."""
        own = self._dk, self._dv
        self._stage_sums = own if stage.local else self._sums(k_stage, v_stage)

    def add(self, call: BoundCall, grads: Gradients) -> None:
        """The gradients of one kernel call."""
        dk, dv = self._stage_sums
        dk.add_rows(grads.dk, call.key_range)
        dv.add_rows(grads.dv, call.key_range)
        if not call.owns_rows:
            self._dq.add_rows(grads.dq, call.row_range)

    def end(self, stage: BoundStage) -> None:
        """Send the stage's dk and dv home, and take in what the stage before brings home."""
        leaving = None
        if not stage.local:
            leaving = _ComingHome(stage, self._stage_sums, self._flight, self._dk, self._dv)
        if stage is self._owning_stage:
            self._dq.add_first(self.owned_dq)
            if self._dsink is not None:
                self._dsink.reduce()
        if stage is not self._last_stage:
            self._dq.fold()
        if self._coming_home is not None:
            self._coming_home.arrive()
            self._dk.fold()
            self._dv.fold()
            self._coming_home.release()
        self._coming_home = leaving

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk, dv and dsink."""
        dq = self._dq.result()  # while the last gradients travel
        if self._coming_home is not None:
            self._coming_home.arrive()
        dk, dv = self._dk.result(), self._dv.result()
        if self._coming_home is not None:
            self._coming_home.release()
        return dq, dk, dv, None if self._dsink is None else self._dsink.result()


class _ComingHome:
    """The dk and dv of one stage on their way to the ranks that hold the keys."""

    def __init__(
        self,
        stage: BoundStage,
        stage_sums: tuple[GradientSum, GradientSum],
        flight: InFlight,
        dk: GradientSum,
        dv: GradientSum,
    ) -> None:
        """Send the stage's sums home, and add to dk and dv what they hold of own keys."""
        self._stage, self._sums = stage, (dk, dv)
        totals = [total.result() for total in stage_sums]
        self._transfer = flight.start(totals, stage.reduce)
        for total, part in zip(self._sums, totals, strict=True):
            total.add(part, stage.own)

    def arrive(self) -> None:
        """Wait for the gradients of this rank's keys that other ranks computed, and add them."""
        self._transfer.wait()
        messages = zip(self._stage.cast.sends, self._stage.reduce.receives, strict=True)
        pieces = [(sent.tokens, arrived.tokens) for sent, arrived in messages]
        for total, buffer in zip(self._sums, self._transfer.buffers, strict=True):
            total.add(buffer, pieces)

    def release(self) -> None:
        self._transfer.release()


class InFlight:
    """The transfers of one pass. If the pass fails, none is left under way."""

    def __init__(self, transport: Transport | None) -> None:
        self._transport = transport
        self._transfers: list[Transfer] = []

    def start(self, tensors: Sequence[Tensor], exchange: Exchange, own: OwnCopies = ()) -> Transfer:
        """Transport.start."""
        assert self._transport is not None, "a plan with travelling stages has a transport"
        transfer = self._transport.start(tensors, exchange, own)
        self._transfers.append(transfer)
        return transfer

    def __enter__(self) -> InFlight:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for transfer in self._transfers:
                transfer.abandon()
            if self._transport is not None:
                self._transport.fail()


def stages_in_order(
    k: Tensor, v: Tensor, stages: Sequence[BoundStage], flight: InFlight, lanes: Lanes
) -> Iterator[tuple[BoundStage, Tensor, Tensor]]:
    """Yield (stage, its k, its v), one by one, with the next stage's keys already on their way."""
    arriving: Transfer | None = None
    for number, stage in enumerate(stages):
        arrived, k_stage, v_stage = arriving, k, v
        if arrived is not None:
            lanes.arrive(arrived)
            k_stage, v_stage = arrived.buffers
        if number + 1 < len(stages):
            # Before this stage's calls, so that both lanes see the own keys that start() copies.
            following = stages[number + 1]
            arriving = flight.start((k, v), following.cast, following.own)
        yield stage, k_stage, v_stage
        if arrived is not None:
            lanes.join()
            arrived.release()
