"""Ranks that die or never arrive: the others end with an error that names operation and stage, within the group's timeout."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.dist.ranks import under_torchrun

TIMEOUT_S = 8
ROOT = Path(__file__).parents[2]
WAYS = ["dies in forward", "dies in backward", "hangs in forward", "hangs in backward"]


def run_faulty(way: str, transport: str, num_ranks: int, tmp_path: Path) -> dict[int, tuple[int, str, float]]:
    """Exit code, stderr and end on the system's monotonic clock of every rank but the faulty one, which is the last."""
    store = tempfile.mktemp(dir=tmp_path)
    command = [sys.executable, "-m", "tests.dist.faulty_rank", way, transport, str(num_ranks), store, str(TIMEOUT_S)]
    processes = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True, cwd=ROOT) for rank in range(num_ranks)]
    results = {}
    try:
        for rank, process in enumerate(processes[:-1]):
            _, stderr = process.communicate(timeout=120)
            results[rank] = process.returncode, stderr, time.monotonic()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return results


def check(results: dict[int, tuple[int, str, float]], way: str) -> None:
    for rank, (code, stderr, ended) in results.items():
        assert "ready at " in stderr, f"rank {rank} failed before the fault: {stderr[-2000:]}"
        waited = ended - float(stderr.split("ready at ")[1].split()[0])
        assert code != 0, f"rank {rank} ended well"
        assert "finished" not in stderr
        assert waited < TIMEOUT_S + 10, f"rank {rank} waited {waited:.0f} s"
        operation = "group_cast of stage" if "forward" in way else r"group_(cast|reduce) of stage"
        assert re.search(rf"{operation} \d", stderr), stderr[-3000:]
        assert "cp rank" in stderr, stderr[-3000:]


@pytest.mark.skipif(under_torchrun(), reason="starts its own ranks")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_gloo(way, num_ranks, tmp_path):
    check(run_faulty(way, "gloo", num_ranks, tmp_path), way)


@pytest.mark.gpu(ranks=2)
@pytest.mark.skipif(under_torchrun(), reason="starts its own ranks")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("transport", ["nccl", "symm_mem"])
def test_gpus(way, transport, tmp_path):
    check(run_faulty(way, transport, 2, tmp_path), way)
