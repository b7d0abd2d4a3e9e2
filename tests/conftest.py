"""Test set-up: without a GPU the Triton kernels run in Triton's interpreter; GPU tests are skipped, with the reason shown."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are decorated, so before magi_sink_cp is imported

# The distributed tests run several ranks on few cores: more threads a rank would only wait for each other.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("gpu")
        needed = marker.kwargs.get("count", 1) if marker else 0
        if torch.cuda.device_count() < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA GPU(s), this machine has {torch.cuda.device_count()}"))
