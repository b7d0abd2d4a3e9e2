"""bench.py masks: what slices save on one GPU, and FlexAttention with the same mask."""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchlib import HEADS, HEADS_KV, Row, Work, draw, measure, summary
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from magi_sink_cp import attention_with_sink, masks

PREFIX, COMPLETIONS = 8192, [2048] * 16
BLOCK = 1024


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    yield shared_prefix_rows(args)
    for tokens in (16384, 65536):
        yield block_causal_rows(args, tokens)


def shared_prefix_rows(args: argparse.Namespace) -> list[Row]:
    """A prompt and 16 completions as slices, beside the prompt repeated before each of them."""
    total = PREFIX + sum(COMPLETIONS)
    q, k, v, dout, sink = draw((total,), 128)
    slices = masks.shared_prefix(PREFIX, COMPLETIONS)
    ours = functools.partial(attention_with_sink, q, k, v, sink, mask_slices=slices)
    lengths = [PREFIX + completion for completion in COMPLETIONS]
    repeated = draw((sum(lengths),), 128)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
    theirs = functools.partial(
        attention_with_sink,
        *repeated[:3],
        repeated[4],
        cu_seqlens_q=offsets,
        cu_seqlens_k=offsets,
        max_seqlen_q=max(lengths),
        max_seqlen_k=max(lengths),
        causal=True,
    )
    work = passes("slices", ours, (q, k, v, sink), dout)
    work |= passes("repeated prompt", theirs, (*repeated[:3], repeated[4]), repeated[3])
    return compared(args, "shared_prefix", total, work, "repeated prompt")


def block_causal_rows(args: argparse.Namespace, tokens: int) -> list[Row]:
    """Blocks of 1,024 tokens, beside FlexAttention with the same mask and no sink."""
    q, k, v, dout, sink = draw((1, tokens), 128)
    slices = masks.block_causal(BLOCK, tokens)
    ours = functools.partial(attention_with_sink, q, k, v, sink, mask_slices=slices)

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query // BLOCK >= key // BLOCK

    block_mask = create_block_mask(seen, None, None, tokens, tokens, device="cuda")
    flex: Callable[..., Any] = torch.compile(flex_attention)
    heads_first = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    theirs = functools.partial(flex, *heads_first, block_mask=block_mask, enable_gqa=True)
    with torch.no_grad():
        plain: Any = attention_with_sink(q, k, v, None, mask_slices=slices)
        other = theirs().transpose(1, 2)
    error = float((plain - other).float().norm() / other.float().norm())
    assert error < 1e-2, f"FlexAttention computes another mask: {error}"
    work = passes("slices", ours, (q, k, v, sink), dout)
    work |= passes("FlexAttention", theirs, heads_first, dout.transpose(1, 2).contiguous())
    return compared(args, "block_causal", tokens, work, "FlexAttention")


def passes(
    name: str, attend: Callable[[], Any], leaves: Any, dout: Tensor
) -> dict[str, Callable[[], Any]]:
    """Forward without gradients, and forward and backward."""

    def forward() -> Any:
        with torch.no_grad():
            return attend()

    return {
        f"{name}, forward": forward,
        f"{name}, both": lambda: torch.autograd.grad(attend(), leaves, dout),
    }


def compared(args: argparse.Namespace, mask: str, tokens: int, work: Work, other: str) -> list[Row]:
    times = measure(work, max(10, args.rounds // 3))
    shape = {"tokens": tokens, "heads": HEADS, "heads_kv": HEADS_KV, "head_dim": 128}
    rows: list[Row] = []
    for name, values in times.items():
        rows.append({**shape, "measured": f"{mask}: {name}", **summary(values)})
    for part in ("forward", "both"):
        theirs, ours = times[f"{other}, {part}"], times[f"slices, {part}"]
        ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
        label = f"{mask}: {other} over slices, {part}"
        rows.append({**shape, "measured": label, "percent": 100 * ratio})
        print(f"{mask} {tokens:6d} {part:8s} slices {statistics.median(ours):9.1f} µs, "
              f"{other} takes {ratio:.2f} times as long", flush=True)  # fmt: skip
    return rows
