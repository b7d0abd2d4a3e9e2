"""One rank of tests/dist/test_faults.py: ``way transport num_ranks store timeout_s rank``. The last rank is the faulty one.

``way`` is "dies in PLACE", "dies later in PLACE" or "hangs in PLACE".
"""

from __future__ import annotations

import datetime
import os
import sys
import time

import torch
import torch.distributed as dist

from magi_sink_cp import cp_attention_with_sink, make_cp_plan
from magi_sink_cp.dist import attention, plan
from tests.dist.ranks import take_gpu

PLACES: dict[str, tuple[object, str]] = {
    "forward": (attention, "_forward_kernel"),
    "backward": (attention, "_backward_kernel"),
    "dsink": (attention._SinkGradient, "reduce"),
    "unshard": (plan._Along, "unshard"),
}


def main() -> None:
    way, transport, num_ranks, store, timeout_s, number = sys.argv[1:]
    rank, ranks = int(number), int(num_ranks)
    on_gpu = transport != "gloo"
    device = take_gpu(rank) if on_gpu else torch.device("cpu")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=float(timeout_s)),
    )
    cp_plan = make_cp_plan(256, group=dist.group.WORLD, transport=transport)
    q, k, v = (
        torch.randn(
            cp_plan.local_tokens, heads, 64, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32, requires_grad=True
        )
        for heads in (4, 2, 2)
    )
    sink = torch.zeros(1, 4, device=device, requires_grad=True)
    place = way.split()[-1]
    only_own = place in ("dsink", "unshard")  # no message of a stage then waits for the faulty rank: a token sees itself alone

    def step() -> None:
        window_size, dsink_reduce = (0 if only_own else -1, 0), "sum" if place == "dsink" else "none"
        out = cp_attention_with_sink(
            q, k, v, sink, plan=cp_plan, window_size=window_size, dsink_reduce=dsink_reduce, overlap_degree=1
        )
        if place == "unshard":
            cp_plan.unshard(out)
        out.sum().backward()

    step()
    if on_gpu:
        torch.cuda.synchronize()
    dist.barrier()
    print(f"ready at {time.monotonic()}", file=sys.stderr, flush=True)

    def fault(*arguments: object) -> None:
        """With messages under way or about to be."""
        if "hangs" in way:
            time.sleep(600)
        if "later" in way:
            time.sleep(2)  # the other ranks have enqueued everything by now, and wait for their GPUs
        os._exit(7)

    if rank == ranks - 1:
        setattr(*PLACES[place], fault)
    for _ in range(3):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    print("finished", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
