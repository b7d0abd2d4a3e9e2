"""What transformers' mask creation gives a layer: which keys are there, as (batch, keys), or None.

The rest of a mask is causal, bidirectional, a window, or packed documents, which the attention
function knows from its own arguments. Every other kind of mask is refused by its name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_KNOWN_MASKS = frozenset(
    {
        "causal_mask_function",
        "bidirectional_mask_function",
        "and_masks.<locals>.and_mask",
        "sliding_window_overlay.<locals>.inner_mask",
        "sliding_window_bidirectional_overlay.<locals>.inner_mask",
        "packed_sequence_mask_function.<locals>.inner_mask",
        "remap_positions_for_packed_sequence.<locals>.inner_mask",
    }
)


def existing_keys(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    device: torch.device | str | None = None,
    **_: Any,
) -> Tensor | None:
    """The mask function that is registered as "magi_sink"; transformers names the arguments.

    Args:
        attention_mask: (batch, tokens seen so far), True or 1 where a token is no padding.
        q_offset, cache_position: where the queries stand, in transformers 5 and 4. A static cache
            holds keys behind them, which do not exist yet.

    Returns:
        bool (batch_size, kv_length), or None if all keys exist.

    Raises:
        ValueError: the model asks for another kind of mask.
    """
    if mask_function is not None:
        _refuse_unknown(mask_function)
    if cache_position is not None:  # transformers 4
        q_length, q_offset = cache_position.shape[0], cache_position[0]
        device = cache_position.device
    assert q_length is not None, "transformers 5 gives q_length, and 4 gives cache_position"
    has_later = isinstance(q_offset, Tensor) or kv_length + kv_offset > q_offset + q_length
    if has_later and kv_length > q_length:
        if attention_mask is not None:
            device = attention_mask.device
        key = torch.arange(kv_length, device=device) + kv_offset
        exists = (key < q_offset + q_length).expand(batch_size, kv_length)
    elif attention_mask is None:
        return None
    else:
        exists = attention_mask.new_ones(batch_size, kv_length, dtype=torch.bool)
    if attention_mask is not None:
        known = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        missing = kv_length - known.shape[1]
        exists = exists & torch.nn.functional.pad(known, (0, missing), value=False)
    if torch.compiler.is_compiling():
        return exists.contiguous()
    if bool(exists.all()):
        return None
    exists = exists.contiguous()
    exists.queries_end = int(q_offset) + q_length - kv_offset  # type: ignore[attr-defined]
    return exists


def _refuse_unknown(mask_function: Callable[..., Any]) -> None:
    name = getattr(mask_function, "__qualname__", repr(mask_function))
    if name not in _KNOWN_MASKS:
        raise ValueError(
            "attn_implementation='magi_sink' knows causal, bidirectional, sliding-window and "
            f"packed masks, and this model asks for {name!r}; use 'eager' or 'flex_attention'"
        )
    for cell in getattr(mask_function, "__closure__", None) or ():
        inner = cell.cell_contents
        for each in inner if isinstance(inner, tuple) else (inner,):
            if callable(each) and not isinstance(each, Tensor):
                _refuse_unknown(each)


class Packed(NamedTuple):
    """Rows of a batch that exist, back to back.

    Attributes:
        rows: int64, which of the flattened (batch · rows) they are; None if all.
        cu_seqlens: int32 offsets of the documents.
        max_seqlen: the longest document; None if nobody has told.
    """

    rows: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int | None


# For each mask or position_ids what was read from it: every layer gets the same tensor.
_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _read_once(x: Tensor, what: object, beside: Tensor | None, read: Callable[[], Any]) -> Any:
    """What ``read`` makes of ``x`` and ``beside``, kept until one of them changes.

    Inference tensors do not tell whether they change: these are read every time.
    """
    if x.is_inference() or (beside is not None and beside.is_inference()):
        return read()
    state = what, x._version, None if beside is None else beside._version
    known = _read.get(x)
    other = None if known is None or known[1] is None else known[1]()
    if known is None or known[0] != state or other is not beside:
        reference = None if beside is None else weakref.ref(beside)
        known = _read[x] = state, reference, read()
    return known[2]


@torch.compiler.disable(reason="the host reads how many keys exist")
def packed_by(
    exists: Tensor, num_queries: int, position_ids: Tensor | None
) -> tuple[Packed, Packed]:
    """(queries, keys) that exist, of what :func:`existing_keys` gave.

    The queries are the last ones of the keys; a static cache has room behind them. Without a cache
    a sample may hold several documents: positions that go back begin one.
    """

    def read() -> tuple[Packed, Packed]:
        if num_queries == exists.shape[1]:
            packed = pack_existing(exists, position_ids)
            return packed, packed
        end = getattr(exists, "queries_end", None)
        if end is None:  # made by a compiled graph
            end = max(num_queries, int(exists.any(0).nonzero().max()) + 1)
        return pack_existing(exists[:, end - num_queries : end]), pack_existing(exists)

    result: tuple[Packed, Packed] = _read_once(exists, num_queries, position_ids, read)
    return result


def pack_existing(exists: Tensor, position_ids: Tensor | None = None) -> Packed:
    """The rows of (batch, tokens) that exist; each sample is a document, or several."""
    rows = exists.flatten().nonzero()[:, 0]
    if position_ids is None:  # one document for each sample, though it is empty
        counts = exists.sum(1).cumsum(0)
        offsets = torch.nn.functional.pad(counts, (1, 0)).to(torch.int32)
    else:
        sample = rows // exists.shape[1]
        starts = torch.ones_like(rows, dtype=torch.bool)
        starts[1:] = sample[1:] != sample[:-1]
        if position_ids.shape[-1] == exists.shape[1]:
            position = position_ids.expand(exists.shape).flatten()[rows]
            starts[1:] |= position[1:] <= position[:-1]
        first = starts.nonzero()[:, 0]
        offsets = torch.nn.functional.pad(first, (0, 1), value=len(rows)).to(torch.int32)
    longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
    return Packed(rows, offsets, longest)


@torch.compiler.disable(reason="the host reads how many documents there are")
def documents_of(position_ids: Tensor, batch_size: int) -> Packed | None:
    """The documents of (batch or 1, tokens) positions; None if each sample is one."""
    found: Packed | None = _read_once(
        position_ids, batch_size, None, lambda: find_documents(position_ids.expand(batch_size, -1))
    )
    return found


def find_documents(position_ids: Tensor) -> Packed | None:
    """The documents of (batch, tokens) positions, which begin where these do not go on by one."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = goes_on(position_ids).logical_not()
    first = starts.flatten().nonzero()[:, 0].to(torch.int32)
    if len(first) == len(position_ids):
        return None
    offsets = torch.nn.functional.pad(first, (0, 1), value=position_ids.numel())
    return Packed(None, offsets, int(offsets.diff().max()))


def goes_on(position_ids: Tensor) -> Tensor:
    """bool (batch, tokens - 1): whether each position but the first follows the one before."""
    return position_ids[:, 1:] == position_ids[:, :-1] + 1
