"""The one kind of cache that this package makes by hand. It imports nothing."""

from __future__ import annotations

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class BoundedCache(dict[K, V]):
    """A dict that forgets its oldest entry when it would hold more than ``most``.

    Shapes and documents change from step to step, so no key is guaranteed to come again.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __setitem__(self, key: K, value: V) -> None:
        if len(self) >= self._most and key not in self:
            self.pop(next(iter(self)), None)
        super().__setitem__(key, value)
