"""cp_attention_with_sink against the fp64 reference on the whole sequence, on 1 to 4 gloo ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magi_sink_cp import cp_attention_with_sink, make_cp_plan
from tests.dist.ranks import run_on_ranks
from tests.helpers import Case, assert_close, make_case, run, truth


def cp_results(case: Case, group, device: torch.device, **arguments) -> dict[str, torch.Tensor]:
    """Results of the sharded call, put together again: dsink summed over ranks for a shared sink, padding rows checked and cut."""
    plan = make_cp_plan(case.q.shape[0], group=group, cu_seqlens=torch.tensor(case.cu_seqlens_q, dtype=torch.int32))
    sharded = Case(
        *(plan.shard(x) for x in (case.q, case.k, case.v)),
        sink=plan.shard(case.sink) if case.sink_layout == "ssh" else case.sink,
        dout=plan.shard(case.dout),
        dlse=None if case.dlse is None else plan.shard(case.dlse, dim=1),
        cu_seqlens_q=case.cu_seqlens_q,
        cu_seqlens_k=case.cu_seqlens_k,
        options=case.options,
    )
    local = run(cp_attention_with_sink, sharded, plan=plan, **arguments)
    padding = ~plan.token_mask
    for name in ("out", "dq", "dk", "dv"):
        assert not local[name][padding].any(), f"{name} of padding is not zero"
    whole = {name: plan.unshard(local[name]) for name in ("out", "dq", "dk", "dv")}
    whole["lse"] = plan.unshard(local["lse"], dim=1)
    if case.sink is not None:
        if case.sink_layout == "ssh":
            whole["dsink"] = plan.unshard(local["dsink"])
        else:
            whole["dsink"] = local["dsink"].clone()
            if group is not None and arguments.get("dsink_reduce", "none") == "none":
                dist.all_reduce(whole["dsink"], group=group)
    return whole


def body_matches_reference(group, device, *, arguments: dict, lengths: list[int], tolerance: float = 1e-5, **case_arguments) -> None:
    case = make_case(lengths, lengths, **case_arguments)
    assert_close(cp_results(case, group, device, **arguments), truth(case), tolerance)


LENGTHS = {
    "one document": [37],
    "divides evenly": [48],
    "packed": [5, 17, 1, 0, 23, 9],
    "many short": [1, 2, 1, 3, 1, 1, 2, 4, 1],
    "fewer tokens than chunks": [3],
    "one token": [1],
    "no tokens": [0],
    "empty first and last": [0, 0, 12, 0],
}


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sink_layout", ["sh", "ssh", None])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_matches_reference(num_ranks, causal, sink_layout, lengths):
    run_on_ranks(
        num_ranks, body_matches_reference, arguments={}, lengths=lengths, causal=causal, sink_layout=sink_layout, s_sink=2, with_dlse=False
    )
