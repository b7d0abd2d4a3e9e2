"""How many stages the keys should travel in: the cost model behind ``overlap_degree="auto"``.

Degree 0 waits for all keys and computes no row twice. Each travelling stage of degree n > 0 hides a transfer behind the computation
before it, and costs a partial result of the rows that see its keys: another pass over out in the merge; in backward,
FlashAttention's fp32 accumulator of dq zeroed, read and rounded once more, and the sum of two dq. Seconds beyond the computation
itself, per rank:

    link(t)            = LATENCY + bytes of k and v of t tokens / LINK
    forward, 0:        link(all remote keys) + pass over the rank's own k and v, which are copied beside them + calls · CALL
    forward, n:        n · (2 bytes for each element of q in those rows / MEMORY) + calls · CALL
                       + Σ stages [link(its keys) - what hides it]
    backward, 0:       as forward, with link and pass twice, as gradients go home
    backward, n:       as forward, with 16 bytes and 2 · link, + link(keys of the last stage)

and SLOWER · the computation: FlashAttention-3 takes longer for two calls than for one in forward, and less long in backward. With
``ranges`` token ranges a rank, 0 makes as many kernel calls, or twice as many where documents end within them, as it computes
rows with and without remote keys apart; n makes one for the own keys and half as many as ranges for each stage.

The figures are an H200's and NVLink's, or 400 Gb/s between hosts (docs/benchmarks.md); they decide between plans whose results are
the same, so on another machine only the order of things must be right. ``overlap_degree=n`` overrides the choice.
"""

from __future__ import annotations

from dataclasses import dataclass

# Bytes a second between GPUs of one host and of two; of device memory. FLOP a second of the attention kernels. Seconds.
LINK = {"nvlink": 3.4e11, "network": 4.5e10}
MEMORY = 4.0e12
FLOPS = 6.0e14
LATENCY_S = 20e-6
CALL_S = 20e-6
# Bytes for each element of q that one more partial result costs, and FLOP for each visible pair, head and dimension.
PARTIAL_BYTES = {"forward": 2, "backward": 16}
PAIR_FLOPS = {"forward": 4, "backward": 10}
# What degree 0, and what any other, adds to the computation of rows that see remote keys, as a part of it.
SLOWER = {"forward": (0.0, 0.045), "backward": (0.025, 0.0)}
# A buffer holds at most so many times the rank's own keys: what a rank holds does not grow with cp_size.
MAX_SHARDS = 4


@dataclass(frozen=True)
class Work:
    """One rank's share of a call, on average over the ranks.

    Attributes:
        rows: query tokens.
        pairs: visible (query, key) pairs.
        remote_keys: tokens that travel to the rank.
        remote_rows: rows that see any of them.
        ranges: token ranges that the rank holds.
        documents: of the whole sequence.
        heads, heads_kv, head_dim, element_size: of q, k and v.
    """

    rows: int
    pairs: int
    remote_keys: int
    remote_rows: int
    ranges: int
    documents: int
    heads: int
    heads_kv: int
    head_dim: int
    element_size: int


def choose_overlap_degrees(work: Work, cp_size: int, link: str) -> tuple[int, int]:
    """The degrees of forward and backward with the least cost; equal on all ranks, as the arguments are."""
    degrees = [n for n in range(cp_size) if buffer_tokens(work, n) <= MAX_SHARDS * work.rows] or [cp_size - 1]
    forward, backward = (
        min(degrees, key=lambda degree: cost_s(work, cp_size, degree, link, way)) for way in ("forward", "backward")
    )
    return forward, backward


def cost_s(work: Work, cp_size: int, degree: int, link: str, way: str) -> float:
    """Seconds beyond the computation itself; ``way`` is "forward" or "backward"."""
    token_bytes = 2 * work.heads_kv * work.head_dim * work.element_size
    trips = 1 if way == "forward" else 2

    def link_s(tokens: float) -> float:
        return LATENCY_S + tokens * token_bytes / LINK[link]

    slower = SLOWER[way][min(degree, 1)] * work.remote_rows / max(1, work.rows)
    computation = PAIR_FLOPS[way] * work.pairs * work.heads * work.head_dim / FLOPS
    if degree == 0:
        calls = work.ranges * (1 if work.documents == 1 else 2)
        own = 2 * work.rows * token_bytes / MEMORY
        return trips * (link_s(work.remote_keys) + own) + slower * computation + calls * CALL_S
    calls = 1 + degree * max(1, work.ranges // 2)
    partial = PARTIAL_BYTES[way] * work.remote_rows * work.heads * work.head_dim / MEMORY
    transfer = link_s(work.remote_keys / degree)
    exposed = max(0.0, trips * transfer - computation / (degree + 1))
    return degree * (partial + exposed) + slower * computation + (trips - 1) * transfer + calls * CALL_S


def buffer_tokens(work: Work, degree: int) -> float:
    """Keys that stand together in a stage's buffer, on average."""
    return work.remote_keys / degree if degree else work.remote_keys + work.rows
