"""Plans that are made ahead of the training loop.

A thread takes the batches. A process makes their blueprints, as a thread would hold Python's lock
while the loop launches kernels. Until the process has started, the thread makes them.
"""

from __future__ import annotations

import atexit
import functools
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from magi_sink_cp.dist.make_plan import (
    agree_on_end,
    check_attachment,
    check_blueprint_arguments,
    last_offset,
    make_cp_plan,
    process_group,
    report_error,
)
from magi_sink_cp.dist.plan import CPPlan
from magi_sink_cp.dist.planning.blueprint import CPBlueprint
from magi_sink_cp.dist.planning.worker import Worker, make_ahead
from magi_sink_cp.kernels.checks import as_count

Batch = TypeVar("Batch")

# How often a thread that waits looks whether the loop has ended.
_LOOK_S = 0.1


def prefetch_plans(
    batches: Iterable[Batch],
    *,
    group: ProcessGroup | DeviceMesh | None = None,
    cu_seqlens: Callable[[Batch], Any] | None = None,
    total_tokens: Callable[[Batch], int] | None = None,
    mask_slices: Callable[[Batch], Any] | None = None,
    position_ids: Callable[[Batch], Any] | None = None,
    layout: str = "auto",
    windows: Sequence[Sequence[int | None]] = ((-1, 0),),
    transport: str = "auto",
    on_hang: str = "abort",
    depth: int = 2,
) -> PlanPrefetcher[Batch]:
    """Iterate over (batch, plan), with the plans made ahead in a process.

    It makes the blueprints (:func:`magi_sink_cp.make_cp_blueprint`), and ahead of the first call
    also what the calls of earlier plans asked for. In the loop a blueprint is only attached to the
    group. Every rank must iterate over as many batches, and use the plans alike::

        for batch, plan in prefetch_plans(loader, group=group, cu_seqlens=itemgetter("cu_seqlens")):
            ...

    Args:
        batches: any iterable; a DataLoader with workers too. It is iterated in a thread.
        group: the cp group, as in :func:`magi_sink_cp.make_cp_plan`.
        cu_seqlens, total_tokens, mask_slices, position_ids: each takes a batch and returns the
            argument of make_cp_plan. They run in the thread; give tensors of the CPU. Without
            total_tokens it is the end of cu_seqlens, so one of the two is needed.
        layout, windows, transport, on_hang: as in make_cp_blueprint and make_cp_plan.
        depth: at most so many batches are taken ahead of the loop.

    Returns:
        An iterable with the length of ``batches``, if that has one. Each iteration over it iterates
        over ``batches`` anew.

    Raises:
        TypeError, ValueError: an argument is invalid. With a group this raises on every rank, when
            the iteration begins, as nothing is sent before; a ``group`` that is none of this rank
            raises at once, on this rank alone. While iterating: what ``batches``, the functions and
            make_cp_plan raise, in the place of the batch that they concern.
    """
    cp_group = process_group(group)
    functions = {
        "cu_seqlens": cu_seqlens,
        "total_tokens": total_tokens,
        "mask_slices": mask_slices,
        "position_ids": position_ids,
    }
    try:
        _check_functions(functions)
        *_, limits, _ = check_blueprint_arguments(
            0, cp_size=1, rank=0, layout=layout, windows=windows
        )
        check_attachment(transport, on_hang, cp_group)
        depth = as_count("depth", depth)
    except Exception as error:
        if cp_group is None:
            raise
        return PlanPrefetcher(_Wrong(error), cp_group, {}, {}, {}, 1)
    return PlanPrefetcher(
        batches,
        cp_group,
        {name: function for name, function in functions.items() if function is not None},
        {"layout": layout, "windows": limits},
        {"transport": transport, "on_hang": on_hang},
        depth,
    )


@dataclass
class _Wrong:
    """Stands for the batches where an argument is invalid: raises as soon as it is iterated."""

    error: Exception

    def __iter__(self) -> NoReturn:
        raise self.error


def _check_functions(functions: Mapping[str, object]) -> None:
    if functions["cu_seqlens"] is None and functions["total_tokens"] is None:
        raise ValueError("cu_seqlens or total_tokens must be given: functions of a batch")
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(
                f"{name} must be a function of a batch or None, got {type(function).__name__}"
            )


@dataclass
class _Failure:
    """An exception of the thread, on its way to the loop."""

    error: BaseException


class _End:
    """There are no more batches."""


class PlanPrefetcher(Generic[Batch]):
    """What :func:`prefetch_plans` returns."""

    def __init__(
        self,
        batches: Iterable[Batch],
        group: ProcessGroup | None,
        functions: dict[str, Callable[[Batch], Any]],
        blueprint_options: dict[str, Any],
        plan_options: dict[str, Any],
        depth: int,
    ) -> None:
        self._batches, self._group = batches, group
        self._functions = functions
        self._blueprint_options, self._plan_options = blueprint_options, plan_options
        self._depth = depth
        # The blueprint of the latest plan that was used: its calls say what the next ones will ask.
        self._latest: CPBlueprint | None = None

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Batch, CPPlan]]:
        # Here, not in the thread: a DataLoader forks its workers now. The child of a thread
        # destroys what the main thread keeps for itself, as DTensors keep their process groups,
        # and hangs in that.
        try:
            iterator = iter(self._batches)
        except Exception as error:
            if self._group is not None:
                report_error(error, self._group)
            raise
        ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        room, stop = threading.Semaphore(self._depth), threading.Event()
        thread = threading.Thread(
            target=self._work,
            args=(iterator, ready, room, stop),
            name="magi_sink_cp plans",
            daemon=True,
        )
        thread.start()
        try:
            while not isinstance(item := ready.get(), _End):
                room.release()
                if isinstance(item, _Failure):
                    if self._group is not None and isinstance(item.error, Exception):
                        report_error(item.error, self._group)
                    raise item.error
                batch, blueprint = item
                plan = make_cp_plan(blueprint, group=self._group, **self._plan_options)
                del item, blueprint
                yield batch, plan
                self._latest = plan.blueprint
                del batch, plan
            if self._group is not None:
                agree_on_end(self._group)
        finally:
            stop.set()
            thread.join(timeout=10 * _LOOK_S)

    def _work(
        self,
        iterator: Iterator[Batch],
        ready: queue.SimpleQueue[Any],
        room: threading.Semaphore,
        stop: threading.Event,
    ) -> None:
        """Put (batch, blueprint) where there is room, then the end; or an exception."""
        try:
            while _wait_for(room, stop):
                try:
                    batch = next(iterator)
                except StopIteration:
                    ready.put(_End())
                    return
                ready.put((batch, self._blueprint(batch)))
                del batch
        except BaseException as error:  # the loop raises it
            ready.put(_Failure(error))
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()  # a generator ends here, not when it is collected

    def _blueprint(self, batch: Batch) -> CPBlueprint:
        given = {name: function(batch) for name, function in self._functions.items()}
        total = given.pop("total_tokens", None)
        if total is None:
            total = last_offset(given.get("cu_seqlens"))
        group = self._group
        what, cp_size, rank, windows, _ = check_blueprint_arguments(
            total,
            cp_size=1 if group is None else dist.get_world_size(group),
            rank=0 if group is None else dist.get_rank(group),
            **given,
            **self._blueprint_options,
        )
        asked = [] if self._latest is None else self._latest.asked
        request = what, cp_size, rank, windows, asked
        worker = _worker()
        if not worker.is_ready:
            return make_ahead(request)
        try:
            return worker.make(request)
        finally:
            if worker.has_ended:
                _worker.cache_clear()  # the next loop starts another


@functools.cache
def _worker() -> Worker:
    """This process's own, which ends with it."""
    worker = Worker()
    atexit.register(worker.close)
    return worker


def _leave_worker_to_parent() -> None:
    """In a forked process: the answers would be its parent's. It starts another."""
    if _worker.cache_info().currsize:
        worker = _worker()
        worker.let_go()
        atexit.unregister(worker.close)
        _worker.cache_clear()


os.register_at_fork(after_in_child=_leave_worker_to_parent)


def _wait_for(room: threading.Semaphore, stop: threading.Event) -> bool:
    """Whether there is room before the loop ends."""
    while not stop.is_set():
        if room.acquire(timeout=_LOOK_S):
            return not stop.is_set()
    return False
