"""transformers' Trainer with ParallelismConfig(cp_size=…) gives the curves of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

if not hasattr(transformers.Trainer, "_prepare_context_parallel_inputs"):
    pytest.skip(
        f"Trainer of transformers {transformers.__version__} has no context parallelism",
        allow_module_level=True,
    )

ROOT = Path(__file__).parents[2]


def run_job(cp_size: int, world: int, folder: Path) -> list[dict[str, float]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    done = subprocess.run(
        [
            sys.executable, *(launcher if world > 1 else []), "-m" if world == 1 else "--module",
            "tests.integrations.trainer_job", str(cp_size), str(folder),
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return json.loads(line.removeprefix("RESULT"))


def test_curves(tmp_path):
    """cp 2, and dp 2 × cp 2, with FSDP2, checkpointing and accumulation."""
    expected = run_job(1, 1, tmp_path)
    assert len(expected) == 4, "three steps and an evaluation"
    for world in (2, 4):
        for ours, theirs in zip(run_job(2, world, tmp_path), expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
