"""bench.py plan: what planning costs the host, and what new documents cost a training loop."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from bench_dist import draw_documents, start_ranks
from benchlib import Row, draw, summary

from magi_sink_cp import CPPlan, cp_attention_with_sink, make_cp_plan, prefetch_plans
from magi_sink_cp.dist.planning.blueprint import PlanInput, make_blueprint
from magi_sink_cp.dist.planning.cost import CallSizes

# (tokens, ranks)
SIZES = ((1 << 20, 8), (1 << 24, 8), (1 << 24, 1024))
WINDOWS = ((-1, 0), (127, 0))
TOKENS, LAYERS, BATCHES = 65536, 4, 10

# The planner before NumPy (commit 1f894d0), timed in a process of its own.
OLD = """
import json, statistics, sys, time
from magi_sink_cp.dist.layout import LAYOUTS, num_tokens
from magi_sink_cp.dist.overlap import Work, choose_overlap
from magi_sink_cp.dist.schedule import build_schedule, typical_share, visible_pairs
tokens, ranks, repeats, link, offsets = json.loads(sys.stdin.read())
documents = [(lo, hi) for lo, hi in zip(offsets, offsets[1:])]
times = []
for _ in range(repeats):
    start = time.perf_counter()
    layout = LAYOUTS["balanced"](tokens, ranks, documents)
    for window in ((-1, 0), (127, 0)):
        share = typical_share(layout, documents, window)
        pairs = sum(visible_pairs(hi - lo, hi - lo, *window) for lo, hi in documents)
        work = Work(
            num_tokens(layout[0]), pairs // ranks, share.remote_keys, share.remote_rows,
            share.alone_pairs, max(map(len, layout)), len(documents), 64, 8, 128, 2,
        )
        for degree in choose_overlap(work, ranks, link, None).degrees:
            build_schedule(layout, documents, window, ranks // 2, degree, routed=link == "nvlink")
    times.append(1e6 * (time.perf_counter() - start))
print(json.dumps(times))
"""


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    start_ranks()
    if dist.get_rank() == 0:
        yield [row for tokens, ranks in SIZES for row in host_rows(args, tokens, ranks)]
    dist.barrier()
    for transport in ("auto", "nccl"):
        rows = step_rows(args, transport)
        if dist.get_rank() == 0:
            yield rows
    dist.barrier()
    dist.destroy_process_group()


def host_rows(args: argparse.Namespace, tokens: int, ranks: int) -> list[Row]:
    """One rank's new plan, with all that it needs of the other ranks, on one core."""
    offsets = draw_documents(tokens, 0)
    link = "nvlink" if ranks <= 8 else "network"
    ours = [planned(tokens, ranks, offsets, link) for _ in range(args.rounds)]
    shape = {"batch": len(offsets) - 1, "tokens": tokens, "ranks": ranks}
    rows: list[Row] = [{**shape, "measured": "host: a new plan", **summary(ours)}]
    text = f"{tokens} tokens, {ranks} ranks: {statistics.median(ours) / 1e3:.1f} ms"
    if args.before is not None:
        asked = json.dumps([tokens, ranks, max(2, args.rounds // 5), link, offsets])
        done = subprocess.run(
            [sys.executable, "-c", OLD], input=asked, capture_output=True, text=True,
            cwd=args.before, check=True,
        )  # fmt: skip
        before = json.loads(done.stdout)
        ratio = statistics.median(before) / statistics.median(ours)
        rows.append({**shape, "measured": "host: a new plan, before", **summary(before)})
        rows.append({**shape, "measured": "host: before over now", "percent": 100 * ratio})
        text += f", before {statistics.median(before) / 1e3:.1f} ms: {ratio:.0f} times as long"
    print(text, flush=True)
    return rows


def planned(tokens: int, ranks: int, offsets: list[int], link: str) -> float:
    """Microseconds of a blueprint and of its schedules, full and window layers, both passes."""
    sizes = CallSizes(1, 64, 8, 128, 2)
    start = time.perf_counter()
    blueprint = make_blueprint(
        PlanInput(tokens, offsets, None, None, "balanced"), ranks, ranks // 2
    )
    for window in WINDOWS:
        overlap = blueprint.overlap(window, sizes, None, link)
        blueprint.pass_schedules(window, sizes, overlap, None, True, link == "nvlink")
    blueprint.position_runs()
    return 1e6 * (time.perf_counter() - start)


def step_rows(args: argparse.Namespace, transport: str) -> list[Row]:
    """A step of 4 full and 4 window layers, forward and backward, each with new documents.

    Beside the same batches with plans that were made, and used, before.
    """
    group = dist.group.WORLD
    batches = [draw_documents(TOKENS, seed) for seed in range(BATCHES)]
    known = [make_cp_plan(TOKENS, group=group, cu_seqlens=x, transport=transport) for x in batches]
    q, k, v, dout, sink = draw((known[0].local_tokens,), 64)

    def step(plan: CPPlan) -> None:
        outs = [
            cp_attention_with_sink(q, k, v, sink, plan=plan, window_size=WINDOWS[layer % 2])
            for layer in range(2 * LAYERS)
        ]
        while outs:
            torch.autograd.grad(outs.pop(), (q, k, v, sink), dout)

    # One pass over the batches before the clock starts: a training loop starts once.
    stream = batches * 4

    def new() -> Iterator[CPPlan]:
        for offsets in stream:
            yield make_cp_plan(TOKENS, group=group, cu_seqlens=offsets, transport=transport)

    def ahead() -> Iterable[CPPlan]:
        given = prefetch_plans(
            stream, group=group, cu_seqlens=lambda x: x, transport=transport, windows=WINDOWS
        )
        return (plan for _, plan in given)

    ways: dict[str, Callable[[], Iterable[CPPlan]]] = {
        "known plans": lambda: known * 4,
        "new plans": new,
        "new plans, prefetched": ahead,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(max(6, args.rounds // 3)):
        for name, plans in list(ways.items())[:: 1 if number % 2 == 0 else -1]:
            start = 0.0
            for done, plan in enumerate(plans()):
                if done == BATCHES:
                    torch.cuda.synchronize()
                    dist.barrier()
                    start = time.perf_counter()
                step(plan)
            torch.cuda.synchronize()
            if number >= 1:
                times[name].append(1e6 * (time.perf_counter() - start) / (3 * BATCHES))
    shape = {
        "tokens": TOKENS,
        "heads": 64,
        "heads_kv": 8,
        "head_dim": 64,
        "ranks": known[0].cp_size,
    }
    name = known[0].transport.name if known[0].transport else "one rank"
    rows: list[Row] = []
    for way, values in times.items():
        extra = [a - b for a, b in zip(values, times["known plans"], strict=True)]
        rows.append({**shape, "measured": f"step over {name}: {way}", **summary(values)})
        if way != "known plans":
            rows.append({**shape, "measured": f"step over {name}: {way}, extra", **summary(extra)})
        if dist.get_rank() == 0:
            print(f"{name}: {way:22s} {statistics.median(values) / 1e3:7.2f} ms a step, "
                  f"{statistics.median(extra) / 1e3:+6.2f}", flush=True)  # fmt: skip
    return rows
