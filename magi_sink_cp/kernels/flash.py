"""What the FlashAttention backends share: dtypes, head_dim, rows and keys that do not exist, and the exact gradient of lse through
kernels that have none."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from magi_sink_cp.kernels.protocol import Backend, Call, Gradients, Partial, Varlen, store

MAX_HEAD_DIM = 256
_INF = float("inf")


class NotUsableError(Exception):
    """A package with kernels is missing, broken, or of an interface that is not known here; the text says which."""


def why_unusable(load: Callable[[], object]) -> str | None:
    """The text of the NotUsableError that ``load`` raises, or None."""
    try:
        load()
    except NotUsableError as error:
        return str(error)
    return None


class FlashBackend(Backend):
    """What all of them check: CUDA, fp16 or bf16, head_dim a multiple of 8 up to 256."""

    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    max_head_dim_v = 0  # of kernels whose v may have another head_dim than q; the kernel says which pairs it has

    def unsupported(self, q: Tensor, call: Call, head_dim_v: int | None = None) -> str | None:
        if q.device.type != "cuda":
            return f"it runs on CUDA tensors, and q is on {q.device}"
        if q.dtype not in self.dtypes:
            return f"it takes {' or '.join(map(str, self.dtypes))}, and q is {q.dtype}"
        if q.shape[-1] % 8 or q.shape[-1] > MAX_HEAD_DIM:
            return f"it takes a head_dim that is a multiple of 8, at most {MAX_HEAD_DIM}, and q has {q.shape[-1]}"
        if head_dim_v not in (None, q.shape[-1]) and (head_dim_v % 8 or head_dim_v > self.max_head_dim_v):
            allowed = f"a multiple of 8, at most {self.max_head_dim_v}" if self.max_head_dim_v else "that of q"
            return f"it takes v with a head_dim that is {allowed}, and v has {head_dim_v} (q {q.shape[-1]})"
        return super().unsupported(q, call, head_dim_v)


class NoLseGradientBackend(FlashBackend):
    """Kernels that take no gradient of lse, and bring it by a second call."""

    @abstractmethod
    def _kernel_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Partial, call: Call, into: Gradients | None
    ) -> Gradients: ...

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Partial, call: Call, dlse: Tensor | None, into: Gradients | None
    ) -> Gradients:
        """The kernel's gradients and, where a gradient reaches lse, its share from a second call.

        The kernels take no dlse, but they compute delta = Σ_d dout·out from what they are given. A call with v = 0 has dP = 0;
        with dout = 1 and out = -dlse in three leading channels it has delta = -dlse, hence dS = P∘dlse, which is the share
        of dlse. Three channels of an 8- or 11-bit mantissa hold every bit of an fp32 number; dlse is first scaled to at most 2,
        as fp16 holds neither 1e-9 nor 1e5. lse does not see dropout, so that this call has none.
        """
        dout, q, k, v = (kernel_ready(x) for x in (dout, q, k, v))
        grads = self._kernel_backward(dout, q, k, v, saved, call, into)
        if dlse is None:
            return grads
        peak = dlse.abs().nan_to_num(nan=0.0, posinf=0.0).amax()
        scale = torch.exp2(-torch.log2(peak).floor().clamp(-126, 126))
        split_out, split_dout = torch.zeros_like(saved.out), torch.zeros_like(saved.out)
        split_dout[..., :3] = 1
        rest = -(dlse * scale).transpose(-1, -2)
        for channel in range(3):
            split_out[..., channel] = rest
            rest = rest - split_out[..., channel]
        call = replace(call, params=replace(call.params, dropout_p=0.0))
        share = self._kernel_backward(split_dout, q, k, torch.zeros_like(v), Partial(split_out, saved.lse), call, None)
        dq, dk = (
            (whole + part / scale).to(q.dtype) for whole, part in ((grads.dq, share.dq.float()), (grads.dk, share.dk.float()))
        )
        return store(Gradients(dq, dk, grads.dv, grads.delta), into)


def kernel_ready(x: Tensor) -> Tensor:
    """x, copied only if the kernels cannot read it where it is: they want a dense last dimension and 16-byte aligned rows."""
    if x.data_ptr() % 16 == 0 and x.stride(-1) == 1:
        size = x.element_size()
        if x.is_contiguous():
            if x.shape[-1] * size % 16 == 0:
                return x
        elif all(stride * size % 16 == 0 for stride in x.stride()[:-1]):
            return x
    return x.clone(memory_format=torch.contiguous_format)


def new_gradients(*tensors: Tensor) -> list[Tensor]:
    """Uninitialised, contiguous tensors like these."""
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def mask_and_scores(call: Call) -> dict[str, Any]:
    """The keyword arguments that FlashAttention-2 and -3 share."""
    params = call.params
    left, right = params.window_size
    return {"softmax_scale": params.softmax_scale, "window_size_left": left, "window_size_right": right, "softcap": params.softcap}


def check_flash_2_window(q: Tensor, k: Tensor, call: Call) -> None:
    """Refuse the dense masks that FlashAttention-2 gets wrong.

    With K keys it drops a limit of at least K, and then takes K for a right limit that is missing beside a left one. Both change
    what the first of T queries see where T is larger than K.

    Raises:
        ValueError: it would compute another mask.
    """
    left, right = call.params.window_size
    num_q, num_k = q.shape[-3], k.shape[-3]
    has_left, has_right = 0 <= left < num_k, 0 <= right < num_k
    takes_k = has_left and not has_right and num_q > num_k + 1
    drops_right = not has_left and num_k <= right < num_q - 1
    if call.varlen is None and (takes_k or drops_right):
        raise ValueError(
            f"FlashAttention-2 computes another mask for window_size={call.params.window_size} with {num_q} queries and {num_k} "
            "keys. Pack the batch (cu_seqlens), which it computes right, or use FlashAttention-3"
        )


def flash_2_maxima(varlen: Varlen, window_size: tuple[int, int]) -> tuple[int, int]:
    """(max_seqlen_q, max_seqlen_k) for FlashAttention-2's kernels; both are upper bounds there.

    With max_seqlen_q = 1 they take it that every document has one row; a zero-row document breaks that. And they compare right
    limits with max_seqlen_k, as check_flash_2_window says, so that it then has to be the larger one.
    """
    left, right = window_size
    max_k = varlen.max_seqlen_k
    if right > 0 or (left >= 0 and right < 0):
        max_k = max(varlen.max_seqlen_q, max_k) + 1
    return max(2, varlen.max_seqlen_q), max_k


def normalise_empty_rows(lse: Tensor) -> Tensor:
    """FlashAttention-2's lse, in place, with -inf instead of +inf for rows that see no key."""
    return lse.masked_fill_(lse == _INF, -_INF)


def flash_2_lse(lse: Tensor) -> Tensor:
    """The lse that FlashAttention-2's backward wants: +inf for rows without a key, so that exp(S - lse) is 0 there, not NaN."""
    return lse.masked_fill(lse == -_INF, _INF)


def hide_unused_rows(out: Tensor, lse: Tensor, varlen: Varlen) -> None:
    """Give the rows from seqused_q on, which kernels leave unwritten, what a row without a key has: out = 0, lse = -inf."""
    assert varlen.seqused_q is not None, "called for a varlen with seqused_q"
    starts = varlen.cu_seqlens_q.long()
    row = torch.arange(out.shape[0], device=out.device)
    document = torch.searchsorted(starts[1:], row, right=True)  # one too many for rows behind the last document
    used = torch.nn.functional.pad(varlen.seqused_q, (0, 1))
    unused = row - starts[document] >= used[document]
    out.masked_fill_(unused[:, None, None], 0.0)
    lse.masked_fill_(unused, -_INF)
