"""What the training scripts share: the folder of a run, its settings, checkpoints, Ctrl-C."""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

T = TypeVar("T")

INTERRUPTED = 130  # the exit code of a shell command that Ctrl-C ended
_NOT_GIVEN = object()


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in the help, and the description as it is written."""


def folder_name(text: str) -> Path:
    """An argument that names a folder."""
    if not text:
        raise argparse.ArgumentTypeError("must name a folder, got ''")
    return Path(text)


def require_at_least(
    parser: argparse.ArgumentParser, args: argparse.Namespace, least: int, *names: str
) -> None:
    """End with an error if one of these arguments is given, and smaller."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def settings_of(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    not_settings: Sequence[str],
    may_change: Sequence[str],
) -> argparse.Namespace:
    """The arguments of the run that --resume names; of ``may_change``, those that are given now.

    Args:
        not_settings: arguments that settings.json does not keep.
    """
    path = args.resume / "settings.json"
    if not path.is_file() or whole_checkpoint(args.resume) is None:
        parser.error(f"--resume {args.resume} holds no settings.json and checkpoint/ of a run")
    try:
        settings = json.loads(path.read_text())
        settings = {name: settings[name] for name in vars(args) if name not in not_settings}
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--resume {args.resume}: settings.json cannot be read: {error!r}")
    # argparse leaves a name alone that the namespace has already.
    blank = argparse.Namespace(**dict.fromkeys(vars(args), _NOT_GIVEN))
    for name, value in vars(parser.parse_args(namespace=blank)).items():
        if value is _NOT_GIVEN or (name in not_settings and name != "out"):
            continue
        if name in may_change:
            settings[name] = value
        elif value != (has := args.resume if name == "out" else settings[name]):
            option = f"--{name.replace('_', '-')}"
            parser.error(
                f"{option} {value} cannot be given with --resume, which goes on with {has}: leave "
                "it out, or start anew"
            )
    kept = {name: getattr(args, name) for name in not_settings if hasattr(args, name)}
    return argparse.Namespace(**{**settings, **kept, "out": args.resume})


def choose_folder(given: Path | None, group: ProcessGroup | None) -> Path:
    """The folder of a run: runs/<time> of the first rank's clock where none is given."""
    now = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    chosen = [Path("runs") / now if given is None else given]
    if group is not None:
        dist.broadcast_object_list(chosen, src=0, group=group)
    return chosen[0]


def prepare_folder(args: argparse.Namespace, not_settings: Sequence[str]) -> str | None:
    """Make --out before anything is computed; why that is not possible, or None."""
    folder: Path = args.out
    if args.resume is None and (folder / "metrics.csv").exists():
        saved = whole_checkpoint(folder) is not None
        instead = f", or --resume {folder}" if saved else "; it saved no checkpoint"
        return f"--out {folder} holds another run: choose a new folder{instead}"
    settings = {name: value for name, value in vars(args).items() if name not in not_settings}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(settings, indent=1))
    except OSError as error:
        return f"--out {folder} cannot be written: {error}"
    return None


def agree_on(failure: str | None, group: ProcessGroup | None) -> str | None:
    """The failure of any rank, on every rank."""
    return next((each for each in of_all_ranks(failure, group) if each is not None), None)


def of_all_ranks(mine: T, group: ProcessGroup | None) -> list[T]:
    """What each rank has."""
    if group is None:
        return [mine]
    every = [mine] * dist.get_world_size(group)
    dist.all_gather_object(every, mine, group=group)
    return every


class Interrupt:
    """Ctrl-C, or SIGTERM, is noted while training runs. A second Ctrl-C ends the process at once.

    A second SIGTERM does not: where a scheduler signals every process, torchrun sends its own too.
    """

    def __init__(self) -> None:
        self.seen = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])


class Recorder:
    """metrics.csv, a line per step, each on disk before the next step begins."""

    def __init__(self, folder: Path, columns: Sequence[str]) -> None:
        self._path = folder / "metrics.csv"
        if not self._path.exists():
            self._path.write_text(",".join(columns) + "\n")

    def keep_before(self, step: int) -> None:
        """Drop the lines from ``step`` on, which come again after a resume."""
        lines = self._path.read_text().splitlines(keepends=True)
        self._path.write_text("".join(lines[: 1 + step]))

    def write(self, *values: float) -> None:
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerow(values)

    def column(self, name: str) -> list[float]:
        with self._path.open() as file:
            return [float(row[name]) for row in csv.DictReader(file)]


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    others: dict[str, Any],
    group: ProcessGroup | None,
) -> None:
    """Write folder/checkpoint; whenever this is cut short, a whole one is left."""
    new, current, old = folder / "checkpoint.new", folder / "checkpoint", folder / "checkpoint.old"
    is_first = group is None or dist.get_rank(group) == 0
    if is_first:  # of a save that was cut short
        shutil.rmtree(new, ignore_errors=True)
    if group is not None:
        dist.barrier(group)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, **others}
    dcp.save(state, checkpoint_id=new, process_group=group, no_dist=group is None)
    if is_first:
        if current.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            current.rename(old)
        new.rename(current)
        shutil.rmtree(old, ignore_errors=True)
    if group is not None:
        dist.barrier(group)


def whole_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of a run, or None. A save that was cut short leaves the one before it."""
    places = (folder / "checkpoint", folder / "checkpoint.old")
    return next((place for place in places if place.is_dir()), None)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, others: dict[str, Any]
) -> dict[str, Any]:
    """Read the folder's checkpoint, which may be of another number of ranks; returns the others."""
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments, **others}
    dcp.load(state, checkpoint_id=whole_checkpoint(folder), no_dist=not dist.is_initialized())
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return {name: state[name] for name in others}
