"""What is shipped and what is promised: the wheel, the direction of imports, the README's examples, the training job."""

from __future__ import annotations

import ast
import csv
import importlib
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
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
    assert "magi_sink_cp/dist/schedule.py" in modules
    assert modules <= names
    assert "magi_sink_cp/py.typed" in names
    assert not any(name.startswith(("tests", "scripts")) for name in names)


def test_dist_is_tracked_and_linted():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing is tracked here (reason: an unpacked archive)")
    everything = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    if not everything:
        pytest.skip("git tracks nothing here (reason: an unpacked archive)")
    tracked = subprocess.run(
        ["git", "ls-files", "magi_sink_cp/dist", "tests/dist"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "magi_sink_cp/dist/plan.py" in tracked
    assert "tests/dist/test_plan.py" in tracked
    assert '"dist"' not in (ROOT / "pyproject.toml").read_text().split("[tool.ruff]")[1].split("[")[1]


def test_imports_point_one_way():
    """magi_sink_cp → dist → kernels; the schedule and the layout know nothing of tensors."""
    for path in PACKAGE.rglob("*.py"):
        imported = imports_of(path)
        if path.parent.name == "kernels":
            assert not any(name.startswith("magi_sink_cp.") and not name.startswith("magi_sink_cp.kernels") for name in imported), (
                path
            )
        if path.parent.name == "dist":
            assert not imported & {"magi_sink_cp", "magi_sink_cp.attention", "magi_sink_cp.module"}, path
        if path.name in ("schedule.py", "layout.py"):
            assert not any(name.split(".")[0] == "torch" for name in imported), path


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def readme_examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readme_has_examples_for_one_device_for_drop_in_functions_and_for_torchrun():
    examples = readme_examples()
    assert len(examples) == 3
    assert all(len(example.splitlines()) <= 22 for example in examples)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_readme_examples_run(tmp_path, number):
    script = tmp_path / "example.py"
    script.write_text(readme_examples()[number])
    launcher = [] if number < 2 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if torch.cuda.device_count() == 1 and number == 2:
        launcher[-1] = "1"
    result = subprocess.run([sys.executable, *launcher, str(script)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    if number == 1:  # the same script, unchanged, without torchrun
        subprocess.run([sys.executable, str(script)], cwd=ROOT, check=True, capture_output=True)


def train(folder: Path, *arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "scripts/train.py", "--out", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs `make train` itself is the test")
def test_the_default_training_run_learns_and_equals_one_rank_within_three_minutes(tmp_path):
    """What `make train` runs on a CPU: 2 ranks, real text, losses equal to one rank's, and a loss that falls to 70% or less."""
    started = time.monotonic()
    result = train(tmp_path, "--verify")
    assert time.monotonic() - started < 180
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"verify: losses of 2 ranks and of one differ by at most .* relative; allowed is 1e-05: ok", result.stdout)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["loss"]) <= 0.7 * float(rows[0]["loss"])
    for row in rows:
        assert abs(float(row["loss"]) / float(row["single_rank_loss_1"]) - 1) <= 1e-5
    assert (tmp_path / "loss.png").stat().st_size > 10_000


@pytest.mark.parametrize("wrong", [["--lr", "1e30"], ["--head-dim", "5"], ["--seq-len", "1"], ["--heads", "3"], ["--steps", "0"]])
def test_what_the_training_job_refuses(tmp_path, wrong):
    """Options that cannot work, and a loss that is not finite, which must never count as equal."""
    small = ["--verify", "--steps", "4", "--seq-len", "64", "--layers", "1", "--dim", "16", *wrong]
    result = train(tmp_path, *small, ranks=1)
    assert result.returncode != 0
    assert (
        ("a loss is not finite" in result.stdout)
        if wrong[0] == "--lr"
        else (f"{wrong[0]} must" in result.stderr or "must divide" in result.stderr)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs `make train` itself is the test")
def test_verify_fails_when_the_runs_differ(tmp_path):
    """A dropped sink in the context-parallel run only: --verify must notice and say so with its exit code."""
    sabotage = tmp_path / "train.py"
    source = (ROOT / "scripts" / "train.py").read_text()
    broken = source.replace(
        "return self.out(self.attention(rotate(q, rotation), rotate(k, rotation), v, plan=plan).flatten(-2))",
        "out, lse = self.attention(rotate(q, rotation), rotate(k, rotation), v, plan=plan, return_lse=True)\n"
        "        scale = 1 / (1 - torch.exp(self.attention.sink.logsumexp(0) - lse.T)) if plan.cp_size > 1 else lse.T * 0 + 1\n"
        "        return self.out((out * scale[..., None]).flatten(-2))",
    )
    assert broken != source
    sabotage.write_text(broken)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(sabotage)]
    options = ["--verify", "--steps", "3", "--seq-len", "300", "--layers", "1", "--out", str(tmp_path / "out")]
    result = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "FAILED" in result.stdout


def test_training_on_the_users_own_text(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("To be, or not to be, that is the question. " * 20)
    (tmp_path / "text" / "empty.txt").touch()
    arguments = ["--data", str(tmp_path / "text"), "--steps", "2", "--seq-len", "100", "--layers", "1"]
    result = train(tmp_path / "out", *arguments, ranks=1)
    assert result.returncode == 0, result.stderr
    assert "in 2 steps" in result.stdout
    missing = train(tmp_path / "out", "--data", str(tmp_path / "nowhere"), ranks=1)
    assert missing.returncode == 2
    assert "nowhere does not exist" in missing.stderr


def test_a_standstill_is_where_no_stream_computes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    standstill = importlib.import_module("bench_dist").standstill
    assert standstill([(5.0, 6.0), (1.0, 4.0), (2.0, 3.0), (3.5, 4.5)]) == (1.5, 6.0)


def test_what_the_sanitizer_watches_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    importlib.import_module("sanitize").kernels(37, 3, 80, "cpu")  # the torch twins: a script that only GPUs run would go stale


@pytest.mark.parametrize("script", ["bench.py", "sanitize.py"])
def test_scripts_that_need_a_gpu_refuse_without_one(tmp_path, script):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU (reason: the refusal is for machines without one)")
    arguments = ["kernel", "--out", str(tmp_path)] if script == "bench.py" else []
    result = subprocess.run([sys.executable, f"scripts/{script}", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "needs a CUDA GPU" in result.stderr
    assert not list(tmp_path.iterdir())
