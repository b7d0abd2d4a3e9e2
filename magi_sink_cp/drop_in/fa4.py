"""FlashAttention-4's public functions with ``sink`` and ``sink_layout``.

These come right after the tensors (and lengths). The functions run on FlashAttention-4, on a Hopper
or Blackwell GPU; on CPU tensors on the cpu backend. Where FlashAttention-4 is missing they raise,
unless :func:`magi_sink_cp.set_fallback` allows the next backend. One sink per head that all rows
share runs in FlashAttention-4's own kernels. More sinks, or sinks per row, take our correction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from magi_sink_cp.drop_in.common import dense, refuse, varlen
from magi_sink_cp.kernels.checks import check_sink_is_tensor, make_params
from magi_sink_cp.kernels.protocol import AttentionParams

_Window = tuple[int | None, int | None]


def fa4_func_with_sink(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None = None,
    sink_layout: str = "sh",
    qv: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: _Window = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Any = None,
    score_mod_bwd: Any = None,
    mask_mod: Any = None,
    aux_tensors: Any = None,
    aux_scalars: Any = None,
    block_sparse_tensors: Any = None,
    block_sparse_tensors_bwd: Any = None,
    return_lse: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
    *,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``flash_attn_func`` of FlashAttention-4 with learnable sinks.

    Unlike FlashAttention-4's function, it returns out alone unless lse is asked for.

    For row i and head h, with scores S_ij over the visible keys and sink logits z (natural log, the
    sinks of gpt-oss):

        out_i = Σ_j exp(S_ij - lse_i) v_j,    lse_i = log(Σ_j exp S_ij + Σ_s exp z_s)

    Differentiable once, in q, k, v and the sinks.

    Args:
        q: (b, sq, h, d), fp16 or bf16 (on the CPU also fp32 and fp64). On Hopper d is 64, 96, 128,
            192 or 256.
        k, v: (b, sk, h_kv, d); h_kv divides h.
        sink: logits, fp32 (bf16 and fp16 are computed in fp32): (h,), (s_sink, h), or with
            sink_layout="ssh" per row, (b, sq, s_sink, h). None is plain attention.
        sink_layout: "sh" (shared by all rows) or "ssh" (a sink per row).
        softmax_scale: factor on the scores; None is d^-1/2.
        causal: mask aligned to the bottom right: row i sees keys up to i + sk - sq.
        window_size: (left, right) tokens seen around i + sk - sq. None is unlimited, and so is
            (-1, -1); other negative limits raise. causal sets right to 0.
        learnable_sink: (h,), FlashAttention-4's own name for one sink per head.
        softcap: scores become softcap · tanh(scores / softcap); 0 is off.
        num_splits, pack_gqa: how the kernel divides its work, as in FlashAttention-4.
        deterministic: the backward gives the same bits in every run.
        return_lse, return_attn_probs: either one also returns lse.
        qv, gather_kv_indices, score_mod, score_mod_bwd, mask_mod: must stay None.
        aux_tensors, aux_scalars, block_sparse_tensors, block_sparse_tensors_bwd: must stay None.
        gather_bwd_recompute_p, gather_bwd_token_chunk: must stay False and None.

    Returns:
        out like q, or (out, lse) with lse fp32 (b, h, sq), the sink included. A gradient that
        reaches lse is exact.

    Raises:
        NotImplementedError: an argument that must stay None.
        TypeError, ValueError: an argument is invalid, the kernels cannot do what is asked, or there
            is no FlashAttention-4. Raised before any kernel runs.
        RuntimeError: in backward, a second derivative is asked for.
    """
    refuse(
        qv=qv, gather_kv_indices=gather_kv_indices, score_mod=score_mod,
        score_mod_bwd=score_mod_bwd, mask_mod=mask_mod,
        aux_tensors=aux_tensors, aux_scalars=aux_scalars, block_sparse_tensors=block_sparse_tensors,
        block_sparse_tensors_bwd=block_sparse_tensors_bwd,
        gather_bwd_recompute_p=gather_bwd_recompute_p or None,
        gather_bwd_token_chunk=gather_bwd_token_chunk,
    )  # fmt: skip
    check_sink_is_tensor(sink, sink_layout)
    sink = _one_sink(q, sink, learnable_sink)
    params = _params(
        q, softmax_scale, causal, window_size, softcap, num_splits, pack_gqa, deterministic
    )
    want_lse = _either(return_lse, return_attn_probs)
    out, lse, _ = dense("fa4", (q, k, v), sink, sink_layout, params, want_lse=want_lse)
    return (out, lse) if want_lse else out


def fa4_varlen_func_with_sink(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    sink: Tensor | None = None,
    sink_layout: str = "sh",
    qv: Tensor | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: _Window = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Any = None,
    score_mod_bwd: Any = None,
    mask_mod: Any = None,
    block_sparse_tensors: Any = None,
    aux_tensors: Any = None,
    aux_scalars: Any = None,
    return_lse: bool = False,
    scheduler_metadata: Any = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
    *,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``flash_attn_varlen_func`` of FlashAttention-4 with learnable sinks.

    Documents are packed, and do not see each other. FlashAttention-4 has qv before the lengths;
    here it stands behind the sink.

    Args:
        q: (total_q, h, d).
        k, v: (total_k, h_kv, d).
        cu_seqlens_q, cu_seqlens_k: (documents + 1,) offsets on the device of q, int32 or int64.
            They end at total_q and total_k. The host does not read CUDA offsets, as in
            FlashAttention: nothing waits for the GPU. Rows behind the last document are
            unspecified, as there. They contribute nothing to dsink. Keep what stands in them
            finite (docs/troubleshooting.md).
        max_seqlen_q, max_seqlen_k: at least the longest document. None reads it from the offsets,
            which waits for the GPU once per tensor.
        sink: (h,), (s_sink, h), or with sink_layout="ssh" (total_q, s_sink, h).
        seqused_q, seqused_k: as in :func:`magi_sink_cp.fa3_varlen_func_with_sink`.
        qv, min_seqlen_k, gather_kv_indices, page_table: must stay None.
        score_mod, score_mod_bwd, mask_mod, aux_tensors, aux_scalars: must stay None.
        block_sparse_tensors, scheduler_metadata, seqlen_k_per_split: must stay None.
        disable_scheduler_metadata, gather_bwd_recompute_p: must stay False.
        gather_bwd_token_chunk: must stay None.

    Other arguments, errors and out (total_q, h, d) are as in :func:`fa4_func_with_sink`. lse is
    fp32 (h, total_q).
    """
    refuse(
        qv=qv, min_seqlen_k=min_seqlen_k, gather_kv_indices=gather_kv_indices,
        page_table=page_table, score_mod=score_mod, score_mod_bwd=score_mod_bwd, mask_mod=mask_mod,
        block_sparse_tensors=block_sparse_tensors, aux_tensors=aux_tensors, aux_scalars=aux_scalars,
        scheduler_metadata=scheduler_metadata, seqlen_k_per_split=seqlen_k_per_split,
        disable_scheduler_metadata=disable_scheduler_metadata or None,
        gather_bwd_recompute_p=gather_bwd_recompute_p or None,
        gather_bwd_token_chunk=gather_bwd_token_chunk,
    )  # fmt: skip
    check_sink_is_tensor(sink, sink_layout)
    sink = _one_sink(q, sink, learnable_sink)
    params = _params(
        q, softmax_scale, causal, window_size, softcap, num_splits, pack_gqa, deterministic
    )
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k
    want_lse = _either(return_lse, return_attn_probs)
    out, lse, _ = varlen("fa4", (q, k, v), sink, sink_layout, params, lengths, want_lse=want_lse)
    return (out, lse) if want_lse else out


def _either(return_lse: bool, return_attn_probs: bool) -> bool:
    for name, flag in (("return_lse", return_lse), ("return_attn_probs", return_attn_probs)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {flag!r}")
    return return_lse or return_attn_probs


def _one_sink(q: Tensor, sink: Tensor | None, learnable_sink: Tensor | None) -> Tensor | None:
    if learnable_sink is None:
        return sink
    if sink is not None:
        raise ValueError(
            "sink and learnable_sink are two names for the same logits; give one of them"
        )
    heads = q.shape[-2] if isinstance(q, Tensor) and q.dim() > 1 else None
    if (
        not isinstance(learnable_sink, Tensor)
        or learnable_sink.dim() != 1
        or heads not in (None, learnable_sink.shape[0])
    ):
        given = (
            tuple(learnable_sink.shape) if isinstance(learnable_sink, Tensor) else learnable_sink
        )
        raise ValueError(
            f"learnable_sink must be a tensor (heads,), heads being those of q, {heads}; got "
            f"{given!r}. Others go into sink"
        )
    return learnable_sink.unsqueeze(0)


def _params(
    q: Tensor,
    softmax_scale: float | None,
    causal: bool,
    window_size: _Window,
    softcap: float,
    num_splits: int,
    pack_gqa: bool | None,
    deterministic: bool,
) -> AttentionParams:
    head_dim = q.shape[-1] if isinstance(q, torch.Tensor) and q.dim() else 1
    unlimited = window_size is None or tuple(window_size) in ((None, None), (-1, -1))
    if not unlimited and any(isinstance(limit, int) and limit < 0 for limit in window_size):
        text = ", ".join("None" if limit == -1 else str(limit) for limit in window_size)
        raise ValueError(
            "window_size of fa4_* functions: FlashAttention-4 reads a negative limit as a number "
            f"of tokens, and only None as unlimited; got {window_size!r}. If you mean unlimited, "
            f"write ({text})"
        )
    return make_params(
        max(1, head_dim), softmax_scale, causal, (-1, -1) if unlimited else window_size, softcap,
        deterministic, num_splits=num_splits, pack_gqa=pack_gqa,
    )  # fmt: skip
