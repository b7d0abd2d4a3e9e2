"""bench.py plan: what planning costs the host, and what new documents cost a training loop."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from bench_dist import draw_documents, start_ranks
from benchlib import Row, draw, summary

from magi_sink_cp import (
    CPBlueprint,
    CPPlan,
    cp_attention_with_sink,
    make_cp_blueprint,
    make_cp_plan,
    prefetch_plans,
)
from magi_sink_cp.dist import driver
from magi_sink_cp.dist.planning.blueprint import PlanInput, make_blueprint
from magi_sink_cp.dist.planning.cost import CallSizes
from magi_sink_cp.kernels.backends import fa3
from magi_sink_cp.kernels.triton_support import Launcher

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
        rows = step_rows(args, transport) + call_rows(args, transport)
        if dist.get_rank() == 0:
            yield rows
    rows = memory_rows()
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
    sizes = CallSizes(1, 64, 8, 128, 2, True)
    start = time.perf_counter()
    blueprint = make_blueprint(
        PlanInput(tokens, offsets, None, None, "balanced"), ranks, ranks // 2
    )
    for window in WINDOWS:
        overlap = blueprint.overlap(window, sizes, None, link)
        blueprint.pass_schedules(window, sizes, overlap, None, link == "nvlink")
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

    def ahead_in_a_thread() -> Iterator[CPPlan]:
        """What prefetch_plans does in a process."""
        asked = known[0].blueprint.asked

        def blueprint_of(offsets: list[int]) -> CPBlueprint:
            made = make_cp_blueprint(
                TOKENS, cp_size=len(known[0].blueprint.layout), rank=dist.get_rank(),
                cu_seqlens=offsets, windows=WINDOWS,
            )  # fmt: skip
            made.prepare(asked)
            return made

        with ThreadPoolExecutor(1) as thread:
            coming = [thread.submit(blueprint_of, offsets) for offsets in stream[:2]]
            for number in range(len(stream)):
                if number + 2 < len(stream):
                    coming.append(thread.submit(blueprint_of, stream[number + 2]))
                made = coming.pop(0).result()
                yield make_cp_plan(made, group=group, transport=transport)

    ways: dict[str, Callable[[], Iterable[CPPlan]]] = {
        "known plans": lambda: known * 4,
        "new plans": new,
        "new plans, prefetched": ahead,
        "new plans, prefetched in a thread": ahead_in_a_thread,
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


def call_rows(args: argparse.Namespace, transport: str) -> list[Row]:
    """The host's time for calls whose plan is known, while the GPU has other work.

    And how much of it passes inside what a call hands to others.
    """
    group, rows = dist.group.WORLD, []
    for name, tokens, offsets, window in (
        ("64k packed", TOKENS, draw_documents(TOKENS, 0), (-1, 0)),
        ("64k packed, window", TOKENS, draw_documents(TOKENS, 0), (127, 0)),
        ("8k", 8192, None, (-1, 0)),
        ("8k, window", 8192, None, (127, 0)),
    ):
        plan = make_cp_plan(tokens, group=group, cu_seqlens=offsets, transport=transport)
        times = timed_calls(args, plan, window, None)
        with timed_pieces() as spent:
            times |= timed_calls(args, plan, window, spent)
        text = f"{plan.transport.name if plan.transport else 'one rank'}: host, {name}:"
        for what, values in times.items():
            rows.append(
                {
                    "tokens": tokens,
                    "heads": 64,
                    "heads_kv": 8,
                    "head_dim": 64,
                    "ranks": plan.cp_size,
                    "measured": f"{text} {what}",
                    **summary(values),
                }
            )
            if dist.get_rank() == 0:
                print(f"{text} {what} {statistics.median(values) / 1e3:.2f} ms", flush=True)
    return rows


def timed_calls(
    args: argparse.Namespace,
    plan: CPPlan,
    window: tuple[int, int],
    spent: dict[str, float] | None,
) -> dict[str, list[float]]:
    """Microseconds of every call after the first eight; with ``spent``, of its pieces instead.

    Pieces that no call has are left out.
    """
    q, k, v, dout, sink = draw((plan.local_tokens,), 64)
    times: dict[str, list[float]] = defaultdict(list)

    def note(way: str, start: float) -> None:
        name = f"{way} of a known plan"
        if spent is None:
            times[name].append(1e6 * (time.perf_counter() - start))
            return
        for piece, seconds in spent.items():
            times[f"{name}, in {piece}"].append(1e6 * seconds)
            spent[piece] = 0.0

    for _ in range(args.rounds + 2):
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda._sleep(100_000_000)
        outs = []
        for _ in range(4):
            start = time.perf_counter()
            outs.append(cp_attention_with_sink(q, k, v, sink, plan=plan, window_size=window))
            note("forward", start)
        while outs:
            start = time.perf_counter()
            torch.autograd.grad(outs.pop(), (q, k, v, sink), dout)
            note("backward", start)
    return {name: values[8:] for name, values in times.items() if any(values)}


@contextlib.contextmanager
def timed_pieces() -> Iterator[dict[str, float]]:
    """The seconds that pass inside what a call hands to others, by name. None contains another.

    The driver's are symm_mem's copies, flags and events.
    """
    spent = dict.fromkeys(("FlashAttention-3's operators", "the driver", "Triton's launches"), 0.0)

    def timed(piece: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[piece] += time.perf_counter() - start

        return timing

    kernels, of_driver, launches = spent
    patched = [
        (driver, "copy", of_driver),
        (driver, "write_flag", of_driver),
        (driver, "wait_flag", of_driver),
        (driver.Event, "__init__", of_driver),
        (driver.Event, "hold", of_driver),
        (Launcher, "__call__", launches),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, piece in patched:
            function = timed(piece, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, function))
        if not fa3.Fa3Backend().unavailable():
            library = fa3._library()
            timing = dataclasses.replace(
                library,
                forward=timed(kernels, library.forward),
                backward=timed(kernels, library.backward),
            )
            stack.enter_context(mock.patch.object(fa3, "_library", return_value=timing))
        yield spent


def memory_rows() -> list[Row]:
    """Memory after 500 and after 2,500 steps, each with a new plan of 8k tokens."""
    group, rows = dist.group.WORLD, []
    local_tokens = make_cp_plan(8192, group=group).local_tokens  # whatever the documents
    q, k, v, dout, sink = draw((local_tokens,), 64)
    for number in range(2501):
        offsets = draw_documents(8192, number)
        plan = make_cp_plan(8192, group=group, cu_seqlens=offsets)
        for window in WINDOWS:
            out = cp_attention_with_sink(q, k, v, sink, plan=plan, window_size=window)
            torch.autograd.grad(out, (q, k, v, sink), dout)
        del out, plan
        if number in (500, 2500):
            torch.cuda.synchronize()
            measured = {
                "of the host, resident": resident_bytes(),
                "of the GPU, allocated": torch.cuda.memory_allocated(),
                "of the GPU, reserved": torch.cuda.memory_reserved(),
            }
            for what, num_bytes in measured.items():
                rows.append(
                    {
                        "tokens": 8192,
                        "ranks": dist.get_world_size(),
                        "measured": f"memory {what}, after {number} new plans",
                        "mib": num_bytes / 2**20,
                    }
                )
                if dist.get_rank() == 0:
                    print(f"after {number} plans: {num_bytes / 2**20:.1f} MiB {what}", flush=True)
    return rows


def resident_bytes() -> int:
    """Memory of this process that is in RAM (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
