"""What the FlashAttention backends share.

dtypes and head_dim, rows and keys that do not exist, FlashAttention-2's habits, and the exact
gradient of lse from kernels that do not take one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from magi_sink_cp.kernels.protocol import (
    Backend,
    Gradients,
    KernelRequest,
    NotUsableError,
    Partial,
    Varlen,
    store,
)

MAX_HEAD_DIM = 256
NO_GPU = "torch sees no CUDA GPU"
_INF = float("inf")


def why_unusable(load: Callable[[], object]) -> str | None:
    """The text of the NotUsableError that ``load`` raises, or None."""
    try:
        load()
    except NotUsableError as error:
        return str(error)
    return None


class FlashBackend(Backend):
    """The limits that all of them have: CUDA, fp16 or bf16, head_dim a multiple of 8 up to 256."""

    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    # The largest head_dim of v where v may have its own; 0 where it may not.
    max_head_dim_v = 0

    def unsupported(
        self, q: Tensor, request: KernelRequest, head_dim_v: int | None = None
    ) -> str | None:
        head_dim = q.shape[-1]
        if q.device.type != "cuda":
            return f"it runs on CUDA tensors, and q is on {q.device}"
        if q.dtype not in self.dtypes:
            return f"it takes {' or '.join(map(str, self.dtypes))}, and q is {q.dtype}"
        if head_dim % 8 or head_dim > MAX_HEAD_DIM:
            return (
                f"it takes a head_dim that is a multiple of 8, at most {MAX_HEAD_DIM}, and q has "
                f"{head_dim}"
            )
        other = head_dim_v not in (None, head_dim)
        if other and (head_dim_v % 8 or head_dim_v > self.max_head_dim_v):  # type: ignore[operator]
            allowed = "that of q"
            if self.max_head_dim_v:
                allowed = f"a multiple of 8, at most {self.max_head_dim_v}"
            return (
                f"it takes v with a head_dim that is {allowed}, and v has {head_dim_v} "
                f"(q {head_dim})"
            )
        return super().unsupported(q, request, head_dim_v)


class NoLseGradientBackend(FlashBackend):
    """Kernels that take no gradient of lse. A second call computes its share."""

    @abstractmethod
    def _kernel_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        saved: Partial,
        request: KernelRequest,
        into: Gradients | None,
    ) -> Gradients: ...

    def _backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        saved: Partial,
        request: KernelRequest,
        dlse: Tensor | None,
        into: Gradients | None,
    ) -> Gradients:
        """The kernel's gradients, plus the share of dlse from a second call if dlse is given.

        Dropout does not change lse, so the second call has none.
        """
        dout, q, k, v = (kernel_ready(x) for x in (dout, q, k, v))
        grads = self._kernel_backward(dout, q, k, v, saved, request, into)
        if dlse is None:
            return grads
        scale, split_out, split_dout = split_dlse(dlse, saved.out, peak_of(dlse))
        request = replace(request, params=request.params._replace(dropout_p=0.0))
        no_values = torch.zeros_like(v)
        split = Partial(split_out, saved.lse)
        share_into = None
        if request.varlen is not None and request.varlen.gaps:
            share_into = Gradients(
                torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v), None
            )  # whose dq adds 0 in a gap
        share = self._kernel_backward(split_dout, q, k, no_values, split, request, share_into)
        dq = (grads.dq + share.dq.float() / scale).to(q.dtype)
        dk = (grads.dk + share.dk.float() / scale).to(q.dtype)
        return store(Gradients(dq, dk, grads.dv, grads.delta), into)


def peak_of(dlse: Tensor) -> Tensor:
    """0-dim: the largest finite |dlse|."""
    return dlse.abs().nan_to_num(nan=0.0, posinf=0.0).amax()


def split_dlse(dlse: Tensor, out: Tensor, peak: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, out, dout) by which a backward without dlse gives scale times the share of dlse.

    Kernels that take no dlse compute delta = Σ_d dout·out from their inputs. A call with v = 0 has
    dP = 0. With dout = 1 and out = -dlse in the first channels it has delta = -dlse, hence
    dS = P∘dlse: exactly the share of dlse.

    Three channels of an 8-bit or 11-bit mantissa hold every bit of an fp32 number. dlse is first
    scaled to at most 2, because fp16 holds neither 1e-9 nor 1e5. ``peak`` is the largest |dlse| of
    all that is scaled alike.
    """
    scale = torch.exp2(-torch.log2(peak).floor().clamp(-126, 126))
    split_out, split_dout = torch.zeros_like(out), torch.zeros_like(out)
    split_dout[..., :3] = 1
    rest = -(dlse * scale).transpose(-1, -2)
    for channel in range(3):
        split_out[..., channel] = rest
        rest = rest - split_out[..., channel]
    return scale, split_out, split_dout


def kernel_ready(x: Tensor) -> Tensor:
    """x, copied only if the kernels cannot read it in place.

    They need a dense last dimension and rows aligned to 16 bytes.
    """
    if x.data_ptr() % 16 == 0 and x.stride(-1) == 1:
        size = x.element_size()
        if x.is_contiguous():
            if x.shape[-1] * size % 16 == 0:
                return x
        elif all(stride * size % 16 == 0 for stride in x.stride()[:-1]):
            return x
    return x.clone(memory_format=torch.contiguous_format)


def new_gradients(*tensors: Tensor) -> list[Tensor]:
    """Uninitialised contiguous tensors like these."""
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def mask_and_scores(request: KernelRequest) -> dict[str, Any]:
    """The keyword arguments that FlashAttention-2 and -3 share."""
    params = request.params
    left, right = params.window_size
    return {
        "softmax_scale": params.softmax_scale,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": params.softcap,
    }


def packed_lengths(request: KernelRequest) -> dict[str, Any]:
    """FlashAttention-3's and -4's keyword arguments for packed documents; none if it is dense."""
    varlen = request.varlen
    if varlen is None:
        return {}
    return {
        "cu_seqlens_q": varlen.cu_seqlens_q,
        "cu_seqlens_k": varlen.cu_seqlens_k,
        "max_seqlen_q": varlen.max_seqlen_q,
        "max_seqlen_k": varlen.max_seqlen_k,
        "seqused_q": varlen.seqused_q,
        "seqused_k": varlen.seqused_k,
    }


def missing_sm_80() -> str | None:
    """Why FlashAttention-2's kernels have no GPU to run on, or None."""
    if not torch.cuda.is_available():
        return NO_GPU
    if (capability := torch.cuda.get_device_capability()) < (8, 0):
        return f"it needs sm_80 or newer, and this GPU is sm_{capability[0]}{capability[1]}"
    return None


def check_flash_2_window(q: Tensor, k: Tensor, request: KernelRequest) -> None:
    """Refuse the dense masks that FlashAttention-2 computes wrongly.

    With K keys it ignores a limit of K or more. It then takes K as the right limit where a left
    limit stands alone. Both change what the first of T queries see if T is larger than K.

    Raises:
        ValueError: it would compute another mask.
    """
    left, right = request.params.window_size
    num_q, num_k = q.shape[-3], k.shape[-3]
    has_left, has_right = 0 <= left < num_k, 0 <= right < num_k
    takes_k = has_left and not has_right and num_q > num_k + 1
    drops_right = not has_left and num_k <= right < num_q - 1
    if request.varlen is None and (takes_k or drops_right):
        raise ValueError(
            f"FlashAttention-2 computes another mask for window_size={request.params.window_size} "
            f"with {num_q} queries and {num_k} keys. Pack the batch (cu_seqlens), which it "
            "computes right, or use FlashAttention-3"
        )


def flash_2_maxima(varlen: Varlen, window_size: tuple[int, int]) -> tuple[int, int]:
    """(max_seqlen_q, max_seqlen_k) for FlashAttention-2's kernels, where both are upper bounds.

    With max_seqlen_q = 1 they assume that every document has exactly one row, which an empty
    document breaks: pass at least 2. They compare right limits with max_seqlen_k
    (:func:`check_flash_2_window`): pass the larger of the two.
    """
    left, right = window_size
    max_k = varlen.max_seqlen_k
    if right > 0 or (left >= 0 and right < 0):
        max_k = max(varlen.max_seqlen_q, max_k) + 1
    return max(2, varlen.max_seqlen_q), max_k


def normalise_empty_rows(lse: Tensor) -> Tensor:
    """FlashAttention-2's lse, changed in place: -inf instead of +inf for rows that see no key."""
    return lse.masked_fill_(lse == _INF, -_INF)


def flash_2_lse(lse: Tensor) -> Tensor:
    """lse for FlashAttention-2's backward: +inf for rows without a key.

    exp(S - lse) is then 0 in those rows, and not NaN.
    """
    return lse.masked_fill(lse == -_INF, _INF)
