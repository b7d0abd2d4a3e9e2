"""The ``magi`` method: MagiAttention's calc_attn computes attention without a sink, and the sink is
added here, once per query row and head.

    forward:   out', lse' = calc_attn(q, k, v)
               lse = log(exp lse' + Σ_j exp z_j),   out = exp(lse' - lse) out'
    backward:  dq, dk, dv = calc_attn's own backward, run on out and lse (kernels/magi_attention.py)
               dsink from lse and delta, as in the ring

MagiAttention's own sinks are not used: its kernels add up exp(z) without taking a maximum out, so
logits beyond ±87 are lost, and its gradient follows an environment variable (docs/engines.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from magi_sink_cp.dist.guard.watchdog import Communication
from magi_sink_cp.dist.magi_engine import (
    DETERMINISTIC,
    EXACT_REDUCE,
    KEPT_KEYS,
    MagiDispatch,
    Sizes,
    is_set,
    slices_of_bands,
)
from magi_sink_cp.dist.methods.base import CheckedCall, Method, Request
from magi_sink_cp.dist.methods.gradients import SinkGradient
from magi_sink_cp.dist.methods.lanes import Lanes
from magi_sink_cp.dist.plan import CPPlan
from magi_sink_cp.dist.planning.mask import Slice
from magi_sink_cp.kernels import magi_attention
from magi_sink_cp.kernels.backends.flash import peak_of, split_dlse
from magi_sink_cp.kernels.magi_attention import Backward
from magi_sink_cp.kernels.merge import merge
from magi_sink_cp.kernels.protocol import AttentionParams, Partial, stat_dtype


@dataclass(frozen=True)
class MagiState:
    """What the method keeps for one kind of call.

    Attributes:
        dispatch: of the plan.
        slices: the mask.
        sizes, overlap_degree: of the key; None is what the plan's key says.
        kind: what the backward of such calls depends on, besides tensors.
        want_lse: the user gets lse.
        reduces_in: the dtype in which dk and dv of several ranks are added.
    """

    dispatch: MagiDispatch
    slices: tuple[Slice, ...]
    sizes: Sizes
    overlap_degree: int | None
    kind: tuple[object, ...]
    want_lse: bool
    reduces_in: torch.dtype

    @property
    def record(self) -> Mapping[str, object]:
        degree = "of the plan's key" if self.overlap_degree is None else self.overlap_degree
        return {
            "overlap_degree": degree,
            "grad_reduce_dtype": str(self.reduces_in),
            "return_lse": self.want_lse,  # its gradient takes communication of its own
        }

    @property
    def learned(self) -> Backward | None:
        """The backward, once a forward that needs gradients has been seen."""
        return self.dispatch.learned.get(self.kind)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams, learn: bool
    ) -> tuple[Tensor, Tensor]:
        """calc_attn of one sample, without a sink: out (T, H, D) and lse (T, H)."""
        # Made here, after the ranks have compared their arguments: it communicates.
        key = self.dispatch.key_for(
            params.window_size, self.slices, self.sizes, self.overlap_degree
        )
        leaves = [x.detach() for x in (q, k, v)]
        # Hooks that are there, as checkpoint's, would hide what is saved.
        with torch.set_grad_enabled(learn), saved_tensors_hooks(_same, _same):
            if learn:
                leaves = [x.requires_grad_() for x in leaves]
            try:
                out, meta = magi_attention.load().calc_attn(
                    *leaves, key, softmax_scale=params.softmax_scale, softcap=params.softcap
                )
            except ValueError as error:
                if "does not exist" not in str(error):
                    raise
                raise RuntimeError(
                    "MagiAttention has dropped the key of this plan: it keeps the latest ones of a "
                    f"group, 1,000 unless {KEPT_KEYS} says another number, until clear_cache(). "
                    "Make the plan again"
                ) from error
        if learn:
            known = dict(zip(("q", "k", "v", "out", "lse"), (*leaves, out, meta.lse), strict=True))
            learned = Backward(out, known, objects=("dist_attn_runtime",))
            self.dispatch.learned[self.kind] = learned
        return out.detach(), meta.lse.detach()


class MagiAttention(Method):
    """See the top of this file."""

    name = "magi"

    def resolve(self, plan: CPPlan, call: CheckedCall) -> MagiState:
        q, k, options = call.q, call.k, call.options
        assert plan.dispatch is not None, "a plan of this engine has been dispatched"
        if reason := magi_attention.unsupported(q):
            raise ValueError(f"engine='magi' cannot run this call: {reason}")
        if options.backend not in ("auto", "ffa"):
            raise ValueError(
                "backend must be 'auto' or 'ffa' with engine='magi', whose kernels are its own, "
                f"got {options.backend!r}"
            )
        _check_deterministic(options.deterministic)
        reduces_in = stat_dtype(q.dtype) if is_set(EXACT_REDUCE) else q.dtype
        if plan.cp_size > 1 and options.grad_reduce_dtype not in (None, reduces_in):
            raise ValueError(
                f"grad_reduce_dtype must be None or {reduces_in} with engine='magi', which adds dk "
                f"and dv in torch.float32 where {EXACT_REDUCE}=1 is set, else in the dtype of k, "
                f"got {options.grad_reduce_dtype}"
            )
        slices = slices_of_bands(plan.blueprint.bands(call.params.window_size))
        sizes, degree = Sizes(q.shape[-2], k.shape[-2], q.shape[-1]), options.overlap_degree
        kind = sizes, degree, call.params, q.dtype  # the window stands for the mask
        return MagiState(plan.dispatch, slices, sizes, degree, kind, call.want_lse, reduces_in)

    def forward(
        self, request: Request, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, want_lse: bool
    ) -> tuple[Tensor, Tensor]:
        state: MagiState = request.state
        _check_deterministic(request.options.deterministic)
        learn = state.learned is None and any(request.requires_grad)
        q, k, v = _ready(request, q, k, v)
        parts = []
        for rows in _samples(request):
            parts.append(state.attend(q[rows], k[rows], v[rows], request.params, learn))
            learn = False
        out, lse = (_joined([part[i] for part in parts]) for i in range(2))
        return merge([Partial(out, lse.t().contiguous())], sink)

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
        state: MagiState = request.state
        dsink = SinkGradient(sink, lse.dtype, request, Lanes()) if needs_dsink else None
        if dsink is not None:  # its reduction runs beside what follows
            dsink.add(None, out, dout, dlse, lse, slice(None))
            dsink.reduce()
        run = state.learned
        assert run is not None, "a forward that needs gradients has learned it"
        q, k, v, dout = _ready(request, q, k, v, dout)
        out, rows_lse = out.contiguous(), lse.t().contiguous()
        peak = _agreed_peak(request, dlse, lse)
        if peak is not None and dlse is None:
            dlse = torch.zeros_like(lse)
        parts = []
        for rows in _samples(request):
            tensors = {
                "q": q[rows], "k": k[rows], "v": v[rows], "out": out[rows], "lse": rows_lse[rows],
            }  # fmt: skip
            dq, dk, dv = run(dout[rows], tensors)
            if peak is not None and dlse is not None:
                scale, split_out, split_dout = split_dlse(dlse[:, rows], out[rows], peak)
                tensors |= {"v": torch.zeros_like(tensors["v"]), "out": split_out}
                dq_share, dk_share, _ = run(split_dout, tensors)
                dq = (dq + dq_share.to(lse.dtype) / scale).to(q.dtype)
                dk = (dk + dk_share.to(lse.dtype) / scale).to(k.dtype)
            parts.append((dq, dk, dv))
        dq, dk, dv = (_joined([part[i] for part in parts]).contiguous() for i in range(3))
        return dq, dk, dv, None if dsink is None else dsink.result()


def _check_deterministic(deterministic: bool) -> None:
    if deterministic and not is_set(DETERMINISTIC):
        raise ValueError(
            f"deterministic=True must come with {DETERMINISTIC}=1 in the environment with "
            "engine='magi', which takes it from there, when a plan is made and in every call"
        )


def _agreed_peak(request: Request, dlse: Tensor | None, lse: Tensor) -> Tensor | None:
    """The largest |dlse| of all ranks; None if no rank has a gradient of lse.

    A second backward call gives the share of dlse, and adds up dk over the ranks: all of them must
    make it, with one scale. That a rank's loss does not reach lse is known to it alone.
    """
    if request.cp_size == 1 or request.group is None:
        return None if dlse is None else peak_of(dlse)
    if not request.want_lse:
        return None
    both = lse.new_zeros(2)
    if dlse is not None:
        both = torch.stack([lse.new_ones(()), peak_of(dlse)])
    group = request.group()
    agreement = Communication(
        "backward of cp_attention_with_sink: all-reduce of the largest gradient of lse",
        group,
        both.is_cuda,
        lambda: [dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group, async_op=True)],
    )
    agreement.wait()
    return both[1] if both[0] > 0 else None  # which waits for the GPU


def _same(x: Tensor) -> Tensor:
    return x


def _ready(request: Request, *tensors: Tensor) -> list[Tensor]:
    """The tensors as the kernels read them, with 0 on padding, which stands in their tiles."""
    if not request.is_padded:
        return [x.contiguous() for x in tensors]
    padding = request.padding(tensors[0].device)[:, None, None]
    return [x.masked_fill(padding, 0) for x in tensors]


def _samples(request: Request) -> list[slice]:
    """The rows of each sample: calc_attn takes one at a time."""
    rows = request.local_tokens
    return [slice(n * rows, (n + 1) * rows) for n in range(request.batch_size)]


def _joined(parts: list[Any]) -> Tensor:
    """The samples' rows back to back."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
