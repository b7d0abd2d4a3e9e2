"""Train a small gpt-oss-style byte-level decoder on real text, context-parallel, and prove it equal to one rank.

    torchrun --nproc-per-node 2 scripts/train.py --verify       # NCCL with a GPU a rank, else gloo on the CPU
    python scripts/train.py                                     # one device, the same code

Every rank holds a zigzag shard of each packed sequence; parameters are replicated, and their gradients are summed over the ranks,
the sinks' among them (dsink_reduce="none"). --verify trains one rank on the whole sequence with the same seed afterwards and fails
unless the losses agree. Results go to runs/<time>/: metrics.csv and loss.png.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import os
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from tqdm import tqdm

from magi_sink_cp import CPPlan, SinkAttention, make_cp_plan

VOCABULARY = 256  # bytes
IGNORED = -100  # label of a document's last byte and of padding
FP32_TOLERANCE = 1e-5  # relative, per step, between context-parallel and single-rank losses in fp32
BF16_ROUNDING = 2**-9
GPU_REFERENCES = 8  # single-rank runs whose mean is compared with and whose spread is allowed, twice


def main() -> int:
    args = parse_arguments()
    under_torchrun = "LOCAL_RANK" in os.environ
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if args.dtype is None:
        args.dtype = "bfloat16" if device.type == "cuda" else "float32"
    group = None
    if under_torchrun:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30))
        group = dist.group.WORLD
    try:
        return run(args, group, device)
    finally:
        if under_torchrun:
            dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="text file, or folder of them (default: the Python standard library's sources)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of one packed sequence, over all ranks")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=16)
    parser.add_argument("--sinks", type=int, default=1, help="sink logits per head")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the compute (default: bfloat16 on GPUs, else float32)")
    parser.add_argument("--backend", default="auto", help="attention backend, see magi_sink_cp.backends()")
    parser.add_argument(
        "--verify", action="store_true", help="also train one rank on the whole sequence, and fail unless the losses agree"
    )
    parser.add_argument("--out", type=Path, help="where to write (default: runs/<time>)")
    args = parser.parse_args()
    for name in ("seq_len", "steps", "dim", "layers", "heads", "kv_heads", "head_dim", "sinks"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.seq_len < 2:
        parser.error(f"--seq-len must be at least 2, so that there is a byte to predict, got {args.seq_len}")
    if args.head_dim % 2:
        parser.error(f"--head-dim must be even for rotary positions, got {args.head_dim}")
    if args.heads % args.kv_heads:
        parser.error(f"--kv-heads must divide --heads, got {args.kv_heads} and {args.heads}")
    if args.data is not None and not args.data.exists():
        parser.error(f"--data {args.data} does not exist")
    return args


def run(args: argparse.Namespace, group: ProcessGroup | None, device: torch.device) -> int:
    is_first = group is None or dist.get_rank(group) == 0
    ranks = 1 if group is None else dist.get_world_size(group)
    losses, rates = train(args, group, device, f"cp {ranks}")
    references: list[list[float]] = []
    if args.verify and is_first:
        # On GPUs, bf16 kernels with atomics differ from run to run. Few runs underestimate by how much: docs/benchmarks.md.
        repeats = GPU_REFERENCES if device.type == "cuda" else 1
        torch.set_num_threads(os.cpu_count() or 1)  # the other ranks are idle now
        references = [train(args, None, device, f"one rank, run {i + 1}")[0] for i in range(repeats)]
    failure = 0
    if is_first:
        failure = report(args, losses, rates, references, ranks, device)
    if group is not None:  # every rank ends with the verdict of the first
        verdict = torch.tensor([failure], device=device)
        dist.broadcast(verdict, src=0, group=group)
        failure = int(verdict.item())
    return failure


def train(args: argparse.Namespace, group: ProcessGroup | None, device: torch.device, name: str) -> tuple[list[float], list[float]]:
    """Train from the seed; returns (loss, tokens/s) of each step. With group None it is the single-rank run on whole sequences."""
    torch.manual_seed(args.seed)
    model = Decoder(args).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    is_first = group is None or dist.get_rank(group) == 0
    losses, rates = [], []
    progress = tqdm(packed_batches(args), total=args.steps, desc=name, unit="step", disable=not is_first)
    for step, batch in enumerate(progress):
        started = time.perf_counter()
        for parameters in optimizer.param_groups:
            parameters["lr"] = args.lr * min(1.0, (step + 1) / 10)
        plan = make_cp_plan(len(batch.tokens), group=group, cu_seqlens=batch.cu_seqlens)
        tokens, labels = (plan.shard(x.to(device)) for x in (batch.tokens, batch.labels))
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logits = model(tokens, plan)
        labels = labels.masked_fill(~plan.token_mask.to(device), IGNORED)
        # Summed, and divided by the count over all ranks, so that gradients over ranks add up to the whole sequence's.
        loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum") / batch.num_labels
        loss.backward()
        total = loss.detach().double()
        if group is not None:
            sum_gradients(model, group)
            dist.all_reduce(total, group=group)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total.item())
        rates.append(len(batch.tokens) / (time.perf_counter() - started))
        progress.set_postfix_str(f"loss {losses[-1]:.4f}, {rates[-1]:,.0f} tokens/s")
    return losses, rates


def sum_gradients(model: nn.Module, group: ProcessGroup) -> None:
    """Sum every parameter's gradient over the ranks, in one all-reduce."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat, group=group)
    for grad, summed in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(summed.view_as(grad))


# --- Data -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """One packed sequence: tokens, labels int64 (T,), offsets of its documents, and how many labels count."""

    tokens: Tensor
    labels: Tensor
    cu_seqlens: list[int]
    num_labels: int


def packed_batches(args: argparse.Namespace) -> Iterator[Batch]:
    """``steps`` sequences of documents packed back to back in a seeded order, cut where a sequence is full."""
    documents = read_documents(args.data)
    order = random.Random(args.seed)
    buffered, ends = bytearray(), []
    for _ in range(args.steps):
        while len(buffered) < args.seq_len:
            buffered += documents[order.randrange(len(documents))]
            ends.append(len(buffered))
        cu_seqlens = [0, *(end for end in ends if end < args.seq_len), args.seq_len]
        tokens = torch.tensor(list(buffered[: args.seq_len]))
        labels = tokens.roll(-1)
        labels[torch.tensor(cu_seqlens[1:]) - 1] = IGNORED
        yield Batch(tokens, labels, cu_seqlens, max(1, int((labels != IGNORED).sum())))
        del buffered[: args.seq_len]
        ends = [end - args.seq_len for end in ends if end > args.seq_len]


def read_documents(path: Path | None) -> list[bytes]:
    """The non-empty files of ``path``, or the sources of the standard library's top-level modules."""
    if path is None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    else:
        files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    documents = [content for content in (f.read_bytes() for f in files) if content]
    if not documents:
        raise ValueError(f"no text found in {path or 'the standard library'}")
    return documents


# --- Model ----------------------------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Byte-level decoder: embedding, ``layers`` blocks, norm, output head."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.head_dim: int = args.head_dim
        self.embedding = nn.Embedding(VOCABULARY, args.dim)
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.layers))
        self.norm = nn.RMSNorm(args.dim)
        self.head = nn.Linear(args.dim, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: Tensor, plan: CPPlan) -> Tensor:
        """tokens (local_tokens,) → logits (local_tokens, 256)."""
        rotation = rotary_embedding(plan.position_ids.to(tokens.device), self.head_dim)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, rotation, plan)
        return self.head(self.norm(x))


class Block(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(args.dim)
        self.attention = Attention(args)
        self.mlp_norm = nn.RMSNorm(args.dim)
        hidden = args.dim * 8 // 3
        self.gate, self.up, self.down = nn.Linear(args.dim, hidden), nn.Linear(args.dim, hidden), nn.Linear(hidden, args.dim)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], plan: CPPlan) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, plan)
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and sinks."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = args.heads, args.kv_heads, args.head_dim
        self.qkv = nn.Linear(args.dim, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.attention = SinkAttention(self.heads, args.sinks, backend=args.backend)
        self.out = nn.Linear(self.heads * self.head_dim, args.dim)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], plan: CPPlan) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
        return self.out(self.attention(rotate(q, rotation), rotate(k, rotation), v, plan=plan).flatten(-2))


def rotary_embedding(position_ids: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (tokens, 1, head_dim / 2), fp32."""
    frequency = 10000.0 ** -(torch.arange(0, head_dim, 2, device=position_ids.device) / head_dim)
    angle = (position_ids[:, None].float() * frequency)[:, None, :]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on (tokens, heads, head_dim), computed in fp32."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


# --- Report ---------------------------------------------------------------------------------------------------------------------


def report(
    args: argparse.Namespace,
    losses: list[float],
    rates: list[float],
    references: list[list[float]],
    ranks: int,
    device: torch.device,
) -> int:
    """Write metrics.csv and loss.png, print the verdict, and return the exit code."""
    folder: Path = args.out or Path("runs") / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", "tokens_per_s", *(f"single_rank_loss_{i + 1}" for i in range(len(references)))])
        for step, row in enumerate(zip(losses, rates, *references, strict=True)):
            writer.writerow([step, *row])
    plot(folder / "loss.png", losses, references, ranks, device)
    print(f"loss {losses[0]:.4f} → {losses[-1]:.4f} in {len(losses)} steps; wrote {folder}/metrics.csv and loss.png")
    if not references:
        return 0
    if not all(math.isfinite(loss) for run in (losses, *references) for loss in run):
        print("verify: FAILED: a loss is not finite")
        return 1
    mean = [statistics.fmean(step) for step in zip(*references, strict=True)]
    difference = largest_difference(losses, mean)
    if args.dtype == "bfloat16":
        spread = max((largest_difference(a, b) for i, a in enumerate(references) for b in references[:i]), default=0.0)
        bound, what = 2 * spread, f"twice the run-to-run spread of one rank, {spread:.2e}"
        if spread == 0:
            bound, what = BF16_ROUNDING, "one rounding to bf16, as runs of one rank do not differ"
    else:
        bound, what = FP32_TOLERANCE, f"{FP32_TOLERANCE:g}"
    agrees = difference <= bound
    verdict = "ok" if agrees else "FAILED"
    print(f"verify: losses of {ranks} ranks and of one differ by at most {difference:.2e} relative; allowed is {what}: {verdict}")
    return 0 if agrees else 1


def largest_difference(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference over the steps."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def plot(path: Path, losses: list[float], references: list[list[float]], ranks: int, device: torch.device) -> None:
    """Loss over steps, this run beside the single-rank reference, and below it their relative difference."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2 if references else 1,
        1,
        figsize=(8, 6 if references else 4),
        sharex=True,
        squeeze=False,
        height_ratios=[3, 1][: 2 if references else 1],
    )
    axis = axes[0][0]
    where = "GPU" if device.type == "cuda" else "CPU"
    for i, reference in enumerate(references[:1]):
        axis.plot(reference, color="#f28e2b", linewidth=5, alpha=0.5, label=f"one {where}, whole sequence", zorder=i)
    axis.plot(losses, color="#1f4e79", linewidth=1.6, label=f"context-parallel over {ranks} {where} rank{'s' if ranks > 1 else ''}")
    axis.set_ylabel("loss (nats per byte)")
    axis.set_title("Byte-level decoder with attention sinks, trained on the text it was given")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    if references:
        below = axes[1][0]
        below.semilogy(
            [max(abs(a - b) / b, 1e-12) for a, b in zip(losses, references[0], strict=True)], color="#1f4e79", linewidth=1.2
        )
        below.set_ylabel("relative\ndifference")
        below.grid(alpha=0.25)
    axes[-1][0].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
