"""How many stages the keys should travel in: the cost model behind ``overlap_degree="auto"``.

One stage (degree 0) waits for all keys and computes each row once. Every travelling stage beside the own one (degree n > 0) hides a
transfer behind a computation, and costs a partial result: one more pass over out in the merge, and, in backward, FlashAttention's
fp32 accumulator of dq written, read and rounded once more and the sum of two dq. Per rank, for forward and backward together:

    link(n)     = LATENCY + n tokens · bytes of their k and v / LINK
    degree 0:   2 · link(all) + link(all)                           keys come twice, their gradients go home
                + 8 · bytes of the rank's own k and v / MEMORY      copied beside them, twice, and so their gradients
    degree n:   Σ over stages [STAGE + 2 · BYTES_PER_STAGE · rows · heads · head_dim / MEMORY]
                + Σ over stages [what link takes longer than the computation that hides it] + link(last stage)

The figures are an H200's and NVLink's, or 400 Gb/s between hosts; they decide between plans whose results are the same, so on
another machine only the order of things must be right. ``overlap_degree=n`` overrides the choice.
"""

from __future__ import annotations

from dataclasses import dataclass

# Bytes a second between GPUs of one host and of two; of device memory. FLOP a second of the attention kernels. Seconds.
LINK = {"nvlink": 3.4e11, "network": 4.5e10}
MEMORY = 4.0e12
FLOPS = 6.0e14
LATENCY_S = 20e-6
STAGE_S = 20e-6
# Bytes for each element of q that a partial result costs: merge, and dq's accumulator zeroed, read, rounded, and added.
BYTES_PER_STAGE = 2 + (4 + 4 + 2 + 6)
# Keys of at most so many ranks stand in a buffer at once: what a rank holds does not grow with cp_size.
MAX_SHARDS = 4


@dataclass(frozen=True)
class Work:
    """One rank's share of a call, on average over the ranks.

    Attributes:
        rows: query tokens. pairs: visible (query, key) pairs. remote_keys: tokens that travel to the rank.
        heads, heads_kv, head_dim, element_size: of q, k and v.
    """

    rows: int
    pairs: int
    remote_keys: int
    heads: int
    heads_kv: int
    head_dim: int
    element_size: int


def choose_overlap_degree(work: Work, cp_size: int, link: str) -> int:
    """The degree with the least cost; equal on all ranks, as the arguments are."""
    degrees = [degree for degree in range(cp_size) if _shards(cp_size, degree) <= MAX_SHARDS] or [cp_size - 1]
    return min(degrees, key=lambda degree: cost_s(work, cp_size, degree, link))


def cost_s(work: Work, cp_size: int, degree: int, link: str) -> float:
    """Seconds of forward and backward beyond the computation itself."""

    def link_s(tokens: float) -> float:
        return LATENCY_S + tokens * 2 * work.heads_kv * work.head_dim * work.element_size / LINK[link]

    if degree == 0:
        own = 2 * work.rows * work.heads_kv * work.head_dim * work.element_size
        return 3 * link_s(work.remote_keys) + 8 * own / MEMORY
    passes = BYTES_PER_STAGE * work.rows * work.heads * work.head_dim / MEMORY
    transfer = link_s(work.remote_keys / degree)
    # 4 FLOP a pair, head and dimension in forward, 10 in backward, over degree + 1 stages.
    hiding = work.pairs * work.heads * work.head_dim / FLOPS / (degree + 1)
    exposed = max(0.0, transfer - 4 * hiding) + max(0.0, 2 * transfer - 10 * hiding)
    return degree * (STAGE_S + passes + exposed) + transfer


def _shards(cp_size: int, degree: int) -> int:
    """How many ranks' keys the largest stage brings together."""
    return cp_size if degree == 0 else -(-(cp_size - 1) // degree)
