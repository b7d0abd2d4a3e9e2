"""What travels: messages and bytes against the plan, overlap with compute, misuse of a transfer."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from magi_sink_cp import cp_attention_with_sink, make_cp_plan
from magi_sink_cp.dist.methods import ring
from magi_sink_cp.dist.transport import base, p2p
from tests.support.ranks import run_on_ranks

HEADS, HEADS_KV, HEAD_DIM = 4, 2, 8


class Recorder:
    """Counts what goes through torch.distributed, and notes the order of transfers and kernels."""

    def __init__(self) -> None:
        self.sends: list[int] = []
        self.receives: list[int] = []
        self.all_reduces: list[int] = []
        self.order: list[str] = []
        self._batch, self._all_reduce = dist.batch_isend_irecv, dist.all_reduce
        self._forward, self._backward = ring.run_forward, ring.run_backward
        self._start, self._wait = p2p.PointToPoint.start, base.Transfer.wait

    def batch(self, messages):
        for message in messages:
            (self.sends if message.op is dist.isend else self.receives).append(
                message.tensor.nbytes
            )
        return self._batch(messages)

    def all_reduce(self, tensor, *args, **kwargs):
        self.all_reduces.append(tensor.nbytes)
        self.order.append("all-reduce")
        return self._all_reduce(tensor, *args, **kwargs)

    def noting(self, name, function):
        def wrapped(*args, **kwargs):
            self.order.append(name)
            return function(*args, **kwargs)

        return wrapped

    def start_noting(self):
        def wrapped(this, tensors, exchange, own=()):
            self.order.append("cast" if exchange.name.startswith("group_cast") else "reduce")
            return self._start(this, tensors, exchange, own)

        return wrapped

    def __enter__(self):
        self._patches = [
            mock.patch.object(dist, "batch_isend_irecv", self.batch),
            mock.patch.object(dist, "all_reduce", self.all_reduce),
            mock.patch.object(ring, "run_forward", self.noting("kernel", self._forward)),
            mock.patch.object(ring, "run_backward", self.noting("kernel", self._backward)),
            mock.patch.object(p2p.PointToPoint, "start", self.start_noting()),
            mock.patch.object(base.Transfer, "wait", self.noting("wait", self._wait)),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_):
        for patch in self._patches:
            patch.stop()


def inputs(plan, dtype=torch.float32):
    q = torch.randn(plan.local_tokens, HEADS, HEAD_DIM, dtype=dtype, requires_grad=True)
    k, v = (
        torch.randn(plan.local_tokens, HEADS_KV, HEAD_DIM, dtype=dtype, requires_grad=True)
        for _ in range(2)
    )
    return q, k, v, torch.randn(1, HEADS, requires_grad=True)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("window_size", [(-1, 0), (-1, -1), (3, 0), (2, 4)])
@pytest.mark.parametrize("cu_seqlens", [[0, 48], [0, 5, 5, 31, 48], list(range(0, 49, 3))])
@pytest.mark.parametrize("dsink_reduce", ["none", "sum"])
@pytest.mark.parametrize("overlap_degree", [0, 2])
def test_messages_and_bytes_are_the_plans(
    num_ranks, window_size, cu_seqlens, dsink_reduce, overlap_degree
):
    arguments = {
        "window_size": window_size,
        "cu_seqlens": cu_seqlens,
        "dsink_reduce": dsink_reduce,
        "overlap_degree": overlap_degree,
    }
    run_on_ranks(num_ranks, body_counts, **arguments)


def body_counts(group, device, *, window_size, cu_seqlens, dsink_reduce, overlap_degree) -> None:
    plan = make_cp_plan(48, group=group, cu_seqlens=cu_seqlens)
    leaves = inputs(plan, torch.bfloat16)
    masks = {"causal": False, "window_size": window_size}
    arguments = {
        "plan": plan,
        "dsink_reduce": dsink_reduce,
        "overlap_degree": overlap_degree,
        **masks,
    }
    cp_attention_with_sink(*leaves, **arguments)  # the signature is compared here
    schedule = plan.blueprint.schedule(window_size, overlap_degree)
    token_bytes = 2 * HEADS_KV * HEAD_DIM * 2  # k and v, bf16
    sent, received = schedule.sent_tokens * token_bytes, schedule.received_tokens * token_bytes
    messages_out, messages_in = (
        sum(2 * len(getattr(s.cast, way)) for s in schedule.stages) for way in ("sends", "receives")
    )
    with Recorder() as forward:
        out = cp_attention_with_sink(*leaves, **arguments)
    assert (len(forward.sends), sum(forward.sends)) == (messages_out, sent)
    assert (len(forward.receives), sum(forward.receives)) == (messages_in, received)
    assert not forward.all_reduces
    with Recorder() as backward:
        out.backward(torch.randn_like(out))
    # K and V come again, and their gradients go home: what was received is sent back.
    assert (len(backward.sends), sum(backward.sends)) == (
        messages_out + messages_in,
        sent + received,
    )
    assert (len(backward.receives), sum(backward.receives)) == (
        messages_in + messages_out,
        received + sent,
    )
    reduces = dsink_reduce == "sum" and plan.cp_size > 1
    assert backward.all_reduces == ([HEADS * 4] if reduces else [])


def test_zigzag_sends_half_of_what_a_ring_would():
    """Causal, one document, cp 2.

    Rank 0 never needs to send its last chunk, nor rank 1 to receive it.
    """
    run_on_ranks(2, body_half)


def body_half(group, device) -> None:
    plan = make_cp_plan(64, group=group)
    for overlap_degree in (0, 1):
        schedule = plan.blueprint.schedule((-1, 0), overlap_degree)
        assert schedule.sent_tokens == (16 if plan.rank == 0 else 32)
        assert schedule.received_tokens == (32 if plan.rank == 0 else 16)


def test_short_documents_do_not_travel():
    run_on_ranks(4, body_local_documents)


def body_local_documents(group, device) -> None:
    plan = make_cp_plan(64, group=group, cu_seqlens=list(range(0, 65, 8)))  # one document a chunk
    with Recorder() as recorder:
        out = cp_attention_with_sink(*inputs(plan), plan=plan)
        out.sum().backward()
    assert recorder.sends == []
    assert recorder.receives == []


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_next_stage_travels_while_this_one_computes(num_ranks):
    run_on_ranks(num_ranks, body_order)


def body_order(group, device) -> None:
    plan = make_cp_plan(64, group=group)
    leaves = inputs(plan)
    stages = plan.cp_size - 1
    arguments = {"plan": plan, "overlap_degree": stages}
    cp_attention_with_sink(*leaves, **arguments)
    with Recorder() as forward:
        out = cp_attention_with_sink(*leaves, **arguments)
    assert forward.order == [
        "cast",
        "kernel",
        *(["wait", "cast", "kernel"] * (stages - 1)),
        "wait",
        "kernel",
    ]
    with Recorder() as backward:
        out.backward(torch.randn_like(out))
    # Each stage's gradients leave when they are computed and are waited for behind the next stage's
    # kernel.
    middle: list[str] = []
    for stage in range(1, stages + 1):
        middle += [
            "wait",
            *(["cast"] if stage < stages else []),
            "kernel",
            "reduce",
            *(["wait"] if stage > 1 else []),
        ]
    assert backward.order == ["cast", "kernel", *middle, "wait"]
    out = cp_attention_with_sink(*leaves, **arguments, dsink_reduce="sum")
    with Recorder() as backward:
        out.backward(torch.randn_like(out))
    assert backward.order == ["cast", "kernel", "all-reduce", *middle, "wait"], (
        "behind all stages with keys of others"
    )


def test_what_needs_no_other_rank_is_computed_before_the_wait():
    run_on_ranks(2, body_one_stage)


def body_one_stage(group, device) -> None:
    plan = make_cp_plan(64, group=group)
    leaves = inputs(plan)
    with Recorder() as forward:
        out = cp_attention_with_sink(*leaves, plan=plan, overlap_degree=0)
    # Rank 0's first chunk sees itself alone; every row of rank 1 may see rank 0's first chunk.
    assert forward.order == (
        ["cast", "kernel", "wait", "kernel"] if plan.rank == 0 else ["cast", "wait", "kernel"]
    )
    with Recorder() as backward:
        out.backward(torch.randn_like(out))
    assert backward.order == [*forward.order, "reduce", "wait"]
    out = cp_attention_with_sink(*leaves, plan=plan, overlap_degree=0, dsink_reduce="avg")
    with Recorder() as backward:
        out.backward(torch.randn_like(out))
    assert backward.order == [*forward.order, "reduce", "all-reduce", "wait"]


def test_misuse():
    run_on_ranks(2, body_misuse)


def body_misuse(group, device) -> None:
    plan = make_cp_plan(16, group=group)
    k = torch.randn(plan.local_tokens, HEADS_KV, HEAD_DIM)
    exchange = plan.blueprint.schedule((-1, 0), 1).stages[1].cast
    transfer = plan.transport.start((k, k), exchange)
    transfer.wait()
    assert [x.shape[0] for x in transfer.buffers] == [exchange.received_tokens] * 2
    with pytest.raises(
        RuntimeError,
        match=r"group_cast of stage 1 \(from cp ranks \[\d\], .*wait\(\) was called twice",
    ):
        transfer.wait()
