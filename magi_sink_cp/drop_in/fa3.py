"""FlashAttention-3's public functions with ``sink`` and ``sink_layout`` right after the tensors.

They run on FlashAttention-3, on a Hopper GPU; on CPU tensors on the cpu backend. Where
FlashAttention-3 is missing they raise, unless :func:`magi_sink_cp.set_fallback` allows the next
backend.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from magi_sink_cp.drop_in.common import check_packed, dense, make_extras, varlen
from magi_sink_cp.kernels.checks import as_int, check_sink_is_tensor, make_params


def fa3_func_with_sink(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None = None,
    sink_layout: str = "sh",
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Sequence[int | None] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``flash_attn_func`` of FlashAttention-3 with learnable sinks.

    For row i and head h, with scores S_ij over the visible keys and sink logits z (natural log, the
    sinks of gpt-oss):

        out_i = Σ_j exp(S_ij - lse_i) v_j,    lse_i = log(Σ_j exp S_ij + Σ_s exp z_s)

    Differentiable once, in q, k, v and sink.

    Args:
        q: (b, sq, h, d), fp16 or bf16; fp8 e4m3 in a forward without gradients. On the CPU also
            fp32 and fp64.
        k: (b, sk, h_kv, d); h_kv divides h.
        v: (b, sk, h_kv, d_v). The kernels decide which d_v other than d they have.
        sink: logits, fp32 (bf16 and fp16 are computed in fp32): (h,), (s_sink, h), or with
            sink_layout="ssh" per row, (b, sq, s_sink, h). None is plain attention.
        sink_layout: "sh" (shared by all rows) or "ssh" (a sink per row).
        softmax_scale: factor on the scores; None is d^-1/2, with qv (d + d_v)^-1/2.
        causal: mask aligned to the bottom right: row i sees keys up to i + sk - sq.
        qv: (b, sq, h, d_v), adds qv·v to the scores. Forward only.
        q_descale, k_descale, v_descale: fp32 (b, h_kv), factors on fp8 q, k and v. Forward only.
        window_size: (left, right) tokens seen around i + sk - sq; -1 or None is unlimited. causal
            sets right to 0. 128 keys, the query's own included, are (127, 0).
        attention_chunk: row i sees keys of its own chunk of this many keys; 0 is off. Forward only.
        softcap: scores become softcap · tanh(scores / softcap); 0 is off.
        num_splits, pack_gqa, sm_margin: how the kernel divides its work, as in FlashAttention-3
            (sm_margin in SMs). They have no effect on CPU tensors.
        deterministic: the backward gives the same bits in every run.
        return_attn_probs: also return softmax_lse.

    Returns:
        out (b, sq, h, d_v) in the dtype of q (bf16 for fp8), or (out, softmax_lse) with softmax_lse
        fp32 (b, h, sq), the sink included. A gradient that reaches softmax_lse is exact.

    Raises:
        TypeError, ValueError: an argument is invalid, the kernels cannot do what is asked, or there
            is no FlashAttention-3. Raised before any kernel runs.
        RuntimeError: in backward, a second derivative is asked for.
    """
    check_sink_is_tensor(sink, sink_layout)
    head_dim = _scale_dim(q, v, qv)
    params = make_params(
        head_dim, softmax_scale, causal, window_size, softcap, deterministic,
        attention_chunk=attention_chunk, num_splits=num_splits, pack_gqa=pack_gqa,
        sm_margin=sm_margin,
    )  # fmt: skip
    extras = make_extras(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    out, lse, _ = dense(
        "fa3", (q, k, v), sink, sink_layout, params, want_lse=return_attn_probs, extras=extras
    )
    return (out, lse) if return_attn_probs else out


def fa3_varlen_func_with_sink(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    sink: Tensor | None = None,
    sink_layout: str = "sh",
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Sequence[int | None] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``flash_attn_varlen_func`` of FlashAttention-3 with learnable sinks.

    Documents are packed, and do not see each other.

    Args:
        q: (total_q, h, d).
        k, v: (total_k, h_kv, d) and (total_k, h_kv, d_v).
        cu_seqlens_q, cu_seqlens_k: (documents + 1,) offsets on the device of q, int32 or int64.
            They end at total_q and total_k. The host does not read CUDA offsets, as in
            FlashAttention: nothing waits for the GPU. Rows behind the last document are
            unspecified, as there. They contribute nothing to dsink. Keep what stands in them
            finite (docs/troubleshooting.md).
        max_seqlen_q, max_seqlen_k: at least the longest document. None reads it from the offsets,
            which waits for the GPU once per tensor.
        sink: (h,), (s_sink, h), or with sink_layout="ssh" (total_q, s_sink, h).
        seqused_q, seqused_k: int32 (documents,): only so many rows and keys of each document exist.
            In other rows out is 0 and lse is the sinks' alone. They contribute to no gradient,
            whatever stands in them.
        qv: (total_q, h, d_v).
        q_descale, k_descale, v_descale: fp32 (documents, h_kv).

    Other arguments, errors and out (total_q, h, d_v) are as in :func:`fa3_func_with_sink`.
    softmax_lse is fp32 (h, total_q).
    """
    check_sink_is_tensor(sink, sink_layout)
    head_dim = _scale_dim(q, v, qv)
    params = make_params(
        head_dim, softmax_scale, causal, window_size, softcap, deterministic,
        attention_chunk=attention_chunk, num_splits=num_splits, pack_gqa=pack_gqa,
        sm_margin=sm_margin,
    )  # fmt: skip
    extras = make_extras(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k)
    out, lse, _ = varlen(
        "fa3",
        (q, k, v),
        sink,
        sink_layout,
        params,
        lengths,
        want_lse=return_attn_probs,
        extras=extras,
    )
    return (out, lse) if return_attn_probs else out


def fa3_qkvpacked_func_with_sink(
    qkv: Tensor,
    sink: Tensor | None = None,
    sink_layout: str = "sh",
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Sequence[int | None] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``flash_attn_qkvpacked_func`` of FlashAttention-3 with learnable sinks.

    The backward writes dqkv in one piece.

    Args:
        qkv: (b, s, 3, h, d), or (b, s, num_heads_q + 2 h_kv, d) with num_heads_q given.
        num_heads_q: query heads of a 4-dimensional qkv; None for a 5-dimensional one.
        sink: (h,), (s_sink, h), or with sink_layout="ssh" (b, s, s_sink, h).

    Other arguments, errors and results are as in :func:`fa3_func_with_sink`.
    """
    check_sink_is_tensor(sink, sink_layout)
    if not isinstance(qkv, Tensor):
        raise TypeError(f"qkv must be a torch.Tensor, got {type(qkv).__name__}")
    if qkv.dim() == 4:
        _check_num_heads_q(qkv, num_heads_q)
    else:
        check_packed(
            "qkv",
            qkv,
            5,
            "(batch, seqlen, 3, heads, head_dim), or (batch, seqlen, heads + 2 heads_kv, head_dim)",
            3,
        )
        if num_heads_q is not None:
            raise ValueError(
                f"num_heads_q is for a 4-dimensional qkv, got num_heads_q={num_heads_q} with qkv "
                f"{tuple(qkv.shape)}"
            )
    params = make_params(
        qkv.shape[-1], softmax_scale, causal, window_size, softcap, deterministic,
        attention_chunk=attention_chunk, sm_margin=sm_margin,
    )  # fmt: skip
    extras = make_extras(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    out, lse, _ = dense(
        "fa3",
        (qkv,),
        sink,
        sink_layout,
        params,
        want_lse=return_attn_probs,
        num_heads_q=num_heads_q or 0,
        extras=extras,
    )
    return (out, lse) if return_attn_probs else out


def _check_num_heads_q(qkv: Tensor, num_heads_q: int | None) -> None:
    heads = qkv.shape[2]
    given = as_int(num_heads_q) or 0
    heads_kv = (heads - given) // 2
    if not 0 < given < heads or given + 2 * heads_kv != heads or given % heads_kv:
        raise ValueError(
            "num_heads_q must be the number of query heads h of a 4-dimensional qkv (batch, "
            "seqlen, h + 2 h_kv, head_dim), with "
            f"h_kv dividing h; got num_heads_q={num_heads_q!r} for qkv {tuple(qkv.shape)}"
        )


def _scale_dim(q: Tensor, v: Tensor, qv: Tensor | None) -> int:
    """What the default softmax_scale is the inverse root of.

    1 for inputs that are about to be refused.
    """
    if not isinstance(q, Tensor) or not isinstance(v, Tensor) or q.dim() == 0 or v.dim() == 0:
        return 1
    return max(1, q.shape[-1] + (0 if qv is None else v.shape[-1]))
