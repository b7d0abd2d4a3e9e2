"""One GPU: kernel calls in turns on two streams give what they give one after the other."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch

from magi_sink_cp import backends, cp_attention_with_sink, make_cp_plan
from magi_sink_cp.dist import driver
from magi_sink_cp.dist.methods import ring
from magi_sink_cp.dist.methods.lanes import Lanes, TwoLanes
from magi_sink_cp.dist.planning import cost
from magi_sink_cp.dist.planning.blueprint import CPBlueprint
from tests.support.cases import offsets

pytestmark = pytest.mark.gpu

LENGTHS = [1500, 1300, 40, 7, 3000, 2200, 1]
SLEEP = 1_000_000  # cycles: about half a millisecond, longer than any call here


class SlowLanes(TwoLanes):
    """What runs beside begins late, so that nobody may read it too early by chance."""

    passes = 0

    def __init__(self) -> None:
        super().__init__()
        SlowLanes.passes += 1

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        with super().turn():
            if self._turns % 2 == 0:
                torch.cuda._sleep(SLEEP)
            yield


def check_lanes(leaves: list[torch.Tensor], step: Callable[[], tuple[torch.Tensor, ...]]) -> int:
    """Bit for bit, with new inputs every time, which come late, while other tensors come and go in
    the memory that calls leave.

    Returns how many passes ran on two streams, of the 10 steps.
    """
    draw, before = random.Random(0), SlowLanes.passes
    for _ in range(10):
        torch.cuda._sleep(SLEEP)
        with torch.no_grad():
            for x in leaves:
                x.copy_(torch.randn_like(x))
        with mock.patch.object(ring, "TwoLanes", SlowLanes):
            ours = [x.clone() for x in step()]
        for _ in range(4):
            torch.full((draw.randint(1, 8 << 20),), float("nan"), device="cuda")
        with mock.patch.object(ring, "TwoLanes", Lanes):
            expected = step()
        for number, (a, b) in enumerate(zip(ours, expected, strict=True)):
            assert torch.equal(a, b), f"result {number}"
    return SlowLanes.passes - before


def check_graph(leaves: list[torch.Tensor], step: Callable[[], tuple[torch.Tensor, ...]]) -> None:
    """Captured and replayed with other inputs, a step gives the same bits."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # thread_local: NCCL's watchdog is another thread.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        captured = step()
    with torch.no_grad():
        for x in leaves:
            x.copy_(torch.randn_like(x))
    expected = step()
    graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip(captured, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture
def many_calls():
    """On two streams however short; of large segments also in backward, where one rank has none."""
    schedule = CPBlueprint.schedule

    def with_large_rows(this, window_size, overlap_degree, batch_size, _, gaps, routed):
        return schedule(this, window_size, overlap_degree, batch_size, 1000, gaps, routed)

    always = mock.patch.object(cost, "TWO_LANES_S", (0.0, float("inf")))
    with always, mock.patch.object(CPBlueprint, "schedule", with_large_rows):
        yield


def inputs(sink_layout: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    total, heads, heads_kv = sum(LENGTHS), 16, 2
    tensors = [
        torch.randn(total, h, 64, device="cuda", dtype=torch.bfloat16)
        for h in (heads, heads_kv, heads_kv)
    ]
    sink = torch.randn(*((total,) if sink_layout == "ssh" else ()), 1, heads, device="cuda")
    return [x.requires_grad_() for x in (*tensors, sink)]


@pytest.mark.parametrize("backend", ["fa3", "aten", "auto"])
@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
@pytest.mark.parametrize("window_size", [(-1, -1), (128, 0)])
def test_two_lanes_change_nothing(many_calls, backend, sink_layout, window_size):
    if backend != "auto" and (reason := {info.name: info.reason for info in backends()}[backend]):
        pytest.skip(f"{backend}: {reason}")
    plan = make_cp_plan(sum(LENGTHS), cu_seqlens=offsets(LENGTHS))
    leaves = inputs(sink_layout)
    dout = torch.randn_like(leaves[0])

    def step() -> tuple[torch.Tensor, ...]:
        options = {
            "sink_layout": sink_layout,
            "window_size": window_size,
            "deterministic": True,
            "backend": backend,
        }
        out, lse = cp_attention_with_sink(*leaves, plan=plan, return_lse=True, **options)
        return (
            out.detach(),
            lse.detach(),
            *torch.autograd.grad((out, lse), leaves, (dout, torch.ones_like(lse))),
        )

    assert check_lanes(leaves, step) == 20, "a pass ran on one stream"


def test_a_thread_that_has_not_called_cuda(many_calls):
    """A backward may be the first CUDA call of autograd's thread; the driver needs a context."""
    made: list[int] = []
    thread = threading.Thread(target=lambda: made.append(driver.new_stream()))
    thread.start()
    thread.join()
    assert len(made) == 1


def test_a_graph_holds_both_lanes(many_calls):
    plan = make_cp_plan(sum(LENGTHS), cu_seqlens=offsets(LENGTHS))
    leaves = inputs("sh")
    dout = torch.randn_like(leaves[0])

    def step() -> tuple[torch.Tensor, ...]:
        out = cp_attention_with_sink(*leaves, plan=plan, deterministic=True)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    before = SlowLanes.passes
    with mock.patch.object(ring, "TwoLanes", SlowLanes):
        check_graph(leaves, step)
    assert SlowLanes.passes >= before + 4


def test_what_the_host_is_ahead_of_takes_no_memory(many_calls):
    """As many layers as the host likes.

    Each uses the memory that the one before left, on either stream.
    """
    plan = make_cp_plan(sum(LENGTHS), cu_seqlens=offsets(LENGTHS))
    q, k, v, sink = (x.detach() for x in inputs("sh"))

    def peak(layers: int) -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda._sleep(200 * SLEEP)
        before = torch.cuda.memory_reserved()
        for _ in range(layers):
            cp_attention_with_sink(q, k, v, sink, plan=plan)
        return torch.cuda.memory_reserved() - before

    peak(1)
    assert peak(20) <= peak(2)
