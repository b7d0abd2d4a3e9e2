"""Windows over global token positions, and what a kernel call must be told of them.

A window (left, right) lets a query see ``left`` tokens before and ``right`` tokens behind itself
within its document; -1 is unlimited, right = 0 is causal. A kernel does not know where its rows and
keys stand in the sequence. Its window is aligned to the bottom right of each segment, so for rows
that end at global position r and keys that end at k, the global window (left, right) becomes
(left + k - r, right + r - k).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from magi_sink_cp.dist.planning.layout import Range

Window = tuple[int, int]
FULL: Window = (-1, -1)
CAUSAL: Window = (-1, 0)


@dataclass(frozen=True)
class Segment:
    """Query rows × keys of one document under a kernel's window.

    Attributes:
        rows, keys: local indices of the rank's queries, and of the stage's keys.
        window_size: (left, right), aligned to the bottom right; -1 is unlimited.
        diagonal: the rows are among the keys. Every row of a document is in exactly one diagonal
            segment of a schedule.
    """

    rows: Range
    keys: Range
    window_size: Window
    diagonal: bool

    @property
    def num_rows(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def num_keys(self) -> int:
        return self.keys[1] - self.keys[0]


def visible_pairs(num_q: int, num_k: int, left: int, right: int) -> int:
    """(query, key) pairs that a window aligned to the bottom right lets through.

    >>> visible_pairs(3, 3, -1, 0)
    6
    """
    total = _pairs_up_to(num_q, num_k, num_k if right < 0 else num_k - num_q + right)
    return total if left < 0 else total - _pairs_up_to(num_q, num_k, num_k - num_q - left - 1)


def _pairs_up_to(num_q: int, num_k: int, offset: int) -> int:
    """How many pairs (p, s), 0 <= p < num_q, 0 <= s < num_k, have s - p <= offset."""

    def sum_of_minima(rows: int) -> int:  # Σ min(num_k, u) for u = 1 … rows
        beyond = max(0, rows - num_k)
        return rows * (rows + 1) // 2 - beyond * (beyond + 1) // 2 if rows > 0 else 0

    return sum_of_minima(num_q + offset) - sum_of_minima(offset)


def reach(tokens: Range, others: Range, before: int, after: int) -> Range:
    """The part of ``tokens`` at most ``before`` before or ``after`` behind one of ``others``.

    -1 is any distance.
    """
    lo = tokens[0] if before < 0 else max(tokens[0], others[0] - before)
    hi = tokens[1] if after < 0 else min(tokens[1], others[1] + after)
    return lo, hi


def effective_window(window_size: Window, documents: Sequence[Range]) -> Window:
    """window_size without limits that reach across every document: they hide nothing."""
    farthest = max((hi - lo for lo, hi in documents), default=1) - 1
    left, right = window_size
    return -1 if 0 < farthest <= left else left, -1 if 0 < farthest <= right else right


def kernel_window(rows: Range, keys: Range, window: Window, diagonal: bool) -> Window:
    """The kernel's window for global rows × keys.

    Off the diagonal, a limit that hides no pair is left out, so that more segments share a call.
    """
    left, right = window
    lag = rows[1] - keys[1]
    kernel_left, kernel_right = left - lag, right + lag
    if left < 0 or (not diagonal and kernel_left >= keys[1] - keys[0] - 1):
        kernel_left = -1
    if right < 0 or (not diagonal and kernel_right >= rows[1] - rows[0] - 1):
        kernel_right = -1
    return kernel_left, kernel_right
