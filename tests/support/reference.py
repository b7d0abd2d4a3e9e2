"""The one reference: dense attention with sinks in fp64, from which every test and benchmark takes
its truth.

Written for clarity, not for size: it holds every score of every head. Gradients come from autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible_mask(
    num_q: int, num_k: int, causal: bool = False, window_size: tuple[int, int] = (-1, -1)
) -> Tensor:
    """Boolean (T, K): True where query i sees key j. Aligned to the bottom right, as FlashAttention
    defines it.

    T = 2, K = 4, causal:  1 1 1 0      T = 4, K = 2, causal:  0 0      (rows 0 and 1 see nothing)
                           1 1 1 1                             0 0
                                                               1 0
                                                               1 1
    """
    left, right = window_size
    right = 0 if causal else right
    offset = torch.arange(num_k).unsqueeze(0) - (torch.arange(num_q).unsqueeze(1) + num_k - num_q)
    mask = torch.ones(num_q, num_k, dtype=torch.bool)
    if left >= 0:
        mask &= offset >= -left
    if right >= 0:
        mask &= offset <= right
    return mask


def document_mask(
    cu_seqlens_q: list[int],
    cu_seqlens_k: list[int],
    causal: bool,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Boolean (total_q, total_k).

    :func:`visible_mask` of each document on the diagonal, False elsewhere.
    """
    mask = torch.zeros(cu_seqlens_q[-1], cu_seqlens_k[-1], dtype=torch.bool)
    for q_lo, q_hi, k_lo, k_hi in zip(
        cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:], strict=False
    ):
        mask[q_lo:q_hi, k_lo:k_hi] = visible_mask(q_hi - q_lo, k_hi - k_lo, causal, window_size)
    return mask


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    mask: Tensor,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(out, lse) in fp64, differentiable in q, k, v and sink.

    Args:
        q: (B, T, H, D) or (T, H, D); k, v: likewise with K rows and H_kv heads.
        sink: (s_sink, H), or per row (B, T, s_sink, H) / (T, s_sink, H), or None.
        mask: boolean (T, K), True where a query sees a key.
    """
    batched = q.dim() == 4
    q, k, v = ((x if batched else x.unsqueeze(0)).double() for x in (q, k, v))
    heads, scale = q.shape[2], q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    k, v = (x.repeat_interleave(heads // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bkhd->bhtk", q, k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask.to(q.device), float("-inf"))
    if sink is None:
        logits = scores
    else:
        # (B or 1, T or s_sink, …)
        rows = sink.double() if sink.dim() == 4 else sink.double().unsqueeze(0)
        shared = sink.dim() == 2
        # (·, H, 1 or T, s_sink)
        per_row = rows.permute(0, 2, 1).unsqueeze(2) if shared else rows.permute(0, 3, 1, 2)
        logits = torch.cat(
            [scores, per_row.expand(q.shape[0], heads, q.shape[1], sink.shape[-2])], dim=-1
        )
    # Rows whose logits are all -inf: exp gives 0 everywhere, and the guards keep 0/0 and log 0 out
    # of the graph.
    peak = (
        logits.detach().amax(-1, keepdim=True)
        if logits.shape[-1]
        else logits.new_full((*logits.shape[:-1], 1), float("-inf"))
    )
    empty = peak == float("-inf")
    weights = torch.exp(logits - peak.masked_fill(empty, 0.0))
    total = weights.sum(-1, keepdim=True).masked_fill(empty, 1.0)
    out = torch.einsum("bhtk,bkhd->bthd", weights[..., : scores.shape[-1]] / total, v)
    lse = (total.log() + peak.masked_fill(empty, 0.0)).masked_fill(empty, float("-inf")).squeeze(-1)
    return (out, lse) if batched else (out[0], lse[0])
