"""scripts/train.py: what it refuses, that it learns, --verify, Ctrl-C and --resume."""

from __future__ import annotations

import csv
import importlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support.scripts import run_main

ROOT = Path(__file__).parents[2]


def train(
    folder: Path, *arguments: str, ranks: int = 2, script: str = "scripts/train.py"
) -> subprocess.CompletedProcess[str]:
    command = [*launcher(ranks), script, "--out", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def launcher(ranks: int) -> list[str]:
    nodes = ["--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *(["-m", "torch.distributed.run", *nodes] if ranks > 1 else [])]


def metrics(folder: Path, name: str = "metrics.csv") -> list[dict[str, str]]:
    with (folder / name).open() as file:
        return list(csv.DictReader(file))


SMALL = ["--seq-len", "64", "--layers", "1", "--dim", "16"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs `make train` itself is the test")
def test_a_training_run_learns_and_equals_one_rank(tmp_path):
    """`make train` on a CPU, at an eighth of its size.

    2 ranks, real text, losses equal to one rank's, and a loss that falls to 75% or less.
    """
    folder = tmp_path / "run"
    result = train(folder, "--verify", "--seq-len", "256", "--layers", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(
        r"verify: losses of 2 ranks and of one differ by at most .* relative; allowed is 1e-05: ok",
        result.stdout,
    )
    losses = [float(row["loss"]) for row in metrics(folder)]
    assert losses[-1] <= 0.75 * losses[0]
    verified = metrics(folder, "verify.csv")
    assert len(verified) == len(losses) == 40
    for row in verified:
        assert abs(float(row["loss"]) / float(row["single_rank_loss_1"]) - 1) <= 1e-5
    assert (folder / "loss.png").stat().st_size > 10_000


WRONG = {
    "--head-dim 5": "--head-dim must be even",
    "--seq-len 1": "--seq-len must be at least 2",
    "--heads 3": "--kv-heads must divide --heads",
    "--steps 0": "--steps must be at least 1",
    "--lr nan": "--lr must be a finite number > 0, got nan",
    "--backend nope": "--backend must be one of .*, got 'nope'",
    "--data nowhere": "--data: nowhere does not exist",
    "--data EMPTY": "holds no file of at least two bytes",
    "--data BYTE": "holds no file of at least two bytes",
    "--resume nowhere": "--resume nowhere holds no settings.json",
    "--out FILE/x": "--out .* cannot be written",
    "--out OLD": "holds another run: choose a new folder, or --resume OLD",
    "--out STOPPED": "holds another run: choose a new folder; it saved no checkpoint",
    "--resume OLD --lr 0.5": "--lr 0.5 cannot be given with --resume, which goes on with 0.003",
    "--resume OLD --out NEW": "--out NEW cannot be given with --resume, which goes on with OLD",
    "--resume DAMAGED": "settings.json cannot be read",
    "--checkpoint-every -1": "--checkpoint-every must be at least 0",
    "--seed 99999999999999999999": "--seed must be from 0 to",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_the_training_job_refuses_before_it_trains(tmp_path, wrong, monkeypatch, capsys):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BYTE").write_text("a")
    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    job = importlib.import_module("train")
    for name in ("OLD", "STOPPED", "DAMAGED"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").touch()
        if name != "STOPPED":
            (tmp_path / name / "checkpoint").mkdir()
    settings = vars(job.make_parser().parse_args([]))
    settings = {name: value for name, value in settings.items() if name not in job.NOT_SETTINGS}
    (tmp_path / "OLD" / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "DAMAGED" / "settings.json").write_text("{")
    monkeypatch.setattr(job, "train", None)  # nothing may be computed
    assert run_main(job, monkeypatch, *wrong.split()) == 2
    message = capsys.readouterr().err
    assert re.search(WRONG[wrong], message), message
    assert "Traceback" not in message


def train_here(monkeypatch, folder: Path, *arguments: str) -> int:
    """One rank, in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    threads = torch.get_num_threads()
    try:
        job = importlib.import_module("train")
        return run_main(job, monkeypatch, "--out", str(folder), *arguments)
    finally:
        torch.set_num_threads(threads)


def test_a_loss_that_is_not_finite_never_counts_as_equal(tmp_path, monkeypatch, capsys):
    options = ["--verify", "--steps", "4", *SMALL, "--lr", "1e30"]
    assert train_here(monkeypatch, tmp_path / "run", *options) == 1
    assert "verify: FAILED: a loss is not finite" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs `make train` itself is the test")
def test_verify_fails_when_the_runs_differ(tmp_path):
    """A sink that only the context-parallel run drops: --verify says so with its exit code."""
    sabotage = tmp_path / "sabotage.py"
    sabotage.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "import train\n"
        "from magi_sink_cp import SinkAttention, cp_attention_with_sink\n"
        "whole = SinkAttention.forward\n"
        "def forward(self, q, k, v, *, plan):\n"
        "    if plan.cp_size > 1:\n"
        "        return cp_attention_with_sink(q, k, v, None, plan=plan) + 0 * self.sink.sum()\n"
        "    return whole(self, q, k, v, plan=plan)\n"
        "SinkAttention.forward = forward\n"
        "sys.exit(train.main())\n"
    )
    folder = tmp_path / "run"
    result = train(folder, "--verify", "--steps", "3", *SMALL, script=str(sabotage))
    assert result.returncode != 0
    assert re.search(r"verify: .* FAILED", result.stdout), result.stdout + result.stderr


def test_ctrl_c_saves_and_a_resumed_run_is_the_same(tmp_path, monkeypatch):
    """An interrupted and resumed run gives the losses of one that was never interrupted."""
    ranks = 1 if torch.cuda.device_count() == 1 else 2
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert train_here(monkeypatch, whole, "--steps", "30", *SMALL) == 0
    command = [*launcher(ranks), "scripts/train.py", "--out", str(parted)]
    options = ["--steps", "100000", *SMALL]
    process = subprocess.Popen(
        [*command, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    while not (parted / "metrics.csv").exists() or len(metrics(parted)) < 5:
        assert process.poll() is None, "it ended before it was interrupted"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode != 0
    done = len(metrics(parted))
    result = train(parted, "--resume", str(parted), "--steps", str(done + 5), ranks=ranks)
    assert result.returncode == 0, result.stderr
    losses = [float(row["loss"]) for row in metrics(parted)]
    assert len(losses) == done + 5
    expected = [float(row["loss"]) for row in metrics(whole)]
    for ours, true in zip(losses, expected, strict=False):
        assert abs(ours / true - 1) < 1e-4


def test_training_on_the_users_own_text(tmp_path, monkeypatch, capsys):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("To be, or not to be, that is the question. " * 20)
    (tmp_path / "text" / "empty.txt").touch()
    arguments = ["--data", str(tmp_path / "text"), "--steps", "2", *SMALL]
    assert train_here(monkeypatch, tmp_path / "out", *arguments) == 0
    assert "in 2 steps" in capsys.readouterr().out
