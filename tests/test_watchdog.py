"""What ends a process whose GPU waits in vain, without a GPU: the stream's word is written by the test."""

from __future__ import annotations

import ctypes
import io
import threading
import time
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._C._distributed_c10d import ErrorType

from magi_sink_cp.dist import watchdog
from magi_sink_cp.dist.schedule import Exchange, Message


def exchange(number: int) -> Exchange:
    return Exchange(f"group_cast of stage {number}", (Message(2, (0, 4)),), (Message(1, (0, 4)),), 4)


def within(timeout_s: float, backend: object = None) -> watchdog._Watched:
    return watchdog._Watched(backend or SimpleNamespace(), timeout_s)


class Backend:
    """Tells of an error, as NCCL's does. ``ErrorType`` is torch's own."""

    def __init__(self, error: str = "SUCCESS") -> None:
        self.error = error
        self.asked = 0

    def get_error(self) -> ErrorType:
        self.asked += 1
        return ErrorType.__members__[self.error]


@pytest.fixture
def enqueued():
    """The flags that streams are to write: addresses and values."""
    flags = []
    with mock.patch.object(watchdog.driver, "write_flag", lambda address, value, stream: flags.append((address, value))):
        yield flags


@pytest.fixture
def dog(enqueued):
    """A watchdog, what it would have aborted for, and an event for the first of that."""
    aborted, noticed = [], threading.Event()

    def abort(what, waited_s):
        aborted.append((str(what), waited_s))
        noticed.set()

    with (
        mock.patch.object(watchdog, "_INTERVAL_S", 0.02),
        mock.patch.object(watchdog, "_abort", abort),
    ):
        watching = watchdog._Watchdog(torch.zeros(watchdog._SLOTS, dtype=torch.int32))
        yield watching, aborted, noticed
        watching.stopped.set()
        time.sleep(0.1)


@pytest.fixture
def still_dog(enqueued):
    """A watchdog that looks when it is told to."""
    with mock.patch.object(watchdog._Watchdog, "_run"):
        yield watchdog._Watchdog(torch.zeros(watchdog._SLOTS, dtype=torch.int32))


def finish(flag) -> None:
    address, value = flag
    ctypes.c_uint32.from_address(address).value = value


def test_what_comes_in_time_is_forgotten(dog, enqueued):
    watching, aborted, _ = dog
    for number in range(20):
        watching.watch(exchange(number), within(0.3), stream=0)
    for flag in enqueued:
        finish(flag)
    time.sleep(0.5)
    assert not aborted
    assert not watching._waiting


def test_the_one_that_does_not_come_is_named(dog, enqueued):
    """Also behind others that have longer to wait and in front of others that are through."""
    watching, aborted, noticed = dog
    watching.watch(exchange(1), within(60), stream=0)
    watching.watch(exchange(2), within(0.2), stream=1)
    watching.watch(exchange(3), within(0.2), stream=2)
    finish(enqueued[2])
    assert noticed.wait(5)
    (text, waited_s) = aborted[0]
    assert text == "group_cast of stage 2 (from cp ranks [1], to cp ranks [2])"
    assert 0.18 <= waited_s < 5


def test_numbers_that_wrap_around(dog, enqueued):
    watching, aborted, _ = dog
    watching._count = 0x7FFFFFFF - 2
    for number in range(6):
        watching.watch(exchange(number), within(0.2), stream=0)
        finish(enqueued[-1])
    time.sleep(0.4)
    assert not aborted


def test_a_flag_that_cannot_be_enqueued_is_not_waited_for(dog):
    watching, aborted, _ = dog
    with mock.patch.object(watchdog.driver, "write_flag", side_effect=RuntimeError("cuStreamWriteValue32 failed")):
        with pytest.raises(RuntimeError, match="cuStreamWriteValue32 failed"):
            watching.watch(exchange(1), within(0.05), stream=0)
        time.sleep(0.2)
    assert not aborted


@pytest.mark.parametrize("error", ["COMM_ERROR", "REMOTE_ERROR", "TIMEOUT"])
def test_an_error_of_the_backend_names_the_first_transfer_that_waits(dog, enqueued, capfd, error):
    """Once, before the timeout, and not for another group; the end is left to torch."""
    watching, aborted, _ = dog
    broken = Backend()
    group = within(60, broken)
    watching.watch(exchange(1), within(60, Backend()), stream=0)
    for number in (2, 3, 4):
        watching.watch(exchange(number), group, stream=0)
    finish(enqueued[1])
    time.sleep(0.2)
    assert not capfd.readouterr().err
    broken.error = error
    time.sleep(0.3)
    told = capfd.readouterr().err
    assert told.count("magi_sink_cp") == 1
    assert "group_cast of stage 3 (from cp ranks [1], to cp ranks [2]) is not through after " in told
    assert f"reports {error}" in told
    assert not aborted


def test_an_error_does_not_replace_the_end_at_nine_tenths(dog, capfd):
    watching, aborted, noticed = dog
    watching.watch(exchange(1), within(0.3, Backend("COMM_ERROR")), stream=0)
    assert noticed.wait(5)
    assert "reports COMM_ERROR" in capfd.readouterr().err
    assert aborted[0][0].startswith("group_cast of stage 1 ")


@pytest.mark.parametrize("backend", [SimpleNamespace(), SimpleNamespace(get_error=mock.Mock(side_effect=RuntimeError))])
def test_a_backend_that_does_not_tell(dog, capfd, backend):
    watching, _, noticed = dog
    watching.watch(exchange(1), within(0.3, backend), stream=0)
    assert noticed.wait(5)
    assert not capfd.readouterr().err


def test_what_is_added_during_a_look_comes_after_the_others(still_dog, capfd):
    watching, broken = still_dog, Backend("COMM_ERROR")
    group, through = within(60, broken), watching._through

    def adding(expected):
        if expected.number == 1:
            watching.watch(exchange(3), group, stream=0)
        return expected.number == 1 or through(expected)

    for number in (1, 2):
        watching.watch(exchange(number), group, stream=0)
    with mock.patch.object(watching, "_through", adding):
        watching._look()
    assert [expected.exchange for expected in watching._waiting] == [exchange(2), exchange(3)]
    assert "group_cast of stage 2 " in capfd.readouterr().err


def test_what_finishes_while_others_are_asked_is_neither_late_nor_named(still_dog, enqueued, capfd):
    """A look that takes long (a stopped process, a lock that is held) tells the time and the words of its start."""
    watching = still_dog

    def slow() -> ErrorType:
        finish(enqueued[-1])
        time.sleep(0.2)
        return ErrorType.COMM_ERROR

    with mock.patch.object(watchdog, "_abort") as abort:
        watching.watch(exchange(1), within(0.1, SimpleNamespace(get_error=slow)), stream=0)
        watching._look()
        watching._look()
    assert not abort.called
    assert not capfd.readouterr().err
    assert not watching._waiting


def test_what_finishes_while_others_are_looked_at_is_not_late(still_dog, enqueued):
    watching, through = still_dog, still_dog._through

    def slow(expected):
        is_through = through(expected)
        if expected.number == 2:
            finish(enqueued[0])
            time.sleep(0.2)
        return is_through

    with mock.patch.object(watching, "_through", slow), mock.patch.object(watchdog, "_abort") as abort:
        for number, timeout_s in ((1, 0.1), (2, 60)):
            watching.watch(exchange(number), within(timeout_s), stream=0)
        watching._look()
        watching._look()
    assert not abort.called
    assert [expected.number for expected in watching._waiting] == [2]


def test_a_backend_is_asked_once_a_look_and_not_kept(still_dog, enqueued):
    backend = Backend()
    group = within(60, backend)
    for number in range(5):
        still_dog.watch(exchange(number), group, stream=0)
    still_dog._look()
    assert backend.asked == 1
    for flag in enqueued:
        finish(flag)
    still_dog._look()
    gone = weakref.ref(backend)
    del backend, group
    assert gone() is None


def test_a_closed_stderr_does_not_keep_the_process(monkeypatch):
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(watchdog.sys, "stderr", stream)
    with mock.patch.object(watchdog.os, "abort") as abort:
        watchdog._report(exchange(1), 1, "COMM_ERROR")
        watchdog._abort(exchange(1), 9.3)
    assert abort.called


def test_the_message(capfd):
    with mock.patch.object(watchdog.os, "abort") as abort:
        watchdog._abort(exchange(1), 9.3)
    assert abort.called
    assert "group_cast of stage 1 (from cp ranks [1], to cp ranks [2]) did not finish within 9 s" in capfd.readouterr().err
