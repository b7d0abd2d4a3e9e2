"""Test set-up: without a GPU the Triton kernels run in Triton's interpreter.

GPU tests are skipped, with the reason shown.
"""

import os

import pytest
import torch
from hypothesis import settings

from tests.support.ranks import RANKS_PER_GPU, gpu_ranks

if not torch.cuda.is_available():
    # Read when the kernels are decorated, so before magi_sink_cp is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# CI draws the same examples every time, so that it tells of the change at hand; a developer's run
# draws new ones.
settings.register_profile("ci", derandomize=True, print_blob=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# The distributed tests run several ranks on few cores: more threads a rank would only wait for each
# other.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker is None:
            continue
        gpus, ranks = marker.kwargs.get("count", 1), marker.kwargs.get("ranks", 1)
        if torch.cuda.device_count() < gpus:
            item.add_marker(
                pytest.mark.skip(
                    reason=f"needs {gpus} CUDA GPU(s), this machine has {torch.cuda.device_count()}"
                )
            )
        elif gpu_ranks() < ranks:
            count = torch.cuda.device_count()
            there = f"{count}, and RANKS_PER_GPU={RANKS_PER_GPU} lets so many share one"
            item.add_marker(
                pytest.mark.skip(
                    reason=f"needs CUDA GPUs for {ranks} ranks, this machine has {there}"
                )
            )
