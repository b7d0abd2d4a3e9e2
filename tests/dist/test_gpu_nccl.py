"""Two or more GPUs over NCCL: cp_attention_with_sink against the fp64 reference, within twice the plain kernel's own error."""

from __future__ import annotations

import pytest
import torch

from magi_sink_cp import attention_with_sink, backends
from tests.dist.ranks import run_on_ranks
from tests.dist.test_cp_attention import LENGTHS, cp_results
from tests.helpers import Case, assert_within_plain, errors, make_case, run, truth

pytestmark = pytest.mark.gpu(count=2)


def body_within_plain_error(group, device, *, backend: str, lengths: list[int], **case_arguments) -> None:
    reasons = {info.name: info.reason for info in backends()}
    assert not reasons[backend], reasons[backend]
    case = make_case(lengths, lengths, heads=8, dtype=torch.bfloat16, device=str(device), **case_arguments)
    plain_case = Case(**{**vars(case), "sink": None, "dlse": None})
    cu_seqlens = torch.tensor(case.cu_seqlens_q, dtype=torch.int32, device=device)
    plain_run = run(attention_with_sink, plain_case, backend=backend, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
    plain = errors(plain_run, truth(plain_case))
    factor = 2.0
    if max(lengths) <= 4:  # rows that see few keys are nearly exact without a sink: see test_lengths_and_rows_without_a_key
        factor = 2 * 2**0.5
        usual = make_case(
            [64],
            [64],
            heads=8,
            dtype=torch.bfloat16,
            device=str(device),
            **{**case_arguments, "sink_layout": None, "with_dlse": False},
        )
        cu_seqlens = torch.tensor([0, 64], dtype=torch.int32, device=device)
        usual_run = run(attention_with_sink, usual, backend=backend, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
        plain = {name: max(plain[name], error) for name, error in errors(usual_run, truth(usual)).items()}
    assert_within_plain(cp_results(case, group, device, backend=backend), truth(case), plain, factor)


@pytest.mark.parametrize("backend", ["fa3", "aten"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", [*LENGTHS.values(), [1000], [300, 1, 0, 511, 64]])
def test_within_plain_error(backend, causal, sink_layout, head_dim, lengths):
    run_on_ranks(
        2,
        body_within_plain_error,
        "cuda",
        backend=backend,
        lengths=lengths,
        causal=causal,
        sink_layout=sink_layout,
        head_dim=head_dim,
        s_sink=2,
        with_dlse=head_dim == 64,
    )
