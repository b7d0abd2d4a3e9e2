"""One rank of tests/dist/test_faults.py: ``way transport num_ranks store timeout_s rank``. The last rank is the faulty one."""

from __future__ import annotations

import datetime
import os
import sys
import time

import torch
import torch.distributed as dist

from magi_sink_cp import cp_attention_with_sink, make_cp_plan
from magi_sink_cp.dist import attention
from tests.dist.ranks import take_gpu


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
    plan = make_cp_plan(256, group=dist.group.WORLD, transport=transport)
    q, k, v = (
        torch.randn(
            plan.local_tokens, heads, 64, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32, requires_grad=True
        )
        for heads in (4, 2, 2)
    )
    arguments = {"plan": plan, "overlap_degree": 1}
    cp_attention_with_sink(q, k, v, **arguments).sum().backward()
    if on_gpu:
        torch.cuda.synchronize()
    dist.barrier()
    print(f"ready at {time.monotonic()}", file=sys.stderr, flush=True)
    kernel = "_forward_kernel" if "forward" in way else "_backward_kernel"

    def fault(*arguments: object) -> None:
        """In the middle of a pass, with messages of it under way or about to be."""
        if "hangs" in way:
            time.sleep(600)
        if "later" in way:
            time.sleep(2)  # the other ranks have enqueued everything by now, and wait for their GPUs
        os._exit(7)

    if rank == ranks - 1:
        setattr(attention, kernel, fault)
    for _ in range(3):
        cp_attention_with_sink(q, k, v, **arguments).sum().backward()
    if on_gpu:
        torch.cuda.synchronize()
    print("finished", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
