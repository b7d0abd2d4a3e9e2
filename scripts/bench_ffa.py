"""bench.py ffa: masks with a sink on one GPU, beside MagiAttention's flex_flash_attn_func.

Both sides get the same q, k, v, gradient and sink. Theirs gets the mask in the slices that suit it
best, as tensors made before; its kernels are compiled in the warm-up.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench_dist import draw_documents
from bench_masks import BLOCK, PREFIX, passes
from benchlib import HEADS, HEADS_KV, Row, draw, measure, rounds_for, summary

from magi_sink_cp import attention_with_sink, masks
from magi_sink_cp.dist.planning.mask import SLICE_TYPES, Slice
from magi_sink_cp.kernels import magi_attention


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    for tokens in (16384, 65536):
        for name, (ours, slices) in cases(tokens).items():
            yield rows_of(args, name, tokens, ours, slices)


def cases(tokens: int) -> dict[str, tuple[dict[str, Any], list[Slice]]]:
    """Name → (arguments of attention_with_sink, the mask as slices for theirs)."""
    offsets = draw_documents(tokens, 0)
    longest = max(hi - lo for lo, hi in itertools.pairwise(offsets))
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device="cuda")
    packed = {
        "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": longest,
        "max_seqlen_k": longest, "causal": True,
    }  # fmt: skip
    prefix = min(PREFIX, tokens // 2)
    shared = masks.shared_prefix(prefix, [(tokens - prefix) // 16] * 16)
    edges = range(0, tokens, BLOCK)
    return {
        "causal": ({"causal": True}, masks.documents([0, tokens])),
        "packed documents": (packed, masks.documents(offsets)),
        "window 128": (
            {"causal": True, "window_size": (127, 0)}, masks.sliding_window([0, tokens], 127)
        ),
        "shared_prefix": ({"mask_slices": shared}, shared),
        "block_causal": (
            {"mask_slices": masks.block_causal(BLOCK, tokens)},
            [((lo, lo + BLOCK), (0, lo + BLOCK), "full") for lo in edges],
        ),
    }  # fmt: skip


def rows_of(
    args: argparse.Namespace, name: str, tokens: int, arguments: dict[str, Any], slices: list[Slice]
) -> list[Row]:
    q, k, v, dout, sink = draw((tokens,), 128)
    dense = "cu_seqlens_q" not in arguments and "mask_slices" not in arguments
    inputs = (q[None], k[None], v[None], sink) if dense else (q, k, v, sink)
    attend: Callable[[], Any] = functools.partial(attention_with_sink, *inputs, **arguments)
    queries, keys, kinds = zip(*slices, strict=True)
    numbers = [SLICE_TYPES.index(kind) for kind in kinds]
    ranges = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in (queries, keys, numbers)]
    spans = sorted(queries)
    api = magi_attention.load()

    def theirs() -> Any:
        out, _ = api.flex_flash_attn_func(
            q, k, v, *ranges, sink=sink,
            disable_fwd_atomic_reduction=all(a[1] <= b[0] for a, b in itertools.pairwise(spans)),
        )  # fmt: skip
        return out

    with torch.no_grad():
        ours, other = attend().view(q.shape).float(), theirs().float()
    error = float((ours - other).norm() / other.norm())
    assert error < 1e-2, f"{name}: the two compute other results: {error}"
    leaves = q, k, v, sink
    work = passes("ours", attend, leaves, dout[None] if dense else dout)
    work |= passes("FFA", theirs, leaves, dout)
    times = measure(work, rounds_for(args, tokens * tokens))
    shape = {"tokens": tokens, "heads": HEADS, "heads_kv": HEADS_KV, "head_dim": 128}
    rows: list[Row] = []
    for part, values in times.items():
        rows.append({**shape, "measured": f"{name}: {part}", **summary(values)})
    for part in ("forward", "both"):
        pairs = zip(times[f"FFA, {part}"], times[f"ours, {part}"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        rows.append({**shape, "measured": f"{name}: FFA over ours, {part}", "percent": 100 * ratio})
        ours_us = statistics.median(times[f"ours, {part}"])
        print(f"{name:18s} {tokens:6d} {part:8s} ours {ours_us:9.1f} µs, FFA takes {ratio:.2f} "
              "times as long", flush=True)  # fmt: skip
    return rows
