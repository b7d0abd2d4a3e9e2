"""Train a small gpt-oss-style byte-level decoder on real text, context-parallel.

    torchrun --nproc-per-node 2 scripts/train.py --verify    # NCCL with a GPU per rank, else gloo
    python scripts/train.py                                  # one device, the same code
    python scripts/train.py --resume runs/2026-01-31_12-00   # go on from its last checkpoint

Every rank holds a zigzag shard of each packed sequence. Parameters are replicated, and their
gradients are summed over the ranks, the sinks' among them (dsink_reduce="none"). --verify then
trains one rank on the whole sequences from the same seed, and fails unless the losses agree.

The folder --out gets metrics.csv (a line per step, as it comes), checkpoint/ (also after Ctrl-C),
settings.json, loss.png, and with --verify verify.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import math
import os
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from tqdm import tqdm
from trainlib import (
    INTERRUPTED,
    Formatter,
    Interrupt,
    Recorder,
    agree_on,
    choose_folder,
    folder_name,
    load_checkpoint,
    prepare_folder,
    require_at_least,
    save_checkpoint,
    settings_of,
)

import magi_sink_cp
from magi_sink_cp import CPPlan, SinkAttention, engines, make_cp_plan, prefetch_plans

VOCABULARY = 256  # bytes
IGNORED = -100  # label of a document's last byte and of padding
FP32_TOLERANCE = 1e-5  # relative, per step, between context-parallel and single-rank losses in fp32
BF16_ROUNDING = 2**-9
# Single-rank runs whose mean is compared with, and twice whose spread is allowed.
GPU_REFERENCES = 8
NOT_SETTINGS = ("documents", "verify", "resume", "out")
MAY_CHANGE = ("steps", "checkpoint_every")  # at a resume
COLUMNS = ("step", "loss", "tokens_per_s")


def main() -> int:
    args = parse_arguments()
    under_torchrun = "LOCAL_RANK" in os.environ
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if args.dtype is None:
        args.dtype = "bfloat16" if device.type == "cuda" else "float32"
    group = None
    if under_torchrun:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
        group = dist.group.WORLD
    try:
        return run(args, group, device)
    except KeyboardInterrupt:  # after training, whose end has been saved
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    finally:
        if under_torchrun:
            dist.destroy_process_group()


# --- Arguments ----------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Checked arguments; a wrong one ends the process with exit code 2 and one line."""
    parser = make_parser()
    args = parser.parse_args()
    if args.resume is not None:
        args = settings_of(parser, args, NOT_SETTINGS, MAY_CHANGE)
    sizes = ("seq_len", "steps", "dim", "layers", "heads", "kv_heads", "head_dim", "sinks")
    require_at_least(parser, args, 1, *sizes)
    require_at_least(parser, args, 0, "checkpoint_every")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed must be from 0 to 2^63 - 1, got {args.seed}")
    if args.seq_len < 2:
        parser.error(f"--seq-len must be at least 2: a byte to predict, got {args.seq_len}")
    if args.head_dim % 2:
        parser.error(f"--head-dim must be even for rotary positions, got {args.head_dim}")
    if args.heads % args.kv_heads:
        parser.error(f"--kv-heads must divide --heads, got {args.kv_heads} and {args.heads}")
    if not (math.isfinite(args.lr) and args.lr > 0):
        parser.error(f"--lr must be a finite number > 0, got {args.lr}")
    backends = ["auto", *(backend.name for backend in magi_sink_cp.backends())]
    if args.backend not in backends:
        parser.error(f"--backend must be one of {backends}, got {args.backend!r}")
    if args.engine == "magi":
        reason = {info.name: info.reason for info in engines()}["magi"]
        if reason or "RANK" not in os.environ:
            reason = reason or "it needs a process group: use torchrun, also for one rank"
            parser.error(f"--engine magi is not available: {reason}")
    try:
        args.documents = read_documents(args.data)
    except (OSError, ValueError) as error:
        parser.error(f"--data: {error}")
    return args


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    text = "text file, or folder of them; None: the sources of Python's standard library"
    add("--data", type=str, help=text)
    add("--seq-len", type=int, default=2048, help="tokens of one packed sequence, over all ranks")
    add("--steps", type=int, default=40, help="optimizer steps in all")
    add("--dim", type=int, default=128, help="width of the model")
    add("--layers", type=int, default=3, help="blocks")
    add("--heads", type=int, default=8, help="query heads")
    add("--kv-heads", type=int, default=2, help="key and value heads")
    add("--head-dim", type=int, default=16, help="width of a head")
    add("--sinks", type=int, default=1, help="sink logits per head")
    add("--lr", type=float, default=3e-3, help="learning rate after 10 steps of warm-up")
    add("--seed", type=int, default=0, help="of parameters and data order")
    text = "of the compute; None: bfloat16 on GPUs, else float32"
    add("--dtype", choices=["float32", "bfloat16"], help=text)
    add("--backend", default="auto", help="attention backend, see magi_sink_cp.backends()")
    text = "who plans and moves keys across ranks, see magi_sink_cp.engines()"
    add("--engine", choices=["native", "magi"], default="native", help=text)
    text = "also train one rank on the whole sequence, and fail unless the losses agree"
    add("--verify", action="store_true", help=text)
    add("--out", type=folder_name, help="folder to write to; None: runs/<time>")
    text = "save after so many steps; 0: at the end, and after Ctrl-C"
    add("--checkpoint-every", type=int, default=0, help=text)
    text = "folder of an earlier run: go on with its settings (--steps and --checkpoint-every anew)"
    add("--resume", type=folder_name, help=text)
    return parser


# --- The run ------------------------------------------------------------------------------------


def run(args: argparse.Namespace, group: ProcessGroup | None, device: torch.device) -> int:
    is_first = group is None or dist.get_rank(group) == 0
    ranks = 1 if group is None else dist.get_world_size(group)
    args.out = choose_folder(args.out, group)
    failure = agree_on(prepare_folder(args, NOT_SETTINGS) if is_first else None, group)
    if failure:
        if is_first:
            print(f"train.py: error: {failure}", file=sys.stderr)
        return 2
    recorder = Recorder(args.out, COLUMNS) if is_first else None
    state = TrainingState(args, device)
    first_step = state.load(args.out) if args.resume else 0
    with Interrupt() as interrupt:
        losses, stopped = train(
            args, state, first_step, group, device, f"cp {ranks}", recorder, interrupt
        )
        state.save(args.out, first_step + len(losses), group)
    if stopped:
        if is_first:
            print(f"interrupted: saved; go on with --resume {args.out}")
        return INTERRUPTED
    verdict = 0
    if is_first:
        references: list[list[float]] = []
        if args.verify:
            references = reference_losses(args, device, first_step)
        verdict = report(args, first_step, losses, references, ranks, device)
    if group is not None:  # every rank ends with the verdict of the first
        shared = torch.tensor([verdict], device=device)
        dist.broadcast(shared, src=0, group=group)
        verdict = int(shared.item())
    return verdict


class TrainingState:
    """Model and optimizer of one run, and their checkpoint."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(args.seed)
        self.model = Decoder(args).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1
        )

    def save(self, folder: Path, next_step: int, group: ProcessGroup | None) -> None:
        """Write folder/checkpoint."""
        save_checkpoint(folder, self.model, self.optimizer, {"next_step": next_step}, group)

    def load(self, folder: Path) -> int:
        """Read folder/checkpoint; returns the next step."""
        others = load_checkpoint(folder, self.model, self.optimizer, {"next_step": 0})
        return int(others["next_step"])


def train(
    args: argparse.Namespace,
    state: TrainingState,
    first_step: int,
    group: ProcessGroup | None,
    device: torch.device,
    name: str,
    recorder: Recorder | None = None,
    interrupt: Interrupt | None = None,
) -> tuple[list[float], bool]:
    """Train from ``first_step`` on; returns the loss of each step, and whether any rank was
    interrupted. group None: whole sequences.
    """
    is_first = group is None or dist.get_rank(group) == 0
    if recorder is not None:
        recorder.keep_before(first_step)
    losses: list[float] = []
    stop = False
    batches = with_plans(args, islice(packed_batches(args), first_step, args.steps), group)
    total = max(0, args.steps - first_step)
    progress = tqdm(batches, total=total, desc=name, unit="step", disable=not is_first)
    for step, (batch, plan) in enumerate(progress, first_step):
        started = time.perf_counter()
        loss, stop = train_step(args, state, step, batch, plan, device, interrupt)
        losses.append(loss)
        rate = len(batch.tokens) / (time.perf_counter() - started)
        progress.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tokens/s")
        if recorder is not None:
            recorder.write(step, loss, rate)
        if stop:
            break
        due = args.checkpoint_every and (step + 1) % args.checkpoint_every == 0
        if due and interrupt is not None:
            state.save(args.out, step + 1, group)
    progress.close()
    return losses, stop


def with_plans(
    args: argparse.Namespace, batches: Iterator[Batch], group: ProcessGroup | None
) -> Iterable[tuple[Batch, CPPlan]]:
    """Each batch with its plan, which the native engine makes ahead of the step."""
    if args.engine == "native" or group is None:
        return prefetch_plans(batches, group=group, cu_seqlens=attrgetter("cu_seqlens"))
    return (
        (batch, make_cp_plan(len(batch.tokens), group=group, cu_seqlens=batch.cu_seqlens,
                             engine=args.engine))
        for batch in batches
    )  # fmt: skip


def train_step(
    args: argparse.Namespace,
    state: TrainingState,
    step: int,
    batch: Batch,
    plan: CPPlan,
    device: torch.device,
    interrupt: Interrupt | None,
) -> tuple[float, bool]:
    """One optimizer step; returns the loss over all ranks, and whether any rank was interrupted."""
    for parameters in state.optimizer.param_groups:
        parameters["lr"] = args.lr * min(1.0, (step + 1) / 10)
    tokens = plan.shard(batch.tokens.to(device))
    labels = plan.shard(batch.labels.to(device), fill=IGNORED)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        logits = state.model(tokens, plan)
    # Summed, and divided by the count over all ranks: gradients over ranks add up to the whole
    # sequence's.
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    loss = loss / batch.num_labels
    loss.backward()
    interrupted = interrupt is not None and interrupt.seen
    totals = torch.stack([loss.detach().double(), loss.new_tensor(interrupted).double()])
    if plan.group is not None:
        sum_gradients(state.model, plan.group)
        dist.all_reduce(totals, group=plan.group)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    total, stop = totals.tolist()
    return total, bool(stop)


def sum_gradients(model: nn.Module, group: ProcessGroup) -> None:
    """Sum every parameter's gradient over the ranks, in one all-reduce."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat, group=group)
    for grad, summed in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(summed.view_as(grad))


def reference_losses(
    args: argparse.Namespace, device: torch.device, first_step: int
) -> list[list[float]]:
    """Losses of single-rank runs over whole sequences, from ``first_step`` on.

    On GPUs, bf16 kernels with atomics differ from run to run, so several runs are made.
    """
    repeats = GPU_REFERENCES if device.type == "cuda" else 1
    torch.set_num_threads(os.cpu_count() or 1)  # the other ranks are idle now
    runs = []
    for number in range(repeats):
        state = TrainingState(args, device)
        name = f"one rank, run {number + 1}"
        losses, _ = train(args, state, 0, None, device, name)
        runs.append(losses[first_step:])
    return runs


# --- Data ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """One packed sequence.

    Attributes:
        tokens, labels: int64 (T,).
        cu_seqlens: offsets of its documents.
        num_labels: how many labels count.
    """

    tokens: Tensor
    labels: Tensor
    cu_seqlens: list[int]
    num_labels: int


def packed_batches(args: argparse.Namespace) -> Iterator[Batch]:
    """Documents packed back to back in a seeded order, cut where a sequence is full."""
    documents: list[bytes] = args.documents
    order = random.Random(args.seed)
    buffered, ends = bytearray(), []
    while True:
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


def read_documents(data: str | None) -> list[bytes]:
    """The files of ``data`` with at least two bytes, or the standard library's top-level modules.

    Raises:
        OSError: a file cannot be read.
        ValueError: there is no file, or none with a byte to predict.
    """
    if data is None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    elif not data or not Path(data).exists():
        raise ValueError(f"{data or repr(data)} does not exist")
    else:
        path = Path(data)
        files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    documents = [content for content in (f.read_bytes() for f in files) if len(content) >= 2]
    if not documents:
        raise ValueError(f"{data} holds no file of at least two bytes: there is no byte to predict")
    return documents


# --- Model ----------------------------------------------------------------------------------------


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
        self.gate, self.up, self.down = (
            nn.Linear(args.dim, hidden),
            nn.Linear(args.dim, hidden),
            nn.Linear(hidden, args.dim),
        )

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
        return self.out(
            self.attention(rotate(q, rotation), rotate(k, rotation), v, plan=plan).flatten(-2)
        )


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


# --- Report -------------------------------------------------------------------------------------


def report(
    args: argparse.Namespace,
    first_step: int,
    losses: list[float],
    references: list[list[float]],
    ranks: int,
    device: torch.device,
) -> int:
    """Write verify.csv and loss.png, print the verdict, and return the exit code."""
    folder: Path = args.out
    plot(
        folder / "loss.png",
        Recorder(folder, COLUMNS).column("loss"),
        first_step,
        references,
        ranks,
        device,
    )
    if losses:
        print(f"loss {losses[0]:.4f} → {losses[-1]:.4f} in {len(losses)} steps; see {folder}")
    else:
        print(f"nothing to do: {first_step} steps are done; see {folder}")
    if not references:
        return 0
    with (folder / "verify.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["step", "loss", *(f"single_rank_loss_{i + 1}" for i in range(len(references)))]
        )
        for step, row in enumerate(zip(losses, *references, strict=True), first_step):
            writer.writerow([step, *row])
    return verdict_on(args, losses, references, ranks)


def verdict_on(
    args: argparse.Namespace, losses: list[float], references: list[list[float]], ranks: int
) -> int:
    """Print whether the losses agree; returns the exit code."""
    if not all(math.isfinite(loss) for run in (losses, *references) for loss in run):
        print("verify: FAILED: a loss is not finite")
        return 1
    mean = [statistics.fmean(step) for step in zip(*references, strict=True)]
    difference = largest_difference(losses, mean)
    bound, what = FP32_TOLERANCE, f"{FP32_TOLERANCE:g}"
    if args.dtype == "bfloat16":
        pairs = ((a, b) for i, a in enumerate(references) for b in references[:i])
        spread = max((largest_difference(a, b) for a, b in pairs), default=0.0)
        bound, what = 2 * spread, f"twice the run-to-run spread of one rank, {spread:.2e}"
        if spread == 0:
            bound = BF16_ROUNDING
            what = "one rounding to bf16, as runs of one rank do not differ"
    agrees = difference <= bound
    print(
        f"verify: losses of {ranks} ranks and of one differ by at most {difference:.2e} relative; "
        f"allowed is {what}: {'ok' if agrees else 'FAILED'}"
    )
    return 0 if agrees else 1


def largest_difference(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference over the steps."""
    return max((abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True)), default=0.0)


def plot(
    path: Path,
    losses: list[float],
    first_step: int,
    references: list[list[float]],
    ranks: int,
    device: torch.device,
) -> None:
    """Loss over steps; with references, the first of them, and below the relative difference."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = 2 if references else 1
    figure, axes = plt.subplots(
        rows, 1, figsize=(8, 3 + 1.5 * rows), sharex=True, squeeze=False,
        height_ratios=[3, 1][:rows],
    )  # fmt: skip
    axis, where = axes[0][0], "GPU" if device.type == "cuda" else "CPU"
    plural = "s" if ranks > 1 else ""
    steps = range(first_step, first_step + len(references[0]) if references else first_step)
    if references:
        label = f"one {where}, whole sequence"
        axis.plot(steps, references[0], color="#f28e2b", linewidth=5, alpha=0.5, label=label)
    label = f"context-parallel over {ranks} {where} rank{plural}"
    axis.plot(losses, color="#1f4e79", linewidth=1.6, label=label)
    axis.set_ylabel("loss (nats per byte)")
    axis.set_title("Byte-level decoder with attention sinks, trained on the text it was given")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    if references:
        below = axes[1][0]
        pairs = zip(losses[first_step:], references[0], strict=True)
        apart = [max(abs(a - b) / b, 1e-12) for a, b in pairs]
        below.semilogy(steps, apart, color="#1f4e79", linewidth=1.2)
        below.set_ylabel("relative\ndifference")
        below.grid(alpha=0.25)
    axes[-1][0].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # of `| head`
        sys.exit(main())
