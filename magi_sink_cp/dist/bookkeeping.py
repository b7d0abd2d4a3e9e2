"""A plan's own tensors: free of the caller's ambient modes, and on their way without a wait."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def plain_tensors() -> Iterator[None]:
    """Tensors made here are ordinary ones, whatever inference_mode is in effect.

    Give each its device: torch.device("meta") or torch.set_default_device may be in effect too. (A
    torch.device context here would pass every operation through Python, which takes longer than
    the operations.)
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def upload(host: Tensor, device: torch.device) -> Tensor:
    """``host`` on ``device``. A copy to a GPU goes through pinned memory and is not waited for."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
