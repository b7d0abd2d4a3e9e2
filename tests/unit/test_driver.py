"""What the driver's wrappers make of a stand-in for NVIDIA's libraries."""

from __future__ import annotations

import ctypes
import sys
import threading
from types import SimpleNamespace

import pytest

from magi_sink_cp.dist import driver
from magi_sink_cp.kernels.protocol import NotUsableError


def install_nvml(
    monkeypatch, active_links: list[int], error: int = 0, missing: bool = False
) -> None:
    """NVML of GPU 00000000:1b:00.0, whose links beyond those listed do not exist."""

    def handle_of(bus, handle) -> int:
        assert bus == b"00000000:1b:00.0"
        handle._obj.value = 7
        return error

    def link_state(handle, link, active) -> int:
        assert handle.value == 7
        if link >= len(active_links):
            return 2
        active._obj.value = active_links[link]
        return 0

    nvml = SimpleNamespace(
        nvmlInit_v2=lambda: 0,
        nvmlDeviceGetHandleByPciBusId_v2=handle_of,
        nvmlDeviceGetNvLinkState=link_state,
    )

    def load(name: str) -> object:
        assert name == "libnvidia-ml.so.1"
        if missing:
            raise OSError("no such file")
        return nvml

    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(driver.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(driver.torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(ctypes, "CDLL", load)


@pytest.mark.parametrize(
    ("active_links", "more", "reason"),
    [
        ([1, 1], {}, None),
        ([0, 1], {}, None),
        ([0, 0], {}, "GPU 00000000:1b:00.0 has no active NVLink"),
        ([], {}, "GPU 00000000:1b:00.0 has no active NVLink"),
        ([1], {"error": 6}, "NVML, which knows of NVLink, fails with error 6"),
        ([1], {"missing": True}, "NVML, which knows of NVLink, does not load: no such file"),
    ],
)
def test_nvlink_is_what_nvml_says(monkeypatch, active_links, more, reason):
    install_nvml(monkeypatch, active_links, **more)
    assert driver.missing_nvlink() == reason


def test_without_cuda_bindings_the_reason_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(driver.torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    driver._load.cache_clear()
    with pytest.raises(NotUsableError, match="pip install cuda-bindings"):
        driver.check_available()
    driver._load.cache_clear()


@pytest.mark.parametrize("has_context", [False, True])
def test_a_thread_without_a_context_gets_the_gpus(monkeypatch, has_context):
    """autograd's threads: a backward may be the first that calls the driver there."""
    bound = []
    cuda = SimpleNamespace(
        cuCtxGetCurrent=lambda: (0, 99 if has_context else 0),
        cuDeviceGet=lambda ordinal: (0, 10 + ordinal),
        cuDevicePrimaryCtxRetain=lambda device: (0, 100 + device),
        cuCtxSetCurrent=lambda context: (bound.append(context), (0,))[1],
        cuStreamCreate=lambda flags: (0, 7),
    )
    monkeypatch.setattr(driver, "_load", lambda: cuda)
    monkeypatch.setattr(driver.torch.cuda, "current_device", lambda: 1)
    streams = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: streams.append(driver.new_stream()))
        thread.start()
        thread.join()
    assert streams == [7, 7]
    assert bound == ([] if has_context else [111, 111])


def test_a_failed_call_is_named(monkeypatch):
    class Error(int):
        name = "CUDA_ERROR_INVALID_VALUE"

    failing = SimpleNamespace(cuStreamWriteValue32=lambda *_: (Error(1),))
    monkeypatch.setattr(driver, "_driver", lambda: failing)
    with pytest.raises(
        RuntimeError, match=r"cuStreamWriteValue32 failed: CUDA_ERROR_INVALID_VALUE \(1\)"
    ):
        driver.write_flag(0, 1, 0)
