"""Stream operations of the CUDA driver through ctypes: copies, flags and events, none of which uses an SM.

PyTorch offers no flags, and its events and copies take the host several times as long, for which a short sequence would wait.

Flags are 32-bit words; waiting is for ``(int32)(flag - value) >= 0``, so that counters may wrap around.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from magi_sink_cp.kernels.flash import NotUsableError

_WAIT_UNTIL_GEQ = 0
_DISABLE_TIMING = 2
_NON_BLOCKING = 1  # does not wait for the legacy default stream
_MOST_LINKS = 18
_DEFAULT = 0  # of a write: everything before it in the stream is visible to whoever sees it, on any device


def copy(target: int, source: int, num_bytes: int, stream: int) -> None:
    """Copy between addresses of this device or of a peer, by a copy engine."""
    driver = _driver()
    _check(
        driver.cuMemcpyDtoDAsync_v2(ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(num_bytes), _handle(stream)),
        "cuMemcpyDtoDAsync",
    )


def write_flag(address: int, value: int, stream: int) -> None:
    """Set a flag of this device, of a peer, or in pinned host memory, after everything before it in the stream."""
    driver = _driver()
    _check(
        driver.cuStreamWriteValue32_v2(_handle(stream), ctypes.c_uint64(address), ctypes.c_uint32(value & 0xFFFFFFFF), _DEFAULT),
        "cuStreamWriteValue32",
    )


def wait_flag(address: int, value: int, stream: int) -> None:
    """Hold the stream until a flag of this device has reached ``value``."""
    driver = _driver()
    _check(
        driver.cuStreamWaitValue32_v2(
            _handle(stream), ctypes.c_uint64(address), ctypes.c_uint32(value & 0xFFFFFFFF), _WAIT_UNTIL_GEQ
        ),
        "cuStreamWaitValue32",
    )


def new_stream() -> int:
    """A stream of the current device that lives as long as the process."""
    stream = Handle()
    _check(_driver().cuStreamCreate(ctypes.byref(stream), _NON_BLOCKING), "cuStreamCreate")
    assert stream.value is not None, "cuStreamCreate succeeded"
    return stream.value


Handle = ctypes.c_void_p


class Event:
    """A point in a stream that other streams can wait for; its handle goes back to ``free`` when nobody holds it any more."""

    def __init__(self, stream: int, free: list[Handle]) -> None:
        self._free = free
        try:
            self._event = free.pop()
        except IndexError:
            self._event = _new_event()
        _check(_driver().cuEventRecord(self._event, _handle(stream)), "cuEventRecord")

    def hold(self, stream: int) -> None:
        """Hold the stream until the point is reached."""
        _check(_driver().cuStreamWaitEvent(_handle(stream), self._event, 0), "cuStreamWaitEvent")

    def __del__(self) -> None:
        if hasattr(self, "_event"):
            self._free.append(self._event)


def _new_event() -> Handle:
    event = Handle()
    _check(_driver().cuEventCreate(ctypes.byref(event), _DISABLE_TIMING), "cuEventCreate")
    return event


def check_available() -> None:
    """Raise NotUsableError if this process has no NVIDIA driver with these operations."""
    _driver()


def missing_nvlink() -> str | None:
    """Why copies from the current GPU to others do not go over NVLink, or None: NVML knows its links, and whether one is active."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        return f"NVML, which knows of NVLink, does not load: {error}"
    device, bus, handle, active = ctypes.c_int(), ctypes.create_string_buffer(32), ctypes.c_void_p(), ctypes.c_uint()
    _check(_driver().cuDeviceGet(ctypes.byref(device), torch.cuda.current_device()), "cuDeviceGet")
    _check(_driver().cuDeviceGetPCIBusId(bus, len(bus), device), "cuDeviceGetPCIBusId")
    result = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(handle))
    if result:
        return f"NVML, which knows of NVLink, fails with error {result}"
    for link in range(_MOST_LINKS):
        if nvml.nvmlDeviceGetNvLinkState(handle, link, ctypes.byref(active)) == 0 and active.value:
            return None
    return f"GPU {bus.value.decode()} has no active NVLink"


@functools.cache
def _driver() -> ctypes.CDLL:
    if torch.version.hip is not None or not torch.cuda.is_available():
        raise NotUsableError("torch sees no CUDA GPU")
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NotUsableError(f"the CUDA driver library does not load: {error}") from error
    for name in ("cuMemcpyDtoDAsync_v2", "cuStreamWriteValue32_v2", "cuStreamWaitValue32_v2"):
        if not hasattr(driver, name):
            raise NotUsableError(f"the CUDA driver has no {name} (CUDA 11.7 and later have)")
    return driver


def _handle(stream: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(stream)


def _check(result: int, what: str) -> None:
    if result:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(result, ctypes.byref(name))
        raise RuntimeError(f"{what} failed: {(name.value or b'unknown error').decode()} ({result})")
