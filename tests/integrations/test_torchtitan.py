"""torchtitan's trainer with our attention gives the curve of its own, context-parallel or not."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("torchtitan") is None:
    pytest.skip(
        "torchtitan is not installed: make integrations (it takes 300 MB, for its datasets)",
        allow_module_level=True,
    )

ROOT = Path(__file__).parents[2]


def start(attention: str, cp: int, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The job on as many ranks."""
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(cp), "--module", "tests.integrations.torchtitan_job",
            attention, str(cp), str(folder), *options,
        ],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip


def run(attention: str, cp: int, folder: Path, *options: str) -> list[list[float]]:
    done = start(attention, cp, folder, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return json.loads(line.removeprefix("RESULT"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """(loss, gradient norm) of torchtitan's flex attention in one process, by what is asked for."""
    return functools.cache(lambda: run("flex", 1, tmp_path_factory.mktemp("flex")))


@pytest.mark.parametrize(
    ("cp", "options"),
    [(1, []), (2, []), (2, ["contiguous", "checkpointing"]), (2, ["full_dtensor"])],
)
def test_curves(tmp_path, cp, options, expected):
    """Packed documents that differ between the samples, windows, accumulation."""
    ours, theirs = run("sink", cp, tmp_path, *options), expected()
    assert len(ours) == len(theirs) == 3
    factor = cp if "full_dtensor" in options else 1  # torchtitan logs the loss times cp there
    for (loss, norm), (true_loss, true_norm) in zip(ours, theirs, strict=True):
        assert loss / factor == pytest.approx(true_loss, rel=1e-5)
        assert norm == pytest.approx(true_norm, rel=3e-5)
    assert theirs[0][0] != pytest.approx(theirs[2][0], rel=1e-3), "nothing was learned"


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("ptrr", "context_parallel_load_balancer must be 'headtail' or None .* got 'ptrr'"),
        ("graphs", "training.disable_cuda_graphs must be True"),
    ],
)
def test_what_is_refused(tmp_path, option, text):
    done = start("sink", 1, tmp_path, option)
    assert done.returncode != 0
    assert re.search(text, done.stderr), done.stderr[-3000:]
