"""Masks as bands over global token positions, and what a kernel call must be told of them.

A *band* is a rectangle of queries × keys in which query q sees key k if lo <= k - q <= hi. Every
mask is a list of bands that share no (query, key) pair:

- a document under a window (left, right): its tokens × its tokens, lo = -left, hi = right. A window
  lets a query see ``left`` tokens before and ``right`` tokens behind itself; -1 is unlimited,
  right = 0 is causal;
- a slice of a mask: its rectangle, with MagiAttention's types (:data:`SLICE_TYPES`).

A kernel does not know where its rows and keys stand in the sequence. Its window is aligned to the
bottom right of each segment: for rows that end at global position r and keys that end at k, the
kernel's window of a band is (k - r - lo, hi - (k - r)).
"""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple, TypeGuard, TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Range = tuple[int, int]
Window = tuple[int, int]
FULL: Window = (-1, -1)
CAUSAL: Window = (-1, 0)
# Farther than any two tokens are apart, and far from overflow.
FAR = 1 << 60

SLICE_TYPES = ("full", "causal", "inv_causal", "bi_causal")
# Queries, keys, type.
Slice = tuple[Range, Range, str]


Flags = NDArray[np.bool_]
# A NamedTuple of arrays of one length.
Table = TypeVar("Table", bound=tuple[Any, ...])


def take(table: Table, index: Flags | NDArray[np.intp] | slice) -> Table:
    """The same table with these rows alone."""
    return type(table)(*(column[index] for column in table))


def runs(continues: Flags) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """(first, last) of the runs of items; ``continues``: whether each but the first goes on one."""
    first = np.flatnonzero(np.concatenate([[True], ~continues]))
    return first, np.append(first[1:], len(continues) + 1) - 1


class Bands(NamedTuple):
    """Bands as arrays: queries [q_lo, q_hi) × keys [k_lo, k_hi), where lo <= key - query <= hi."""

    q_lo: Ints
    q_hi: Ints
    k_lo: Ints
    k_hi: Ints
    lo: Ints
    hi: Ints

    def within(self, queries: Range, keys: Range) -> int:
        """How many pairs these queries and keys have."""
        tile = Bands(
            np.maximum(self.q_lo, queries[0]),
            np.maximum(np.minimum(self.q_hi, queries[1]), np.maximum(self.q_lo, queries[0])),
            np.maximum(self.k_lo, keys[0]),
            np.maximum(np.minimum(self.k_hi, keys[1]), np.maximum(self.k_lo, keys[0])),
            self.lo,
            self.hi,
        )
        return int(band_pairs(tile).sum())

    def shifted(self, by: int) -> Bands:
        """The same bands ``by`` tokens later."""
        return Bands(
            self.q_lo + by, self.q_hi + by, self.k_lo + by, self.k_hi + by, self.lo, self.hi
        )


def bands_of_documents(documents: Sequence[Range] | Ints, window_size: Window) -> Bands:
    """One band for each document.

    Limits of the window that reach across every document hide nothing and are left out.
    """
    edges = np.array(documents, dtype=np.int64).reshape(-1, 2)
    start, stop = edges[:, 0], edges[:, 1]
    farthest = int((stop - start).max(initial=1)) - 1
    left, right = (FAR if n < 0 or 0 < farthest <= n else n for n in window_size)
    return Bands(start, stop, start, stop, np.full_like(start, -left), np.full_like(start, right))


def bands_of_slices(slices: Sequence[Slice]) -> Bands:
    """One band for each slice, or one for two that are a window.

    With queries [q0, q1) and keys [k0, k1): "full" sees all; "causal" is aligned to the bottom
    right, k - q <= k1 - q1; "inv_causal" to the top left, k - q >= k0 - q0; "bi_causal" is both.
    Four queries and six keys (x is seen):

        full         causal       inv_causal   bi_causal
        x x x x x x  x x x . . .  x x x x x x  x x x . . .
        x x x x x x  x x x x . .  . x x x x x  . x x x . .
        x x x x x x  x x x x x .  . . x x x x  . . x x x .
        x x x x x x  x x x x x x  . . . x x x  . . . x x x
    """
    return _with_whole_windows(_bands_one_by_one(slices))


def _bands_one_by_one(slices: Sequence[Slice]) -> Bands:
    edges = np.array([(*q, *k) for q, k, _ in slices], dtype=np.int64).reshape(-1, 4)
    q_lo, q_hi, k_lo, k_hi = edges.T
    right = np.array([kind in ("causal", "bi_causal") for *_, kind in slices], dtype=bool)
    left = np.array([kind in ("inv_causal", "bi_causal") for *_, kind in slices], dtype=bool)
    lo, hi = np.where(left, k_lo - q_lo, -FAR), np.where(right, k_hi - q_hi, FAR)
    return Bands(q_lo, q_hi, k_lo, k_hi, lo, hi)


def _with_whole_windows(b: Bands) -> Bands:
    """The same mask with one band where two slices are a sliding window.

    As slices, the rows that the window does not cut are one, and the others are the next.
    """
    if len(b.lo) < 2:
        return b
    one, two = take(b, slice(-1)), take(b, slice(1, None))
    continues = (
        (one.q_hi == two.q_lo)
        & (one.hi == two.hi)
        & (one.hi < FAR)
        & (one.lo == -FAR)
        & (two.lo > -FAR)
        & (one.q_hi - 1 + two.lo <= one.k_lo)  # two's limit hides no pair of one
        & (two.q_lo + two.lo == two.k_lo)
        & (one.k_lo <= two.k_lo)
        & (one.k_hi <= two.k_hi)
    )
    first = np.append(continues, False)
    second = np.concatenate([[False], continues])
    return Bands(
        b.q_lo[~second],
        np.where(first, np.append(two.q_hi, 0), b.q_hi)[~second],
        b.k_lo[~second],
        np.where(first, np.append(two.k_hi, 0), b.k_hi)[~second],
        np.where(first, np.append(two.lo, 0), b.lo)[~second],
        b.hi[~second],
    )


def join_bands(parts: Sequence[Bands]) -> Bands:
    """All bands of the parts."""
    return Bands(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def band_pairs(bands: Bands) -> Ints:
    """(query, key) pairs that each band lets through."""
    rows, keys = bands.q_hi - bands.q_lo, bands.k_hi - bands.k_lo
    # Row p and key s, counted from the rectangle's first: k - q = s - p + k_lo - q_lo.
    start = bands.k_lo - bands.q_lo
    return _pairs_up_to(rows, keys, np.minimum(bands.hi - start, keys)) - _pairs_up_to(
        rows, keys, np.maximum(bands.lo - start - 1, -rows - 1)
    )


def pairs_of_rows(bands: Bands, edges: Ints) -> Ints:
    """Visible pairs of the rows between each two neighbours of the ascending ``edges``."""
    band, chunk = overlaps(bands.q_lo, bands.q_hi, edges[:-1], edges[1:])
    parts = take(bands, band)
    parts = parts._replace(
        q_lo=np.maximum(parts.q_lo, edges[chunk]), q_hi=np.minimum(parts.q_hi, edges[chunk + 1])
    )
    # Exact below 2**53, and weights of work above.
    pairs = np.bincount(chunk, band_pairs(parts).astype(np.float64), minlength=len(edges) - 1)
    return pairs.astype(np.int64)


def overlaps(lo: Ints, hi: Ints, start: Ints, stop: Ints) -> tuple[Ints, Ints]:
    """Indices (i, j) of all ranges [lo, hi) and [start, stop) that share a token, ascending in i.

    The second ranges are sorted and disjoint, the first ones any.
    """
    first = np.searchsorted(stop, lo, side="right")
    count = np.maximum(np.searchsorted(start, hi, side="left") - first, 0)
    count[hi <= lo] = 0
    return expand(first, count)


def covered(lo: Ints, hi: Ints) -> tuple[Ints, Ints]:
    """(starts, stops) of the sorted disjoint ranges that cover what [lo, hi) do."""
    if not len(lo):
        return lo, hi
    order = np.argsort(lo, kind="stable")
    lo, reach = lo[order], np.maximum.accumulate(hi[order])
    first, last = runs(lo[1:] <= reach[:-1])
    return lo[first], reach[last]


def expand(first: Ints, count: Ints) -> tuple[Ints, Ints]:
    """(i, first[i] + 0 … count[i] - 1) for every i, one after the other."""
    owner = np.repeat(np.arange(len(count)), count)
    ends = np.cumsum(count)
    return owner, np.arange(len(owner)) + (first - (ends - count))[owner]


def visible_pairs(num_q: int, num_k: int, left: int, right: int) -> int:
    """(query, key) pairs that a window aligned to the bottom right lets through.

    >>> visible_pairs(3, 3, -1, 0)
    6
    """
    lag = num_k - num_q
    one = [np.array([n]) for n in (
        0, num_q, 0, num_k, -FAR if left < 0 else lag - left, FAR if right < 0 else lag + right
    )]  # fmt: skip
    return int(band_pairs(Bands(*one))[0])


def _pairs_up_to(num_q: Ints, num_k: Ints, offset: Ints) -> Ints:
    """How many pairs (p, s), 0 <= p < num_q, 0 <= s < num_k, have s - p <= offset."""

    def sum_of_minima(rows: Ints) -> Ints:  # Σ min(num_k, u) for u = 1 … rows
        rows = np.maximum(rows, 0)
        beyond = np.maximum(0, rows - num_k)
        return rows * (rows + 1) // 2 - beyond * (beyond + 1) // 2

    return sum_of_minima(num_q + offset) - sum_of_minima(offset)


def check_slices(total_tokens: int, mask_slices: object) -> tuple[Slice, ...]:
    """The slices as tuples of ints.

    Raises:
        TypeError, ValueError: they are no slices of a mask of total_tokens, or two of them share a
            (query, key) pair. The text names the slice.
    """
    slices = tuple(
        _check_slice(index, given, total_tokens)
        for index, given in enumerate(in_order(mask_slices))
    )
    _refuse_shared_pairs(slices)
    return slices


def in_order(mask_slices: object) -> tuple[Any, ...]:
    """What is in the sequence. Raises TypeError if it is none."""
    if not is_sequence(mask_slices):
        raise TypeError(
            "mask_slices must be a sequence of ((q0, q1), (k0, k1), type), got "
            f"{type(mask_slices).__name__}"
        )
    return tuple(mask_slices)


def is_sequence(value: object) -> TypeGuard[Iterable[Any]]:
    """Whether its entries come in an order, one by one, and are no text."""
    no_sequence = isinstance(value, (str, bytes, bytearray, Mapping, Set))
    return isinstance(value, Iterable) and not no_sequence


def _check_slice(index: int, given: Any, total_tokens: int) -> Slice:
    name = f"mask_slices[{index}]"
    try:
        queries, keys, kind = given
        q0, q1 = map(as_index, queries)
        k0, k1 = map(as_index, keys)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must be ((q0, q1), (k0, k1), type) with int ranges, got {given!r}"
        ) from None
    if not isinstance(kind, str) or kind not in SLICE_TYPES:
        raise ValueError(f"{name} must have one of the types {SLICE_TYPES}, got {kind!r}")
    for what, lo, hi in (("queries", q0, q1), ("keys", k0, k1)):
        if not 0 <= lo < hi <= total_tokens:
            raise ValueError(
                f"{name} must have a range of {what} (start, stop) with 0 <= start < stop <= "
                f"total_tokens, {total_tokens}, got {(lo, hi)}"
            )
    return (q0, q1), (k0, k1), kind


def as_index(value: Any) -> int:
    """value as an int. Raises TypeError if it is none; a bool is none."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")) == "torch.bool":
        raise TypeError
    return operator.index(value)


# With more pairs for each slice a sweep finds those to compare: 64,000 slices, half of which share
# their queries and half their keys, take half a second in place of 20. The usual masks have at most
# three pairs for each slice, and take a fifth of the sweep's time.
_MANY_PAIRS = 8


def _refuse_shared_pairs(slices: tuple[Slice, ...]) -> None:
    """Raise ValueError if two slices share a (query, key) pair.

    Slices are compared with those that share queries with them, or keys if these are fewer; if many
    do, with those alone that come to lie beside them. So n slices take some n log n comparisons.
    """
    b = _bands_one_by_one(slices)
    axes = [(b.q_lo, b.q_hi), (b.k_lo, b.k_hi)]
    neighbours = [_later_overlaps(lo, hi) for lo, hi in axes]
    order, first, count = min(neighbours, key=lambda each: int(each[2].sum()))
    if count.sum() > _MANY_PAIRS * len(slices):
        found = _sweep(b)
    else:
        i, j = expand(first, count)
        one, two = order[i], order[j]
        common = _common(take(b, one), take(b, two), np.minimum, np.maximum)
        shared = np.flatnonzero(_has_pairs(common))[:1]
        found = next(zip(one[shared].tolist(), two[shared].tolist(), strict=True), None)
    if found is None:
        return
    a, c = sorted(found)
    one_band, other = _as_ints(take(b, np.array([a, c])))
    common = _common(one_band, other, min, max)
    query = max(common.q_lo, common.k_lo - common.lo)
    raise ValueError(
        f"mask_slices[{a}], {slices[a]}, and mask_slices[{c}], {slices[c]}, must not share "
        f"a (query, key) pair, and both hold ({query}, {query + common.lo})"
    )


def _as_ints(b: Bands) -> list[Any]:
    """Each band by itself, of ints."""
    return [Bands(*band) for band in zip(*(x.tolist() for x in b), strict=True)]


def _common(one: Any, two: Any, least: Callable[..., Any], most: Callable[..., Any]) -> Any:
    """What two bands share, as a band whose lo and hi are what key - query can be. ``least`` and
    ``most`` are min and max for bands of ints, NumPy's for arrays.
    """
    q_lo, q_hi = most(one.q_lo, two.q_lo), least(one.q_hi, two.q_hi)
    k_lo, k_hi = most(one.k_lo, two.k_lo), least(one.k_hi, two.k_hi)
    lo = most(most(one.lo, two.lo), k_lo - q_hi + 1)
    hi = least(least(one.hi, two.hi), k_hi - 1 - q_lo)
    return Bands(q_lo, q_hi, k_lo, k_hi, lo, hi)


def _has_pairs(common: Any) -> Any:
    return (common.q_lo < common.q_hi) & (common.k_lo < common.k_hi) & (common.lo <= common.hi)


def _sweep(b: Bands) -> tuple[int, int] | None:
    """Two bands that share a pair, or None.

    Row by row, the bands that have keys are kept in the order of their first keys (the sweep of
    Shamos and Hoey, 1976). From a row to the next a first key stays or moves by one. So bands keep
    their order until two of them share a key, and these two are then side by side: comparing
    neighbours, when they become that, finds them before.
    """
    begin = np.maximum(b.q_lo, b.k_lo - b.hi)  # the rows in which a band has keys
    end = np.minimum(b.q_hi, b.k_hi - b.lo)
    there = np.flatnonzero((begin < end) & (b.lo <= b.hi))
    rows = np.concatenate([end[there], begin[there]])
    is_begin = np.repeat([False, True], len(there))
    order = np.lexsort((is_begin, rows))  # in a row, bands end before others begin
    events = zip(
        rows[order].tolist(), np.tile(there, 2)[order].tolist(), is_begin[order].tolist(),
        strict=True,
    )  # fmt: skip
    bands = _as_ints(b)
    active: list[int] = []
    for row, band, begins in events:
        at_row = row if begins else row - 1

        def first_key(other: int, at_row: int = at_row) -> int:
            return max(bands[other].k_lo, at_row + bands[other].lo)

        place = bisect.bisect_left(active, first_key(band), key=first_key)
        if begins:
            active.insert(place, band)
            met = active[max(0, place - 1) : place + 2]
        else:
            del active[place]
            met = active[max(0, place - 1) : place + 1]
        for one, two in itertools.pairwise(met):
            if _has_pairs(_common(bands[one], bands[two], min, max)):
                return one, two
    return None


def _later_overlaps(lo: Ints, hi: Ints) -> tuple[Ints, Ints, Ints]:
    """Ranges in ascending order; for each, where those that begin later inside it begin, and how
    many there are.
    """
    order = np.argsort(lo, kind="stable")
    first = np.arange(1, len(lo) + 1)
    return order, first, np.searchsorted(lo[order], hi[order], side="left") - first
