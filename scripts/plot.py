"""Draw the pictures of docs/benchmarks.md from the CSV files that scripts/bench.py writes.

    python scripts/plot.py [--data docs/benchmarks]

Writes kernel.png, functions.png, dist.png, dist_trace.png, masks.png and plan.png beside the CSV
files of these names, whichever are there.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

BLUE, ORANGE, GREEN, GREY = "#1f4e79", "#f28e2b", "#59a14f", "#888888"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path("docs/benchmarks"), help="folder of the CSV files"
    )
    args = parser.parse_args()
    if not draw_all(args.data):
        print(
            f"no {', '.join(f'{name}.csv' for name in PICTURES)} in {args.data}; scripts/bench.py "
            "writes them",
            file=sys.stderr,
        )
        return 2
    return 0


def draw_all(folder: Path, prefix: str = "") -> bool:
    """Draw what has a CSV file and a name that begins with ``prefix``.

    Returns whether there was anything to draw.
    """
    drawn = [
        draw(folder, name, function)
        for name, function in PICTURES.items()
        if name.startswith(prefix)
    ]
    return any(drawn)


def draw(folder: Path, name: str, function: Callable[[list[dict[str, str]]], Any]) -> bool:
    source = folder / f"{name}.csv"
    if not source.exists():
        return False
    with source.open() as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise SystemExit(f"{source} holds no rows; scripts/bench.py writes them")
    figure = function(rows)
    with (folder / "dist.csv" if name == "dist_trace" else source).open() as file:
        origin = next(csv.DictReader(file))
    facts = [origin["gpu"], origin["backend"], f"torch {origin['torch']}"]
    text = ", ".join([*facts, f"commit {origin['commit']}", origin["date"]])
    figure.text(0.5, 0.005, text, ha="center", fontsize=8, color=GREY)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(folder / f"{name}.png", dpi=150)
    print(f"wrote {folder / name}.png")
    return True


def draw_kernel(rows: list[dict[str, str]]) -> Any:
    """Overheads of the sink over plain FlashAttention-3.

    Forward in passes over out, backward in percent.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    panels = (
        ("forward", "passes_over_out", 1.3, "read+write passes over out"),
        ("backward", "percent_of_plain", 1.0, "% of plain backward"),
    )
    for axis, (phase, column, target, label) in zip(axes, panels, strict=True):
        for head_dim, color in (("128", BLUE), ("64", ORANGE)):
            chosen = [
                r
                for r in rows
                if r["measured"] == f"{phase} overhead" and r["head_dim"] == head_dim
            ]
            names = [f"{int(r['tokens']) // 1024}k×{r['batch']}" for r in chosen]
            axis.plot(
                names,
                [float(r[column]) for r in chosen],
                "o-",
                color=color,
                label=f"head_dim {head_dim}",
            )
        axis.axhline(target, color=GREY, linestyle="--", linewidth=1, label=f"target {target:g}")
        axis.set_title(f"{phase}: cost of the sink")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    return figure


def draw_functions(rows: list[dict[str, str]]) -> Any:
    """Overheads of the drop-in functions over their own kernels without a sink, forward and
    backward.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axis, head_dim in zip(axes, ("128", "64"), strict=True):
        chosen = [
            r for r in rows if r["measured"].endswith(" overhead") and r["head_dim"] == head_dim
        ]
        for name in dict.fromkeys(r["measured"] for r in chosen):
            points = [r for r in chosen if r["measured"] == name]
            names = [f"{int(r['tokens']) // 1024}k×{r['batch']}" for r in points]
            axis.plot(
                names,
                [float(r["percent_of_plain"]) for r in points],
                "o-",
                label=name.removesuffix(" overhead"),
            )
        axis.axhline(0, color=GREY, linewidth=1)
        axis.set_title(f"head_dim {head_dim}")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("% over the kernels without a sink, forward + backward")
    axes[1].legend(frameon=False, fontsize=8)
    return figure


def draw_dist(rows: list[dict[str, str]]) -> Any:
    """One causal document: percent of one GPU's FlashAttention-3 without a sink over the ranks."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    variants = (
        ("cp", "ours, with a sink", BLUE),
        ("zigzag ring without a sink", "ring-flash-attn's zigzag, without a sink", ORANGE),
        ("MagiAttention", "MagiAttention's calc_attn, with a sink", GREEN),
    )
    for axis, phase in zip(axes, ("forward", "forward+backward"), strict=True):
        for key, label, color in variants:
            chosen = [r for r in rows if r["measured"] == f"causal: {phase} {key}"]
            if not chosen:
                continue
            names = [f"{int(r['tokens']) // 1024}k" for r in chosen]
            axis.plot(
                names,
                [float(r["percent_of_plain"]) for r in chosen],
                "o-",
                color=color,
                label=label,
            )
        axis.axhline(
            100, color=GREY, linestyle="--", linewidth=1, label="one GPU without a sink ÷ ranks"
        )
        axis.set_xlabel(f"tokens over {rows[0]['ranks']} GPUs")
        axis.set_title(phase)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("efficiency (%)")
    axes[1].legend(frameon=False)
    return figure


def draw_trace(rows: list[dict[str, str]]) -> Any:
    """When each rank's GPU computes and its copy engines move, in a forward and backward at 32k."""
    colors = {"Fwd": BLUE, "BwdSm90": ORANGE, "_merge": GREEN, "Memcpy": "#b07aa1"}
    lanes = sorted(
        {(r["rank"], r["lane"]) for r in rows},
        key=lambda lane: (lane[0], lane[1] == "copies", lane[1]),
    )
    figure, axes = plt.subplots(2, 1, figsize=(11, 5))
    ends = [float(r["start_us"]) + float(r["duration_us"]) for r in rows]
    turn = min(float(r["start_us"]) for r in rows if "Bwd" in r["name"])
    for axis, (lo, hi), title in zip(
        axes, ((0, turn), (turn, max(ends))), ("forward", "backward"), strict=True
    ):
        for r in rows:
            start, duration = float(r["start_us"]), float(r["duration_us"])
            color = next((c for key, c in colors.items() if key in r["name"]), GREY)
            axis.broken_barh(
                [(start / 1e3, duration / 1e3)],
                (lanes.index((r["rank"], r["lane"])) - 0.4, 0.8),
                color=color,
            )
        axis.set_xlim(lo / 1e3, hi / 1e3)
        axis.set_yticks(range(len(lanes)), [f"rank {rank}: {lane}" for rank, lane in lanes])
        axis.invert_yaxis()
        axis.set_title(title)
    axes[1].set_xlabel("ms")
    names = {
        "Fwd": "forward kernel",
        "BwdSm90": "backward kernel",
        "_merge": "merge with the sink",
        "Memcpy": "copies between GPUs",
    }
    handles = [mpl.patches.Patch(color=colors[key], label=name) for key, name in names.items()]
    handles.append(mpl.patches.Patch(color=GREY, label="other"))
    axes[0].legend(
        handles=handles, frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.15)
    )
    return figure


def draw_plan(rows: list[dict[str, str]]) -> Any:
    """What a new plan costs the host, now and before, and a training step."""
    figure, (host, steps) = plt.subplots(1, 2, figsize=(10, 3.6))
    sizes = list(
        dict.fromkeys(
            (int(row["tokens"]), row["ranks"])
            for row in rows
            if row["measured"] == "host: a new plan"
        )
    )
    for offset, (suffix, color) in enumerate((("", BLUE), (", before", GREY))):
        named = [row for row in rows if row["measured"] == f"host: a new plan{suffix}"]
        values = [float(row["median_us"]) / 1e3 for row in named]
        places = [place + 0.4 * offset for place in range(len(values))]
        host.bar(places, values, 0.38, color=color, label="commit 1f894d0" if suffix else "now")
    host.set_xticks(
        [place + 0.2 for place in range(len(sizes))],
        [f"{tokens >> 20}M tokens\n{ranks} ranks" for tokens, ranks in sizes],
    )
    host.set(yscale="log", ylim=(1, 3000), ylabel="ms of host time", title="a new plan, one core")
    host.legend()
    extra = [row for row in rows if row["measured"].endswith(", extra")]
    names = [row["measured"].removeprefix("step over ").removesuffix(", extra") for row in extra]
    values = [float(row["median_us"]) / 1e3 for row in extra]
    steps.barh(names[::-1], values[::-1], color=ORANGE)
    steps.set(xlabel="ms a step over known plans", title="new documents, two GPUs")
    return figure


def draw_masks(rows: list[dict[str, str]]) -> Any:
    """How much longer the alternatives to slices take."""
    figure, axis = plt.subplots(figsize=(7, 3.2))
    ratios = [row for row in rows if " over slices, " in row["measured"]]
    names = [f"{row['measured'].replace(' over slices', '')}, {row['tokens']}" for row in ratios]
    axis.barh(names[::-1], [float(row["percent"]) / 100 for row in ratios][::-1], color=GREEN)
    axis.axvline(1, color=GREY)
    axis.set(xlabel="time over that of slices")
    return figure


PICTURES = {
    "kernel": draw_kernel,
    "functions": draw_functions,
    "dist": draw_dist,
    "dist_trace": draw_trace,
    "masks": draw_masks,
    "plan": draw_plan,
}

if __name__ == "__main__":
    sys.exit(main())
