"""The symm_mem transport's protocol on shared memory of CPU processes.

The same code that runs on NVLink, with other streams.
"""

from __future__ import annotations

import contextlib
import os
import time
from datetime import timedelta
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from magi_sink_cp import cp_attention_with_sink, make_cp_plan
from magi_sink_cp.dist import make_plan
from magi_sink_cp.dist.guard.watchdog import timeout_s
from magi_sink_cp.dist.methods import ring
from magi_sink_cp.dist.transport import choose as choose_module
from magi_sink_cp.dist.transport import rendezvous as rendezvous_module
from magi_sink_cp.dist.transport import symmetric as symmetric_module
from magi_sink_cp.dist.transport.symmetric import SymmetricMemory
from magi_sink_cp.kernels.protocol import NotUsableError
from tests.distributed.test_cp_attention import body_matches_reference, cp_results
from tests.support.cases import assert_close, make_case, truth
from tests.support.ranks import run_on_ranks
from tests.support.shared_memory import HostStreams


def transport_of(group, shaky: bool = False) -> SymmetricMemory:
    return SymmetricMemory(
        dist.get_rank(group), dist.get_world_size(group), HostStreams(group, shaky)
    )


@contextlib.contextmanager
def on(transport: SymmetricMemory):
    """make_cp_plan chooses this transport."""
    group = transport._streams._group
    choose_module._symmetric[group] = transport
    with mock.patch.object(make_plan, "choose_transport", return_value=transport):
        yield
    del choose_module._symmetric[group]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("overlap_degree", [0, 1, 3])
@pytest.mark.parametrize(
    "options", [{"causal": True}, {"causal": False}, {"causal": True, "window_size": (9, 0)}]
)
def test_matches_reference(num_ranks, overlap_degree, options):
    run_on_ranks(num_ranks, body_reference, overlap_degree=overlap_degree, options=options)


def body_reference(group, device, *, overlap_degree, options) -> None:
    with on(transport_of(group)):
        for lengths in ([37], [5, 17, 1, 0, 23, 9], [3], [0]):
            body_matches_reference(
                group,
                device,
                arguments={"overlap_degree": overlap_degree},
                lengths=lengths,
                **options,
            )


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_one_arena_serves_plans_of_all_sizes_and_ranks_in_any_pace(num_ranks):
    run_on_ranks(num_ranks, body_plans)


def body_plans(group, device) -> None:
    """Plans, masks and degrees in turns, with pauses at random.

    A part of the arena is reused only when it has been read.
    """
    transport = transport_of(group, shaky=True)
    largest = 0
    with on(transport):
        for turn, (length, degree) in enumerate(
            [(20, 1), (90, 0), (20, 3), (90, 3), (33, 2), (90, 0), (20, 0)]
        ):
            case = make_case(
                [length // 3, length - length // 3],
                [length // 3, length - length // 3],
                causal=turn % 3 != 0,
                seed=turn,
            )
            for _ in range(2):
                assert_close(
                    cp_results(case, group, device, overlap_degree=degree), truth(case), 1e-5
                )
            allocations = transport._streams.allocations
            largest = max(largest, allocations)
            if turn > 3:
                assert allocations == largest, "the arena is not reused"


def test_each_stream_that_waits_for_other_ranks_is_watched():
    run_on_ranks(2, body_watched)


def body_watched(group, device) -> None:
    """Of three documents the first alone has tokens of both ranks.

    Rank 0 sends its keys, rank 1 receives them.
    """
    transport = transport_of(group)
    with on(transport):
        plan = make_cp_plan(16, group=group, cu_seqlens=[0, 8, 12, 16], layout="zigzag")
        q, k, v = (torch.randn(8, 2, 8) for _ in range(3))
        cp_attention_with_sink(q, k, v, plan=plan)
    streams = transport._streams
    if dist.get_rank(group) == 0:
        assert streams.watched == [
            ("group_cast of stage 1 (from cp ranks [], to cp ranks [1])", streams.copying())
        ]
    else:
        assert streams.watched == [
            ("group_cast of stage 1 (from cp ranks [0], to cp ranks [])", streams.calling())
        ]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_what_is_sent_equals_gloo_bit_for_bit(num_ranks):
    run_on_ranks(num_ranks, body_bits)


def body_bits(group, device) -> None:
    case = make_case([50, 14], [50, 14], dtype=torch.bfloat16, causal=True)
    for degree in (0, 1, 2):
        plain = cp_results(case, group, device, overlap_degree=degree)
        with on(transport_of(group)):
            for _ in range(2):
                for name, value in cp_results(case, group, device, overlap_degree=degree).items():
                    assert torch.equal(value, plain[name]), name


def test_misuse():
    run_on_ranks(2, body_misuse)


def body_misuse(group, device) -> None:
    transport = transport_of(group)
    with on(transport):
        plan = make_cp_plan(32, group=group)
        exchange = plan.blueprint.schedule((-1, -1), 1, routed=True).stages[1].cast
        k = torch.randn(plan.local_tokens, 2, 8)
        transfer = transport.start((k, k), exchange)
        with pytest.raises(
            RuntimeError,
            match=r"group_cast of stage 1 .*: its buffer is in use by a transfer that has not "
            r"been rel",
        ):
            transport.start((k, k), exchange)
        larger = torch.randn(plan.local_tokens, 9000, 8)
        with pytest.raises(
            RuntimeError,
            match="needs more symmetric memory was started while another one is in flight",
        ):
            transport.start((larger, larger), exchange)
        transfer.wait()
        with pytest.raises(RuntimeError, match=r"wait\(\) was called twice"):
            transfer.wait()
        transfer.release()


def test_counters_wrap_around():
    run_on_ranks(2, body_wrap)


def body_wrap(group, device) -> None:
    transport = transport_of(group)
    with on(transport):
        plan = make_cp_plan(24, group=group)
        x = torch.randn(plan.local_tokens, 2, 8)
        first = cp_attention_with_sink(x, x, x, plan=plan)
        transport._count = 2**32 - 3
        arena = transport._arena.buffer[: transport._flag_bytes].view(torch.int32)
        dist.barrier(group)
        arena.fill_(-4)
        dist.barrier(group)
        for _ in range(6):
            assert torch.equal(cp_attention_with_sink(x, x, x, plan=plan), first)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("on_gloo", [False, True])
@pytest.mark.parametrize("kernel", ["run_forward", "run_backward"])
@pytest.mark.parametrize("overlap_degree", [0, 1, 2])
def test_ranks_that_fail_alike_can_go_on(num_ranks, on_gloo, kernel, overlap_degree):
    run_on_ranks(
        num_ranks, body_failure, on_gloo=on_gloo, kernel=kernel, overlap_degree=overlap_degree
    )


def body_failure(group, device, *, on_gloo, kernel, overlap_degree) -> None:
    """A kernel that fails on every rank, as for want of memory, leaves no transfer behind."""
    case = make_case([48], [48], causal=False)
    with contextlib.nullcontext() if on_gloo else on(transport_of(group)):
        plan = make_cp_plan(48, group=group)
        for call in (0, 1):
            failing = FailsAt(getattr(ring, kernel), call)
            with mock.patch.object(ring, kernel, failing):
                try:
                    cp_results(case, group, device, overlap_degree=overlap_degree)
                    assert failing.calls <= call, "it did not fail"
                except torch.OutOfMemoryError:
                    pass
            if not on_gloo and failing.calls > call:
                with pytest.raises(
                    RuntimeError, match="an earlier call over this cp group failed on this rank"
                ):
                    cp_attention_with_sink(
                        *(plan.shard(x) for x in (case.q, case.k, case.v)), plan=plan, causal=False
                    )
        assert_close(
            cp_results(case, group, device, overlap_degree=overlap_degree), truth(case), 1e-5
        )


class FailsAt:
    def __init__(self, function, call: int) -> None:
        self.function, self.failing_call, self.calls = function, call, 0

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls > self.failing_call:
            raise torch.OutOfMemoryError("no memory left")
        return self.function(*arguments)


def test_ever_new_documents_do_not_pile_up():
    run_on_ranks(2, body_new_documents)


def body_new_documents(group, device) -> None:
    with mock.patch.object(symmetric_module, "_MOST_VIEWS", 6):
        transport = transport_of(group)
    with on(transport):
        for turn in range(12):
            lengths = [20 + 3 * turn, 9, 60 - 3 * turn]
            case = make_case(lengths, lengths, causal=True, seed=turn)
            assert_close(
                cp_results(case, group, device, overlap_degree=turn % 2), truth(case), 1e-5
            )
            assert len(transport._views) <= 6
    assert transport._streams.allocations <= 3


def test_a_need_that_cannot_be_met_leaves_what_was_there():
    run_on_ranks(2, body_no_room)


def body_no_room(group, device) -> None:
    transport = transport_of(group)
    small, large = (make_case([n], [n], causal=True) for n in (40, 9000))
    with on(transport):
        cp_results(small, group, device)
        with (
            mock.patch.object(
                transport._streams, "allocate", side_effect=NotUsableError("cp rank 1: 9 bytes")
            ),
            pytest.raises(
                RuntimeError, match="no room for this call's keys: cp rank 1: 9 bytes; make a plan"
            ),
        ):
            cp_results(large, group, device)
        assert_close(cp_results(small, group, device), truth(small), 1e-5)


def test_ranks_that_are_out_of_step_find_out():
    run_on_ranks(2, body_out_of_step)


def body_out_of_step(group, device) -> None:
    """One rank failed before it started what the other has started: no plan is made any more."""
    transport = transport_of(group)
    with on(transport):
        make_cp_plan(32, group=group)
        transport._count += dist.get_rank(group)
        transport.fail()
        with pytest.raises(
            ValueError,
            match=r"the same number of exchanges so far .*start the job again\), got rank 0: 0, "
            r"rank 1: 1",
        ):
            make_cp_plan(32, group=group)


def test_a_rendezvous_waits_for_a_time_of_its_own():
    store = rendezvous_module.CountingStore(dist.HashStore(), timedelta(milliseconds=200))
    for wait in (lambda: store.get("name/key"), lambda: store.wait(["name/key"])):
        begin = time.monotonic()
        with pytest.raises(RuntimeError, match="[Tt]imeout"):
            wait()
        assert 0.1 < time.monotonic() - begin < 20, "the store's own time is 300 s"


def test_a_rendezvous_counts_its_own_keys():
    run_on_ranks(4, body_rendezvous)


def body_rendezvous(group, device) -> None:
    """The test plays torch's part: two rendezvous of ranks 1 and 3, numbered apart on each rank."""
    number = 5 * dist.get_rank()  # of what this process has exchanged before
    pair = dist.new_group([1, 3])
    alive = []

    def torch_rendezvous(buffer, name):
        nonlocal number
        stand_in = dist.distributed_c10d._resolve_process_group(name)
        # It calls the methods of the Python class.
        store = dist.PrefixStore("of C++", stand_in.get_group_store())
        for _ in range(2):
            keys = [f"CUDASymmetricMemory/{number}/{rank}" for rank in range(stand_in.size())]
            store.set(keys[stand_in.rank()], buffer)
            store.wait(keys)
            found = [store.get(key) for key in keys]
            number += 1
        assert store.add(f"CUDASymmetricMemory/{number}/num_members", 1) in (1, 2), (
            "as torch 2.13's barrier does first"
        )
        begin = time.monotonic()
        with pytest.raises(RuntimeError, match="[Tt]imeout"):
            store.wait([f"CUDASymmetricMemory/{number}/last_member"], timedelta(milliseconds=10))
        assert time.monotonic() - begin < 10, (
            "waited for the time of the store, not for the time that was asked for"
        )
        number += 1
        alive.append(stand_in)
        return found

    counting = mock.Mock(wraps=rendezvous_module.CountingStore)
    with (
        mock.patch.object(rendezvous_module.symm_mem, "rendezvous", torch_rendezvous),
        mock.patch.object(rendezvous_module, "CountingStore", counting),
    ):
        for name in ("first", "second") if dist.get_rank() in (1, 3) else ():
            mine = f"{name} of {dist.get_rank()}".encode() + bytes([0, 255])
            theirs = [f"{name} of {rank}".encode() + bytes([0, 255]) for rank in (1, 3)]
            assert rendezvous_module.rendezvous(mine, pair, name) == theirs
            with pytest.raises(RuntimeError, match=name):
                dist.distributed_c10d._resolve_process_group(name)
            [_, waits], _ = counting.call_args
            assert waits == timedelta(seconds=timeout_s(pair._get_backend(device))) / 2, (
                "who failed before waits as long"
            )


@pytest.mark.parametrize(
    "fault",
    [None, "no driver", "no stream", "no memory", "no mapping", "no NVLink", "another host"],
)
def test_set_up_succeeds_on_every_rank_or_on_none(fault):
    run_on_ranks(3, body_set_up, fault=fault)


def body_set_up(group, device, *, fault) -> None:
    """Whatever fails in connect() on rank 1 alone, every rank learns it and none waits.

    The test plays CUDA's part.
    """
    here = dist.get_rank(group) == 1

    def failing(what, result):
        def call(*_, **__):
            if here and fault == what:
                raise RuntimeError(f"this rank has {what}")
            return result

        return call

    block = torch.zeros(1 << 22, dtype=torch.uint8)
    buffer = block[4096 : 4096 + (2 << 20)]  # torch may put a small buffer into a larger block
    handle = SimpleNamespace(buffer_ptrs=[1 << 40, 2 << 40, 3 << 40])
    handle.buffer_ptrs[dist.get_rank(group)] = block.data_ptr()

    def check_available() -> None:
        if here and fault == "no driver":
            raise NotUsableError("this rank has no driver")

    names = []

    def record_name(buffer, group, name):
        assert os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"
        names.append(name)
        return failing("no mapping", handle)()

    patches = {
        "driver.check_available": check_available,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.Stream": failing("no stream", SimpleNamespace(cuda_stream=5)),
        "torch.cuda.synchronize": lambda *_: None,
        "symm_mem.empty": failing("no memory", buffer),
        "rendezvous": record_name,
        "Communication": mock.Mock(),
        "driver.missing_nvlink": lambda: (
            "it has no NVLink" if here and fault == "no NVLink" else None
        ),
        "_host": lambda: "elsewhere" if here and fault == "another host" else "here",
    }
    with contextlib.ExitStack() as stack:
        for name, replacement in patches.items():
            *path, attribute = name.split(".")
            owner = symmetric_module
            for part in path:
                owner = getattr(owner, part)
            stack.enter_context(mock.patch.object(owner, attribute, replacement))
        found = symmetric_module.connect(group)
        if isinstance(found, SymmetricMemory):
            found._streams.allocate(1 << 20)
    if fault in (None, "no NVLink"):
        assert len(set(names)) == 2, "each rendezvous has its own name"
        of_all = [None] * dist.get_world_size(group)
        dist.all_gather_object(of_all, names, group=group)
        assert of_all == [names] * len(of_all), "which all ranks give it"
        assert isinstance(found, SymmetricMemory)
        assert found.missing_nvlink == (None if fault is None else "cp rank 1: it has no NVLink"), (
            "every rank knows"
        )
        rank = dist.get_rank(group)
        addresses = [base + 4096 for base in handle.buffer_ptrs]
        assert found._arena.addresses == addresses
        assert addresses[rank] == buffer.data_ptr()
    elif fault == "another host":
        assert found == "its ranks are on different hosts"
    else:
        assert found.startswith("cp rank 1: ")
        assert f"this rank has {fault}" in found
