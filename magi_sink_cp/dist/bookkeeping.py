"""A plan's own tensors: free of the caller's ambient modes, and on their way without a wait."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def plain_tensors() -> Iterator[None]:
    """Tensors made here are ordinary ones of the CPU, unless their device is given.

    Whatever inference_mode, torch.device("meta") or torch.set_default_device is in effect.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        yield


def upload(host: Tensor, device: torch.device) -> Tensor:
    """``host`` on ``device``. A copy to a GPU goes through pinned memory and is not waited for."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
