"""``bench.py dist``: what context parallelism costs over one GPU's work divided by the number of
ranks.

100% is FlashAttention-3 without a sink over the whole sequence on one GPU, measured in the same
rounds, divided by the ranks. Times are those of the slowest rank of each round. Ours runs on the
kernels that backend="auto" takes, but where a row names them.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import functools
import importlib
import importlib.util
import itertools
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from benchlib import (
    HEADS,
    HEADS_KV,
    PlainAttention,
    Row,
    Work,
    chosen_backend,
    draw,
    kernel_kind,
    measure,
    summary,
)
from torch import Tensor
from torch._C._autograd import DeviceType

from magi_sink_cp import CPPlan, cp_attention_with_sink, engines, make_cp_plan, masks
from magi_sink_cp.dist.magi_engine import as_ranges
from magi_sink_cp.dist.planning import cost
from magi_sink_cp.dist.planning.layout import LAYOUTS
from magi_sink_cp.dist.planning.mask import CAUSAL, Slice, bands_of_documents
from magi_sink_cp.dist.planning.schedule import Mask
from magi_sink_cp.kernels import magi_attention
from magi_sink_cp.kernels.checks import make_params
from magi_sink_cp.kernels.protocol import KernelRequest, Varlen

# What is timed, its leaves, and the gradient of its result.
Variant = tuple[Callable[[], Any], tuple[Tensor, ...], Tensor]

TOKENS = (8192, 16384, 32768, 65536, 131072)
EXPOSED_TOKENS = (8192, 16384, 32768, 65536)
TRACED_TOKENS = 32768

# Lengths of 13.5 million documents: (longest of the bin, documents), from MagiAttention v1.1.1's
# exps/dist_attn/benchmark/datasets/default/doc_length_distribution.csv, whose rule is followed too:
# none is longer than a quarter of the batch.
DOCUMENT_LENGTHS = (
    (10, 30254), (50, 391188), (100, 699596), (200, 1377757), (500, 3794735), (1024, 3316785),
    (2048, 2106566), (4096, 988525),
    (8192, 410002), (16384, 173574), (32768, 115007), (65536, 18428), (131072, 22513), (196608,
    18284),
)  # fmt: skip


def start_ranks() -> None:
    """Join the process group of torchrun, on this rank's GPU."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Every part's rows, on rank 0."""
    start_ranks()
    parts: list[Callable[[], list[Row]]] = [
        # First, as the arena never shrinks.
        *(lambda tokens=tokens: memory_rows(tokens) for tokens in TOKENS),
        *(lambda tokens=tokens: causal_rows(args, tokens) for tokens in TOKENS),
        *(lambda tokens=tokens: mechanism_rows(args, tokens) for tokens in EXPOSED_TOKENS),
        lambda: window_rows(args),
        lambda: packed_rows(args, 0),
        lambda: packed_rows(args, 1),
        lambda: host_rows(args),
        *(lambda tokens=tokens: exposed_rows(args, tokens) for tokens in EXPOSED_TOKENS),
        balance_rows,
    ]
    for part in parts:
        rows = part()
        torch.cuda.empty_cache()
        if dist.get_rank() == 0:
            for row in rows:
                if text := describe(row):
                    print(text, flush=True)
            yield rows
    dist.destroy_process_group()


def causal_rows(args: argparse.Namespace, tokens: int) -> list[Row]:
    """One causal document: ours on either transport, and the peers that are installed."""
    plans = {
        name: make_cp_plan(tokens, group=dist.group.WORLD, transport=name)
        for name in (("auto", "nccl") if tokens < 131072 else ("auto",))
    }
    q, k, v, dout, sink = draw((plans["auto"].local_tokens,), 128)
    attention = functools.partial(cp_attention_with_sink, q, k, v, sink)
    ours: dict[str, Variant] = {
        "cp" if name == "auto" else f"cp {name}": (
            functools.partial(attention, plan=plan),
            (q, k, v, sink),
            dout,
        )
        for name, plan in plans.items()
    }
    ours |= peers(tokens, (q, k, v, sink), dout)
    return compared(
        args,
        "causal",
        {"batch": 1, "tokens": tokens, "head_dim": 128},
        ours,
        (-1, 0),
        None,
        tokens * tokens,
    )


def peers(tokens: int, leaves: tuple[Tensor, ...], dout: Tensor) -> dict[str, Variant]:
    """One causal document by ring_flash_attn's zigzag, without a sink, and by magi_attention."""
    q, k, v, _ = leaves
    found: dict[str, Variant] = {}
    if importlib.util.find_spec("ring_flash_attn"):
        ring = importlib.import_module("ring_flash_attn").zigzag_ring_flash_attn_func
        batched = [x.detach()[None].requires_grad_() for x in (q, k, v)]
        function = functools.partial(ring, *batched, causal=True)
        found["zigzag ring without a sink"] = function, tuple(batched), dout[None]
    return found | magi_peers(masks.documents([0, tokens]), leaves, dout)


def magi_peers(slices: list[Slice], leaves: tuple[Tensor, ...], dout: Tensor) -> dict[str, Variant]:
    """MagiAttention's calc_attn with its own sink, at the overlap degrees that it documents for
    two ranks (1 is its default), and our engine "magi", which adds the sink.
    """
    if {info.name: info.reason for info in engines()}["magi"]:
        return {}
    q, k, v, sink = leaves
    api = magi_attention.load()
    tokens = q.shape[0] * dist.get_world_size()
    found: dict[str, Variant] = {}
    for degree in (1, 0, 2) if tokens < 131072 else (1,):
        config = api.DistAttnConfig(overlap_config=api.OverlapConfig(degree=degree))
        key = api.magi_attn_flex_key(
            *as_ranges(slices), tokens, tokens, HEADS, HEADS_KV, q.shape[-1], 0, dist.group.WORLD,
            dist_attn_config=config,
        )  # fmt: skip
        assert key.pad_size == 0, "these numbers of tokens need no padding"
        name = "MagiAttention" if degree == 1 else f"MagiAttention, overlap degree {degree}"
        found[name] = functools.partial(calc_attn, q, k, v, key, sink), leaves, dout
        if degree == 1:
            plan = make_cp_plan(magi_key=key)
            ours = functools.partial(cp_attention_with_sink, q, k, v, sink, plan=plan)
            found["cp, engine magi"] = ours, leaves, dout
    return found


def calc_attn(q: Tensor, k: Tensor, v: Tensor, key: Any, sink: Tensor) -> Tensor:
    """MagiAttention's, without its lse."""
    out: Tensor = magi_attention.load().calc_attn(q, k, v, key, sink=sink)[0]
    return out


def gathering_peers(
    cu_seqlens: list[int], head_dim: int, window_size: tuple[int, int]
) -> dict[str, Variant]:
    """ring_flash_attn's llama3 varlen, at two strides of heads, without a sink.

    It gathers K and V, and its shards are contiguous: several trainers do so.
    """
    if not importlib.util.find_spec("ring_flash_attn"):
        return {}
    package = importlib.import_module("ring_flash_attn")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    offsets = torch.tensor(cu_seqlens, dtype=torch.int32, device="cuda")
    offsets_q, offsets_k, longest_q, longest_k, local_k = (
        package.llama3_flash_attn_prepare_cu_seqlens(offsets, True, rank, ranks)
    )
    q, k, v, dout, _ = draw((cu_seqlens[-1] // ranks,), head_dim)
    found: dict[str, Variant] = {}
    for stride in (1, HEADS_KV):
        function = functools.partial(
            package.llama3_flash_attn_varlen_func, q, k, v, offsets_q, offsets_k, longest_q,
            longest_k, heads_k_stride=stride, local_k_slice=local_k, causal=True,
            window_size=window_size, group=dist.group.WORLD,
        )  # fmt: skip
        found[f"llama3 varlen without a sink, {stride} KV heads at a time"] = (
            function,
            (q, k, v),
            dout,
        )
    return found


# What a plan without one mechanism has in the place of a constant of the cost model.
WITHOUT: dict[str, tuple[str, Any]] = {
    "calls on one stream": ("TWO_LANES_S", (math.inf, math.inf)),
    "neighbouring segments joined": ("LARGE_WAVES", 10**9),
}


def mechanism_rows(args: argparse.Namespace, tokens: int) -> list[Row]:
    """Each overlap degree, and degree 0 without one mechanism: what it gains."""
    q, k, v, dout, sink = draw((tokens // dist.get_world_size(),), 128)
    leaves = q, k, v, sink

    def variant(overlap_degree: int, name: str | None = None) -> Variant:
        plan = make_cp_plan(tokens, group=dist.group.WORLD)
        attention = functools.partial(
            cp_attention_with_sink, *leaves, plan=plan, overlap_degree=overlap_degree
        )
        replaced = mock.patch.object(cost, *WITHOUT[name]) if name else contextlib.nullcontext()
        with replaced:
            both(attention, leaves, dout)  # a plan keeps what its first call chose
        return attention, leaves, dout

    ours = {f"cp overlap_degree {n}": variant(n) for n in range(min(2, dist.get_world_size()))}
    ours |= {f"cp overlap_degree 0, {name}": variant(0, name) for name in WITHOUT}
    shape = {"batch": 1, "tokens": tokens, "head_dim": 128}
    return compared(args, "mechanism", shape, ours, (-1, 0), None, tokens * tokens)


def window_rows(args: argparse.Namespace) -> list[Row]:
    """gpt-oss's window of 128 keys, the query's own included; head_dim 64."""
    tokens, window_size = 131072, (127, 0)
    plan = make_cp_plan(tokens, group=dist.group.WORLD)
    q, k, v, dout, sink = draw((plan.local_tokens,), 64)
    attention = functools.partial(
        cp_attention_with_sink, q, k, v, sink, plan=plan, window_size=window_size
    )
    ours: dict[str, Variant] = {
        "cp": (attention, (q, k, v, sink), dout),
        "cp on fa3": (functools.partial(attention, backend="fa3"), (q, k, v, sink), dout),
    }
    ours |= gathering_peers([0, tokens], 64, window_size)
    ours |= magi_peers(masks.sliding_window([0, tokens], 127), (q, k, v, sink), dout)
    shape = {"batch": 1, "tokens": tokens, "head_dim": 64}
    return compared(args, "window 128", shape, ours, window_size, None, tokens * 256)


def packed_rows(args: argparse.Namespace, seed: int) -> list[Row]:
    """Documents drawn from DOCUMENT_LENGTHS, in the balanced layout."""
    tokens = 65536
    cu_seqlens = draw_documents(tokens, seed)
    plan = make_cp_plan(tokens, group=dist.group.WORLD, cu_seqlens=cu_seqlens, layout="balanced")
    q, k, v, dout, sink = draw((plan.local_tokens,), 128)
    attention = functools.partial(cp_attention_with_sink, q, k, v, sink, plan=plan)
    ours: dict[str, Variant] = {
        "cp": (attention, (q, k, v, sink), dout),
        "cp on fa3": (functools.partial(attention, backend="fa3"), (q, k, v, sink), dout),
    }
    ours |= gathering_peers(cu_seqlens, 128, (-1, -1))
    ours |= magi_peers(masks.documents(cu_seqlens), (q, k, v, sink), dout)
    pairs = sum((hi - lo) ** 2 for lo, hi in itertools.pairwise(cu_seqlens))
    shape = {"batch": len(cu_seqlens) - 1, "tokens": tokens, "head_dim": 128}
    return compared(args, f"packed, batch {seed}", shape, ours, (-1, 0), cu_seqlens, pairs)


def host_rows(args: argparse.Namespace) -> list[Row]:
    """Microseconds that the host spends in one call, where the GPU is always behind."""
    rows: list[Row] = []
    for transport in ("nccl", "auto"):
        plan = make_cp_plan(2048, group=dist.group.WORLD, transport=transport)
        q, k, v, dout, sink = draw((plan.local_tokens,), 64)
        name = plan.transport.name if plan.transport else "one rank"
        for part, values in host_times(q, k, v, sink, plan, dout, args.rounds).items():
            shape = {"tokens": 2048, "head_dim": 64, "ranks": plan.cp_size}
            rows.append({**shape, "measured": f"host: {part}, {name}", **summary(values)})
    return rows


def host_times(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor, plan: CPPlan, dout: Tensor, rounds: int
) -> dict[str, list[float]]:
    """Microseconds of the host: forward, and forward with backward, of 10 calls in turn."""

    def forward() -> Any:
        return cp_attention_with_sink(q, k, v, sink, plan=plan)

    def step() -> Any:
        return torch.autograd.grad(forward(), (q, k, v, sink), dout)

    times: dict[str, list[float]] = {"forward": [], "forward+backward": []}
    for number in range(rounds + 3):
        for part, function in (("forward", forward), ("forward+backward", step)):
            torch.cuda.synchronize()
            torch.cuda._sleep(20_000_000)
            start = time.perf_counter()
            for _ in range(10):
                function()
            if number >= 3:
                times[part].append((time.perf_counter() - start) / 10 * 1e6)
    torch.cuda.synchronize()
    return times


def draw_documents(tokens: int, seed: int) -> list[int]:
    """Offsets of documents whose lengths follow DOCUMENT_LENGTHS, even within a bin, none above
    a quarter; the last is cut.
    """
    generator = random.Random(seed)
    bins = [
        (1 if not n else DOCUMENT_LENGTHS[n - 1][0] + 1, hi, count)
        for n, (hi, count) in enumerate(DOCUMENT_LENGTHS)
    ]
    offsets = [0]
    while offsets[-1] < tokens:
        lo, hi, _ = generator.choices(bins, weights=[count for *_, count in bins])[0]
        length = generator.randint(lo, hi)
        if length <= tokens // 4:
            offsets.append(min(tokens, offsets[-1] + length))
    return offsets


def compared(
    args: argparse.Namespace,
    name: str,
    shape: Row,
    ours: dict[str, Variant],
    window_size: tuple[int, int],
    cu_seqlens: list[int] | None,
    pairs: int,
) -> list[Row]:
    """Forward, and forward with backward, of each of ``ours`` (function, leaves, gradient)
    beside the whole sequence on one GPU.
    """
    ranks, tokens, head_dim = dist.get_world_size(), shape["tokens"], shape["head_dim"]
    leading = (1, tokens) if cu_seqlens is None else (tokens,)
    whole_q, whole_k, whole_v, whole_dout, _ = draw(leading, head_dim)
    varlen = None
    if cu_seqlens is not None:
        offsets = torch.tensor(cu_seqlens, dtype=torch.int32, device="cuda")
        longest = int((offsets[1:] - offsets[:-1]).max())
        varlen = Varlen(offsets, offsets, longest, longest)
    call = KernelRequest(
        make_params(head_dim, None, True, (window_size[0], -1), 0.0, False), varlen
    )
    backend = chosen_backend(args, whole_q)

    def plain() -> Tensor:
        return PlainAttention.apply(whole_q, whole_k, whole_v, backend, call)

    whole: Variant = plain, (whole_q, whole_k, whole_v), whole_dout
    token = torch.zeros(1, device="cuda")
    rows: list[Row] = []
    shape = {**shape, "heads": HEADS, "heads_kv": HEADS_KV, "ranks": ranks}
    rounds = max(7, int(args.rounds / max(1.0, pairs / (4 * 8192**2))))
    # Each alone with the plain one: what runs before decides a GPU's clock.
    for key, variant in ours.items():
        pair = {"plain": whole, key: variant}
        phases: dict[str, Work] = {
            "forward": {
                name_: torch.no_grad()(function) for name_, (function, _, _) in pair.items()
            },
            "forward+backward": {
                name_: functools.partial(both, *each) for name_, each in pair.items()
            },
        }
        for phase, work in phases.items():
            times = measure(work, rounds, before_each=lambda: dist.all_reduce(token))
            # A step ends when the last rank does.
            slowest = torch.tensor(list(times.values()), device="cuda")
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            plain_times, our_times = slowest.tolist()
            percent = 100 * statistics.median(plain_times) / ranks / statistics.median(our_times)
            rows.append(
                {**shape, "measured": f"{name}: {phase} plain beside {key}", **summary(plain_times)}
            )
            rows.append(
                {
                    **shape,
                    "measured": f"{name}: {phase} {key}",
                    **summary(our_times),
                    "percent_of_plain": percent,
                }
            )
    return rows


def both(
    function: Callable[[], Any], leaves: tuple[Tensor, ...], gradient: Tensor
) -> tuple[Tensor, ...]:
    """Forward and backward."""
    return torch.autograd.grad(function(), leaves, gradient)


def describe(row: Row) -> str | None:
    """One line for the terminal."""
    percent = row.get("percent_of_plain", row.get("percent"))
    if percent is None:
        return None
    median = f"{row['median_us'] / 1e3:9.3f} ms" if "median_us" in row else ""
    return f"{row['tokens']:6d} tokens {row['measured']:50s} {median} {percent:6.2f}%"


def exposed_rows(args: argparse.Namespace, tokens: int) -> list[Row]:
    """How long no kernel but those of NCCL runs, on any stream, within a forward and backward, in
    percent of it.

    The slower GPU waits for the transfers alone; the faster one waits for the slower one too.
    """
    plan = make_cp_plan(tokens, group=dist.group.WORLD)
    events = profiled_step(plan)
    idle, span = standstill(
        [(e["start"], e["start"] + e["us"]) for e in events if e["lane"] != "copies"]
    )
    figures = torch.zeros(dist.get_world_size(), 2, device="cuda", dtype=torch.float64)
    figures[dist.get_rank()] = torch.tensor([idle, span])
    dist.all_reduce(figures)
    shape = {
        "tokens": tokens,
        "heads": HEADS,
        "heads_kv": HEADS_KV,
        "head_dim": 128,
        "ranks": dist.get_world_size(),
    }
    rows = [
        {
            **shape,
            "measured": f"exposed: forward+backward, kernels idle, {which}",
            "median_us": us,
            "percent_of_plain": 100 * us / of,
        }
        for which, (us, of) in zip(
            ("rank that waits least", "most"),
            (min(figures.tolist()), max(figures.tolist())),
            strict=True,
        )
    ]
    if tokens == TRACED_TOKENS:
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, events)
        if dist.get_rank() == 0:
            write_trace(args.out / "dist_trace.csv", gathered)
    return rows


def standstill(busy: list[tuple[float, float]]) -> tuple[float, float]:
    """How much of [0, last end) none of the intervals covers, and that end."""
    end = idle = 0.0
    for begin, stop in sorted(busy):
        idle += max(0.0, begin - end)
        end = max(end, stop)
    return idle, end


def write_trace(path: Path, events_of_ranks: list[list[dict[str, Any]]]) -> None:
    """What each rank's GPU did when, from 5 µs on; scripts/plot.py draws it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["rank", "lane", "name", "start_us", "duration_us"])
        for rank, events in enumerate(events_of_ranks):
            for e in sorted(events, key=lambda e: e["start"]):
                if e["us"] >= 5:
                    writer.writerow(
                        [rank, e["lane"], e["name"], f"{e['start']:.1f}", f"{e['us']:.1f}"]
                    )


def profiled_step(plan: CPPlan) -> list[dict[str, Any]]:
    """What the GPU did in one forward and backward, enqueued whole before it starts, so that the
    host cannot hold it up.

    Times in µs from where all ranks are ready. The lanes: "kernels" and, where a pass uses a second
    stream, "kernels beside" of the computation; "copies", whatever carries them out.
    """
    q, k, v, dout, sink = draw((plan.local_tokens,), 128)

    def step() -> Any:
        return torch.autograd.grad(
            cp_attention_with_sink(q, k, v, sink, plan=plan), (q, k, v, sink), dout
        )

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    dist.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        token = torch.zeros(1, device="cuda")
        torch.cuda._sleep(20_000_000)
        dist.all_reduce(token)
        step()
        torch.cuda.synchronize()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [
        e
        for e in profile.profiler.kineto_results.events()
        if e.device_type() == DeviceType.CUDA and e.duration_ns() > 0
    ]
    ready = max(e.start_ns() + e.duration_ns() for e in events if "AllReduce" in e.name())
    events = [e for e in events if e.start_ns() >= ready and not e.name().startswith("nccl:")]
    computed: collections.Counter[int] = collections.Counter()  # ns on each stream
    for e in events:
        computed[e.device_resource_id()] += 0 if is_copy(e.name()) else e.duration_ns()
    [(calling, _)] = computed.most_common(1)
    return [
        {
            "name": kernel_kind(e.name())
            if "cutlass" in e.name()
            else e.name().replace("void ", "").split("<")[0].split("(")[0][:40],
            "start": (e.start_ns() - ready) / 1e3,
            "us": e.duration_ns() / 1e3,
            "lane": "copies"
            if is_copy(e.name())
            else "kernels"
            if e.device_resource_id() == calling
            else "kernels beside",
        }
        for e in events
    ]


def is_copy(name: str) -> bool:
    """Whether an event of the profiler moves data rather than computing."""
    return name.startswith("Memcpy") or "nccl" in name


def memory_rows(tokens: int) -> list[Row]:
    """Peak of one rank over q, k, v, out and their gradients, the arena of symmetric memory
    included.
    """
    plan = make_cp_plan(tokens, group=dist.group.WORLD)
    q, k, v, dout, sink = draw((plan.local_tokens,), 128)
    # q, k, v and their gradients; out and dout.
    tensors = 2 * (q.nbytes + k.nbytes + v.nbytes) + 2 * dout.nbytes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    out = cp_attention_with_sink(q, k, v, sink, plan=plan)
    grads = torch.autograd.grad(out, (q, k, v, sink), dout)
    torch.cuda.synchronize()
    del grads
    arena = getattr(plan.transport, "num_bytes", 0)
    peak = torch.tensor(
        torch.cuda.max_memory_allocated() + arena, device="cuda", dtype=torch.float64
    )
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    shape = {
        "tokens": tokens,
        "heads": HEADS,
        "heads_kv": HEADS_KV,
        "head_dim": 128,
        "ranks": dist.get_world_size(),
    }
    return [
        {
            **shape,
            "measured": "memory: peak over q, k, v, out and gradients",
            "percent": 100 * peak.item() / tensors,
        },
        {
            **shape,
            "measured": "memory: arena over k and v",
            "percent": 100 * arena / (k.nbytes + v.nbytes),
        },
    ]


def balance_rows() -> list[Row]:
    """How much more (query, key) pairs than the mean the busiest rank has, over batches of 1,024
    k tokens, in either layout.
    """
    rows: list[Row] = []
    tokens = 1 << 20
    for ranks in (2, 8, 64):
        for name in ("auto", "balanced", "zigzag"):
            layout = LAYOUTS[name]
            leads = []
            for seed in range(5):
                offsets = draw_documents(tokens, seed)
                bands = bands_of_documents(list(itertools.pairwise(offsets)), CAUSAL)
                mask = Mask(layout(tokens, ranks, bands), bands)
                work = [mask.pairs(rank) for rank in range(ranks)]
                leads.append(100 * (max(work) * ranks / sum(work) - 1))
            row = {"tokens": tokens, "ranks": ranks, "percent": statistics.mean(leads)}
            rows.append(
                {**row, "measured": f"balance: busiest rank over the mean, {ranks} ranks, {name}"}
            )
    return rows
