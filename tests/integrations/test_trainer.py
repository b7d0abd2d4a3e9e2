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


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What one process logs."""
    logs = run_job(1, 1, tmp_path_factory.mktemp("one"))
    assert len(logs) == 4, "three steps and an evaluation"
    assert logs[-1]["eval_rows"] == 23
    return logs


def test_curves(tmp_path, expected):
    """cp 2 with FSDP2, checkpointing, accumulation, and an evaluation whose last batch is not full;
    and, in `make integrations`, again from its checkpoint.
    """
    for options in ([], ["resume"]) if "INTEGRATIONS" in os.environ else ([],):
        for ours, theirs in zip(run_job(2, 2, tmp_path, *options), expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.skipif(
    "INTEGRATIONS" not in os.environ, reason="four ranks take a minute: make integrations"
)
def test_curves_beside_data_parallel_ranks(tmp_path, expected):
    """dp 2 × cp 2. Trainer takes the mean of the means of each data-parallel rank's batches."""
    for ours, theirs in zip(run_job(2, 4, tmp_path), expected, strict=True):
        for name, value in theirs.items():
            tolerance = 1e-2 if name == "eval_loss" else 1e-5
            assert ours[name] == pytest.approx(value, rel=tolerance), name
