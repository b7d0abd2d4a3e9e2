"""Stream operations of the CUDA driver: copies, flags and events. None of them uses an SM.

They come from cuda-bindings, which torch's CUDA wheels for Linux require. PyTorch itself offers no
flags, and its events and copies take the host several times as long, for which a short sequence
would wait (docs/benchmarks.md).

Flags are 32-bit words. Waiting is for ``(int32)(flag - value) >= 0``: counters may wrap around.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import torch

from magi_sink_cp.kernels.protocol import NotUsableError

_WAIT_UNTIL_GEQ = 0
_DISABLE_TIMING = 2
_NON_BLOCKING = 1  # does not wait for the legacy default stream
_DEFAULT = 0  # of a write: whoever sees it, on any device, sees everything before it in the stream
_MOST_LINKS = 18


def copy(target: int, source: int, num_bytes: int, stream: int) -> None:
    """Copy between addresses of this device or of a peer, by a copy engine."""
    _check(_driver().cuMemcpyDtoDAsync(target, source, num_bytes, stream), "cuMemcpyDtoDAsync")


def write_flag(address: int, value: int, stream: int) -> None:
    """Set a flag, after everything before it in the stream.

    The flag is on this device, on a peer, or in pinned host memory.
    """
    value &= 0xFFFFFFFF
    result = _driver().cuStreamWriteValue32(stream, address, value, _DEFAULT)
    _check(result, "cuStreamWriteValue32")


def wait_flag(address: int, value: int, stream: int) -> None:
    """Hold the stream until a flag of this device has reached ``value``."""
    value &= 0xFFFFFFFF
    result = _driver().cuStreamWaitValue32(stream, address, value, _WAIT_UNTIL_GEQ)
    _check(result, "cuStreamWaitValue32")


def new_stream() -> int:
    """A stream of the current device that lives as long as the process."""
    result = _driver().cuStreamCreate(_NON_BLOCKING)
    _check(result, "cuStreamCreate")
    return int(result[1])


Handle = Any  # a CUevent


class Event:
    """A point in a stream that other streams can wait for.

    When nobody holds it any more, its handle goes back to ``free``.
    """

    def __init__(self, stream: int, free: list[Handle]) -> None:
        self._free = free
        try:
            self._event = free.pop()
        except IndexError:
            result = _driver().cuEventCreate(_DISABLE_TIMING)
            _check(result, "cuEventCreate")
            self._event = result[1]
        _check(_driver().cuEventRecord(self._event, stream), "cuEventRecord")

    def hold(self, stream: int) -> None:
        """Hold the stream until the point is reached."""
        _check(_driver().cuStreamWaitEvent(stream, self._event, 0), "cuStreamWaitEvent")

    def __del__(self) -> None:
        if hasattr(self, "_event"):
            self._free.append(self._event)


def check_available() -> None:
    """Raise NotUsableError if this process cannot use these operations."""
    _driver()


def missing_nvlink() -> str | None:
    """Why copies from the current GPU to others do not use NVLink, or None if a link is active."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        return f"NVML, which knows of NVLink, does not load: {error}"
    gpu: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    bus = f"{gpu.pci_domain_id:08x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    handle, active = ctypes.c_void_p(), ctypes.c_uint()
    failed = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByPciBusId_v2(
        bus.encode(), ctypes.byref(handle)
    )
    if failed:
        return f"NVML, which knows of NVLink, fails with error {failed}"
    for link in range(_MOST_LINKS):
        failed = nvml.nvmlDeviceGetNvLinkState(handle, link, ctypes.byref(active))
        if not failed and active.value:
            return None
    return f"GPU {bus} has no active NVLink"


_of_thread = threading.local()


def _driver() -> Any:
    """The driver, with the current GPU's context bound to this thread.

    autograd's threads may have none yet: CUDA's runtime binds it at its first call, and the driver
    never does.
    """
    try:
        return _of_thread.driver
    except AttributeError:
        driver = _load()
        _bind_context(driver)
        _of_thread.driver = driver
        return driver


def _bind_context(driver: Any) -> None:
    result = driver.cuCtxGetCurrent()
    _check(result, "cuCtxGetCurrent")
    if int(result[1]) != 0:
        return
    result = driver.cuDeviceGet(torch.cuda.current_device())
    _check(result, "cuDeviceGet")
    result = driver.cuDevicePrimaryCtxRetain(result[1])
    _check(result, "cuDevicePrimaryCtxRetain")
    _check(driver.cuCtxSetCurrent(result[1]), "cuCtxSetCurrent")


@functools.cache
def _load() -> Any:
    if torch.version.hip is not None or not torch.cuda.is_available():
        raise NotUsableError("torch sees no CUDA GPU")
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise NotUsableError(
            f"cuda-bindings does not load: {error}. torch's CUDA wheels for Linux bring it; else "
            "`pip install cuda-bindings`"
        ) from error
    return driver


def _check(result: tuple[Any, ...], what: str) -> None:
    error = result[0]
    if error:
        raise RuntimeError(f"{what} failed: {error.name} ({int(error)})")
