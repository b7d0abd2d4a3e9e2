"""What ends a process whose GPU waits in vain, without a GPU.

The stream's word is written by the test.
"""

from __future__ import annotations

import ctypes
import datetime
import io
import threading
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._C._distributed_c10d import ErrorType

from magi_sink_cp.dist.guard import watchdog
from magi_sink_cp.dist.planning.exchange import Exchange, Message


def exchange(number: int) -> Exchange:
    return Exchange(
        f"group_cast of stage {number}", (Message(2, (0, 4)),), (Message(1, (0, 4)),), 4
    )


class Backend:
    """Tells of an error, as NCCL's does. ``ErrorType`` is torch's own."""

    def __init__(self, error: str = "SUCCESS") -> None:
        self.error = error
        self.asked = 0

    def get_error(self) -> ErrorType:
        self.asked += 1
        return ErrorType.__members__[self.error]


def within(timeout_s: float, backend: object = None) -> watchdog._Watched:
    """A group whose ``backend`` has this timeout."""
    backend = backend or SimpleNamespace()
    backend.options = SimpleNamespace(_timeout=datetime.timedelta(seconds=timeout_s))
    return watchdog._Watched(backend)


@pytest.fixture
def enqueued():
    """The flags that streams are to write: addresses and values."""
    flags = []
    with mock.patch.object(
        watchdog.driver, "write_flag", lambda address, value, stream: flags.append((address, value))
    ):
        yield flags


@pytest.fixture
def clock():
    """The time of the watchdog's module; a test moves ``now``, in seconds."""
    moved = SimpleNamespace(now=1000.0)
    with mock.patch.object(watchdog, "time", SimpleNamespace(monotonic=lambda: moved.now)):
        yield moved


@pytest.fixture
def aborted():
    """What would have ended the process: text and seconds waited."""
    ends = []
    with mock.patch.object(
        watchdog, "_abort", lambda what, waited_s: ends.append((str(what), waited_s))
    ):
        yield ends


class Dog(watchdog._Watchdog):
    def watch(self, what: object, group: watchdog._Watched) -> None:
        """A stream that is to come this far."""
        self.write(self.expect(what, group), stream=0)


@pytest.fixture
def dog(enqueued, clock, aborted):
    """A watchdog that looks when a test tells it to."""
    with mock.patch.object(Dog, "_run"):
        yield Dog(torch.zeros(watchdog._SLOTS, dtype=torch.int32))


@pytest.fixture
def group(dog, monkeypatch):
    """A process group on GPUs, with a timeout of 60 s.

    What its ranks wait for is expected by ``dog``.
    """
    monkeypatch.setattr(watchdog, "_watchdog", dog)
    monkeypatch.setattr(watchdog.torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(
        watchdog.torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5)
    )
    return mock.Mock(_get_backend=mock.Mock(return_value=within(60, Backend()).backend))


def finish(flag) -> None:
    address, value = flag
    ctypes.c_uint32.from_address(address).value = value


def test_what_comes_in_time_is_forgotten(dog, enqueued, clock, aborted):
    for number in range(20):
        dog.watch(exchange(number), within(10))
    for flag in enqueued:
        finish(flag)
    clock.now += 11
    dog._look()
    assert not aborted
    assert not dog._waiting


def test_the_one_that_does_not_come_is_named(dog, enqueued, clock, aborted):
    """Also behind others that have longer to wait and in front of others that are through."""
    dog.watch(exchange(1), within(60))
    dog.watch(exchange(2), within(10))
    dog.watch(exchange(3), within(10))
    finish(enqueued[2])
    clock.now += 8.9
    dog._look()
    assert not aborted
    clock.now += 0.2
    dog._look()
    assert aborted == [
        ("group_cast of stage 2 (from cp ranks [1], to cp ranks [2])", pytest.approx(9.1))
    ]


def test_a_timeout_that_is_set_later_is_for_what_starts_later(dog, clock, aborted):
    group = within(10)
    dog.watch(exchange(1), group)
    group.backend.options = within(100).backend.options
    clock.now += 2
    dog.watch("all-reduce of dsink", group)
    clock.now += 7.1
    dog._look()
    assert [what.split(" (")[0] for what, _ in aborted] == ["group_cast of stage 1"]
    dog._waiting.popleft()
    clock.now += 82.8
    dog._look()
    assert len(aborted) == 1
    clock.now += 0.2
    dog._look()
    assert aborted[1] == ("all-reduce of dsink", pytest.approx(90.1))


def test_numbers_that_wrap_around(dog, enqueued, clock, aborted):
    dog._count = 0x7FFFFFFF - 2
    for number in range(6):
        dog.watch(exchange(number), within(10))
        finish(enqueued[-1])
    clock.now += 11
    dog._look()
    assert not aborted


def test_a_flag_that_cannot_be_enqueued_is_not_waited_for(dog, clock, aborted):
    with (
        mock.patch.object(
            watchdog.driver, "write_flag", side_effect=RuntimeError("cuStreamWriteValue32 failed")
        ),
        pytest.raises(RuntimeError, match="cuStreamWriteValue32 failed"),
    ):
        dog.watch(exchange(1), within(10))
    clock.now += 11
    dog._look()
    assert not aborted


def test_its_thread_looks_again_and_again(enqueued):
    broken, ended = Backend(), threading.Event()
    with (
        mock.patch.object(watchdog, "_INTERVAL_S", 0.02),
        mock.patch.object(watchdog, "_abort", side_effect=lambda what, waited_s: ended.set()),
    ):
        watching = Dog(torch.zeros(watchdog._SLOTS, dtype=torch.int32))
        [thread] = [
            thread for thread in threading.enumerate() if thread.name == "magi_sink_cp watchdog"
        ]
        try:
            watching.watch(exchange(1), within(0.5, broken))
            assert ended.wait(30)
            assert broken.asked > 1
        finally:
            watching.stopped.set()
            thread.join()


@pytest.mark.parametrize("error", ["COMM_ERROR", "REMOTE_ERROR", "TIMEOUT"])
def test_an_error_of_the_backend_names_the_first_transfer_that_waits(
    dog, enqueued, clock, aborted, capfd, error
):
    """Once, before the timeout, and not for another group; the end is left to torch."""
    broken = Backend()
    group = within(60, broken)
    dog.watch(exchange(1), within(60, Backend()))
    for number in (2, 3, 4):
        dog.watch(exchange(number), group)
    finish(enqueued[1])
    dog._look()
    assert not capfd.readouterr().err
    broken.error = error
    clock.now += 0.5
    for _ in range(3):
        dog._look()
    told = capfd.readouterr().err
    assert told.count("magi_sink_cp") == 1
    assert (
        "group_cast of stage 3 (from cp ranks [1], to cp ranks [2]) has not completed after 0.5 s"
        in told
    )
    assert f"reports {error}" in told
    assert not aborted


def test_an_error_does_not_replace_the_end_at_nine_tenths(dog, clock, aborted, capfd):
    dog.watch(exchange(1), within(10, Backend("COMM_ERROR")))
    dog._look()
    assert "reports COMM_ERROR" in capfd.readouterr().err
    assert not aborted
    clock.now += 9.1
    dog._look()
    assert aborted[0][0].startswith("group_cast of stage 1 ")


@pytest.mark.parametrize(
    "backend", [SimpleNamespace(), SimpleNamespace(get_error=mock.Mock(side_effect=RuntimeError))]
)
def test_a_backend_that_does_not_tell(dog, clock, aborted, capfd, backend):
    dog.watch(exchange(1), within(10, backend))
    dog._look()
    clock.now += 9.1
    dog._look()
    assert aborted
    assert not capfd.readouterr().err


def test_what_is_added_during_a_look_comes_after_the_others(dog, capfd):
    group, through = within(60, Backend("COMM_ERROR")), dog._through

    def adding(expected):
        if expected.number == 1:
            dog.watch(exchange(3), group)
        return expected.number == 1 or through(expected)

    for number in (1, 2):
        dog.watch(exchange(number), group)
    with mock.patch.object(dog, "_through", adding):
        dog._look()
    assert [expected.what for expected in dog._waiting] == [exchange(2), exchange(3)]
    assert "group_cast of stage 2 " in capfd.readouterr().err


def test_what_finishes_while_others_are_asked_is_neither_late_nor_named(
    dog, enqueued, clock, aborted, capfd
):
    """A look that takes long (a stopped process, a lock that is held) tells the time and the
    words of its start.
    """

    def slow() -> ErrorType:
        finish(enqueued[-1])
        clock.now += 20
        return ErrorType.COMM_ERROR

    dog.watch(exchange(1), within(10, SimpleNamespace(get_error=slow)))
    dog._look()
    dog._look()
    assert not aborted
    assert not capfd.readouterr().err
    assert not dog._waiting


def test_what_finishes_while_others_are_looked_at_is_not_late(dog, enqueued, clock, aborted):
    through = dog._through

    def slow(expected):
        is_through = through(expected)
        if expected.number == 2:
            finish(enqueued[0])
            clock.now += 20
        return is_through

    with mock.patch.object(dog, "_through", slow):
        for number, timeout_s in ((1, 10), (2, 60)):
            dog.watch(exchange(number), within(timeout_s))
        dog._look()
        dog._look()
    assert not aborted
    assert [expected.number for expected in dog._waiting] == [2]


def test_a_backend_is_asked_once_a_look_and_not_kept(dog, enqueued):
    backend = Backend()
    group = within(60, backend)
    for number in range(5):
        dog.watch(exchange(number), group)
    dog._look()
    assert backend.asked == 1
    for flag in enqueued:
        finish(flag)
    dog._look()
    gone = weakref.ref(backend)
    del backend, group
    assert gone() is None


@pytest.mark.parametrize("timeout", [datetime.timedelta(seconds=7), None])
def test_a_groups_backend_and_timeout(dog, group, timeout):
    """None: a backend without options, whose group has torch's default."""
    backend = group._get_backend()
    if timeout is None:
        del backend.options
    else:
        backend.options = SimpleNamespace(_timeout=timeout)
    for number in (1, 2):
        watchdog.stream_watcher(group)(exchange(number), 5)
    first, second = dog._waiting
    assert first.group is second.group, "which holds what was told of it"
    assert first.group.backend is backend
    assert (
        first.timeout_s == (timeout or watchdog.dist.constants.default_pg_timeout).total_seconds()
    )
    assert [expected.what for expected in dog._waiting] == [exchange(1), exchange(2)]


class _UsersOwn(io.StringIO):
    """A stderr that was replaced, and fails."""

    def write(self, text: str) -> int:
        raise AttributeError("no file yet")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("stream", [io.StringIO(), _UsersOwn()])
def test_a_stderr_that_fails_does_not_keep_the_process(monkeypatch, stream):
    if type(stream) is io.StringIO:
        stream.close()
    monkeypatch.setattr(watchdog.sys, "stderr", stream)
    with mock.patch.object(watchdog.os, "abort") as abort:
        watchdog._report(exchange(1), 1, "COMM_ERROR")
        watchdog._abort(exchange(1), 9.3)
    assert abort.called


def test_a_process_that_can_start_no_thread_ends_all_the_same():
    with (
        mock.patch.object(
            watchdog.threading.Thread, "start", side_effect=RuntimeError("can't start new thread")
        ),
        mock.patch.object(watchdog.os, "abort") as abort,
    ):
        watchdog._abort(exchange(1), 9.3)
    assert abort.called


def test_a_stderr_that_takes_nothing_does_not_keep_the_process(monkeypatch):
    """Such as a full pipe whose reader has stopped."""
    taken, written = threading.Event(), []
    write = SimpleNamespace(write=lambda text: written.append(taken.wait(10)), flush=lambda: None)
    monkeypatch.setattr(watchdog.sys, "stderr", write)
    monkeypatch.setattr(watchdog, "_STDERR_S", 0.05)
    try:
        with mock.patch.object(watchdog.os, "abort") as abort:
            watchdog._abort(exchange(1), 9.3)
        assert abort.called
        assert not written
    finally:
        taken.set()


class Work:
    """Of torch.distributed."""

    def __init__(self, group_backend: Backend) -> None:
        self.backend = group_backend
        self.through = False

    def is_completed(self) -> bool:
        return self.through or self.backend.error != "SUCCESS"  # as NCCL's

    def wait(self) -> None:
        """On GPUs the stream's wait is enqueued."""


def all_reduce(group, *works) -> watchdog.Communication:
    """Started on a GPU, and not yet waited for."""
    return watchdog.Communication("all-reduce of dsink", group, True, lambda: works)


def test_a_host_that_is_held_at_the_start_is_named(group, dog, clock, aborted):
    def start():
        clock.now += 53.9
        dog._look()
        assert not aborted
        clock.now += 0.2
        dog._look()
        return [None]

    watchdog.Communication("comparing arguments", group, True, start).wait()
    assert aborted == [("comparing arguments", pytest.approx(54.1))]


@pytest.mark.parametrize("through", [False, True])
def test_a_host_may_take_its_time_before_it_waits_for_what_has_come(
    group, dog, clock, aborted, through
):
    """A debugger, a compiler; but one that CUDA holds until what it started is through is named."""
    works = [Work(group._get_backend()) for _ in range(2)]
    communication = all_reduce(group, *works)
    works[0].through, works[1].through = True, through
    clock.now += 55
    dog._look()
    assert aborted == ([] if through else [("all-reduce of dsink", 55)])
    communication.wait()
    clock.now += 53
    dog._look()
    assert len(aborted) == (0 if through else 1), "a stream has its time from where it waits"
    clock.now += 2
    dog._look()
    assert aborted[-1] == ("all-reduce of dsink", 55)


def test_a_host_that_waits_while_it_is_looked_at_is_not_late(group, dog, clock, aborted):
    """The two threads as unluckily as they can be: write() runs after the time was read."""
    work = Work(group._get_backend())
    work.through = True
    communication = all_reduce(group, work)

    class Waits(float):
        def __rmul__(self, other):
            communication.wait()
            return other * float(self)

    [expected] = dog._waiting
    expected.timeout_s = Waits(expected.timeout_s)
    clock.now += 55
    dog._look()
    assert expected.communication is None, "it waited in that moment"
    assert not aborted


def test_a_communication_given_up_while_it_is_looked_at_is_not_late(group, dog, clock, aborted):
    kept = [all_reduce(group, Work(group._get_backend()))]
    through = dog._through

    def then_given_up(expected):
        result = through(expected)
        kept.clear()
        return result

    clock.now += 55
    with mock.patch.object(dog, "_through", then_given_up):
        dog._look()
    assert not aborted


def test_a_host_that_is_held_where_its_stream_shall_wait_is_named(group, dog, clock, aborted):
    """By a queue of the driver that is full."""
    work = Work(group._get_backend())
    communication = all_reduce(group, work)

    def held(address, value, stream):
        clock.now += 55
        dog._look()

    with mock.patch.object(watchdog.driver, "write_flag", held):
        communication.wait()
    assert aborted == [("all-reduce of dsink", 55)]


def test_after_an_error_of_nccl_what_was_started_is_late_though_its_works_say_completed(
    group, dog, clock, aborted
):
    communication = all_reduce(group, Work(group._get_backend()))
    group._get_backend().error = "COMM_ERROR"
    clock.now += 55
    dog._look()
    assert aborted == [("all-reduce of dsink", 55)]
    del communication


def test_works_that_cannot_be_asked_are_late(group, dog, clock, aborted):
    work = SimpleNamespace(is_completed=mock.Mock(side_effect=RuntimeError("CUDA error")))
    communication = all_reduce(group, work)
    clock.now += 55
    dog._look()
    assert aborted
    del communication


def test_the_first_that_was_started_is_named_though_it_is_waited_for_last(
    group, dog, enqueued, clock, capfd
):
    """Over NCCL what comes after it on its stream waits too."""
    dsink, stage = (
        watchdog.Communication(what, group, True, lambda: [Work(group._get_backend())])
        for what in ("dsink", "stage")
    )
    stage.wait()
    dsink.wait()
    group._get_backend().error = "COMM_ERROR"
    dog._look()
    assert "magi_sink_cp: dsink has not completed" in capfd.readouterr().err
    for flag in enqueued:
        finish(flag)
    dog._look()
    assert not dog._waiting


def test_what_a_rank_gives_up_is_not_waited_for(group, dog, enqueued, clock, aborted):
    communication = all_reduce(group, Work(group._get_backend()))
    dog._look()
    assert len(dog._waiting) == 1
    del communication  # the pass failed on this rank
    clock.now += 55
    dog._look()
    assert not aborted
    assert not dog._waiting


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("at", ["start", "wait"])
@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        (
            RuntimeError("connection reset"),
            RuntimeError,
            "all-reduce of dsink failed; a rank has died, .*: connection reset",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_communication_that_fails_says_what_it_was_for_and_is_over(
    group, dog, enqueued, on_gpu, at, error, raised, text
):
    def fail():
        raise error

    start = (
        fail if at == "start" else lambda: [SimpleNamespace(wait=fail, is_completed=lambda: False)]
    )
    with pytest.raises(raised, match=text) as kept:
        watchdog.Communication("all-reduce of dsink", group, on_gpu, start).wait()
    dog._look()
    assert kept.value.__traceback__, "which holds the communication"
    assert not dog._waiting
    assert not enqueued


def test_on_cpus_nothing_is_watched(group, dog):
    communication = watchdog.Communication(
        "all-reduce of dsink", group, False, lambda: [Work(Backend())]
    )
    assert not dog._waiting
    communication.wait()
    assert not dog._waiting


def test_nothing_is_watched_in_a_graph(group, dog, enqueued, monkeypatch):
    """No host takes part in its replays."""
    monkeypatch.setattr(watchdog.torch.cuda, "is_current_stream_capturing", lambda: True)
    all_reduce(group, Work(Backend())).wait()
    assert not dog._waiting
    assert not enqueued


def test_the_message(capfd):
    with mock.patch.object(watchdog.os, "abort") as abort:
        watchdog._abort(exchange(1), 9.3)
    assert abort.called
    assert (
        "group_cast of stage 1 (from cp ranks [1], to cp ranks [2]) did not finish within 9 s"
        in capfd.readouterr().err
    )
