"""Benchmarks on GPUs, written as CSV.

    python scripts/bench.py kernel --out docs/benchmarks
    python scripts/bench.py functions --out docs/benchmarks
    python scripts/bench.py host --out docs/benchmarks
    python scripts/bench.py masks --out docs/benchmarks
    python scripts/bench.py ffa --out docs/benchmarks        # where magi_attention is installed
    python scripts/bench.py dist --out docs/benchmarks       # one rank a GPU; or under torchrun
    python scripts/bench.py plan --out docs/benchmarks       # likewise
    python scripts/bench.py model --out docs/benchmarks      # likewise

``kernel``: attention_with_sink beside plain FlashAttention-3 and one read+write pass over out.
``functions``: forward+backward of the drop-in functions beside the same kernels without a sink;
peak memory, first call, and where the time goes. ``host``: what a call costs the host. ``dist``:
cp_attention_with_sink beside one GPU's FlashAttention-3 without a sink on the whole sequence,
divided by the number of ranks, and beside ring-flash-attn's zigzag and MagiAttention where they are
installed; windows, packed documents, time that compute waits, memory (bench_dist.py). ``plan``:
what a new plan costs the host and a training loop (bench_plan.py). ``masks``: slices beside a
repeated prompt and beside FlexAttention (bench_masks.py). ``ffa``: masks beside MagiAttention's
kernel with a sink (bench_ffa.py). ``model``: a model of gpt-oss's shape in
transformers, beside its eager and flex_attention, and over two GPUs (bench_model.py).

What is compared runs in turns in one process, in both orders, after warm-up; a row holds the median
and the 20% and 80% quantiles of all rounds. An overhead is the median of the differences within a
round, so that clocks that change over time cancel.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from benchlib import (
    HEADS,
    HEADS_KV,
    PlainAttention,
    Row,
    Work,
    causal_call,
    chosen_backend,
    draw,
    kernel_kind,
    measure,
    origin_of,
    rounds_for,
    summary,
    write,
)
from torch import Tensor

import magi_sink_cp
from magi_sink_cp import attention_with_sink
from magi_sink_cp.kernels.backends.registry import BackendPolicy, select_backend
from magi_sink_cp.kernels.protocol import KernelRequest, Varlen

KERNEL_SHAPES = ((4, 2048), (2, 4096), (1, 8192), (1, 16384), (1, 32768))  # (batch, tokens)
FUNCTION_SHAPES = ((8, 1024), (4, 2048), (2, 4096), (1, 8192), (1, 16384), (1, 32768))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=list(BENCHES))
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV")
    parser.add_argument(
        "--backend",
        default="fa3",
        help="kernels on both sides of the comparison (dist: of the one GPU)",
    )
    parser.add_argument(
        "--rounds", type=int, default=60, help="rounds per shape (fewer for shapes that take long)"
    )
    parser.add_argument(
        "--before",
        type=Path,
        help="plan: a checkout of commit 1f894d0, whose planner runs beside this one",
    )
    parser.add_argument("--layers", type=int, default=24, help="model: its layers")
    parser.add_argument("--steps", type=int, default=20, help="model: steps that are measured")
    parser.add_argument("--tokens", type=int, help="model: only the cases of so many")
    parser.add_argument("--commit", help="commit to record (default: asks git)")
    args = parser.parse_args()
    if args.rounds < 10:
        parser.error(f"--rounds must be at least 10 for a median and quantiles, got {args.rounds}")
    if not torch.cuda.is_available():
        print(
            "bench.py needs a CUDA GPU: absolute times of another device say nothing here",
            file=sys.stderr,
        )
        return 2
    if (
        args.what in ("dist", "model", "plan") and "LOCAL_RANK" not in os.environ
    ):  # start one rank a GPU
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(torch.cuda.device_count()),
        ]
        os.execv(sys.executable, [sys.executable, *launcher, __file__, *sys.argv[1:]])
    rows: list[Row] = []
    origin: Row = {}
    for part in BENCHES[args.what](args):
        rows += part
        origin = origin or origin_of(args)
        write(args, rows, origin)  # after each part: a run that is cut short keeps what it has
    if rows:
        print(f"wrote {args.out / args.what}.csv")
        if importlib.util.find_spec("matplotlib"):
            importlib.import_module("plot").draw_all(args.out, args.what)
        else:
            print(
                "no picture: matplotlib is not installed (pip install matplotlib; python "
                "scripts/plot.py --data DIR)"
            )
    return 0


# --- One device -----------------------------------------------------------------------------------


def bench_kernel(args: argparse.Namespace) -> Iterator[list[Row]]:
    for head_dim in (128, 64):
        for batch, tokens in KERNEL_SHAPES:
            yield kernel_rows(args, head_dim, batch, tokens)


def kernel_rows(args: argparse.Namespace, head_dim: int, batch: int, tokens: int) -> list[Row]:
    q, k, v, dout, sink = draw((batch, tokens), head_dim)
    backend = chosen_backend(args, q)
    leaves = {"plain": (q, k, v), "sink": (q, k, v, sink)}
    forward: Work = {
        "plain": lambda: PlainAttention.apply(q, k, v, backend, causal_call(q)),
        "sink": lambda: attention_with_sink(q, k, v, sink, causal=True, backend=args.backend),
    }
    graphs = {name: function() for name, function in forward.items()}
    backward: Work = {
        "plain": lambda: torch.autograd.grad(
            graphs["plain"], leaves["plain"], dout, retain_graph=True
        ),
        "sink": lambda: torch.autograd.grad(
            graphs["sink"], leaves["sink"], dout, retain_graph=True
        ),
    }
    buffer = torch.empty_like(q).detach()
    times = measure({"pass over out": lambda: buffer.mul_(1.0)}, args.rounds)
    for phase, work in (("forward", forward), ("backward", backward)):
        measured = measure(work, rounds_for(args, batch * tokens * tokens))
        times |= {f"{phase} {name}": values for name, values in measured.items()}
    shape = {
        "batch": batch,
        "tokens": tokens,
        "heads": HEADS,
        "heads_kv": HEADS_KV,
        "head_dim": head_dim,
    }
    rows: list[Row] = [
        {**shape, "measured": name, **summary(values)} for name, values in times.items()
    ]
    pass_us = statistics.median(times["pass over out"])
    for phase in ("forward", "backward"):
        extra = [
            a - b for a, b in zip(times[f"{phase} sink"], times[f"{phase} plain"], strict=True)
        ]
        over = statistics.median(extra)
        plain = statistics.median(times[f"{phase} plain"])
        percent, passes = 100 * over / plain, over / pass_us
        columns = {"percent_of_plain": percent, "passes_over_out": passes}
        rows.append({**shape, "measured": f"{phase} overhead", **summary(extra), **columns})
        label = f"d {head_dim:3d} {batch}×{tokens:6d} {phase:8s}"
        print(
            f"{label} plain {plain:9.1f} µs, overhead {over:6.1f} µs = {percent:5.2f}% = "
            f"{passes:4.2f} passes over out",
            flush=True,
        )
    return rows


# --- The drop-in functions ------------------------------------------------------------------------


def bench_functions(args: argparse.Namespace) -> Iterator[list[Row]]:
    for head_dim in (128, 64):
        for batch, tokens in FUNCTION_SHAPES:
            yield function_rows(args, head_dim, batch, tokens)
    yield memory_rows()
    yield profile_rows()
    yield first_call_rows()


def function_rows(args: argparse.Namespace, head_dim: int, batch: int, tokens: int) -> list[Row]:
    """Forward and backward of every function that has its kernels here, beside the same kernels
    without a sink.
    """
    shape = {
        "batch": batch,
        "tokens": tokens,
        "heads": HEADS,
        "heads_kv": HEADS_KV,
        "head_dim": head_dim,
    }
    rows: list[Row] = []
    groups = function_groups(head_dim, batch, tokens)
    for name, work in groups.items():
        # At 32k a few tenths of a percent are asked for, which ten rounds do not resolve.
        fewest = 10 if name.startswith("fa2") else 24
        times = measure(work, max(fewest, rounds_for(args, batch * tokens * tokens)))
        plain = statistics.median(times["plain"])
        rows.append({**shape, "measured": f"{name} plain", **summary(times["plain"])})
        for function, values in times.items():
            if function == "plain":
                continue
            extra = [a - b for a, b in zip(values, times["plain"], strict=True)]
            percent = 100 * statistics.median(extra) / plain
            rows.append(
                {
                    **shape,
                    "measured": f"{function} overhead",
                    **summary(extra),
                    "percent_of_plain": percent,
                }
            )
            print(
                f"d {head_dim:3d} {batch}×{tokens:6d} {function:32s} {percent:6.2f}% over {name} "
                f"{plain:9.1f} µs",
                flush=True,
            )
    return rows


def function_groups(head_dim: int, batch: int, tokens: int) -> dict[str, Work]:
    """For each kernel family that is here: "plain", and the functions that run on it."""
    q, k, v, dout, sink = draw((batch, tokens), head_dim)
    flat = [x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v)]
    qkv = torch.cat([x.detach() for x in (q, k, v)], dim=2).requires_grad_()
    kv = torch.stack([x.detach() for x in (k, v)], dim=2).requires_grad_()
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * tokens
    varlen = Varlen(cu_seqlens, cu_seqlens, tokens, tokens)
    packed = KernelRequest(causal_call(q).params, varlen)
    lengths = (cu_seqlens, cu_seqlens, tokens, tokens)
    call = causal_call(q)

    def step(
        function: Callable[..., Any], leaves: Any, gradient: Tensor, *arguments: Any, **options: Any
    ) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(*arguments, **options), leaves, gradient)

    def plain(name: str) -> dict[str, Callable[[], Any]]:
        return {
            "plain": step(
                PlainAttention.apply,
                (q, k, v),
                dout,
                q,
                k,
                v,
                select_backend(BackendPolicy(name), q, call),
                call,
            )
        }

    available = {info.name for info in magi_sink_cp.backends() if info.available}
    groups: dict[str, Work] = {}
    packed_dout = dout.flatten(0, 1)
    if "fa3" in available:
        fa3 = select_backend(BackendPolicy("fa3"), q, call)
        groups["fa3"] = plain("fa3") | {
            "fa3_func_with_sink": step(
                magi_sink_cp.fa3_func_with_sink, (q, k, v, sink), dout, q, k, v, sink, causal=True
            ),
            "fa3_qkvpacked_func_with_sink": step(
                magi_sink_cp.fa3_qkvpacked_func_with_sink,
                (qkv, sink),
                dout,
                qkv,
                sink,
                causal=True,
                num_heads_q=HEADS,
            ),
        }
        groups["fa3 varlen"] = {
            "plain": step(PlainAttention.apply, flat, packed_dout, *flat, fa3, packed),
            "fa3_varlen_func_with_sink": step(
                magi_sink_cp.fa3_varlen_func_with_sink,
                (*flat, sink),
                packed_dout,
                *flat,
                *lengths,
                sink,
                causal=True,
            ),
        }
    if "fa4" in available:
        own = importlib.import_module("flash_attn.cute.interface").flash_attn_func
        one_sink = sink.detach()[0].requires_grad_()

        def native(*arguments: Tensor) -> Tensor:
            return own(*arguments, causal=True, learnable_sink=one_sink)[0]

        groups["fa4"] = plain("fa4") | {
            "FlashAttention-4's own sink": step(native, (q, k, v, one_sink), dout, q, k, v),
            "fa4_func_with_sink": step(
                magi_sink_cp.fa4_func_with_sink, (q, k, v, sink), dout, q, k, v, sink, causal=True
            ),
            "attention_with_sink on fa4": step(
                attention_with_sink,
                (q, k, v, sink),
                dout,
                q,
                k,
                v,
                sink,
                causal=True,
                backend="fa4",
            ),
        }
    fa2 = select_backend(BackendPolicy("fa2" if "fa2" in available else "aten"), q, call)
    groups["fa2"] = plain(fa2.name) | {
        "fa2_func_with_sink": step(
            magi_sink_cp.fa2_func_with_sink, (q, k, v, sink), dout, q, k, v, sink, causal=True
        ),
        "fa2_kvpacked_func_with_sink": step(
            magi_sink_cp.fa2_kvpacked_func_with_sink, (q, kv, sink), dout, q, kv, sink, causal=True
        ),
    }
    groups["fa2 varlen"] = {
        "plain": step(PlainAttention.apply, flat, packed_dout, *flat, fa2, packed),
        "fa2_varlen_func_with_sink": step(
            magi_sink_cp.fa2_varlen_func_with_sink,
            (*flat, sink),
            packed_dout,
            *flat,
            *lengths,
            sink,
            causal=True,
        ),
    }
    return groups


def bench_host(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Microseconds that the host spends in one forward call, where the GPU is always behind. Beside
    the public flash_attn_func of FlashAttention-3, where its module flash_attn_interface can be
    imported.
    """
    q, k, v, _, sink = draw((8, 256), 128)
    call = causal_call(q)
    work: Work = {
        "operator in an autograd function": lambda: PlainAttention.apply(
            q, k, v, select_backend(BackendPolicy("fa3"), q, call), call
        ),
        "fa3_func_with_sink": lambda: magi_sink_cp.fa3_func_with_sink(q, k, v, sink, causal=True),
        "fa3_func_with_sink, sink=None": lambda: magi_sink_cp.fa3_func_with_sink(
            q, k, v, causal=True
        ),
    }
    if importlib.util.find_spec("flash_attn_interface") is not None:
        flash_attn_func = importlib.import_module("flash_attn_interface").flash_attn_func
        work["flash_attn_func"] = lambda: flash_attn_func(q, k, v, causal=True)
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(args.rounds + 3):
        for name, function in list(work.items())[:: 1 if number % 2 == 0 else -1]:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(20):
                function()
            if number >= 3:
                times[name].append((time.perf_counter() - start) / 20 * 1e6)
    for name, values in times.items():
        print(f"host µs a forward: {name:36s} {statistics.median(values):6.1f}", flush=True)
    yield [
        {"batch": 8, "tokens": 256, "head_dim": 128, "measured": f"host: {name}", **summary(x)}
        for name, x in times.items()
    ]


def memory_rows() -> list[Row]:
    """Peak bytes of forward and backward at 32k tokens, inputs included."""
    peaks: dict[str, int] = {}
    for name in ("plain", "fa3_func_with_sink"):
        work = function_groups(128, 1, 32768)["fa3"][name]
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            work()
            torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated()
    print(
        f"peak memory at 32k: {peaks}, ratio {peaks['fa3_func_with_sink'] / peaks['plain']:.4f}",
        flush=True,
    )
    shape = {"batch": 1, "tokens": 32768, "heads": HEADS, "heads_kv": HEADS_KV, "head_dim": 128}
    ratio = 100 * peaks["fa3_func_with_sink"] / peaks["plain"]
    return [
        {
            **shape,
            "measured": "peak MiB plain",
            "percent_of_plain": 100.0,
            "mib": peaks["plain"] / 2**20,
        },
        {
            **shape,
            "measured": "peak MiB fa3_func_with_sink",
            "percent_of_plain": ratio,
            "mib": peaks["fa3_func_with_sink"] / 2**20,
        },
    ]


def profile_rows() -> list[Row]:
    """Where the GPU's time goes in fa3_func_with_sink, forward and backward, at 8 sequences of
    1k.
    """
    work = function_groups(128, 8, 1024)["fa3"]["fa3_func_with_sink"]
    for _ in range(3):
        work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(20):
            work()
        torch.cuda.synchronize()
    rows: list[Row] = []
    for event in sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total):
        if event.self_device_time_total > 0:
            name = (
                event.key.replace("void ", "").split("<")[0].split("(")[0]
                if "cutlass" not in event.key
                else kernel_kind(event.key)
            )
            microseconds = event.self_device_time_total / 20
            print(f"1k×8: {microseconds:8.1f} µs {name}", flush=True)
            shape = {
                "batch": 8,
                "tokens": 1024,
                "heads": HEADS,
                "heads_kv": HEADS_KV,
                "head_dim": 128,
            }
            rows.append(
                {**shape, "measured": f"kernel: {name}", "median_us": microseconds, "rounds": 20}
            )
    return rows


FIRST_CALL = """
import sys, time, torch
from magi_sink_cp import fa3_func_with_sink
options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
q, k, v = (torch.randn(1, 1024, h, 128, **options) for h in (64, 8, 8))
sink = torch.randn(1, 64, device="cuda", requires_grad=True) if sys.argv[1] == "sink" else None
torch.cuda.synchronize()
start = time.perf_counter()
fa3_func_with_sink(q, k, v, sink, causal=True).sum().backward()
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def first_call_rows() -> list[Row]:
    """Seconds until a process's first forward and backward are done.

    Rows: without a sink; with a sink and an empty cache of kernels; with a filled one.
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as cache:
        for name, argument in (
            ("without a sink", "plain"),
            ("empty Triton cache", "sink"),
            ("filled Triton cache", "sink"),
        ):
            environment = {**os.environ, "TRITON_CACHE_DIR": cache}
            command = [sys.executable, "-c", FIRST_CALL, argument]
            result = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            )
            seconds = float(result.stdout.split()[-1])
            print(f"first forward and backward, {name}: {seconds:.2f} s", flush=True)
            rows.append(
                {
                    "batch": 1,
                    "tokens": 1024,
                    "head_dim": 128,
                    "measured": f"first call: {name}",
                    "median_us": 1e6 * seconds,
                }
            )
    return rows


# --- Ranks ----------------------------------------------------------------------------------------


def bench_dist(args: argparse.Namespace) -> Iterator[list[Row]]:
    import bench_dist as across_ranks  # beside this file

    yield from across_ranks.run(args)


def bench_masks(args: argparse.Namespace) -> Iterator[list[Row]]:
    import bench_masks as of_masks  # beside this file

    yield from of_masks.run(args)


def bench_ffa(args: argparse.Namespace) -> Iterator[list[Row]]:
    import bench_ffa as of_ffa  # beside this file

    yield from of_ffa.run(args)


def bench_plan(args: argparse.Namespace) -> Iterator[list[Row]]:
    import bench_plan as of_plans  # beside this file

    yield from of_plans.run(args)


def bench_model(args: argparse.Namespace) -> Iterator[list[Row]]:
    import bench_model as of_models  # beside this file

    yield from of_models.run(args)


# --- Measuring and writing ------------------------------------------------------------------------


BENCHES = {
    "kernel": bench_kernel,
    "functions": bench_functions,
    "host": bench_host,
    "dist": bench_dist,
    "masks": bench_masks,
    "ffa": bench_ffa,
    "plan": bench_plan,
    "model": bench_model,
}

if __name__ == "__main__":
    sys.exit(main())
