"""One rank of tests/distributed/test_faults.py; the last rank is the faulty one.

Arguments: ``way transport num_ranks store timeout_s rank``.

``way`` is "dies in PLACE", "dies later in PLACE", "hangs in PLACE", "hangs early in PLACE", where
it comes there first, or "hangs, held in dsink", where CUDA holds the others before they wait for
it.
"""

from __future__ import annotations

import datetime
import os
import sys
import time

import torch
import torch.distributed as dist

from magi_sink_cp import cp_attention_with_sink, make_cp_plan
from magi_sink_cp.dist import shard
from magi_sink_cp.dist.guard import agreement, late
from magi_sink_cp.dist.methods import ring
from magi_sink_cp.dist.methods.gradients import SinkGradient
from magi_sink_cp.dist.transport import symmetric
from tests.support.ranks import take_gpu

# Processes that start at once take their time, and so does NCCL.
SETTING_UP = datetime.timedelta(seconds=100)
PLACES: dict[str, tuple[object, str]] = {
    "forward": (ring, "run_forward"),
    "backward": (ring, "run_backward"),
    "dsink": (SinkGradient, "reduce"),
    "unshard": (shard, "all_gather"),
    "comparison": (agreement, "collect"),
    "rendezvous": (symmetric, "rendezvous"),
    "barrier": (symmetric._Cuda, "idle"),
}


def main() -> None:
    way, transport, num_ranks, store, timeout_s, number = sys.argv[1:]
    rank, ranks = int(number), int(num_ranks)
    timeout = datetime.timedelta(seconds=float(timeout_s))
    on_gpu = transport != "gloo"
    device = take_gpu(rank) if on_gpu else torch.device("cpu")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        timeout=max(timeout, SETTING_UP),
    )
    place = way.split()[-1]
    group = dist.group.WORLD
    if not on_gpu:  # gloo's messages have the timeout with which their group was made
        dist.barrier()
        group = dist.new_group(timeout=timeout)

    def fault(*arguments: object) -> None:
        """With messages under way or about to be."""
        if "hangs" in way:
            time.sleep(600)
        if "later" in way:
            # The other ranks have enqueued everything by then, and wait for their GPUs.
            time.sleep(2)
        os._exit(7)

    def begin() -> None:
        """From here the last rank is faulty, and the others have ``timeout_s``."""
        if on_gpu:
            dist.distributed_c10d._set_pg_timeout(timeout)
        print(f"ready at {time.monotonic()}", file=sys.stderr, flush=True)
        if rank == ranks - 1:
            setattr(*PLACES[place], fault)
            if place == "comparison":  # the group's first ones on GPUs
                late.all_gather = fault
        elif "held" in way:
            result = SinkGradient.result
            SinkGradient.result = lambda this: (torch.cuda.synchronize(), result(this))[1]

    if "early" in way:
        if place != "comparison":  # in which NCCL connects the ranks
            dist.barrier()
        begin()
    cp_plan = make_cp_plan(256, group=group, transport=transport)
    q, k, v = (
        torch.randn(
            cp_plan.local_tokens,
            heads,
            64,
            device=device,
            dtype=torch.bfloat16 if on_gpu else torch.float32,
            requires_grad=True,
        )
        for heads in (4, 2, 2)
    )
    sink = torch.zeros(1, 4, device=device, requires_grad=True)
    in_a_stage = place in ("forward", "backward")
    arguments = {
        # 0: a token sees itself alone, so that no stage waits for the faulty rank.
        "window_size": (-1 if in_a_stage else 0, 0),
        "dsink_reduce": "sum" if place == "dsink" else "none",
        "checks": "always" if place == "comparison" else "auto",
        "overlap_degree": 1,
    }

    def step() -> None:
        out = cp_attention_with_sink(q, k, v, sink, plan=cp_plan, **arguments)
        if place == "unshard":
            cp_plan.unshard(out)
        out.sum().backward()

    if "early" not in way:
        step()
        if on_gpu:
            torch.cuda.synchronize()
        dist.barrier()
        begin()
    for _ in range(3):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    print("finished", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
