"""What the driver's wrappers make of a stand-in for NVIDIA's libraries."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from magi_sink_cp.dist import driver


def libraries(monkeypatch, active_links: list[int], error: int = 0, missing: bool = False) -> None:
    """NVML of GPU 0000:1B:00.0, whose links beyond those listed do not exist."""

    def bus_id(buffer, size, device) -> int:
        buffer.value = b"0000:1B:00.0"
        return 0

    def handle_of(bus, handle) -> int:
        assert bus.value == b"0000:1B:00.0"
        handle._obj.value = 7
        return error

    def link_state(handle, link, active) -> int:
        assert handle.value == 7
        if link >= len(active_links):
            return 2
        active._obj.value = active_links[link]
        return 0

    cuda = SimpleNamespace(cuDeviceGet=lambda device, ordinal: 0, cuDeviceGetPCIBusId=bus_id)
    nvml = SimpleNamespace(nvmlInit_v2=lambda: 0, nvmlDeviceGetHandleByPciBusId_v2=handle_of, nvmlDeviceGetNvLinkState=link_state)

    def load(name: str) -> object:
        assert name == "libnvidia-ml.so.1"
        if missing:
            raise OSError("no such file")
        return nvml

    monkeypatch.setattr(driver, "_driver", lambda: cuda)
    monkeypatch.setattr(driver.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(ctypes, "CDLL", load)


@pytest.mark.parametrize(
    ("active_links", "more", "reason"),
    [
        ([1, 1], {}, None),
        ([0, 1], {}, None),
        ([0, 0], {}, "GPU 0000:1B:00.0 has no active NVLink"),
        ([], {}, "GPU 0000:1B:00.0 has no active NVLink"),
        ([1], {"error": 6}, "NVML, which knows of NVLink, fails with error 6"),
        ([1], {"missing": True}, "NVML, which knows of NVLink, does not load: no such file"),
    ],
)
def test_nvlink_is_what_nvml_says(monkeypatch, active_links, more, reason):
    libraries(monkeypatch, active_links, **more)
    assert driver.missing_nvlink() == reason
