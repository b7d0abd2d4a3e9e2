"""transformers' Trainer with ParallelismConfig(cp_size=…) gives the curves of one process."""

from __future__ import annotations

import json
import os
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


def run_job(
    cp_size: int, world: int, folder: Path, *options: str, module: str = "trainer_job"
) -> list[dict[str, float]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    done = subprocess.run(
        [
            sys.executable, *(launcher if world > 1 else []), "-m" if world == 1 else "--module",
            f"tests.integrations.{module}", str(cp_size), str(folder), *options,
        ],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"CI": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return json.loads(line.removeprefix("RESULT"))


def test_curves(tmp_path):
    """cp 2, and dp 2 × cp 2, with FSDP2, checkpointing, accumulation, and an evaluation whose last
    batch is not full; and cp 2 again from its checkpoint.
    """
    expected = run_job(1, 1, tmp_path / "one")
    assert len(expected) == 4, "three steps and an evaluation"
    assert expected[-1]["eval_rows"] == 23
    for world in (2, 4):
        for ours, theirs in zip(run_job(2, world, tmp_path / str(world)), expected, strict=True):
            for name, value in theirs.items():
                # Trainer takes the mean of the means of each data-parallel rank's batches.
                tolerance = 1e-2 if (world, name) == (4, "eval_loss") else 1e-5
                assert ours[name] == pytest.approx(value, rel=tolerance), name
    resumed = run_job(2, 2, tmp_path / "2", "resume")
    for ours, theirs in zip(resumed, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
