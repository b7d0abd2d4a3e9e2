"""What bench.py and bench_dist.py share: inputs, the plain kernel, rounds in turns, CSV rows."""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magi_sink_cp.kernels.backends.registry import BackendPolicy, select_backend
from magi_sink_cp.kernels.checks import make_params
from magi_sink_cp.kernels.protocol import Backend, KernelRequest, Partial

Row = dict[str, Any]
Work = dict[str, Callable[[], Any]]

HEADS, HEADS_KV = 64, 8
PACKAGES = (
    "xformers",
    "flash-attn-3",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "flash-attn",
    "ring-flash-attn",
    "magi-attention",
)


class PlainAttention(torch.autograd.Function):
    """The backend's own forward and backward and nothing else: what flash_attn_func does."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, backend: Backend, call: KernelRequest
    ) -> Tensor:
        ctx.backend, ctx.call = backend, call
        partial = backend.forward(q, k, v, ctx.call)
        ctx.save_for_backward(q, k, v, partial.out, partial.lse)
        return partial.out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        grads = ctx.backend.backward(dout, q, k, v, Partial(out, lse), ctx.call)
        return grads.dq, grads.dk, grads.dv, None, None


def chosen_backend(args: argparse.Namespace, q: Tensor) -> Backend:
    """The backend of both sides, for a causal call."""
    return select_backend(BackendPolicy(args.backend), q, causal_call(q))


def causal_call(q: Tensor) -> KernelRequest:
    return KernelRequest(make_params(q.shape[-1], None, True, (-1, -1), 0.0, False))


def draw(leading: tuple[int, ...], head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout in bf16 and one sink per head, random."""
    sizes = (HEADS, HEADS_KV, HEADS_KV, HEADS)
    q, k, v, dout = (
        torch.randn(*leading, heads, head_dim, device="cuda", dtype=torch.bfloat16)
        for heads in sizes
    )
    sink = torch.randn(1, HEADS, device="cuda")
    for x in (q, k, v, sink):
        x.requires_grad_()
    return q, k, v, dout, sink


def rounds_for(args: argparse.Namespace, pairs: int) -> int:
    """Fewer rounds where one takes long: a round of 32k tokens counts as 8 of 8k or less."""
    return max(10, int(args.rounds / max(1.0, pairs / (4 * 8192**2))))


def measure(
    work: Work, rounds: int, before_each: Callable[[], Any] | None = None
) -> dict[str, list[float]]:
    """Microseconds on the GPU of each piece of work, one value a round; every other round runs in
    the opposite order.

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
    return {
        name: [1e3 * start.elapsed_time(stop) for start, stop in pairs]
        for name, pairs in events.items()
    }


def summary(values: list[float]) -> dict[str, float]:
    """Median and the 20% and 80% quantiles, in µs, and how many values."""
    quantiles = statistics.quantiles(values, n=5)
    return {
        "median_us": statistics.median(values),
        "p20_us": quantiles[0],
        "p80_us": quantiles[3],
        "rounds": len(values),
    }


def kernel_kind(key: str) -> str:
    """Which of FlashAttention-3's kernels a mangled name is."""
    kinds = (
        "FlashAttnFwdSm90",
        "FlashAttnBwdPreprocess",
        "FlashAttnBwdPostprocessConvertdQ",
        "FlashAttnBwdSm90",
    )
    return next((kind for kind in kinds if kind in key), key[:40])


def installed(name: str) -> str | None:
    """The version of a package that a comparison may use, if it is there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version() -> str:
    """The NVIDIA driver's, as its tool says."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def origin_of(args: argparse.Namespace) -> Row:
    """Where the rows of a run come from."""
    commit = args.commit
    if commit is None:
        result = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        )
        commit = result.stdout.strip() or "unknown"
    import triton

    probe = torch.empty(1, 1, 1, 64, device="cuda", dtype=torch.bfloat16)
    backend = chosen_backend(args, probe)
    return {
        "backend": backend.describe(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "packages": " ".join(
            f"{name} {version}" for name in PACKAGES if (version := installed(name))
        ),
        "driver": driver_version(),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(
            [
                "scripts/bench.py",
                *(
                    {str(args.out): "DIR", str(args.before): "BEFORE"}.get(word, word)
                    for word in sys.argv[1:]
                ),
            ]
        ),
    }


def write(args: argparse.Namespace, rows: list[Row], origin: Row) -> None:
    """One CSV, every row with where it comes from."""
    shape = ("batch", "tokens", "heads", "heads_kv", "head_dim", "ranks")
    results = (
        "measured",
        "median_us",
        "p20_us",
        "p80_us",
        "rounds",
        "percent_of_plain",
        "percent",
        "passes_over_out",
        "mib",
    )
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"{args.what}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*shape, *results, *origin], restval="")
        writer.writeheader()
        for row in rows:
            rounded = {
                name: f"{value:.4g}" if isinstance(value, float) else value
                for name, value in row.items()
            }
            writer.writerow({**rounded, **origin})
