"""MagiAttention's flex_flash_attn_func (FFA) as a backend, for one device.

It is taken by name alone, never by "auto". Its own sinks are not used: its kernels add up exp(sink)
without taking a maximum out, so logits beyond ±87 are lost (docs/engines.md). The merge adds them,
as for every other backend. A kernel is compiled at its first use, which takes minutes, and is kept
on disk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from magi_sink_cp.kernels import magi_attention
from magi_sink_cp.kernels.backends.flash import NoLseGradientBackend, kernel_ready, why_unusable
from magi_sink_cp.kernels.caching import BoundedCache
from magi_sink_cp.kernels.magi_attention import Backward, Rectangles, rectangles_of_bands
from magi_sink_cp.kernels.protocol import (
    AttentionParams,
    Backend,
    Gradients,
    KernelRequest,
    Partial,
    Varlen,
    store,
)

_FAR = 1 << 40  # farther than any two tokens are apart


class FfaBackend(NoLseGradientBackend):
    """Each document and its window are at most three slices; a call is one kernel."""

    name = "ffa"
    features = frozenset({"softcap", "deterministic", "seqused_q", "seqused_k"})

    def __init__(self) -> None:
        self._learned: BoundedCache[tuple[object, ...], Backward] = BoundedCache(256)

    def unavailable(self) -> str | None:
        return why_unusable(magi_attention.load) or magi_attention.missing_gpu()

    def unsupported(
        self, q: Tensor, request: KernelRequest, head_dim_v: int | None = None
    ) -> str | None:
        if head_dim_v not in (None, q.shape[-1]):
            return f"it takes v with the head_dim of q, {q.shape[-1]}, and v has {head_dim_v}"
        return magi_attention.unsupported(q) or Backend.unsupported(self, q, request)

    def _forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        request: KernelRequest,
        out: Tensor | None,
        want_probs: bool,
    ) -> Partial:
        rows, keys, values = (_flat(kernel_ready(x)) for x in (q, k, v))
        slices = _slices_of_call(q, k, request)
        flat_out, lse = _attend(rows, keys, values, slices, request.params)
        if q.dim() == 3:
            return Partial(flat_out, lse.t().contiguous())
        return Partial(flat_out.view(q.shape), lse.view(*q.shape[:3]).transpose(1, 2).contiguous())

    def _kernel_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        saved: Partial,
        request: KernelRequest,
        into: Gradients | None,
    ) -> Gradients:
        q_ranges, k_ranges, kinds = _slices_of_call(q, k, request)
        tensors = {
            "q": _flat(q),
            "k": _flat(k),
            "v": _flat(v),
            "out": _flat(kernel_ready(saved.out)),
            "lse": saved.lse.transpose(-1, -2).contiguous().view(-1, q.shape[-2]),
            "q_ranges": q_ranges,
            "k_ranges": k_ranges,
            "kinds": kinds,
        }
        grads = self._backward_of(q, k, request.params)(_flat(dout), tensors)
        dq, dk, dv = (grad.view(x.shape) for grad, x in zip(grads, (q, k, v), strict=True))
        return store(Gradients(dq, dk, dv, None), into)

    def _backward_of(self, q: Tensor, k: Tensor, params: AttentionParams) -> Backward:
        """Learned once for a kind of call, from one row."""
        key = q.device, q.dtype, q.shape[-2:], k.shape[-2], params
        found = self._learned.get(key)
        if found is None:
            with torch.enable_grad():
                rows, keys, values = (
                    torch.zeros(
                        1, heads, q.shape[-1], dtype=q.dtype, device=q.device
                    ).requires_grad_()
                    for heads in (q.shape[-2], k.shape[-2], k.shape[-2])
                )
                slices = tuple(
                    torch.tensor(x, dtype=torch.int32, device=q.device)
                    for x in ([[0, 1]], [[0, 1]], [magi_attention.FULL])
                )
                out, lse = _attend(rows, keys, values, slices, params)
                known = {"q": rows, "k": keys, "v": values, "out": out, "lse": lse}
                known |= zip(("q_ranges", "k_ranges", "kinds"), slices, strict=True)
                found = self._learned[key] = Backward(out, known)
        return found


Slices = tuple[Tensor, ...]  # q_ranges (n, 2), k_ranges (n, 2), types (n,), int32


def _attend(
    q: Tensor, k: Tensor, v: Tensor, slices: Slices, params: AttentionParams
) -> tuple[Tensor, Tensor]:
    """out (T, H, D) and lse (T, H)."""
    q_ranges, k_ranges, kinds = slices
    out, meta = magi_attention.load().flex_flash_attn_func(
        q, k, v, q_ranges, k_ranges, kinds,
        softmax_scale=params.softmax_scale,
        softcap=params.softcap,
        deterministic=params.deterministic,
        disable_fwd_atomic_reduction=True,  # no two slices have a row in common
    )  # fmt: skip
    return out, meta.lse


def _flat(x: Tensor) -> Tensor:
    """(B, T, H, D) → (B·T, H, D); what is packed stays."""
    return x.flatten(0, 1) if x.dim() == 4 else x


def _slices_of_call(q: Tensor, k: Tensor, request: KernelRequest) -> Slices:
    """The slices of a call, made on the device without a wait."""
    q_lo, q_hi, k_lo, k_hi = _documents(q, k, request.varlen)
    left, right = (_FAR if limit < 0 else limit for limit in request.params.window_size)
    lag = k_hi - q_hi  # the window is aligned to the bottom right
    parts = rectangles_of_bands(q_lo, q_hi, k_lo, k_hi, lag - left, lag + right)
    columns = [torch.cat(column) for column in zip(*_not_empty(parts, left, right), strict=True)]
    first, last, key, end, kinds = (column.int() for column in columns)
    return torch.stack([first, last], 1), torch.stack([key, end], 1), kinds


def _not_empty(parts: tuple[Rectangles, ...], left: int, right: int) -> list[Rectangles]:
    """Without those that are empty for such a window, whatever the documents."""
    causal, middle, _ = parts
    if left == right == _FAR:
        return [middle]
    if left == _FAR:
        return [causal] if right == 0 else [causal, middle]
    return [causal, middle] if right == 0 else list(parts)


def _documents(q: Tensor, k: Tensor, varlen: Varlen | None) -> tuple[Tensor, ...]:
    """int64 (documents,): where each one's rows and keys begin and end."""
    if varlen is None:
        sample = torch.arange(q.shape[0], device=q.device)
        edges = ((sample * x.shape[1], (sample + 1) * x.shape[1]) for x in (q, k))
        return tuple(edge for pair in edges for edge in pair)
    found: list[Tensor] = []
    for offsets, used in (
        (varlen.cu_seqlens_q, varlen.seqused_q),
        (varlen.cu_seqlens_k, varlen.seqused_k),
    ):
        starts = offsets[:-1].long()
        found += [starts, offsets[1:].long() if used is None else starts + used]
    return tuple(found)
