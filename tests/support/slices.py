"""Mask slices: how tests draw them, and what they mean pair by pair."""

from __future__ import annotations

import itertools

import torch
from hypothesis import strategies as st

KINDS = st.sampled_from(["full", "causal", "inv_causal", "bi_causal"])


@st.composite
def slices_of(draw, total: int):
    """Slices that share no pair: rectangles of a grid and others, with any type."""
    q_cuts = sorted({0, total, *draw(st.lists(st.integers(0, total), max_size=3))})
    found = []
    for q in itertools.pairwise(q_cuts):
        k_cuts = sorted(set(draw(st.lists(st.integers(0, total), max_size=4))))
        for k in itertools.pairwise(k_cuts):
            if draw(st.booleans()):
                found.append((q, k, draw(KINDS)))
    for _ in range(draw(st.integers(0, 5)) if total else 0):
        spans = [
            (lo, draw(st.integers(lo + 1, total)))
            for lo in (draw(st.integers(0, total - 1)) for _ in range(2))
        ]
        one = (*spans, draw(KINDS))
        if dense([*found, one], total).max() <= 1:
            found.append(one)
    return draw(st.permutations(found))


def dense(slices, total: int) -> torch.Tensor:
    """MagiAttention's definition, pair by pair."""
    mask = torch.zeros(total, total, dtype=torch.int64)
    for (q0, q1), (k0, k1), kind in slices:
        q, k = torch.arange(q0, q1)[:, None], torch.arange(k0, k1)
        before = k1 - k >= q1 - q if kind in ("causal", "bi_causal") else True
        behind = k - k0 >= q - q0 if kind in ("inv_causal", "bi_causal") else True
        mask[q0:q1, k0:k1] += torch.ones(q1 - q0, k1 - k0, dtype=torch.bool) & before & behind
    return mask
