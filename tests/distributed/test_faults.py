"""Ranks that die or never arrive.

The others end with an error that names operation and stage, within the group's timeout.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.ranks import RANKS_PER_GPU, under_torchrun

TIMEOUT_S = 8
GLOO_TIMEOUT_S = 3
ROOT = Path(__file__).parents[2]
WAYS = ["dies in forward", "dies in backward", "hangs in forward", "hangs in backward"]
COLLECTIVES = {
    "dsink": "cp_attention_with_sink: all-reduce of dsink over the cp group",
    "unshard": "CPPlan.unshard .*: all-gather over the cp group",
    "comparison": "cp_attention_with_sink: comparing arguments over the cp group",
}
FIRST_COMPARISON = "make_cp_plan: comparing arguments over the cp group"


@contextmanager
def faulty_ranks(
    way: str, transport: str, num_ranks: int, tmp_path: Path, timeout_s: float = TIMEOUT_S
) -> Iterator[list[subprocess.Popen[str]]]:
    """The last rank is the faulty one."""
    store = tempfile.mktemp(dir=tmp_path)
    command = [
        sys.executable,
        "-m",
        "tests.support.faulty_rank",
        way,
        transport,
        str(num_ranks),
        store,
        str(timeout_s),
    ]
    processes = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True, cwd=ROOT)
        for rank in range(num_ranks)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_faulty(
    way: str, transport: str, num_ranks: int, tmp_path: Path
) -> dict[int, tuple[int, str, float]]:
    """Exit code, stderr and end (monotonic clock) of every rank but the faulty one."""
    results = {}
    timeout_s = GLOO_TIMEOUT_S if transport == "gloo" else TIMEOUT_S
    with faulty_ranks(way, transport, num_ranks, tmp_path, timeout_s) as processes:
        for rank, process in enumerate(processes[:-1]):
            _, stderr = process.communicate(timeout=120)
            results[rank] = process.returncode, stderr, time.monotonic()
    return results


def waited_s(stderr: str, until: float) -> float:
    """From where the rank said that it was ready."""
    assert "ready at " in stderr, f"failed before the fault: {stderr[-2000:]}"
    return until - float(stderr.split("ready at ")[1].split()[0])


def stages(operation: str) -> str:
    """What an error says of a stage's message."""
    return rf"{operation} of stage \d.*cp rank"


def check(results: dict[int, tuple[int, str, float]], what: str) -> None:
    for rank, (code, stderr, ended) in results.items():
        print(f"--- rank {rank}\n{stderr}")  # pytest shows it where a check fails
        waited = waited_s(stderr, ended)
        assert code != 0, f"rank {rank} ended well"
        assert "finished" not in stderr
        assert waited < TIMEOUT_S + 10, f"rank {rank} waited {waited:.0f} s"
        assert re.search(what, stderr), stderr[-3000:]


@pytest.mark.skipif(under_torchrun(), reason="starts its own ranks")
@pytest.mark.parametrize(
    ("way", "num_ranks"), [*((way, 2) for way in WAYS), ("dies in forward", 3)]
)
def test_gloo(way, num_ranks, tmp_path):
    check(
        run_faulty(way, "gloo", num_ranks, tmp_path),
        # Over gloo a rank may be past the forward before it misses another one.
        stages("group_(cast|reduce)") + "|backward of cp_attention_with_sink: comparing arguments",
    )


@pytest.mark.skipif(under_torchrun(), reason="starts its own ranks")
@pytest.mark.parametrize("place", COLLECTIVES)
@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_collectives_of_gloo(fault, place, tmp_path):
    check(run_faulty(f"{fault} in {place}", "gloo", 2, tmp_path), COLLECTIVES[place])


@pytest.mark.skipif(under_torchrun(), reason="starts its own ranks")
def test_a_rank_that_never_arrives_on_gloo(tmp_path):
    check(run_faulty("hangs early in comparison", "gloo", 2, tmp_path), FIRST_COMPARISON)


@pytest.mark.gpu(ranks=2)
@pytest.mark.skipif(under_torchrun(), reason="starts its own ranks")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("transport", ["nccl", "symm_mem"])
def test_gpus(way, transport, tmp_path):
    # A host that runs ahead of its GPU in forward may hear of the death when it starts the next
    # message, in backward.
    check(run_faulty(way, transport, 2, tmp_path), stages("group_(cast|reduce)"))


@pytest.mark.gpu(ranks=2)
@pytest.mark.skipif(under_torchrun(), reason="starts its own ranks")
@pytest.mark.parametrize("place", COLLECTIVES)
@pytest.mark.parametrize("fault", ["dies", "hangs"])
@pytest.mark.parametrize("transport", ["nccl", "symm_mem"])
def test_collectives_of_gpus(fault, place, transport, tmp_path):
    """The stages' messages are of ``transport``, these are NCCL's under both."""
    check(run_faulty(f"{fault} in {place}", transport, 2, tmp_path), COLLECTIVES[place])


@pytest.mark.gpu(ranks=2)
@pytest.mark.skipif(under_torchrun(), reason="starts its own ranks")
@pytest.mark.parametrize(
    ("place", "transport", "what"),
    [
        ("comparison", "nccl", FIRST_COMPARISON),
        ("forward", "nccl", stages("group_cast")),
        ("rendezvous", "symm_mem", "symmetric memory: setting it up over the cp group"),
        ("barrier", "symm_mem", "symmetric memory: barrier over the cp group"),
    ],
)
def test_a_rank_that_never_arrives_on_gpus(place, transport, what, tmp_path):
    """At what these two do together for the first time, for which NCCL holds the host."""
    check(run_faulty(f"hangs early in {place}", transport, 2, tmp_path), what)


@pytest.mark.gpu(ranks=2)
@pytest.mark.skipif(under_torchrun(), reason="starts its own ranks")
def test_a_host_that_cuda_holds_is_named(tmp_path):
    """Between the start and the wait, as by a synchronization."""
    check(run_faulty("hangs, held in dsink", "nccl", 2, tmp_path), COLLECTIVES["dsink"])


@pytest.mark.gpu(ranks=2)
@pytest.mark.skipif(under_torchrun(), reason="starts its own ranks")
@pytest.mark.skipif(
    RANKS_PER_GPU == 1,
    reason="within a host NCCL does not notice that a rank died; ranks that share a GPU use "
    "sockets",
)
@pytest.mark.parametrize("place", ["forward", "backward", *COLLECTIVES])
def test_a_death_that_nccl_notices_is_named_at_once(place, tmp_path):
    """Long before nine tenths of the timeout.

    Torch ends the process a minute later, after its flight recorder.
    """
    with faulty_ranks(f"dies later in {place}", "nccl", 2, tmp_path, timeout_s=200) as processes:
        seen = []
        for line in processes[0].stderr:
            seen.append(line)
            if line.startswith("magi_sink_cp"):
                break
        named, stderr = time.monotonic(), "".join(seen)
    what = COLLECTIVES.get(place, stages("group_(cast|reduce)"))
    assert re.search(rf"magi_sink_cp: .*{what}.* reports COMM_ERROR", stderr), stderr
    assert waited_s(stderr, named) < 15
