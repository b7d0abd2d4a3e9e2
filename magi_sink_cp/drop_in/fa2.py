"""FlashAttention-2's public functions (2.8) with ``sink`` and ``sink_layout``.

These come right after the tensors (and lengths). The functions run on the flash_attn package (2.7
or 2.8) where it is installed, else on PyTorch's own FlashAttention-2; on CPU tensors on the cpu
backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from magi_sink_cp.drop_in.common import check_packed, dense, make_extras, varlen
from magi_sink_cp.kernels.checks import check_sink_is_tensor, make_params
from magi_sink_cp.kernels.protocol import AttentionParams, Extras

_Result = Tensor | tuple[Tensor, Tensor, Tensor]


def fa2_func_with_sink(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None = None,
    sink_layout: str = "sh",
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """``flash_attn_func`` of FlashAttention-2 with learnable sinks.

    For row i and head h, with scores S_ij over the visible keys and sink logits z (natural log, the
    sinks of gpt-oss):

        out_i = Σ_j exp(S_ij - lse_i) v_j,    lse_i = log(Σ_j exp S_ij + Σ_s exp z_s)

    Differentiable once, in q, k, v and sink.

    Args:
        q: (b, sq, h, d), fp16 or bf16. On the CPU also fp32 and fp64.
        k, v: (b, sk, h_kv, d); h_kv divides h.
        sink: logits, fp32 (bf16 and fp16 are computed in fp32): (h,), (s_sink, h), or with
            sink_layout="ssh" per row, (b, sq, s_sink, h). None is plain attention.
        sink_layout: "sh" (shared by all rows) or "ssh" (a sink per row).
        dropout_p: probability that a weight is dropped after the softmax; lse does not see it.
        softmax_scale: factor on the scores; None is d^-1/2.
        causal: mask aligned to the bottom right: row i sees keys up to i + sk - sq.
        window_size: (left, right) tokens seen around i + sk - sq; -1 or None is unlimited. causal
            sets right to 0. 128 keys, the query's own included, are (127, 0).
        softcap: scores become softcap · tanh(scores / softcap); 0 is off. flash_attn only.
        alibi_slopes: fp32 (h,) or (b, h): scores get -slope · |i + sk - sq - j|. flash_attn only.
        deterministic: the backward gives the same bits in every run.
        return_attn_probs: also return softmax_lse and S_dmask. Needs dropout_p > 0.

    Returns:
        out like q, or (out, softmax_lse, S_dmask). softmax_lse is fp32 (b, h, sq), the sink
        included; a gradient that reaches it is exact. S_dmask (b, h, sq and sk rounded up to 128)
        is as the kernel leaves it: scaled by the kernel, without the sink, negative where dropped.

    Raises:
        TypeError, ValueError: an argument is invalid, or the kernels here cannot do what is asked.
            Raised before any kernel runs.
        RuntimeError: in backward, a second derivative is asked for.
    """
    check_sink_is_tensor(sink, sink_layout)
    params = _params(
        q, dropout_p, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs
    )
    extras = make_extras(alibi_slopes=alibi_slopes)
    return _run_dense((q, k, v), sink, sink_layout, params, extras, return_attn_probs)


def fa2_varlen_func_with_sink(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    sink: Tensor | None = None,
    sink_layout: str = "sh",
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> _Result:
    """``flash_attn_varlen_func`` of FlashAttention-2 with learnable sinks.

    Documents are packed, and do not see each other.

    Args:
        q: (total_q, h, d).
        k, v: (total_k, h_kv, d), or with block_table pages (pages, page size, h_kv, d).
        cu_seqlens_q, cu_seqlens_k: (documents + 1,) offsets on the device of q, int32 or int64.
            They end at total_q and total_k. The host does not read CUDA offsets, as in
            FlashAttention: nothing waits for the GPU. Rows behind the last document are
            unspecified, as there. They contribute nothing to dsink. Keep what stands in them
            finite (docs/troubleshooting.md).
        max_seqlen_q, max_seqlen_k: at least the longest document. None reads it from the offsets,
            which waits for the GPU once per tensor.
        sink: (h,), (s_sink, h), or with sink_layout="ssh" (total_q, s_sink, h).
        alibi_slopes: fp32 (h,) or (documents, h).
        block_table: int32 (documents, blocks): the pages of each document's keys. Forward only, in
            the flash_attn package.

    Other arguments, errors and results are as in :func:`fa2_func_with_sink`. softmax_lse is
    (h, total_q).
    """
    check_sink_is_tensor(sink, sink_layout)
    params = _params(
        q, dropout_p, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs
    )
    extras = make_extras(alibi_slopes=alibi_slopes, block_table=block_table)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _run_varlen((q, k, v), lengths, sink, sink_layout, params, extras, return_attn_probs)


def fa2_qkvpacked_func_with_sink(
    qkv: Tensor,
    sink: Tensor | None = None,
    sink_layout: str = "sh",
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """``flash_attn_qkvpacked_func`` of FlashAttention-2 with learnable sinks.

    The backward writes dqkv in one piece in the flash_attn package. PyTorch's own operator
    allocates its gradients, which costs a copy.

    Args:
        qkv: (b, s, 3, h, d).
        sink: (h,), (s_sink, h), or with sink_layout="ssh" (b, s, s_sink, h).

    Other arguments, errors and results are as in :func:`fa2_func_with_sink`.
    """
    check_packed("qkv", qkv, 5, "(batch, seqlen, 3, heads, head_dim)", 3)
    check_sink_is_tensor(sink, sink_layout)
    params = _params(
        qkv,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        deterministic,
        return_attn_probs,
    )
    extras = make_extras(alibi_slopes=alibi_slopes)
    return _run_dense((qkv,), sink, sink_layout, params, extras, return_attn_probs)


def fa2_kvpacked_func_with_sink(
    q: Tensor,
    kv: Tensor,
    sink: Tensor | None = None,
    sink_layout: str = "sh",
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """``flash_attn_kvpacked_func`` of FlashAttention-2 with learnable sinks.

    dkv is written as dqkv is in :func:`fa2_qkvpacked_func_with_sink`.

    Args:
        q: (b, sq, h, d).
        kv: (b, sk, 2, h_kv, d).

    Other arguments, errors and results are as in :func:`fa2_func_with_sink`.
    """
    check_packed("kv", kv, 5, "(batch, seqlen, 2, heads_kv, head_dim)", 2)
    check_sink_is_tensor(sink, sink_layout)
    params = _params(
        q, dropout_p, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs
    )
    extras = make_extras(alibi_slopes=alibi_slopes)
    return _run_dense((q, kv), sink, sink_layout, params, extras, return_attn_probs)


def fa2_varlen_qkvpacked_func_with_sink(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    sink: Tensor | None = None,
    sink_layout: str = "sh",
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """``flash_attn_varlen_qkvpacked_func`` of FlashAttention-2 with learnable sinks.

    Args:
        qkv: (total, 3, h, d).
        cu_seqlens, max_seqlen: those of queries and keys.
        sink: (h,), (s_sink, h), or with sink_layout="ssh" (total, s_sink, h).

    Other arguments, errors and results are as in :func:`fa2_varlen_func_with_sink`.
    """
    check_packed("qkv", qkv, 4, "(total, 3, heads, head_dim)", 3)
    check_sink_is_tensor(sink, sink_layout)
    params = _params(
        qkv,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        deterministic,
        return_attn_probs,
    )
    extras = make_extras(alibi_slopes=alibi_slopes)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return _run_varlen((qkv,), lengths, sink, sink_layout, params, extras, return_attn_probs)


def fa2_varlen_kvpacked_func_with_sink(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    sink: Tensor | None = None,
    sink_layout: str = "sh",
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """``flash_attn_varlen_kvpacked_func`` of FlashAttention-2 with learnable sinks.

    Args:
        q: (total_q, h, d).
        kv: (total_k, 2, h_kv, d).

    Other arguments, errors and results are as in :func:`fa2_varlen_func_with_sink`.
    """
    check_packed("kv", kv, 4, "(total, 2, heads_kv, head_dim)", 2)
    check_sink_is_tensor(sink, sink_layout)
    params = _params(
        q, dropout_p, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs
    )
    extras = make_extras(alibi_slopes=alibi_slopes)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _run_varlen((q, kv), lengths, sink, sink_layout, params, extras, return_attn_probs)


def _params(
    q: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int | None],
    softcap: float,
    deterministic: bool,
    return_attn_probs: bool,
) -> AttentionParams:
    head_dim = q.shape[-1] if isinstance(q, Tensor) and q.dim() else 1
    params = make_params(
        max(1, head_dim),
        softmax_scale,
        causal,
        window_size,
        softcap,
        deterministic,
        dropout_p=dropout_p,
    )
    if return_attn_probs and dropout_p == 0:
        raise ValueError(
            "return_attn_probs=True needs dropout_p > 0: without dropout FlashAttention-2 "
            "computes no S_dmask. For the lse alone "
            "use attention_with_sink(..., return_lse=True), or a fa3_* or fa4_* function"
        )
    return params


def _run_dense(
    inputs: Sequence[Tensor],
    sink: Tensor | None,
    sink_layout: str,
    params: AttentionParams,
    extras: Extras,
    want_probs: bool,
) -> _Result:
    padded, head_dim = _padded(inputs)
    out, lse, probs = dense(
        "fa2",
        padded,
        sink,
        sink_layout,
        params,
        want_lse=want_probs,
        extras=extras,
        want_probs=want_probs,
    )
    return _result(out, lse, probs, head_dim, want_probs)


def _run_varlen(
    inputs: Sequence[Tensor],
    lengths: Sequence[Any],
    sink: Tensor | None,
    sink_layout: str,
    params: AttentionParams,
    extras: Extras,
    want_probs: bool,
) -> _Result:
    padded, head_dim = _padded(inputs)
    out, lse, probs = varlen(
        "fa2",
        padded,
        sink,
        sink_layout,
        params,
        lengths,
        want_lse=want_probs,
        extras=extras,
        want_probs=want_probs,
    )
    return _result(out, lse, probs, head_dim, want_probs)


def _padded(inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], int | None]:
    """inputs with head_dim padded with zeros to a multiple of 8, and head_dim if it was padded.

    FlashAttention-2's functions do so.
    """
    head_dim = (
        inputs[0].shape[-1]
        if isinstance(inputs[0], Tensor) and inputs[0].is_cuda and inputs[0].dim()
        else 0
    )
    if head_dim % 8 == 0 or any(x.shape[-1] != head_dim for x in inputs):
        return inputs, None
    return [pad(x, (0, -head_dim % 8)) for x in inputs], head_dim


def _result(
    out: Tensor, lse: Tensor, probs: Tensor | None, head_dim: int | None, want_probs: bool
) -> _Result:
    out = out if head_dim is None else out[..., :head_dim]
    if not want_probs:
        return out
    assert probs is not None, "FlashAttention-2 returns S_dmask with dropout"
    return out, lse, probs
