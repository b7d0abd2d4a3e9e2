"""bench.py model: training steps of a model of gpt-oss's shape, in transformers.

24 layers, d_model 2880, 64:8 heads, head_dim 64, window 128 in every other layer; experts and
vocabulary are cut so that it fits. Checkpointed, bf16, AdamW; two ranks average their gradients.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import re
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from bench_dist import draw_documents, start_ranks
from benchlib import Row

from magi_sink_cp.integrations import transformers as magi

# (tokens, packed documents, attention, ranks). Eager and flex_attention make no mask for gpt-oss's
# packed documents, so they are compared over one. Eager holds its scores: it gets what it can.
CASES = (
    (8192, False, "eager", 1),
    (8192, False, "magi_sink", 1),
    (32768, False, "flex_attention", 1),
    (32768, False, "magi_sink", 1),
    (131072, True, "magi_sink", 1),
    (131072, True, "magi_sink", 2),
)
VOCABULARY = 8192
WARMUP = 2
# Kernels of attention, sinks and the exchange of keys: FlashAttention's, ours, flex_attention's.
ATTENTION = re.compile("flash|merge|dsink|accumulate|flex|tem_fused|Memcpy PtoP", re.IGNORECASE)


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    start_ranks()
    magi.register()
    for tokens, packed, attention, ranks in CASES:
        if ranks > dist.get_world_size() or args.tokens not in (None, tokens):
            continue
        rows: list[Row] = []
        if dist.get_rank() < ranks:
            rows = [measured(args, tokens, packed, attention, ranks)]
            gc.collect()
            torch.cuda.empty_cache()
        dist.barrier()
        if dist.get_rank() == 0:
            yield rows
    dist.destroy_process_group()


def make_model(layers: int, attention: str) -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        num_hidden_layers=layers, hidden_size=2880, intermediate_size=2880, num_attention_heads=64,
        num_key_value_heads=8, head_dim=64, num_local_experts=4, num_experts_per_tok=2,
        vocab_size=VOCABULARY, sliding_window=128, pad_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.device("cuda"):
        model: Any = GptOssForCausalLM(config)
        model = model.to(torch.bfloat16).train()
    model.set_attn_implementation(attention)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def measured(
    args: argparse.Namespace, tokens: int, packed: bool, attention: str, ranks: int
) -> Row:
    torch.manual_seed(0)
    model = make_model(args.layers, attention)
    if ranks > 1:
        magi.context_parallel(model, dist.group.WORLD)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def train_step(number: int) -> None:
        offsets = draw_documents(tokens, number) if packed else [0, tokens]
        positions = torch.cat([torch.arange(hi - lo) for lo, hi in itertools.pairwise(offsets)])
        ids = torch.randint(VOCABULARY, (1, tokens), device="cuda")
        batch = {"input_ids": ids, "labels": ids, "position_ids": positions[None].cuda()}
        model(**batch, use_cache=False).loss.backward()
        if ranks > 1:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            for grad in grads:
                dist.all_reduce(grad, op=dist.ReduceOp.AVG)
        optimizer.step()
        optimizer.zero_grad()

    times = []
    torch.cuda.reset_peak_memory_stats()
    for number in range(WARMUP + args.steps):
        if ranks > 1:
            dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        train_step(number)
        torch.cuda.synchronize()
        if number >= WARMUP:
            times.append(1e6 * (time.perf_counter() - start))
    share = None if attention == "eager" else share_of_attention(lambda: train_step(0))
    median = statistics.median(times)
    peak = torch.cuda.max_memory_allocated() / 2**20
    name = f"{args.layers} layers, {attention}: a step"
    name += " with new documents" if packed else ""
    name += "" if share is None else f", attention {100 * share:.0f}% of the kernels' time"
    if dist.get_rank() == 0:
        speed = 1e6 * tokens / median
        print(
            f"{tokens} tokens, {ranks} GPUs, {name}: {speed:.0f} tokens/s, {peak:.0f} MiB",
            flush=True,
        )
    return {
        "tokens": tokens, "heads": 64, "heads_kv": 8, "head_dim": 64, "ranks": ranks,
        "measured": name,
        "median_us": median, "rounds": len(times), "mib": peak,
    }  # fmt: skip


def share_of_attention(run_step: Callable[[], None]) -> float:
    """Of the time of all kernels of a step, how much attention's take."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run_step()
        torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total for event in profile.key_averages()}
    return sum(us for name, us in times.items() if ATTENTION.search(name)) / sum(times.values())
