"""What is shipped and what is promised.

The wheel, the direction of imports, the README's examples, the training job.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from tests.support.scripts import run_main

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "magi_sink_cp"


def test_the_wheel_holds_every_module(tmp_path):
    """A folder called dist is skipped by many tools' defaults; it must be shipped."""
    source = tmp_path / "source"  # a copy: an old build folder could hide what is missing
    shutil.copytree(PACKAGE, source / "magi_sink_cp", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("magi_sink_cp-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    assert "magi_sink_cp/dist/planning/schedule.py" in modules
    assert modules <= names
    assert "magi_sink_cp/py.typed" in names
    assert not any(name.startswith(("tests", "scripts")) for name in names)


def test_dist_is_tracked_and_linted():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing is tracked here (reason: an unpacked archive)")
    everything = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    if not everything:
        pytest.skip("git tracks nothing here (reason: an unpacked archive)")
    tracked = subprocess.run(
        ["git", "ls-files", "magi_sink_cp/dist"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "magi_sink_cp/dist/plan.py" in tracked
    assert (
        '"dist"' not in (ROOT / "pyproject.toml").read_text().split("[tool.ruff]")[1].split("[")[1]
    )


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
    ]
    options = ["--config", "pyproject.toml", "--no-cache"]
    paths = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [*command, *options], cwd=folder, env=paths, capture_output=True, text=True
    )


WRONG_IMPORTS = {
    "kernels know nothing of ranks": ("kernels/merge.py", "import magi_sink_cp.dist.plan"),
    "nor of the operators": ("kernels/merge.py", "import magi_sink_cp.ops.attention"),
    "ranks know nothing of operators": ("dist/plan.py", "import magi_sink_cp.ops.attention"),
    "nor of the public functions": ("dist/methods/ring.py", "import magi_sink_cp.attention"),
    "planning imports nothing": ("dist/planning/cost.py", "import torch.distributed"),
    "a transport knows no method": (
        "dist/transport/p2p.py",
        "import magi_sink_cp.dist.methods.ring",
    ),
    "a new room needs a floor": ("dist/attic.py", "import torch"),
}


def test_imports_point_one_way():
    """magi_sink_cp → ops → dist → kernels, and planning → nothing: pyproject.toml."""
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout


@pytest.mark.parametrize("what", WRONG_IMPORTS)
def test_a_wrong_import_is_noticed(tmp_path, what):
    shutil.copytree(
        PACKAGE, tmp_path / "magi_sink_cp", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path, statement = WRONG_IMPORTS[what]
    with (tmp_path / "magi_sink_cp" / path).open("a") as file:
        file.write(f"{statement}\n")
    assert lint_imports(tmp_path).returncode == 1


def test_planning_needs_no_torch():
    """Every module of dist/planning is imported where torch cannot be."""
    modules = sorted(path.stem for path in (PACKAGE / "dist" / "planning").glob("[a-z]*.py"))
    assert "schedule" in modules
    source = (
        "import importlib, sys, types\n"
        "sys.modules['torch'] = None\n"
        "package = types.ModuleType('magi_sink_cp')\n"
        f"package.__path__ = [{str(PACKAGE)!r}]\n"
        "sys.modules['magi_sink_cp'] = package\n"
        f"for name in {modules}: importlib.import_module(f'magi_sink_cp.dist.planning.{{name}}')\n"
    )
    subprocess.run([sys.executable, "-c", source], check=True)


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
    """`make train` on a CPU, at half its size.

    2 ranks, real text, losses equal to one rank's, and a loss that falls to 75% or less.
    """
    folder = tmp_path / "run"
    result = train(folder, "--verify", "--seq-len", "1024", "--layers", "2")
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


def test_a_loss_that_is_not_finite_never_counts_as_equal(tmp_path):
    result = train(tmp_path / "run", "--verify", "--steps", "4", *SMALL, "--lr", "1e30", ranks=1)
    assert result.returncode == 1
    assert "verify: FAILED: a loss is not finite" in result.stdout


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


def test_ctrl_c_saves_and_a_resumed_run_is_the_same(tmp_path):
    """An interrupted and resumed run gives the losses of one that was never interrupted."""
    ranks = 1 if torch.cuda.device_count() == 1 else 2
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert train(whole, "--steps", "30", *SMALL, ranks=1).returncode == 0
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


def test_training_on_the_users_own_text(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("To be, or not to be, that is the question. " * 20)
    (tmp_path / "text" / "empty.txt").touch()
    arguments = ["--data", str(tmp_path / "text"), "--steps", "2", *SMALL]
    result = train(tmp_path / "out", *arguments, ranks=1)
    assert result.returncode == 0, result.stderr
    assert "in 2 steps" in result.stdout


def test_a_standstill_is_where_no_stream_computes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    standstill = importlib.import_module("bench_dist").standstill
    assert standstill([(5.0, 6.0), (1.0, 4.0), (2.0, 3.0), (3.5, 4.5)]) == (1.5, 6.0)


def test_what_the_sanitizer_watches_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    # The torch twins: a script that only GPUs run would go stale.
    importlib.import_module("sanitize").kernels(37, 3, 80, "cpu")


def test_simulate_runs_the_planner_of_every_rank(tmp_path):
    lengths = tmp_path / "lengths"
    lengths.write_text("700\n0\n300\n24\n")
    command = [sys.executable, "scripts/simulate.py", "--cp", "2", "5", "--tokens", "1024"]
    command += ["--window", "64", "--out", str(tmp_path)]
    for documents in (str(lengths), "one", "published"):
        result = subprocess.run(
            [*command, "--documents", documents], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        with (tmp_path / "simulate.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["ranks"] for row in rows] == ["2"] * 4 + ["5"] * 4
        assert all(float(row["balance"]) >= 1 for row in rows)
        assert all(float(row["buffers_over_own"]) <= 8 for row in rows)
    lengths.write_text("3\n")
    result = subprocess.run(
        [*command, "--documents", str(lengths)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "must hold lengths >= 0 that sum up to 1024" in result.stderr


@pytest.mark.parametrize("script", ["bench.py", "sanitize.py"])
def test_scripts_that_need_a_gpu_refuse_without_one(tmp_path, script):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU (reason: the refusal is for machines without one)")
    arguments = ["kernel", "--out", str(tmp_path)] if script == "bench.py" else []
    result = subprocess.run(
        [sys.executable, f"scripts/{script}", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "needs a CUDA GPU" in result.stderr
    assert not list(tmp_path.iterdir())


def test_stress_prints_how_to_reproduce_a_failure(monkeypatch, capsys):
    stress = importlib.import_module("tests.stress")
    ran = []

    def run_case(name: str) -> None:
        ran.append(name)
        if len(ran) == 3:
            raise AssertionError("dq: relative error 0.1 exceeds 1e-05")

    monkeypatch.setattr(stress, "run_case", run_case)
    monkeypatch.setattr(sys, "argv", ["stress", "--minutes", "1", "--seed", "7"])
    assert stress.main() == 1
    assert ran[0] == "one seed 7"
    printed = capsys.readouterr()
    assert f"reproduce: python -m tests.stress --only '{ran[2]}'" in printed.out
    assert "dq: relative error" in printed.err


def test_stress_draws_on_one_device_and_on_ranks():
    command = [sys.executable, "-m", "tests.stress", "--only"]
    for name in ("one seed 3", "ranks 2 seed 4"):
        result = subprocess.run([*command, name], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "1 cases passed" in result.stdout
