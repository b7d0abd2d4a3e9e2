"""What is shipped and what is promised.

The wheel, the direction of imports, scripts beside the package.
"""

from __future__ import annotations

import csv
import importlib
import os
import shutil
import subprocess
import sys
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


def test_a_standstill_is_where_no_stream_computes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    standstill = importlib.import_module("bench_dist").standstill
    assert standstill([(5.0, 6.0), (1.0, 4.0), (2.0, 3.0), (3.5, 4.5)]) == (1.5, 6.0)


def test_what_the_sanitizer_watches_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    # The torch twins: a script that only GPUs run would go stale.
    importlib.import_module("sanitize").kernels(37, 3, 80, "cpu")


def test_simulate_runs_the_planner_of_every_rank(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    simulate = importlib.import_module("simulate")
    lengths = tmp_path / "lengths"
    lengths.write_text("700\n0\n300\n24\n")
    options = ["--cp", "2", "5", "--tokens", "1024", "--window", "64", "--out", str(tmp_path)]
    for documents in (str(lengths), "one", "published"):
        assert run_main(simulate, monkeypatch, *options, "--documents", documents) == 0
        with (tmp_path / "simulate.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["ranks"] for row in rows] == ["2"] * 4 + ["5"] * 4
        assert all(float(row["balance"]) >= 1 for row in rows)
        assert all(float(row["buffers_over_own"]) <= 8 for row in rows)
    lengths.write_text("3\n")
    assert run_main(simulate, monkeypatch, *options, "--documents", str(lengths)) == 2
    assert "must hold lengths >= 0 that sum up to 1024" in capsys.readouterr().err


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
