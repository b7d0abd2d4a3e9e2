"""One GPU: kernel calls in turns on two streams give what they give one after the other."""

from __future__ import annotations

import random
from unittest import mock

import pytest
import torch

from magi_sink_cp import backends, cp_attention_with_sink, make_cp_plan
from magi_sink_cp.dist import attention as cp_module
from magi_sink_cp.dist import schedule
from magi_sink_cp.dist.lanes import Lanes, TwoLanes
from tests.helpers import offsets

pytestmark = pytest.mark.gpu

LENGTHS = [1500, 900, 40, 7, 3000, 2200, 1]


@pytest.fixture
def many_calls():
    with mock.patch.object(schedule, "LARGE_ROWS", 500), mock.patch.object(cp_module, "TwoLanes", wraps=TwoLanes) as two:
        yield two


def inputs(sink_layout: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    total, heads, heads_kv = sum(LENGTHS), 16, 2
    tensors = [torch.randn(total, h, 64, device="cuda", dtype=torch.bfloat16) for h in (heads, heads_kv, heads_kv)]
    sink = torch.randn(*((total,) if sink_layout == "ssh" else ()), 1, heads, device="cuda")
    return [x.requires_grad_() for x in (*tensors, sink)]


@pytest.mark.parametrize("backend", ["fa3", "aten", "auto"])
@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
@pytest.mark.parametrize("window_size", [(-1, -1), (128, 0)])
def test_two_lanes_change_nothing(many_calls, backend, sink_layout, window_size):
    """Bit for bit, while other tensors come and go in the memory that the calls leave."""
    if backend != "auto" and (reason := {info.name: info.reason for info in backends()}[backend]):
        pytest.skip(f"{backend}: {reason}")
    plan = make_cp_plan(sum(LENGTHS), cu_seqlens=offsets(LENGTHS))
    leaves = inputs(sink_layout)
    dout = torch.randn_like(leaves[0])
    draw = random.Random(0)

    def results() -> list[torch.Tensor]:
        options = {"sink_layout": sink_layout, "window_size": window_size, "deterministic": True, "backend": backend}
        out, lse = cp_attention_with_sink(*leaves, plan=plan, return_lse=True, **options)
        grads = torch.autograd.grad((out, lse), leaves, (dout, torch.ones_like(lse)))
        found = [x.clone() for x in (out.detach(), lse.detach(), *grads)]
        del out, lse, grads
        for _ in range(4):
            torch.full((draw.randint(1, 8 << 20),), float("nan"), device="cuda")
        return found

    with mock.patch.object(cp_module._Call, "lanes", return_value=Lanes()):
        expected = results()
    assert not many_calls.called
    for _ in range(20):
        for name, ours, theirs in zip(("out", "lse", "dq", "dk", "dv", "dsink"), results(), expected, strict=True):
            assert torch.equal(ours, theirs), name
    assert many_calls.call_count == 40, "a pass ran on one stream"


def test_a_graph_holds_both_lanes(many_calls):
    plan = make_cp_plan(sum(LENGTHS), cu_seqlens=offsets(LENGTHS))
    leaves = inputs("sh")
    dout = torch.randn_like(leaves[0])

    def step() -> tuple[torch.Tensor, ...]:
        out = cp_attention_with_sink(*leaves, plan=plan, deterministic=True)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    beside = torch.cuda.Stream()
    with torch.cuda.stream(beside):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in leaves:
            x.copy_(torch.randn_like(x))
    expected = step()
    graph.replay()
    for ours, theirs in zip(captured, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert many_calls.called
