"""What ends a process whose GPU waits in vain, without a GPU: the stream's word is written by the test."""

from __future__ import annotations

import ctypes
import threading
import time
from unittest import mock

import pytest
import torch

from magi_sink_cp.dist import watchdog
from magi_sink_cp.dist.schedule import Exchange, Message


def exchange(number: int) -> Exchange:
    return Exchange(f"group_cast of stage {number}", (Message(2, (0, 4)),), (Message(1, (0, 4)),), 4)


@pytest.fixture
def dog():
    """A watchdog, the flags that were enqueued, and what it would have aborted for."""
    enqueued, aborted, noticed = [], [], threading.Event()

    def abort(what, waited_s):
        aborted.append((str(what), waited_s))
        noticed.set()

    with (
        mock.patch.object(watchdog, "_INTERVAL_S", 0.02),
        mock.patch.object(watchdog.driver, "write_flag", lambda address, value, stream: enqueued.append((address, value))),
        mock.patch.object(watchdog, "_abort", abort),
    ):
        watching = watchdog._Watchdog(torch.zeros(watchdog._SLOTS, dtype=torch.int32))
        yield watching, enqueued, aborted, noticed
        watching.stopped.set()
        time.sleep(0.1)


def finish(flag) -> None:
    address, value = flag
    ctypes.c_uint32.from_address(address).value = value


def test_what_comes_in_time_is_forgotten(dog):
    watching, enqueued, aborted, _ = dog
    for number in range(20):
        watching.watch(exchange(number), 0.3, stream=0)
    for flag in enqueued:
        finish(flag)
    time.sleep(0.5)
    assert not aborted
    assert not watching._waiting


def test_the_one_that_does_not_come_is_named(dog):
    """Also behind others that have longer to wait and in front of others that are through."""
    watching, enqueued, aborted, noticed = dog
    watching.watch(exchange(1), 60, stream=0)
    watching.watch(exchange(2), 0.2, stream=1)
    watching.watch(exchange(3), 0.2, stream=2)
    finish(enqueued[2])
    assert noticed.wait(5)
    (text, waited_s) = aborted[0]
    assert text == "group_cast of stage 2 (from cp ranks [1], to cp ranks [2])"
    assert 0.18 <= waited_s < 5


def test_numbers_that_wrap_around(dog):
    watching, enqueued, aborted, _ = dog
    watching._count = 0x7FFFFFFF - 2
    for number in range(6):
        watching.watch(exchange(number), 0.2, stream=0)
        finish(enqueued[-1])
    time.sleep(0.4)
    assert not aborted


def test_a_flag_that_cannot_be_enqueued_is_not_waited_for(dog):
    watching, _, aborted, _ = dog
    with mock.patch.object(watchdog.driver, "write_flag", side_effect=RuntimeError("cuStreamWriteValue32 failed")):
        with pytest.raises(RuntimeError, match="cuStreamWriteValue32 failed"):
            watching.watch(exchange(1), 0.05, stream=0)
        time.sleep(0.2)
    assert not aborted


def test_the_message(capfd):
    with mock.patch.object(watchdog.os, "abort") as abort:
        watchdog._abort(exchange(1), 9.3)
    assert abort.called
    assert "group_cast of stage 1 (from cp ranks [1], to cp ranks [2]) did not finish within 9 s" in capfd.readouterr().err
