"""What compute-sanitizer watches: every Triton kernel on small inputs, and, on several GPUs, the
symm_mem transport.

    compute-sanitizer --tool memcheck python scripts/sanitize.py       # and --tool racecheck
    torchrun --nproc-per-node 2 --no-python \\
        compute-sanitizer --tool memcheck --report-api-errors no python scripts/sanitize.py

The last option keeps calls quiet by which NCCL asks the driver what it can do. With ``bash -c
'NCCL_HOSTID="rank $RANK" TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 LOCAL_RANK=0 exec
compute-sanitizer …'`` the ranks share one GPU.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from magi_sink_cp import cp_attention_with_sink, make_cp_plan
from magi_sink_cp.kernels.accumulate import Term, accumulate
from magi_sink_cp.kernels.dsink import sink_gradient
from magi_sink_cp.kernels.merge import merge
from magi_sink_cp.kernels.protocol import Partial, RowDelta


def main() -> int:
    if not torch.cuda.is_available():
        print(
            "sanitize.py needs a CUDA GPU: compute-sanitizer watches what runs there",
            file=sys.stderr,
        )
        return 2
    if "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
        transport()
        dist.destroy_process_group()
    else:
        for tokens in (37, 300):
            for heads, head_dim in ((4, 64), (3, 80)):
                kernels(tokens, heads, head_dim)
    torch.cuda.synchronize()
    return 0


def kernels(tokens: int, heads: int, head_dim: int, device: str = "cuda") -> None:
    """Rows, heads and head_dim that fill no tile; partial results of some rows; both layouts."""

    def out(rows: int) -> Tensor:
        return torch.randn(rows, heads, head_dim, device=device, dtype=torch.bfloat16)

    def stat(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    documents = torch.tensor([0, 5, tokens], device=device, dtype=torch.int32)
    ends = torch.tensor([0, tokens - 3], device=device, dtype=torch.int32)
    for sink in (None, stat(2, heads), stat(tokens, 3, heads)):
        whole, later = (
            Partial(out(tokens), stat(heads, tokens)),
            Partial(out(tokens - 9), stat(heads, tokens - 9), 9),
        )
        merge([whole, later, Partial(out(5), stat(heads, 5), 2)], sink)
        merge([whole], sink, cu_seqlens_q=ends)
        if sink is not None:
            sink_gradient(sink, whole.lse, None, out(tokens), out(tokens), stat(heads, tokens))
            sink_gradient(sink, whole.lse, RowDelta(stat(heads, tokens), tokens))
            padded = RowDelta(stat(heads, (tokens + 2 * 64) // 64 * 64 + 64), tokens, 64, documents)
            sink_gradient(sink, whole.lse, padded)
    total = out(tokens)
    terms = [Term(total, 0, 0, tokens), Term(out(tokens), 2, 1, tokens - 4), Term(out(9), 0, 3, 12)]
    accumulate(terms, total)
    accumulate([Term(out(tokens), 0, 0, tokens)], stat(tokens, heads, head_dim))


def transport() -> None:
    """Two steps of packed documents, with and without a window, on both degrees."""
    plan = make_cp_plan(700, group=dist.group.WORLD, transport="symm_mem", cu_seqlens=[0, 300, 700])
    q, k, v = (
        torch.randn(
            plan.local_tokens, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True
        )
        for heads in (4, 2, 2)
    )
    sink = torch.randn(1, 4, device="cuda", requires_grad=True)
    for _ in range(2):
        for overlap_degree in (0, 1):
            for window_size in ((-1, -1), (40, 0)):
                out = cp_attention_with_sink(
                    q, k, v, sink, plan=plan, backend="aten", overlap_degree=overlap_degree,
                    window_size=window_size, dsink_reduce="sum",
                )  # fmt: skip
                assert isinstance(out, torch.Tensor), "lse was not asked for"
                torch.autograd.grad(out.sum(), (q, k, v, sink))


if __name__ == "__main__":
    sys.exit(main())
