"""Keeps a caller's ambient modes out of a plan's own tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def plain_tensors() -> Iterator[None]:
    """Tensors made here are ordinary ones of the CPU, unless their device is given.

    Whatever inference_mode, torch.device("meta") or torch.set_default_device is in effect.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        yield
