"""Train gpt-oss, or another model with sinks that transformers knows, under context parallelism.

    torchrun --nproc-per-node 8 scripts/train_gpt_oss.py --model gpt-oss-20b --data texts --cp 8
    torchrun --nproc-per-node 8 scripts/train_gpt_oss.py --resume runs/2026-01-31_12-00 --cp 4
    python scripts/train_gpt_oss.py --model a_config --data texts                    # one device

--model is a folder of Hugging Face: config.json, tokenizer.json and *.safetensors. Without weights
it begins at random ones, and then bytes can be the tokens. --data is a folder of text files and
*.jsonl files. FSDP2 shards parameters over all ranks, a dp × cp mesh. Each cp group takes its part
of a step's sequences, and all its ranks share each of them; with --dynamic-cp, sequences of short
documents are split among smaller groups. The losses are the same whatever the mesh, also after a
resume.

The folder --out gets metrics.csv (a line per step), checkpoint/ (also after Ctrl-C), settings.json,
training.png, and with --save-model model/, a folder of Hugging Face again.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from packed_data import (
    IGNORED,
    Documents,
    PackedSequence,
    PackedSequences,
    Place,
    Stream,
    Tokenize,
    make_loader,
    start,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
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
    of_all_ranks,
    prepare_folder,
    require_at_least,
    save_checkpoint,
    settings_of,
)

from magi_sink_cp import CPPlan, make_cp_plan
from magi_sink_cp.integrations import transformers as magi

NOT_SETTINGS = ("resume", "out", "cp_size", "accept_data")
MAY_CHANGE = ("data", "steps", "checkpoint_every", "cp", "dynamic_cp", "workers", "save_model")
# What a model's own forward does to logits, and this script does not.
REFUSED_HEADS = ("final_logit_softcapping", "logit_scale", "lm_head_multiplier")
COLUMNS = ("step", "loss", "grad_norm", "tokens_per_s", "mean_cp_size")
ROWS_OF_LOGITS = 2048  # whose logits are there at a time


def main() -> int:
    args = parse_arguments()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    start_ranks(device)
    try:
        return run(args, device)
    except KeyboardInterrupt:  # after training, whose end has been saved
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    finally:
        dist.destroy_process_group()


def start_ranks(device: torch.device) -> None:
    """torchrun's ranks; without torchrun, a group of one."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=30)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


# --- Arguments ----------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Checked arguments; a wrong one ends the process with exit code 2 and one line."""
    parser = make_parser()
    args = parser.parse_args()
    args.accept_data = args.data is not None  # at a resume, though it has changed
    if args.resume is not None:
        args = settings_of(parser, args, NOT_SETTINGS, MAY_CHANGE)
    world = int(os.environ.get("WORLD_SIZE", 1))
    args.cp_size = world if args.cp is None else args.cp
    require_at_least(parser, args, 1, "seq_len", "sequences", "steps", "cp")
    require_at_least(parser, args, 0, "checkpoint_every", "workers", "warmup")
    for name in ("lr", "clip"):
        if not (math.isfinite(getattr(args, name)) and getattr(args, name) > 0):
            parser.error(f"--{name} must be a finite number > 0, got {getattr(args, name)}")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed must be from 0 to 2^63 - 1, got {args.seed}")
    if world % args.cp_size:
        parser.error(f"--cp must divide the number of ranks, {world}, got {args.cp_size}")
    dp_size = world // args.cp_size
    if args.sequences % dp_size:
        parser.error(
            f"--sequences must be a multiple of the {dp_size} cp groups ({world} ranks, --cp "
            f"{args.cp_size}), got {args.sequences}"
        )
    for option in ("model", "data"):
        if not getattr(args, option):
            parser.error(f"--{option} must name a folder")
    if failure := what_is_wrong_with(Path(args.model)):
        parser.error(f"--model {args.model} {failure}")
    args.model, args.data = os.path.abspath(args.model), os.path.abspath(args.data)
    return args


def what_is_wrong_with(folder: Path) -> str | None:
    """Why the files of a model cannot be trained, or None."""
    from transformers import AutoConfig

    try:
        config = json.loads((folder / "config.json").read_text())
        quantized = config.get("quantization_config", {}).get("quant_method", "mxfp4")
        text_config = AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, ValueError, AttributeError, KeyError) as error:
        return f"must hold a config.json of transformers: {error}"
    if quantized != "mxfp4":
        return (
            f"is quantized as {quantized!r}: only weights that are not, or in mxfp4, can be trained"
        )
    if refused := [name for name in REFUSED_HEADS if getattr(text_config, name, None) is not None]:
        return f"has {refused[0]} in its config, which this script does not honour"
    has_weights = any(folder.glob("*.safetensors"))
    if not has_weights and any(folder.glob("pytorch_model*.bin")):
        return "has weights as *.bin: save them as *.safetensors"
    others = [*folder.glob("tokenizer.model"), *folder.glob("vocab.json")]
    if not (folder / "tokenizer.json").is_file() and (has_weights or others):
        return "must hold tokenizer.json: only a model without weights can be trained on bytes"
    return None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    text = "folder with config.json, and maybe *.safetensors and tokenizer.json"
    add("--model", help=text)
    add("--data", help="folder of *.jsonl files and text files, or one such file")
    add("--text-key", default="text", help="of the text in a JSON line")
    add("--seq-len", type=int, default=8192, help="tokens of a packed sequence")
    add("--sequences", type=int, default=4, help="sequences of a step, over all ranks")
    add("--steps", type=int, default=100, help="optimizer steps in all")
    add("--cp", type=int, help="ranks that share a sequence; None: all")
    text = "split sequences of short documents among smaller groups of ranks"
    add("--dynamic-cp", action=argparse.BooleanOptionalAction, default=False, help=text)
    add("--lr", type=float, default=1e-5, help="learning rate after the warm-up")
    add("--warmup", type=int, default=10, help="steps of warm-up")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--seed", type=int, default=0, help="of data order, and of parameters without weights")
    add("--workers", type=int, default=2, help="processes of a rank that tokenize, pack and plan")
    add("--out", type=folder_name, help="folder to write to; None: runs/<time>")
    text = "save after so many steps; 0: at the end, and after Ctrl-C"
    add("--checkpoint-every", type=int, default=0, help=text)
    text = "write model/ in the end"
    add("--save-model", action=argparse.BooleanOptionalAction, default=False, help=text)
    text = f"folder of an earlier run: go on with its settings, but for {', '.join(MAY_CHANGE)}"
    add("--resume", type=folder_name, help=text.replace("_", "-"))
    parser.set_defaults(fingerprint=None)  # of the documents; settings.json keeps it
    return parser


# --- The run ------------------------------------------------------------------------------------


def run(args: argparse.Namespace, device: torch.device) -> int:
    is_first = dist.get_rank() == 0
    args.out = choose_folder(args.out, dist.group.WORLD)
    failure: str | None = None
    try:
        documents = Documents(args.data, args.text_key)
        if len(documents) < args.sequences:
            failure = (
                f"--data {args.data} must hold a document for each of the {args.sequences} "
                f"sequences of a step, got {len(documents)}"
            )
        failure = failure or compare_data(args, documents)
    except (OSError, ValueError) as error:
        failure = f"--data: {error}"
    if len(found := {*of_all_ranks(args.fingerprint, dist.group.WORLD)}) > 1 and not failure:
        failure = (
            f"--data, or tokenizer.json, must be the same on every rank, got {len(found)} kinds"
        )
    if failure is None and is_first:
        failure = prepare_folder(args, NOT_SETTINGS)
    failure = agree_on(failure, dist.group.WORLD)
    if failure:
        if is_first:
            print(f"train_gpt_oss.py: error: {failure}", file=sys.stderr)
        return 2
    meshes = make_meshes(args.cp_size, device)
    model, config = make_model(args, meshes[args.cp_size], device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1,
        fused=device.type == "cuda",
    )  # fmt: skip
    first_step, places = 0, [Place()] * args.sequences
    if args.resume:
        empty = {
            "next_step": 0,
            "places": torch.zeros(args.sequences, len(Place()), dtype=torch.long),
        }
        others = load_checkpoint(args.out, model, optimizer, empty)
        first_step = int(others["next_step"])
        places = [Place(*numbers) for numbers in others["places"].tolist()]
    job = Job(args, config, documents, meshes, model, optimizer, places, device)
    with Interrupt() as interrupt:
        done, stopped, failure = job.train(first_step, interrupt)
    if is_first:
        plot(args.out)
        if failure is not None:
            print(f"train_gpt_oss.py: error: {failure}", file=sys.stderr)
        if stopped:
            print(f"stopped: saved; go on with --resume {args.out}")
    if stopped:
        return INTERRUPTED if failure is None else 1
    if args.save_model:
        save_model(args, model)
    if is_first:
        print(f"{done} steps are done; see {args.out}")
    return 0


def compare_data(args: argparse.Namespace, documents: Documents) -> str | None:
    """Why the documents or their tokens are others than before --resume, or None."""
    tokenizer = Path(args.model) / "tokenizer.json"
    content = tokenizer.read_bytes() if tokenizer.is_file() else b""
    found = f"{documents.fingerprint()} {hashlib.sha256(content).hexdigest()[:16]}"
    if args.resume and args.fingerprint != found and not args.accept_data:
        return (
            f"--resume {args.resume}: the files of {args.data}, or tokenizer.json, have changed, "
            "so documents may come twice or never; give --data again to go on with what is there"
        )
    args.fingerprint = found
    return None


def make_meshes(cp: int, device: torch.device) -> dict[int, DeviceMesh]:
    """(groups, ranks) meshes of all ranks, by the number of ranks in a group: divisors of cp."""
    world = dist.get_world_size()
    sizes = [size for size in range(1, cp + 1) if cp % size == 0]
    return {
        size: init_device_mesh(device.type, (world // size, size), mesh_dim_names=("dp", "cp"))
        for size in sizes
    }


class Job:
    """Everything that a step needs."""

    def __init__(
        self,
        args: argparse.Namespace,
        config: Any,
        documents: Documents,
        meshes: dict[int, DeviceMesh],
        model: TokenLoss,
        optimizer: torch.optim.Optimizer,
        places: list[Place],
        device: torch.device,
    ) -> None:
        self._args, self._device, self._meshes = args, device, meshes
        self._model, self._optimizer, self._places = model, optimizer, places
        mesh = meshes[args.cp_size]
        dp, dp_rank = mesh["dp"].size(), mesh.get_local_rank("dp")
        own = range(dp_rank, args.sequences, dp)
        tokenize = make_tokenize(args.model, config)
        window = getattr(config, "sliding_window", None)
        sequences = PackedSequences(
            [Stream(documents, tokenize, n, args.sequences, args.seed, places[n]) for n in own],
            own,
            args.seq_len,
            args.cp_size,
            mesh.get_local_rank("cp"),
            [(-1, 0), *([(window - 1, 0)] if window else [])],
            pairs_per_token(model, config) if args.dynamic_cp else None,
        )
        self._sequences_of_step = len(own)
        self._loader = make_loader(sequences, len(own), args.workers, device.type == "cuda")

    def train(self, first_step: int, interrupt: Interrupt) -> tuple[int, bool, str | None]:
        """Train from ``first_step`` to --steps; returns the next step, whether to stop before the
        end, and why if it is no signal. What is returned is the same on every rank.
        """
        args, is_first = self._args, dist.get_rank() == 0
        recorder = Recorder(args.out, COLUMNS) if is_first else None
        if recorder is not None:
            recorder.keep_before(first_step)
        step, sequences = first_step, start(self._loader)
        saved, stop, failure = -1, False, None
        progress = tqdm(total=args.steps, initial=first_step, unit="step", disable=not is_first)
        while step < args.steps and not stop:
            begin = time.perf_counter()
            batch, num_labels, failure = self._next_batch(sequences)
            if failure is not None:
                stop = True
                break
            loss, norm, cp_size, stop = self._step(step, batch, num_labels, interrupt)
            step += 1
            rate = args.sequences * args.seq_len / (time.perf_counter() - begin)
            progress.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tokens/s", refresh=False)
            progress.update()
            if recorder is not None:
                recorder.write(step - 1, loss, norm, rate, cp_size)
            if args.checkpoint_every and step % args.checkpoint_every == 0 and not stop:
                self._save(step)
                saved = step
        progress.close()
        if saved != step:
            self._save(step)
        return step, stop, failure

    def _next_batch(
        self, sequences: Iterator[PackedSequence]
    ) -> tuple[list[PackedSequence], int, str | None]:
        """This rank's sequences of a step, the labels of all ranks', and why a rank has none."""
        batch: list[PackedSequence] = []
        failure = None
        try:
            batch = list(islice(sequences, self._sequences_of_step))
        except Exception as error:  # the other ranks must hear of it
            text = str(error).strip() or repr(error)
            failure = text.splitlines()[-1]  # behind a worker's traceback
        counts = [sum(sequence.num_labels for sequence in batch), failure is not None]
        totals = torch.tensor(counts, device=self._device)
        dist.all_reduce(totals)
        num_labels, failed = totals.tolist()
        if failed:
            return [], 0, agree_on(failure, dist.group.WORLD)
        return batch, num_labels // self._args.cp_size, None  # a cp group's ranks all count them

    def _step(
        self, step: int, batch: list[PackedSequence], num_labels: int, interrupt: Interrupt
    ) -> tuple[float, float, float, bool]:
        """One optimizer step: (loss, norm of the gradient, mean cp size, whether to stop)."""
        args, device, world = self._args, self._device, dist.get_world_size()
        for sequence in batch:
            self._places[sequence.stream] = sequence.place
        total = torch.zeros((), device=device)
        for sequence in batch:
            cp_size = sequence.blueprint.cp_size
            plan = make_cp_plan(sequence.blueprint, group=self._meshes[cp_size]["cp"])
            tokens = plan.shard(sequence.tokens.to(device, non_blocking=True))
            targets = plan.shard(sequence.labels.to(device, non_blocking=True), fill=IGNORED)
            loss, balance = self._model(tokens, targets, plan)
            loss = loss / max(1, num_labels)
            # FSDP takes the mean of the gradients over all ranks.
            share = plan.total_tokens / (args.sequences * args.seq_len)
            (world * loss + world / cp_size * share * balance).backward()
            total += loss.detach() + share / cp_size * balance.detach()
        for parameters in self._optimizer.param_groups:
            parameters["lr"] = args.lr * min(1.0, (step + 1) / (args.warmup + 1))
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), args.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._optimizer.step()
        self._optimizer.zero_grad()
        sizes = sum(sequence.blueprint.cp_size for sequence in batch) / len(batch) / world
        sums = torch.tensor([0.0, sizes, interrupt.seen], dtype=torch.float64, device=device)
        sums[0] = total
        dist.all_reduce(sums)
        loss_sum, mean_size, stop = sums.tolist()
        return loss_sum, norm.item(), mean_size, stop > 0

    def _save(self, next_step: int) -> None:
        """Write checkpoint/, with the places of all streams."""
        places = torch.zeros(len(self._places), len(Place()), dtype=torch.long, device=self._device)
        mesh = self._meshes[self._args.cp_size]
        for n in range(mesh.get_local_rank("dp"), len(self._places), mesh["dp"].size()):
            places[n] = torch.tensor(self._places[n])
        dist.all_reduce(places, group=mesh["dp"].get_group())
        others = {"next_step": next_step, "places": places.cpu()}
        save_checkpoint(self._args.out, self._model, self._optimizer, others, dist.group.WORLD)


# --- Model --------------------------------------------------------------------------------------


class TokenLoss(nn.Module):
    """A causal language model whose forward returns the loss of this rank's tokens.

    The logits of all tokens would be the largest tensor by far, so the loss is taken of some rows
    at a time, and computed again in backward.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor, plan: CPPlan) -> tuple[Tensor, Tensor]:
        """tokens, labels (local_tokens,) → the sum over labels, and the routers' loss of the plan's
        tokens, 0 unless the config asks for it.
        """
        config = self.model.config.get_text_config()
        has_routers = bool(getattr(config, "output_router_logits", False))
        asked = {"output_router_logits": True} if has_routers else {}
        outputs = self.model.get_decoder()(
            input_ids=tokens[None], position_ids=plan.position_ids[None].to(tokens.device),
            use_cache=False, cp_plan=plan, **asked,
        )  # fmt: skip
        hidden = outputs.last_hidden_state[0]
        parts = zip(hidden.split(ROWS_OF_LOGITS), labels.split(ROWS_OF_LOGITS), strict=True)
        loss = torch.stack(
            [checkpoint(self._loss_of_rows, *part, use_reentrant=False) for part in parts]
        ).sum()
        balance = loss.new_zeros(())
        if has_routers:
            balance = config.router_aux_loss_coef * magi.cp_load_balancing_loss(
                outputs.router_logits, num_experts(config), config.num_experts_per_tok, plan
            )
        return loss, balance

    def _loss_of_rows(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(hidden).float()
        logits = logits / getattr(self.model.config, "logits_scaling", 1.0)  # Granite's
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def make_model(
    args: argparse.Namespace, mesh: DeviceMesh, device: torch.device
) -> tuple[TokenLoss, Any]:
    """The model, sharded over all ranks of the mesh, and its config.

    Rank 0 reads the weights, and sends them. Weights in mxfp4, as gpt-oss is published, are trained
    without quantization.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    magi.register()
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "magi_sink"}
    config = AutoConfig.from_pretrained(args.model)
    unpack: dict[str, Any] = {}
    if hasattr(config, "quantization_config"):
        unpack["quantization_config"] = Mxfp4Config(dequantize=True)
        del config.quantization_config
    source = None
    if dist.get_rank() == 0:
        torch.manual_seed(args.seed)
        if any(Path(args.model).glob("*.safetensors")):
            source = AutoModelForCausalLM.from_pretrained(args.model, **options, **unpack)
        else:
            print(f"{args.model} holds no weights: they begin at random ones")
            source = AutoModelForCausalLM.from_config(config, **options)
        if not (Path(args.model) / "tokenizer.json").is_file():
            print(f"{args.model} holds no tokenizer.json: the tokens are bytes")
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config, **options)
    whole.gradient_checkpointing_enable({"use_reentrant": False})
    model = TokenLoss(whole).train()
    policy = MixedPrecisionPolicy()
    if device.type == "cuda":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    everyone = mesh._flatten("dp_cp")
    for layer in whole.get_decoder().layers:
        fully_shard(layer, mesh=everyone, mp_policy=policy)
    fully_shard(model, mesh=everyone, mp_policy=policy)
    model.to_empty(device=device)
    weights = {} if source is None else TokenLoss(source).state_dict()
    set_model_state_dict(
        model, weights,
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )  # fmt: skip
    buffers = {} if source is None else dict(TokenLoss(source).named_buffers())
    for name, buffer in model.named_buffers():
        if source is not None:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)
    return model, config


def pairs_per_token(model: TokenLoss, config: Any) -> float:
    """How many (query, key) pairs cost as much as all that is not attention costs one token."""
    text = config.get_text_config()
    active = sum(
        p.numel() * (text.num_experts_per_tok / num_experts(text) if ".experts." in name else 1)
        for name, p in model.named_parameters()
        if "embed_tokens" not in name
    )
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    full = sum(kind == "full_attention" for kind in kinds)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * active / max(1, 4 * text.num_attention_heads * head_dim * full)


def num_experts(text_config: Any) -> int:
    """By the name that a model's config has for it."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next(getattr(text_config, name) for name in names if hasattr(text_config, name))


def make_tokenize(folder: str, config: Any) -> Tokenize:
    """Text → tokens, the end of a document too; bytes if the folder has no tokenizer."""
    end = config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    path = Path(folder) / "tokenizer.json"
    size = config.get_text_config().vocab_size
    return Tokenizer(str(path) if path.is_file() else None, [] if end is None else [end], size)


class Tokenizer:
    """A tokenizer that each worker reads for itself."""

    def __init__(self, path: str | None, end: list[int], vocab_size: int) -> None:
        self._path, self._end, self._vocab_size = path, end, vocab_size
        self._read: Any = None

    def __call__(self, text: str) -> list[int]:
        """The tokens of a document.

        Raises:
            ValueError: a token is beyond the model's vocabulary.
        """
        if self._path is None:
            tokens = [*text.encode(), *self._end]
        else:
            if self._read is None:
                from tokenizers import Tokenizer as Read

                self._read = Read.from_file(self._path)
            tokens = [*self._read.encode(text, add_special_tokens=False).ids, *self._end]
        if tokens and max(tokens) >= self._vocab_size:
            raise ValueError(
                f"token {max(tokens)} is beyond the model's vocab_size of {self._vocab_size}"
            )
        return tokens


def save_model(args: argparse.Namespace, model: TokenLoss) -> None:
    """Write model/, in bf16, as transformers reads it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        state = {name.removeprefix("model."): x.bfloat16() for name, x in weights.items()}
        model.model.config.dtype = torch.bfloat16
        model.model.save_pretrained(args.out / "model", state_dict=state)
        for pattern in ("tokenizer*", "special_tokens_map.json", "chat_template*"):
            for file in Path(args.model).glob(pattern):
                shutil.copy(file, args.out / "model")
    dist.barrier()


# --- Report -------------------------------------------------------------------------------------


def plot(folder: Path) -> None:
    """training.png: the loss, and the tokens per second, over steps."""
    mpl.use("Agg")
    recorder = Recorder(folder, COLUMNS)
    figure, axes = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[2, 1])
    columns = {"loss": "loss (nats per token)", "tokens_per_s": "tokens/s"}
    for axis, (column, label) in zip(axes, columns.items(), strict=True):
        axis.plot(recorder.column("step"), recorder.column(column), color="#1f4e79")
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
    axes[1].set_ylim(bottom=0)
    axes[1].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(folder / "training.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # of `| head`
        sys.exit(main())
