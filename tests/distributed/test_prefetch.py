"""prefetch_plans: order, errors, ends, and how far it runs ahead; blueprints from elsewhere."""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from magi_sink_cp import (
    cp_attention_with_sink,
    make_cp_blueprint,
    make_cp_plan,
    prefetch,
    prefetch_plans,
)
from tests.support.ranks import run_on_ranks

WINDOWS = ((-1, 0), (5, 0))


def offsets_of(number: int) -> list[int]:
    return [0, 3 + number % 7, 20]


class Batches(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, number):
        return torch.tensor(offsets_of(number))


def first(batch):
    return batch


def run(plan, window=(-1, -1)):
    x = torch.ones(plan.local_tokens, 2, 4)
    return cp_attention_with_sink(x, x, x, torch.zeros(1, 2), plan=plan, window_size=window)


def names_of_threads():
    return {thread.name for thread in threading.enumerate()}


def wait_until_ended():
    for _ in range(50):
        if "magi_sink_cp plans" not in names_of_threads():
            return
        time.sleep(0.1)
    raise AssertionError("the thread goes on")


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_plans_come_in_order_and_are_those_of_make_cp_plan(num_ranks):
    run_on_ranks(num_ranks, body_order)


def body_order(group, device) -> None:
    batches = [offsets_of(n) for n in range(7)]
    seen = []
    for batch, plan in prefetch_plans(batches, group=group, cu_seqlens=first, windows=WINDOWS):
        expected = make_cp_plan(20, group=group, cu_seqlens=batch)
        assert plan.layout == expected.layout
        assert plan.documents == expected.documents
        assert torch.equal(plan.position_ids, expected.position_ids)
        for window in WINDOWS:
            assert torch.equal(run(plan, window), run(expected, window))
        if len(seen) > 3:
            asked = {key[0] for key in plan.blueprint.asked}
            assert asked == {(-1, 0), (5, 0)}, "what calls ask is made ahead"
        seen.append(batch)
    assert seen == batches
    wait_until_ended()


def test_one_rank_alone():
    """Without a group, and with functions for everything."""
    given = prefetch_plans(
        [4, 9], total_tokens=first, position_ids=lambda n: range(n), mask_slices=lambda n: []
    )
    assert len(given) == 2
    for _ in range(2):
        assert [(n, plan.total_tokens) for n, plan in given] == [(4, 4), (9, 9)]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_dataloaders_with_workers(context):
    loader = DataLoader(Batches(), batch_size=None, num_workers=2, multiprocessing_context=context)
    got = prefetch_plans(loader, cu_seqlens=first)
    assert len(got) == 6
    assert [plan.documents[0] for _, plan in got] == [(0, 3 + n) for n in range(6)]
    for _, _plan in got:
        break
    wait_until_ended()


def test_workers_are_forked_by_the_loops_own_thread():
    """A child of another thread destroys what that one does not own, and may hang in it."""
    began = []

    class Loader:
        def __iter__(self):
            began.append(threading.current_thread())
            return iter([[0, 20]])

    assert len(list(prefetch_plans(Loader(), cu_seqlens=first))) == 1
    assert began == [threading.current_thread()]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_it_never_runs_ahead_further_than_asked(depth):
    taken, ended = [], []

    def batches():
        try:
            for number in range(20):
                taken.append(number)
                yield offsets_of(number)
        finally:
            ended.append(True)

    for number, _ in enumerate(prefetch_plans(batches(), cu_seqlens=first, depth=depth)):
        time.sleep(0.03)
        assert len(taken) <= number + 1 + depth
        if number == 5:
            break
    wait_until_ended()
    assert ended == [True], "the caller's generator has ended too"


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_exceptions_of_the_batches_come_in_their_place(error):
    def batches():
        yield offsets_of(0)
        raise error

    iterator = iter(prefetch_plans(batches(), cu_seqlens=first))
    next(iterator)
    with pytest.raises(type(error)):
        next(iterator)
    wait_until_ended()


@pytest.mark.parametrize("offsets", [None, []])
def test_batches_without_offsets_are_refused(offsets):
    with pytest.raises(ValueError, match="cu_seqlens must return offsets for each batch"):
        list(prefetch_plans([offsets], cu_seqlens=first))


def test_an_exception_in_the_loop_ends_the_thread():
    def loop():
        for _ in prefetch_plans([offsets_of(n) for n in range(9)], cu_seqlens=first):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()
    wait_until_ended()


def wait_for_worker():
    worker = prefetch._worker()
    for _ in range(600):
        if worker.is_ready:
            return worker
        time.sleep(0.1)
    raise AssertionError("the process does not start")


def test_the_process_makes_the_same_blueprints():
    worker = wait_for_worker()
    made = []
    make = worker.make

    def recording(request):
        made.append(request)
        return make(request)

    with mock.patch.object(worker, "make", recording):
        for batch, plan in prefetch_plans([offsets_of(n) for n in range(4)], cu_seqlens=first):
            expected = make_cp_plan(20, cu_seqlens=batch)
            assert plan.layout == expected.layout
            assert torch.equal(run(plan), run(expected))
    assert len(made) == 4
    assert made[-1][-1], "what earlier calls asked is made ahead"


def test_a_process_that_dies_is_named_and_another_one_starts():
    worker = wait_for_worker()
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(RuntimeError, match="the process that plans ahead has died, with exit code"):
        list(prefetch_plans([[0, 20]], cu_seqlens=first))
    assert len(list(prefetch_plans([[0, 20]], cu_seqlens=first))) == 1
    assert wait_for_worker() is not worker


def test_a_forked_process_starts_its_own():
    worker = wait_for_worker()
    until_closed, closed = os.pipe()
    child = os.fork()
    if child == 0:  # nothing of pytest may run here
        status = 1
        with contextlib.suppress(BaseException):
            os.close(closed)
            other = prefetch._worker()
            status = int(other is worker)
            other.close()
            os.read(until_closed, 1)
        os._exit(status)
    os.close(until_closed)
    assert len(list(prefetch_plans([[0, 20]], cu_seqlens=first))) == 1
    assert prefetch._worker() is worker
    start = time.perf_counter()
    worker.close()  # while the child lives
    assert time.perf_counter() - start < 3
    assert worker.has_ended
    prefetch._worker.cache_clear()
    os.close(closed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_errors_of_the_process_are_raised_here():
    with pytest.raises(AttributeError):
        wait_for_worker().make((None, 1, 0, (), ()))


def test_ranks_that_differ_are_told():
    run_on_ranks(2, body_differ)


def body_differ(group, device) -> None:
    rank = dist.get_rank(group)

    def iterate(batches):
        for _ in prefetch_plans(batches, group=group, cu_seqlens=first):
            pass

    with pytest.raises(ValueError, match="must not fall|rank 1 was given something invalid"):
        iterate([[0, 20], [0, 30, 20] if rank else [0, 20]])
    with pytest.raises(ValueError, match="same cu_seqlens, mask_slices and position_ids"):
        iterate([[0, 5 + rank, 20]])
    with pytest.raises(ValueError, match="the same call, got rank 0: 'prefetch_plans, at the end"):
        iterate([[0, 20]] * (2 + rank))
    iterate([[0, 20]] * 3)
    for wrong in ({"depth": 0}, {"layout": "x"}, {"transport": "x"}, {"on_hang": "x"}):
        options = wrong if rank else {}
        plans = prefetch_plans([[0, 20]], group=group, cu_seqlens=first, **options)
        dist.barrier(group)  # nothing is sent before the iteration begins
        with pytest.raises(ValueError, match="must be|rank 1 was given something invalid"):
            list(plans)
    iterate([[0, 20]] * 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "cu_seqlens or total_tokens must be given: functions of a batch"),
        ({"cu_seqlens": [0, 4]}, TypeError, "cu_seqlens must be a function of a batch or None"),
        ({"cu_seqlens": first, "depth": 0}, ValueError, "depth must be an int >= 1, got 0"),
        ({"cu_seqlens": first, "group": 3}, TypeError, "group must be a ProcessGroup"),
        ({"cu_seqlens": first, "layout": "ring"}, ValueError, "layout must be one of"),
        ({"cu_seqlens": first, "windows": (3,)}, ValueError, "each of windows must be two"),
        ({"cu_seqlens": first, "windows": None}, TypeError, "windows must be a sequence"),
        ({"cu_seqlens": first, "transport": "x"}, ValueError, "transport must be one of"),
        ({"cu_seqlens": first, "on_hang": "x"}, ValueError, "on_hang must be one of"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        prefetch_plans([], **options)


@pytest.mark.parametrize(
    "wrong", [5, torch.tensor(20), "abc", {"a": 1}, {0, 20}, torch.tensor([[0, 20]]), [0, None]]
)
def test_functions_that_return_no_offsets(wrong):
    with pytest.raises((TypeError, ValueError), match="cu_seqlens must"):
        list(prefetch_plans([0], cu_seqlens=lambda _: wrong))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_blueprints_travel(num_ranks):
    run_on_ranks(num_ranks, body_blueprints)


def body_blueprints(group, device) -> None:
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    blueprint = make_cp_blueprint(20, cp_size=size, rank=rank, cu_seqlens=[0, 7, 20])
    plan = make_cp_plan(pickle.loads(pickle.dumps(blueprint)), group=group)
    other = make_cp_plan(20, cu_seqlens=[0, 7, 20], group=group)
    assert torch.equal(run(plan), run(other))
    used = make_cp_plan(pickle.loads(pickle.dumps(plan.blueprint)), group=group)
    assert torch.equal(run(used), run(other)), "with the schedules that it holds by now"
    for options in ({"cu_seqlens": [0, 20]}, {"layout": "zigzag"}):
        with pytest.raises(ValueError, match="must be given to make_cp_blueprint, not beside"):
            make_cp_plan(blueprint, group=group, **options)
    wrong = make_cp_blueprint(20, cp_size=size + 1, rank=rank)
    with pytest.raises(ValueError, match="the blueprint must be for this rank"):
        make_cp_plan(wrong, group=group)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cp_size": 0, "rank": 0}, ValueError, "cp_size must be an int >= 1, got 0"),
        ({"cp_size": 2, "rank": 2}, ValueError, "rank must be an int from 0 to cp_size - 1, 1"),
        ({"cp_size": 2, "rank": 0, "layout": "ring"}, ValueError, "layout must be one of"),
        ({"cp_size": 2, "rank": 0, "windows": (3,)}, ValueError, "each of windows must be two"),
    ],
)
def test_wrong_blueprints(options, error, message):
    with pytest.raises(error, match=message):
        make_cp_blueprint(20, **options)
