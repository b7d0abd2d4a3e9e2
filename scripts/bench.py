"""Benchmarks on GPUs, written as CSV.

    python scripts/bench.py kernel --out docs/benchmarks
    python scripts/bench.py dist --out docs/benchmarks       # starts one rank a GPU; or under torchrun

``kernel``: attention_with_sink beside plain FlashAttention-3 and one read+write pass over out. ``dist``: cp_attention_with_sink
beside one GPU's FlashAttention-3 without a sink on the whole sequence, divided by the number of ranks.

What is compared runs in turns in one process, in both orders, after warm-up; a row holds the median and the 20% and 80% quantiles
of all rounds. An overhead is the median of the differences within a round, so that clocks that change over time cancel.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from magi_sink_cp import attention_with_sink, cp_attention_with_sink, make_cp_plan
from magi_sink_cp.kernels.inputs import make_params
from magi_sink_cp.kernels.protocol import Backend, Call, Partial
from magi_sink_cp.kernels.registry import select_backend

Row = dict[str, Any]
Work = dict[str, Callable[[], Any]]

HEADS, HEADS_KV = 64, 8
KERNEL_SHAPES = ((4, 2048), (2, 4096), (1, 8192), (1, 16384), (1, 32768))  # (batch, tokens)
DIST_TOKENS = (8192, 16384, 32768, 65536, 131072)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kernel", "dist"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV")
    parser.add_argument("--backend", default="fa3", help="kernels on both sides of the comparison")
    parser.add_argument("--rounds", type=int, default=60, help="rounds per shape (fewer for shapes that take long)")
    parser.add_argument("--commit", help="commit to record (default: asks git)")
    args = parser.parse_args()
    if args.rounds < 10:
        parser.error(f"--rounds must be at least 10 for a median and quantiles, got {args.rounds}")
    if not torch.cuda.is_available():
        print("bench.py needs a CUDA GPU: absolute times of another device say nothing here", file=sys.stderr)
        return 2
    if args.what == "dist" and "LOCAL_RANK" not in os.environ:  # start one rank a GPU
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torch.cuda.device_count())]
        os.execv(sys.executable, [sys.executable, *launcher, __file__, *sys.argv[1:]])
    rows = bench_kernel(args) if args.what == "kernel" else bench_dist(args)
    if rows:
        write(args, rows)
    return 0


# --- One device -----------------------------------------------------------------------------------------------------------------


class PlainAttention(torch.autograd.Function):
    """The backend's own forward and backward and nothing else: what flash_attn_func does."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> Tensor:
        ctx.backend, ctx.call = backend, causal_call(q)
        partial = backend.forward(q, k, v, ctx.call)
        ctx.save_for_backward(q, k, v, partial.out, partial.lse)
        return partial.out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        grads = ctx.backend.backward(dout, q, k, v, Partial(out, lse), ctx.call)
        return grads.dq, grads.dk, grads.dv, None


def bench_kernel(args: argparse.Namespace) -> list[Row]:
    return [row for head_dim in (128, 64) for batch, tokens in KERNEL_SHAPES for row in kernel_rows(args, head_dim, batch, tokens)]


def kernel_rows(args: argparse.Namespace, head_dim: int, batch: int, tokens: int) -> list[Row]:
    q, k, v, dout, sink = draw((batch, tokens), head_dim)
    backend = chosen_backend(args, q)
    leaves = {"plain": (q, k, v), "sink": (q, k, v, sink)}
    forward: Work = {
        "plain": lambda: PlainAttention.apply(q, k, v, backend),
        "sink": lambda: attention_with_sink(q, k, v, sink, causal=True, backend=args.backend),
    }
    graphs = {name: function() for name, function in forward.items()}
    backward: Work = {
        "plain": lambda: torch.autograd.grad(graphs["plain"], leaves["plain"], dout, retain_graph=True),
        "sink": lambda: torch.autograd.grad(graphs["sink"], leaves["sink"], dout, retain_graph=True),
    }
    buffer = torch.empty_like(q).detach()
    times = measure({"pass over out": lambda: buffer.mul_(1.0)}, args.rounds)
    for phase, work in (("forward", forward), ("backward", backward)):
        measured = measure(work, rounds_for(args, batch * tokens * tokens))
        times |= {f"{phase} {name}": values for name, values in measured.items()}
    shape = {"batch": batch, "tokens": tokens, "heads": HEADS, "heads_kv": HEADS_KV, "head_dim": head_dim}
    rows: list[Row] = [{**shape, "measured": name, **summary(values)} for name, values in times.items()]
    pass_us = statistics.median(times["pass over out"])
    for phase in ("forward", "backward"):
        extra = [a - b for a, b in zip(times[f"{phase} sink"], times[f"{phase} plain"], strict=True)]
        over = statistics.median(extra)
        plain = statistics.median(times[f"{phase} plain"])
        percent, passes = 100 * over / plain, over / pass_us
        columns = {"percent_of_plain": percent, "passes_over_out": passes}
        rows.append({**shape, "measured": f"{phase} overhead", **summary(extra), **columns})
        label = f"d {head_dim:3d} {batch}×{tokens:6d} {phase:8s}"
        print(
            f"{label} plain {plain:9.1f} µs, overhead {over:6.1f} µs = {percent:5.2f}% = {passes:4.2f} passes over out", flush=True
        )
    return rows


# --- Ranks ----------------------------------------------------------------------------------------------------------------------


def bench_dist(args: argparse.Namespace) -> list[Row]:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    rows = [row for tokens in DIST_TOKENS for row in dist_rows(args, tokens, head_dim=128)]
    is_first = dist.get_rank() == 0
    dist.destroy_process_group()
    return rows if is_first else []


def dist_rows(args: argparse.Namespace, tokens: int, head_dim: int) -> list[Row]:
    ranks = dist.get_world_size()
    plan = make_cp_plan(tokens, group=dist.group.WORLD)
    whole_q, whole_k, whole_v, whole_dout, _ = draw((1, tokens), head_dim)
    q, k, v, dout, sink = draw((plan.local_tokens,), head_dim)
    backend = chosen_backend(args, q)

    def plain() -> Tensor:
        return PlainAttention.apply(whole_q, whole_k, whole_v, backend)

    def cp() -> Any:
        return cp_attention_with_sink(q, k, v, sink, plan=plan, backend=args.backend)

    phases: dict[str, Work] = {
        "forward": {"plain": torch.no_grad()(plain), "cp": torch.no_grad()(cp)},
        "forward+backward": {
            "plain": lambda: torch.autograd.grad(plain(), (whole_q, whole_k, whole_v), whole_dout),
            "cp": lambda: torch.autograd.grad(cp(), (q, k, v, sink), dout),
        },
    }
    token = torch.zeros(1, device="cuda")
    shape = {"batch": 1, "tokens": tokens, "heads": HEADS, "heads_kv": HEADS_KV, "head_dim": head_dim, "ranks": ranks}
    rows: list[Row] = []
    for phase, work in phases.items():
        times = measure(work, rounds_for(args, tokens * tokens), before_each=lambda: dist.all_reduce(token))
        slowest = torch.tensor(list(times.values()), device="cuda")  # a step ends when the last rank does
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        times = dict(zip(times, slowest.tolist(), strict=True))
        rows += [{**shape, "measured": f"{phase} {name}", **summary(values)} for name, values in times.items()]
        ideal, ours = statistics.median(times["plain"]) / ranks, statistics.median(times["cp"])
        percent = 100 * ideal / ours
        rows.append({**shape, "measured": f"{phase} efficiency", "percent_of_plain": percent})
        if dist.get_rank() == 0:
            figures = f"one GPU ÷ {ranks} {ideal / 1e3:8.3f} ms, ours {ours / 1e3:8.3f} ms = {percent:5.1f}%"
            print(f"{tokens:6d} tokens {phase:16s} {figures}", flush=True)
    return rows


# --- Measuring and writing ------------------------------------------------------------------------------------------------------


def chosen_backend(args: argparse.Namespace, q: Tensor) -> Backend:
    """The backend of both sides, for a causal call."""
    return select_backend(args.backend, q, causal_call(q))


def causal_call(q: Tensor) -> Call:
    return Call(make_params(q.shape[-1], None, True, (-1, -1), 0.0, False))


def draw(leading: tuple[int, ...], head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout in bf16 and one sink per head, random."""
    sizes = (HEADS, HEADS_KV, HEADS_KV, HEADS)
    q, k, v, dout = (torch.randn(*leading, heads, head_dim, device="cuda", dtype=torch.bfloat16) for heads in sizes)
    sink = torch.randn(1, HEADS, device="cuda")
    for x in (q, k, v, sink):
        x.requires_grad_()
    return q, k, v, dout, sink


def rounds_for(args: argparse.Namespace, pairs: int) -> int:
    """Fewer rounds where one takes long: a round of 32k tokens counts as 8 of 8k or less."""
    return max(10, int(args.rounds / max(1.0, pairs / (4 * 8192**2))))


def measure(work: Work, rounds: int, before_each: Callable[[], Any] | None = None) -> dict[str, list[float]]:
    """Microseconds on the GPU of each piece of work, one value a round; every other round runs in the opposite order.

    ``before_each`` brings the ranks into step on the GPU, without holding up the host.
    """
    for _ in range(3):
        for function in work.values():
            function()
    torch.cuda.synchronize()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in work}
    for number in range(rounds):
        for name, function in list(work.items())[:: 1 if number % 2 == 0 else -1]:
            if before_each is not None:
                before_each()
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            stop.record()
            events[name].append((start, stop))
    torch.cuda.synchronize()
    return {name: [1e3 * start.elapsed_time(stop) for start, stop in pairs] for name, pairs in events.items()}


def summary(values: list[float]) -> dict[str, float]:
    """Median and the 20% and 80% quantiles, in µs, and how many values."""
    quantiles = statistics.quantiles(values, n=5)
    return {"median_us": statistics.median(values), "p20_us": quantiles[0], "p80_us": quantiles[3], "rounds": len(values)}


def write(args: argparse.Namespace, rows: list[Row]) -> None:
    """One CSV, every row with where it comes from."""
    commit = args.commit
    if commit is None:
        result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        commit = result.stdout.strip() or "unknown"
    import triton

    probe = torch.empty(1, 1, 1, 64, device="cuda", dtype=torch.bfloat16)
    backend = chosen_backend(args, probe)
    origin = {
        "backend": backend.describe(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["scripts/bench.py", *("DIR" if word == str(args.out) else word for word in sys.argv[1:])]),
    }
    shape = ("batch", "tokens", "heads", "heads_kv", "head_dim", "ranks")
    results = ("measured", "median_us", "p20_us", "p80_us", "rounds", "percent_of_plain", "passes_over_out")
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"{args.what}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*shape, *results, *origin], restval="")
        writer.writeheader()
        for row in rows:
            rounded = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
            writer.writerow({**rounded, **origin})
    print(f"wrote {args.out / args.what}.csv")


if __name__ == "__main__":
    sys.exit(main())
