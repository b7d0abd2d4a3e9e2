"""FlashAttention-2's public functions (2.8) with ``sink`` and ``sink_layout`` right after the
tensors and lengths.

They run on the flash_attn package (2.7 and 2.8) where it is installed, else on PyTorch's own
FlashAttention-2, which has no softcap, alibi_slopes and block_table; CPU tensors run on this
package's cpu backend, which has no dropout, alibi_slopes and block_table. What the kernels at hand
lack raises, by name.
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
    """``flash_attn_func`` of FlashAttention-2 with learnable sinks; differentiable in q, k, v and
    sink.

    For row i and head h, with scores S_ij over the visible keys and sink logits z: out_i = Σ_j
        exp(S_ij - lse_i) v_j with
    lse_i = log(Σ_j exp S_ij + Σ_s exp z_s), natural log (the sinks of gpt-oss).

    Args:
        q: (b, sq, h, d), fp16 or bf16 (on the CPU fp32 and fp64 too); a d that is no multiple of 8
            is padded on a GPU.
        k, v: (b, sk, h_kv, d); h_kv divides h.
        sink: logits, fp32 (bf16 and fp16 are computed in fp32), (s_sink, h) or per row (b, sq,
            s_sink, h). None: plain attention.
        sink_layout: "sh" or "ssh", the two shapes of sink.
        dropout_p: probability with which a weight is dropped after the softmax; the sinks are never
            dropped.
        softmax_scale: factor on the scores, default d^-1/2.
        causal: mask aligned to the bottom right: row i sees keys up to i + sk - sq.
        window_size: (left, right) tokens seen around i + sk - sq; -1 is unlimited; causal makes
            right 0.
        softcap: scores become softcap · tanh(scores / softcap); 0 is off.
        alibi_slopes: fp32 (h,) or (b, h): scores get -slope · |i + sk - sq - j|.
        deterministic: the backward gives the same bits in every run.
        return_attn_probs: also return softmax_lse and S_dmask. FlashAttention-2 has S_dmask with
            dropout only, so that without dropout this raises. For lse alone:
            ``attention_with_sink(..., return_lse=True)``.

    Returns:
        out like q; or (out, softmax_lse, S_dmask) with softmax_lse fp32 (b, h, sq), the sink
        included, and S_dmask (b, h, sq and sk rounded up to 128) as the kernel leaves it: its
        scaling is the kernel's own and without the sink, and a negative entry is a dropped one. A
        gradient that reaches softmax_lse is exact.

    Raises:
        TypeError, ValueError: before any kernel runs: an invalid argument, or something the kernels
            at hand cannot do.
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
    """``flash_attn_varlen_func`` of FlashAttention-2 with learnable sinks: packed documents, which
    do not see each other.

    Args:
        q: (total_q, h, d); k, v: (total_k, h_kv, d), or with block_table pages (pages, page size,
            h_kv, d).
        cu_seqlens_q, cu_seqlens_k: int32 (documents + 1,) offsets, on the device of q. They end at
            total_q and total_k. CUDA offsets are not read by the host, as in FlashAttention:
            nothing here waits for the GPU. Rows behind the last document are unspecified, as there;
            with a sink they count as rows without a key, so that dsink is right.
        max_seqlen_q, max_seqlen_k: longest document, at least. None reads it from the offsets (on a
            GPU this waits once a tensor).
        sink: (s_sink, h), or with sink_layout="ssh" (total_q, s_sink, h).
        alibi_slopes: fp32 (h,) or (documents, h).
        block_table: int32 (documents, blocks): the pages of each document's keys; forward only, in
            the flash_attn package.

    The others, the errors and the results are as in :func:`fa2_func_with_sink`; softmax_lse is (h,
    total_q).
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
    """``flash_attn_qkvpacked_func`` of FlashAttention-2 with learnable sinks, for qkv (b, s, 3, h,
    d).

    sink is (s_sink, h), or with sink_layout="ssh" (b, s, s_sink, h). The backward writes dqkv where
    it belongs (PyTorch's own kernels allocate their gradients, which then cost a copy). All else is
    as in :func:`fa2_func_with_sink`.
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
    """``flash_attn_kvpacked_func`` of FlashAttention-2 with learnable sinks, for q (b, sq, h, d)
    and kv (b, sk, 2, h_kv, d).

    The backward writes dkv where it belongs (PyTorch's own kernels allocate their gradients, which
    then cost a copy). All else is as in :func:`fa2_func_with_sink`.
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
    """``flash_attn_varlen_qkvpacked_func`` of FlashAttention-2 with learnable sinks, for qkv
    (total, 3, h, d).

    cu_seqlens and max_seqlen are those of queries and keys; sink is (s_sink, h), or with
    sink_layout="ssh" (total, s_sink, h). dqkv is as in :func:`fa2_qkvpacked_func_with_sink`, all
    else as in :func:`fa2_varlen_func_with_sink`.
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

    q is (total_q, h, d) and kv (total_k, 2, h_kv, d). dkv is as in
    :func:`fa2_kvpacked_func_with_sink`, all else as in :func:`fa2_varlen_func_with_sink`.
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
    """inputs with head_dim padded with zeros to a multiple of 8, as FlashAttention-2's functions
    do; and head_dim if it was.
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
