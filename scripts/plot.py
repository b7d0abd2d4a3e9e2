"""Draw the pictures of docs/benchmarks.md from the CSV files that scripts/bench.py writes.

    python scripts/plot.py [--data docs/benchmarks]

Writes kernel.png, functions.png and dist.png beside kernel.csv, functions.csv and dist.csv, whichever are there.
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

BLUE, ORANGE, GREY = "#1f4e79", "#f28e2b", "#888888"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("docs/benchmarks"), help="folder of the CSV files")
    args = parser.parse_args()
    pictures = {"kernel": draw_kernel, "functions": draw_functions, "dist": draw_dist}
    drawn = [draw(args.data, name, function) for name, function in pictures.items()]
    if not any(drawn):
        print(f"no {', '.join(f'{name}.csv' for name in pictures)} in {args.data}; scripts/bench.py writes them", file=sys.stderr)
        return 2
    return 0


def draw(folder: Path, name: str, function: Callable[[list[dict[str, str]]], Any]) -> bool:
    source = folder / f"{name}.csv"
    if not source.exists():
        return False
    with source.open() as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise SystemExit(f"{source} holds no rows; scripts/bench.py writes them")
    figure = function(rows)
    origin = rows[0]
    text = f"{origin['gpu']}, {origin['backend']}, torch {origin['torch']}, commit {origin['commit']}, {origin['date']}"
    figure.text(0.5, 0.005, text, ha="center", fontsize=8, color=GREY)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(folder / f"{name}.png", dpi=150)
    print(f"wrote {folder / name}.png")
    return True


def draw_kernel(rows: list[dict[str, str]]) -> Any:
    """Overheads of the sink over plain FlashAttention-3: forward in passes over out, backward in percent."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    panels = (
        ("forward", "passes_over_out", 1.3, "read+write passes over out"),
        ("backward", "percent_of_plain", 1.0, "% of plain backward"),
    )
    for axis, (phase, column, target, label) in zip(axes, panels, strict=True):
        for head_dim, color in (("128", BLUE), ("64", ORANGE)):
            chosen = [r for r in rows if r["measured"] == f"{phase} overhead" and r["head_dim"] == head_dim]
            names = [f"{int(r['tokens']) // 1024}k×{r['batch']}" for r in chosen]
            axis.plot(names, [float(r[column]) for r in chosen], "o-", color=color, label=f"head_dim {head_dim}")
        axis.axhline(target, color=GREY, linestyle="--", linewidth=1, label=f"target {target:g}")
        axis.set_title(f"{phase}: cost of the sink")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    return figure


def draw_functions(rows: list[dict[str, str]]) -> Any:
    """Overheads of the drop-in functions over their own kernels without a sink, forward and backward."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axis, head_dim in zip(axes, ("128", "64"), strict=True):
        chosen = [r for r in rows if r["measured"].endswith(" overhead") and r["head_dim"] == head_dim]
        for name in dict.fromkeys(r["measured"] for r in chosen):
            points = [r for r in chosen if r["measured"] == name]
            names = [f"{int(r['tokens']) // 1024}k×{r['batch']}" for r in points]
            axis.plot(names, [float(r["percent_of_plain"]) for r in points], "o-", label=name.removesuffix(" overhead"))
        axis.axhline(0, color=GREY, linewidth=1)
        axis.set_title(f"head_dim {head_dim}")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("% over the kernels without a sink, forward + backward")
    axes[1].legend(frameon=False, fontsize=8)
    return figure


def draw_dist(rows: list[dict[str, str]]) -> Any:
    """Efficiency over one GPU's FlashAttention-3 without a sink, divided by the ranks."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for phase, color in (("forward", BLUE), ("forward+backward", ORANGE)):
        chosen = [r for r in rows if r["measured"] == f"{phase} efficiency"]
        names = [f"{int(r['tokens']) // 1024}k" for r in chosen]
        axis.plot(names, [float(r["percent_of_plain"]) for r in chosen], "o-", color=color, label=phase)
    axis.axhline(100, color=GREY, linestyle="--", linewidth=1, label="one GPU without a sink ÷ ranks")
    axis.set_xlabel(f"tokens over {rows[0]['ranks']} GPUs")
    axis.set_ylabel("efficiency (%)")
    axis.set_title("Context-parallel attention with a sink")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
