"""Attention with sinks on one device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from magi_sink_cp.kernels.inputs import check_lengths, check_qkv, check_sink, make_params
from magi_sink_cp.kernels.registry import check_backend_name
from magi_sink_cp.ops import Lengths, attention, make_op_call


def attention_with_sink(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None = None,
    *,
    sink_layout: str = "sh",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention whose softmax denominator also holds learnable sink logits; differentiable in q, k, v and sink.

    For query row i and head h, with scores S_ij = softcap(scale · q_i·k_j) over the visible keys and sink logits z:
    out_i = Σ_j exp(S_ij - lse_i) v_j with lse_i = log(Σ_j exp S_ij + Σ_s exp z_s) (the sinks of gpt-oss).

    Args:
        q: (b, sq, h, d), or packed (total_q, h, d) with cu_seqlens; fp16, bf16, fp32 or fp64 as the backend takes.
        k, v: (b, sk, h_kv, d) or (total_k, h_kv, d); h_kv divides h. Where the backend can, v may have a head_dim of its own.
        sink: logits, natural log, fp32 (bf16 and fp16 are accepted and computed in fp32); None is plain attention.
            -inf switches a sink off.
        sink_layout: "sh": sink is (s_sink, h), shared by all rows. "ssh": a sink per row, (b, sq, s_sink, h) or
            (total_q, s_sink, h). Any s_sink >= 1.
        cu_seqlens_q, cu_seqlens_k: int32 (documents + 1,) offsets of packed documents, on the device of q. A new CUDA
            tensor is copied to the host once, to be checked.
        max_seqlen_q, max_seqlen_k: longest document; read from cu_seqlens if None.
        softmax_scale: factor on q·k, default d^-1/2.
        causal: mask aligned to the bottom right: row i sees keys up to i + sk - sq.
        window_size: (left, right) tokens seen around i + sk - sq; -1 is unlimited; causal makes right 0.
        softcap: scores become softcap · tanh(scores / softcap); 0 is off.
        deterministic: the backward gives the same bits in every run.
        backend: "auto", or a name of :func:`magi_sink_cp.backends`.
        return_lse: also return lse.

    Returns:
        out like q (with v's head_dim), or (out, lse) with lse fp32 (b, h, sq) / (h, total_q), the sink included (fp64 for fp64
        inputs). A row that sees no key has out = 0 and lse = log Σ exp z, or -inf without a sink. A gradient that reaches lse is
        exact.

    Raises:
        TypeError, ValueError: before any kernel runs; the text names the argument, what came and what is allowed.
    """
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    shape_text = "(total, heads, head_dim), as cu_seqlens are given," if packed else "(batch, seqlen, heads, head_dim)"
    check_qkv(q, k, v, 3 if packed else 4, shape_text)
    check_sink(sink, sink_layout, q)
    check_backend_name(backend)
    check_lengths(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    params = make_params(q.shape[-1], softmax_scale, causal, window_size, softcap, deterministic)
    lengths = None
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse, _ = attention((q, k, v), sink, make_op_call(params, backend, want_lse=return_lse, read_lengths=True), lengths)
    return (out, lse) if return_lse else out
