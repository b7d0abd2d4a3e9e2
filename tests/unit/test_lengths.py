"""Lengths of packed documents: what they may be, under every mode that traces or fakes tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from magi_sink_cp import attention_with_sink, fa3_varlen_func_with_sink, make_cp_plan
from magi_sink_cp.kernels.checks import INT32_MAX


class Subclass(torch.Tensor):
    pass


def attend(q, cu_seqlens, **options):
    return attention_with_sink(
        q, q, q, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, causal=True, **options
    )


@pytest.fixture
def q():
    return torch.randn(9, 2, 16)


@pytest.mark.parametrize("given", [[0, 4, 9], torch.tensor([0, 4, 9])], ids=["list", "int64"])
def test_lengths_in_a_compiled_graph(q, given):
    compiled = torch.compile(lambda q: attend(q, given), backend="eager", fullgraph=True)
    assert torch.equal(compiled(q), attend(q, given))


def test_int64_lengths_are_traced_and_faked(q):
    offsets = torch.tensor([0, 4, 9])
    traced = make_fx(lambda q, offsets: attend(q, offsets))(q, offsets)  # which takes no **options
    torch.testing.assert_close(traced(q, offsets), attend(q, offsets))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert attend(mode.from_tensor(q), mode.from_tensor(offsets)).shape == q.shape


@pytest.mark.parametrize(
    "beyond",
    [
        torch.tensor([0, 4, 2**32 + 9]),
        torch.tensor([0, 4, 2**32 + 9]).as_subclass(Subclass),
        torch.tensor([0, 4 - 2**32, 9]),
        [0, 4, 2**32 + 9],
        [0, 2**80, 9],
        np.array([0, 4, INT32_MAX + 1]),
    ],
)
def test_lengths_that_do_not_fit_in_int32(q, beyond):
    with pytest.raises(ValueError, match="cu_seqlens_q must fit in int32, got"):
        attend(q, beyond)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (torch.tensor([], dtype=torch.int64), ValueError, r"must have shape \(documents \+ 1,\)"),
        (np.array(9), TypeError, "must hold ints, got 9"),
        (9, TypeError, "must be an int32 or int64 tensor, a NumPy array or a sequence of ints"),
        ({0, 9}, TypeError, "must be an int32 or int64 tensor, a NumPy array or a sequence of"),
    ],
)
def test_what_are_no_lengths(q, lengths, error, message):
    with pytest.raises(error, match=message):
        attend(q, lengths)


def test_seqused_far_below_zero(q):
    with pytest.raises(ValueError, match="seqused_k must fit in int32, got -4294967294"):
        fa3_varlen_func_with_sink(
            q, q, q, [0, 9], [0, 9], max_seqlen_q=9, max_seqlen_k=9,
            seqused_k=torch.tensor([2 - 2**32]),
        )  # fmt: skip


def test_tensors_without_numbers(q):
    with pytest.raises(ValueError, match="cu_seqlens must hold numbers, got a tensor on the meta"):
        make_cp_plan(9, cu_seqlens=torch.tensor([0, 9], device="meta"))
    with pytest.raises(ValueError, match="max_seqlen_q must be an int >= 0"):
        attend(q, [0, 9], max_seqlen_q=torch.tensor(9, device="meta"))
