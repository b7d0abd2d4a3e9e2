"""Builders of mask slices: lists of ((q0, q1), (k0, k1), type) for ``mask_slices=``.

A slice is a rectangle of queries × keys. Its type says which part of it is seen:
:func:`magi_sink_cp.dist.planning.mask.bands_of_slices` draws the four types. Slices of one mask
share no (query, key) pair. This file imports no torch.

In the pictures a row is a query, a column is a key, and x is seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from magi_sink_cp.dist.planning.mask import (
    FAR,
    Range,
    Slice,
    as_index,
    bands_of_slices,
    check_slices,
    is_sequence,
)

__all__ = [
    "block_causal",
    "documents",
    "draw",
    "global_tokens",
    "prefix_lm",
    "shared_prefix",
    "sliding_window",
]

# What draw prints at most in each direction.
_DRAWN = 64


def documents(cu_seqlens: Iterable[int], causal: bool = True) -> list[Slice]:
    """Packed documents that do not see each other.

    Args:
        cu_seqlens: (documents + 1,) ascending ints from 0. Empty documents are left out.
        causal: a query sees no later key.

    ::

        documents([0, 3, 6])
        x . . . . .
        x x . . . .
        x x x . . .
        . . . x . .
        . . . x x .
        . . . x x x

    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    if not isinstance(causal, (bool, np.bool_)):
        raise TypeError(f"causal must be a bool, got {causal!r}")
    kind = "causal" if causal else "full"
    return [(tokens, tokens, kind) for tokens in _documents(cu_seqlens)]


def sliding_window(cu_seqlens: Iterable[int], left: int) -> list[Slice]:
    """Packed documents in which a query sees itself and the ``left`` tokens before it.

    ::

        sliding_window([0, 6], left=2)
        x . . . . .
        x x . . . .
        x x x . . .
        . x x x . .
        . . x x x .
        . . . x x x

    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    left = _count("left", left, 0)
    slices: list[Slice] = []
    for lo, hi in _documents(cu_seqlens):
        slices += _window((lo, hi), lo, left)
    return slices


def prefix_lm(cu_seqlens: Iterable[int], prefix_lengths: Iterable[int]) -> list[Slice]:
    """Packed documents whose first tokens see each other, and whose other tokens are causal.

    Args:
        prefix_lengths: one int for each document, from 0 to its length.

    ::

        prefix_lm([0, 6], [3])
        x x x . . .
        x x x . . .
        x x x . . .
        x x x x . .
        x x x x x .
        x x x x x x

    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    edges = _offsets(cu_seqlens)
    prefixes = _counts("prefix_lengths", prefix_lengths)
    if len(prefixes) != len(edges) - 1:
        raise ValueError(
            f"prefix_lengths must have one entry for each of {len(edges) - 1} documents, got "
            f"{len(prefixes)}"
        )
    slices: list[Slice] = []
    for index, ((lo, hi), length) in enumerate(
        zip(itertools.pairwise(edges), prefixes, strict=True)
    ):
        if length > hi - lo:
            raise ValueError(
                f"prefix_lengths[{index}] must be from 0 to its document's length, {hi - lo}, got "
                f"{length}"
            )
        prefix = lo, lo + length
        if length:
            slices.append((prefix, prefix, "full"))
        if prefix[1] < hi:
            slices.append(((prefix[1], hi), (lo, hi), "causal"))
    return slices


def shared_prefix(prefix: int, completions: Sequence[int]) -> list[Slice]:
    """One prompt, and several completions that see it and themselves: RL, preference training.

    The tokens are the prompt's, then each completion's. All are causal. Positions continue after
    the prompt in each completion: give such ``position_ids`` to make_cp_plan.

    Args:
        prefix: tokens of the prompt.
        completions: tokens of each completion.

    ::

        shared_prefix(2, [2, 2])
        x . . . . .
        x x . . . .
        x x x . . .
        x x x x . .
        x x . . x .
        x x . . x x

    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    start = _count("prefix", prefix, 0)
    lengths = _counts("completions", completions)
    edges = [start, *itertools.accumulate(lengths, initial=start)][1:]
    slices: list[Slice] = [((0, start), (0, start), "causal")] if start else []
    if start and edges[-1] > start:
        slices.append(((start, edges[-1]), (0, start), "full"))
    slices += [((lo, hi), (lo, hi), "causal") for lo, hi in itertools.pairwise(edges) if lo < hi]
    return slices


def block_causal(block: int, total: int) -> list[Slice]:
    """A query sees its own block of tokens and all earlier ones: video, chunked generation.

    It is one causal slice, and what lies above the diagonal in each block. So kernels run it in two
    calls, whatever the number of blocks.

    Args:
        block: tokens of a block.
        total: tokens of the sequence; the last block may be shorter.

    ::

        block_causal(2, 6)
        x x . . . .
        x x . . . .
        x x x x . .
        x x x x . .
        x x x x x x
        x x x x x x

    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    block, total = _count("block", block, 1), _count("total", total, 0)
    slices: list[Slice] = [((0, total), (0, total), "causal")] if total else []
    for lo in range(0, total, block):
        hi = min(lo + block, total)
        if hi - lo > 1:
            slices.append(((lo, hi - 1), (lo + 1, hi), "inv_causal"))
    return slices


def global_tokens(cu_seqlens: Iterable[int], n: int, left: int) -> list[Slice]:
    """A sliding window, and the first ``n`` tokens of each document, which all later ones see.

    ::

        global_tokens([0, 6], n=1, left=1)
        x . . . . .
        x x . . . .
        x x x . . .
        x . x x . .
        x . . x x .
        x . . . x x

    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    n, left = _count("n", n, 0), _count("left", left, 0)
    slices: list[Slice] = []
    for lo, hi in _documents(cu_seqlens):
        split = min(lo + n, hi)
        if split > lo:
            slices.append(((lo, split), (lo, split), "causal"))
        if split < hi:
            if split > lo:
                slices.append(((split, hi), (lo, split), "full"))
            slices += _window((split, hi), split, left)
    return slices


def draw(mask_slices: Sequence[Slice], total_tokens: int | None = None) -> str:
    """The mask as text: a row for each query, a column for each key, x where it is seen.

    Above 64 tokens each row and column stand for several: x where all pairs are seen, o where some
    are.

    Args:
        mask_slices: of a builder, or by hand.
        total_tokens: of the sequence; None is up to the last token of any slice.

    >>> print(draw(block_causal(2, 4)))
    x x . .
    x x . .
    x x x x
    x x x x

    Raises:
        TypeError, ValueError: the slices are invalid, or two of them share a pair.
    """
    total = FAR if total_tokens is None else _count("total_tokens", total_tokens, 0)
    slices = check_slices(total, mask_slices)
    if total_tokens is None:
        total = max((max(q[1], k[1]) for q, k, _ in slices), default=0)
    bands = bands_of_slices(slices)
    size = -(-total // _DRAWN) if total > _DRAWN else 1
    cuts = list(range(0, total, size))
    rows = []
    for q0 in cuts:
        row = []
        for k0 in cuts:
            tile = (q0, min(q0 + size, total)), (k0, min(k0 + size, total))
            seen = bands.within(*tile)
            row.append("." if not seen else "x" if seen == _area(*tile) else "o")
        rows.append(" ".join(row))
    return "\n".join(rows)


def _area(queries: Range, keys: Range) -> int:
    return (queries[1] - queries[0]) * (keys[1] - keys[0])


def _window(tokens: Range, first_key: int, left: int) -> list[Slice]:
    """Queries and keys among ``tokens``, causal, with at most ``left`` keys before each query."""
    lo, hi = tokens
    head = min(lo + left + 1, hi)  # they see all keys before them
    slices: list[Slice] = [((lo, head), (first_key, head), "causal")]
    if head < hi:
        slices.append(((head, hi), (head - left, hi), "bi_causal"))
    return slices


def _documents(cu_seqlens: Iterable[int]) -> list[Range]:
    return [(lo, hi) for lo, hi in itertools.pairwise(_offsets(cu_seqlens)) if lo < hi]


def _offsets(cu_seqlens: Any) -> list[int]:
    edges = _counts("cu_seqlens", cu_seqlens)
    if not edges or edges[0] != 0 or any(b < a for a, b in itertools.pairwise(edges)):
        raise ValueError(f"cu_seqlens must start at 0 and never fall, got {edges[:8]}")
    return edges


def _counts(name: str, given: Any) -> list[int]:
    values = given.tolist() if hasattr(given, "tolist") else given
    if not is_sequence(values):
        raise TypeError(f"{name} must be a sequence of ints, got {type(given).__name__}")
    return [_count(f"each of {name}", value, 0) for value in values]


def _count(name: str, value: object, least: int) -> int:
    try:
        number = as_index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be >= {least}, got {number}")
    return number
