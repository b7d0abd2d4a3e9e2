"""What plans would cost on many ranks, from the real planner of every rank; no GPU is needed.

    python scripts/simulate.py --cp 8 64 --tokens 1048576 --documents published --out DIR

``--documents``: "one"; "published" (lengths as MagiAttention's authors published them); or a file
with one length per line. A row of simulate.csv holds, for one window and number of ranks: balance
(the busiest rank's pairs over the mean), keys that a rank receives, messages, kernel calls, buffers
over the rank's own keys, and a predicted step. That is a model, checked on two GPUs alone: 600 and
500 TFLOP/s forward and backward, LINK and LATENCY of magi_sink_cp/dist/planning/cost.py, 10 µs a
message and eight at once, transfers hidden behind the computation of other stages.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from magi_sink_cp.dist.planning.blueprint import CPBlueprint, PlanInput
from magi_sink_cp.dist.planning.cost import LATENCY_S, LINK, CallSizes
from magi_sink_cp.dist.planning.exchange import Schedule
from magi_sink_cp.dist.planning.mask import Window
from magi_sink_cp.dist.planning.packing import Gaps

FLOPS = {"forward": 6e14, "backward": 5e14}
PAIR_FLOPS = {"forward": 4, "backward": 10}
MESSAGE_S, AT_ONCE = 10e-6, 8
GPUS_OF_A_HOST = 8

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cp", type=int, nargs="+", required=True, help="numbers of ranks")
    parser.add_argument("--tokens", type=int, required=True, help="of the whole sequence")
    parser.add_argument("--documents", default="published", help="one, published or a file")
    parser.add_argument("--window", type=int, nargs="*", default=[], help="left limits, besides -1")
    parser.add_argument("--layout", default="auto", choices=("auto", "zigzag", "balanced"))
    parser.add_argument(
        "--heads", type=int, nargs=3, default=(64, 8, 128), help="of q, of k, and head_dim"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV and the picture")
    args = parser.parse_args()
    if min(args.cp) < 2 or args.tokens < 1 or any(left < 0 for left in args.window):
        parser.error("--cp must be >= 2, --tokens >= 1 and --window >= 0")
    try:
        offsets = read_documents(args.documents, args.tokens)
    except (OSError, ValueError) as error:
        parser.error(f"--documents: {error}")
    heads, heads_kv, head_dim = args.heads
    sizes = CallSizes(1, heads, heads_kv, head_dim, 2, True)
    rows = [
        row
        for cp_size in args.cp
        for window in [(-1, 0), *((left, 0) for left in args.window)]
        for row in simulated(args, offsets, cp_size, window, sizes)
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "simulate.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {args.out / 'simulate.csv'}")
    if importlib.util.find_spec("matplotlib"):
        draw(rows, args.out / "simulate.png")
        print(f"wrote {args.out / 'simulate.png'}")
    else:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
    return 0


def read_documents(name: str, tokens: int) -> list[int]:
    """Offsets of the documents."""
    if name == "one":
        return [0, tokens]
    if name == "published":
        return importlib.import_module("bench_dist").draw_documents(tokens, 0)
    lengths = [int(line) for line in Path(name).read_text().split()]
    if min(lengths, default=-1) < 0 or sum(lengths) != tokens:
        raise ValueError(f"{name} must hold lengths >= 0 that sum up to {tokens}")
    return [0, *itertools.accumulate(lengths)]


def simulated(
    args: argparse.Namespace, offsets: list[int], cp_size: int, window: Window, sizes: CallSizes
) -> list[Row]:
    """A row for forward and one for backward."""
    link = "nvlink" if cp_size <= GPUS_OF_A_HOST else "network"
    what = PlanInput(args.tokens, offsets, None, None, args.layout)
    blueprint = CPBlueprint(what, cp_size, 0)
    mask = blueprint.mask(window)
    started = time.perf_counter()
    overlap = blueprint.overlap(window, sizes, None, link)
    planning_s = time.perf_counter() - started
    pairs = [mask.pairs(rank) for rank in range(cp_size)]
    rows: list[Row] = []
    for way, degree in zip(("forward", "backward"), overlap.degrees, strict=True):
        large_rows = overlap.large_rows if way == "forward" else None
        gaps = Gaps(True, None if way == "forward" else overlap.idle_tiles)
        schedules = [mask.schedule(rank, degree, large_rows, gaps) for rank in range(cp_size)]
        steps = [
            predicted_s(schedule, rank_pairs, way, link, sizes)
            for schedule, rank_pairs in zip(schedules, pairs, strict=True)
        ]
        ideal = PAIR_FLOPS[way] * sizes.heads * sizes.head_dim * sum(pairs) / cp_size / FLOPS[way]
        exchanges = [
            [stage.cast for stage in schedule.stages]
            + ([stage.reduce for stage in schedule.stages] if way == "backward" else [])
            for schedule in schedules
        ]
        keys, gradients = mask.buffers(degree)
        slots = min(2, max(1, degree))
        held = slots * (keys + (gradients if way == "backward" else 0))
        token_bytes = 2 * sizes.heads_kv * sizes.head_dim * sizes.element_size
        rows.append(
            {
                "ranks": cp_size,
                "tokens": args.tokens,
                "documents": len(offsets) - 1,
                "window": window[0],
                "pass": way,
                "stages": max(1, degree),
                "balance": round(max(pairs) * cp_size / max(1, sum(pairs)), 4),
                "received_mb": round(
                    statistics.mean(sum(x.received_tokens for x in each) for each in exchanges)
                    * token_bytes
                    / 1e6,
                    2,
                ),
                "messages": max(sum(len(x.sends) + len(x.receives) for x in e) for e in exchanges),
                "kernel_calls": max(len(schedule.kernel_calls) for schedule in schedules),
                "buffers_over_own": round(held / max(1, mask.local_tokens), 2),
                "step_ms": round(1e3 * max(steps), 3),
                "efficiency_percent": round(100 * ideal / max(max(steps), 1e-12), 1),
                "choosing_ms": round(1e3 * planning_s, 1),
            }
        )
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def predicted_s(schedule: Schedule, pairs: int, way: str, link: str, sizes: CallSizes) -> float:
    """Seconds of one rank: each transfer is hidden behind the computation of the stage before."""
    computation = PAIR_FLOPS[way] * sizes.heads * sizes.head_dim * pairs / FLOPS[way]
    token_bytes = 2 * sizes.heads_kv * sizes.head_dim * sizes.element_size
    rows = [sum(call.rows[1] - call.rows[0] for call in stage.calls) for stage in schedule.stages]
    shares = [computation * n / max(1, sum(rows)) for n in rows]

    def travel_s(number: int) -> float:
        stage = schedule.stages[number]
        tokens, messages = 0, 0
        for exchange in (stage.cast, stage.reduce) if way == "backward" else (stage.cast,):
            tokens += max(exchange.received_tokens, exchange.sent_tokens)
            messages += len(exchange.sends) + len(exchange.receives)
        if not messages:
            return 0.0
        rounds = -(-messages // AT_ONCE)
        return LATENCY_S + tokens * token_bytes / LINK[link] + rounds * MESSAGE_S

    total = shares[0]
    for number in range(1, len(schedule.stages)):
        total += max(0.0, travel_s(number) - shares[number - 1]) + shares[number]
    return total


def draw(rows: list[Row], path: Path) -> None:
    """Efficiency and balance over the number of ranks."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for (window, way), group in itertools.groupby(
        sorted(rows, key=lambda row: (row["window"], row["pass"], row["ranks"])),
        key=lambda row: (row["window"], row["pass"]),
    ):
        points = list(group)
        label = f"{'full' if window < 0 else f'window {window}'}, {way}"
        ranks = [row["ranks"] for row in points]
        axes[0].plot(ranks, [row["efficiency_percent"] for row in points], "o-", label=label)
        if way == "forward":
            axes[1].plot(ranks, [row["buffers_over_own"] for row in points], "o-", label=label)
    for axis, title in zip(axes, ("predicted efficiency, %", "buffers over own keys"), strict=True):
        axis.set(xscale="log", xlabel="ranks", title=title)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
