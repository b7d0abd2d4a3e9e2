"""The attention function "magi_sink" of transformers' attention interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from magi_sink_cp.attention import attention_with_sink
from magi_sink_cp.cp_attention import cp_attention_with_sink
from magi_sink_cp.dist.plan import CPPlan
from magi_sink_cp.integrations.transformers.masks import (
    Packed,
    documents_of,
    existing_keys,
    goes_on,
    packed_by,
)

NAME = "magi_sink"
# Models whose layers add keys, or hide some, in ways that the attention interface does not tell.
_REFUSED_MODELS = frozenset({
    "deepseek_v4", "hy_v4", "hy_v4_vl", "inkling2", "inkling2_loop",
    # They choose keys by an index of their own.
    "deepseek_v32", "glm_moe_dsa", "axk2", "mistral_large4", "dots3_note", "minimax_m3_vl",
    # Their windows are in the mask alone, and their packed documents.
    "qwen2_moe", "phimoe", "blt", "unlimited_ocr",
    "persimmon", "moshi", "chameleon", "idefics", "kyutai_speech_to_text",
})  # fmt: skip
_REFUSED_ARGUMENTS = (
    "position_bias", "sinks", "head_mask", "block_table", "block_tables", "indices",
    "block_indices",
)  # fmt: skip


def register() -> None:
    """Make attn_implementation="magi_sink" known to transformers, 4.57 or newer.

    A model with it runs forward, backward and generate() on one device; and across ranks after
    :func:`context_parallel`, or where a ``cp_plan=`` is passed to its forward. Calling this again
    changes nothing.

    Raises:
        ImportError: transformers is missing or older.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            f"magi_sink_cp.integrations.transformers needs transformers 4.57 or newer: {error}"
        ) from error
    AttentionInterface.register(NAME, magi_sink_attention)
    AttentionMaskInterface.register(NAME, existing_keys)


def magi_sink_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    cp_plan: CPPlan | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What a layer calls; transformers names the arguments.

    Args:
        query: (batch, heads, queries, head_dim).
        key, value: (batch, kv heads, keys, head_dim); the queries are the last ones of the keys.
        attention_mask: of :func:`existing_keys`.
        sliding_window: how many keys a query sees, itself included.
        s_aux: the sink, (heads,).
        position_ids: (batch, tokens). Where they do not go on by one, a new document begins.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed documents of a batch of
            one; position_ids are then not looked at.
        cp_plan: the tensors are this rank's shards under the plan.

    Returns:
        (batch, queries, heads, head_dim of v), and None for the weights.

    Raises:
        ValueError: an argument asks for what this function does not honour.
    """
    _refuse(module, attention_mask, dropout, others)
    _refuse_untold_window(module, sliding_window)
    causal = bool(module.is_causal if is_causal is None else is_causal)
    causal = causal and getattr(getattr(module, "config", None), "is_causal", True) is not False
    window = (-1, -1)
    if sliding_window is not None:
        window = (sliding_window - 1, 0 if causal else sliding_window - 1)
    q, k, v = _in_one_dtype(*(x.transpose(1, 2) for x in (query, key, value)))
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "causal": causal,
        "window_size": window,
        "softcap": softcap or 0.0,
    }
    if cp_plan is not None:
        if attention_mask is not None:
            raise ValueError(
                "attention_mask must be None beside cp_plan: padding is left out of the plan's "
                "tokens (magi_sink_cp.integrations.transformers.shard_batch does)"
            )
        out = cp_attention_with_sink(q, k, v, s_aux, plan=cp_plan, **options)
        assert isinstance(out, Tensor), "lse was not asked for"
        return out, None
    if attention_mask is not None and q.shape[1] == 1 and not torch.is_grad_enabled():
        return _one_query(q, k, v, s_aux, attention_mask, scaling, window[0], softcap), None
    if cu_seq_lens_q is None:
        documents = _documents(position_ids, attention_mask, q, k)
    else:
        _refuse_beside_offsets(q, attention_mask)
        offsets_k = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
        documents = (
            Packed(None, cu_seq_lens_q, _as_int(max_length_q)),
            Packed(None, offsets_k, _as_int(max_length_k)),
        )
    if documents is None:
        return _attend(q, k, v, s_aux, **options), None
    return _attend_packed(q, k, v, s_aux, *documents, options), None


def _attend(*tensors: Tensor | None, **options: Any) -> Tensor:
    out = attention_with_sink(*tensors, **options)  # type: ignore[arg-type]
    assert isinstance(out, Tensor), "lse was not asked for"
    return out


def _refuse(
    module: torch.nn.Module, attention_mask: Tensor | None, dropout: float, others: dict[str, Any]
) -> None:
    config = getattr(module, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type in _REFUSED_MODELS:
        raise ValueError(
            f"attn_implementation={NAME!r} does not honour what {model_type} passes to its "
            "attention; use 'eager' for it"
        )
    if dropout:
        raise ValueError(
            f"attn_implementation={NAME!r} has no dropout, got {dropout}; set the config's "
            "attention_dropout to 0"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attn_implementation={NAME!r} takes a (batch, keys) mask of padding, got one of shape "
            f"{tuple(attention_mask.shape)}: dense masks of one's own are not honoured"
        )
    if others.get("output_attentions"):
        raise ValueError(f"attn_implementation={NAME!r} keeps no weights for output_attentions")
    if given := [name for name in _REFUSED_ARGUMENTS if others.get(name) is not None]:
        raise ValueError(
            f"attn_implementation={NAME!r} does not honour {' and '.join(given)}, which "
            f"{model_type or 'this model'} passes to its attention"
        )


def _refuse_untold_window(module: torch.nn.Module, sliding_window: int | None) -> None:
    """Raise where the layer's window is in the model's mask alone, which is not looked at."""
    config: Any = getattr(module, "config", None)
    window = getattr(config, "sliding_window", None)
    if sliding_window is not None or not window:
        return
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and layer is not None and layer < len(kinds):
        has_window = kinds[layer] == "sliding_attention"
    else:
        has_window = getattr(config, "use_sliding_window", True)
    if has_window:
        raise ValueError(
            f"attn_implementation={NAME!r} does not honour windows that are in the mask alone: "
            f"the config of {config.model_type} has a window of {window}, and layer {layer} tells "
            "its attention none; use 'eager' for it"
        )


def _refuse_beside_offsets(q: Tensor, attention_mask: Tensor | None) -> None:
    """Raise where cu_seq_lens_q, a batch of one packed row, come with padding or with more rows."""
    if attention_mask is not None:  # compiled, a mask of ones is given too
        text = "cu_seq_lens_q are offsets in a batch of one packed row, without padding"
        if not torch.compiler.is_compiling():
            raise ValueError(f"{text}, got an attention_mask with padding")
        torch._assert_async(attention_mask.all(), text)
    if q.shape[0] != 1:
        raise ValueError(
            f"cu_seq_lens_q are offsets in a batch of one packed row, got {q.shape[0]} rows"
        )


def _in_one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As autocast has it: rotary embeddings may have made q and k fp32."""
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        return q.to(dtype), k.to(dtype), v.to(dtype)
    return (q, k, v) if q.dtype == v.dtype else (q.to(v.dtype), k.to(v.dtype), v)


def _as_int(length: Any) -> int | None:
    """max_length may be a 0-dim tensor."""
    return None if length is None else int(length)


def _documents(
    position_ids: Tensor | None, attention_mask: Tensor | None, q: Tensor, k: Tensor
) -> tuple[Packed, Packed] | None:
    """The documents of queries and keys that mask or positions tell of; None: each row is one."""
    if attention_mask is not None:
        positions = position_ids if position_ids is None or position_ids.dim() == 2 else None
        return packed_by(attention_mask, q.shape[1], positions)
    if position_ids is None or position_ids.dim() != 2 or q.shape[1] == 1:
        return None
    if not q.shape[1] == k.shape[1] == position_ids.shape[1]:  # with a cache
        return None
    if torch.compiler.is_compiling():
        torch._assert_async(
            goes_on(position_ids).all(),
            "position_ids hold packed documents: pass cu_seq_lens_q too, under torch.compile",
        )
        return None
    documents = documents_of(position_ids, q.shape[0])
    return None if documents is None else (documents, documents)


def _attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    queries: Packed,
    keys: Packed,
    options: dict[str, Any],
) -> Tensor:
    """Attention of the rows that exist, as documents; the others get 0."""
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
    if queries.rows is not None:
        flat_q = flat_q[queries.rows]
    if keys.rows is not None:
        flat_k, flat_v = flat_k[keys.rows], flat_v[keys.rows]
    out = _attend(
        flat_q, flat_k, flat_v, sink,
        cu_seqlens_q=queries.cu_seqlens, cu_seqlens_k=keys.cu_seqlens,
        max_seqlen_q=queries.max_seqlen, max_seqlen_k=keys.max_seqlen, **options,
    )  # fmt: skip
    if queries.rows is not None:
        rows = q.new_zeros(q.shape[0] * q.shape[1], *out.shape[1:])
        out = rows.index_copy(0, queries.rows, out)
    return out.unflatten(0, q.shape[:2])


def _one_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    exists: Tensor,
    scaling: float | None,
    left: int,
    softcap: float | None,
) -> Tensor:
    """A step of decoding, in plain operations: no shape depends on what the mask holds, so a graph
    or a compiled step serves every length.
    """
    batch, _, heads, head_dim = q.shape
    heads_kv = k.shape[2]
    if left >= 0:  # the last left + 1 keys that exist
        exists = exists & (exists.flip(1).cumsum(1).flip(1) <= left + 1)
    grouped = q.reshape(batch, heads_kv, heads // heads_kv, head_dim).float()
    scores = torch.einsum("bhgd,bkhd->bhgk", grouped, k.float())
    scores = scores * (head_dim**-0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~exists[:, None, None, :], float("-inf"))
    if sink is not None:
        logits = sink.float().view(1, heads_kv, -1, 1).expand(batch, -1, -1, -1)
        scores = torch.cat([scores, logits], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[1]]
    out = torch.einsum("bhgk,bkhd->bhgd", weights, v.float())
    return out.reshape(batch, 1, heads, v.shape[-1]).to(q.dtype)
