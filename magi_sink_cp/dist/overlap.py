"""How the keys travel, and which kernels add the sink: the cost model behind ``overlap_degree="auto"``.

Degree 0 gathers all keys and computes no row twice, but for those that fill the wait (the head start of schedule.py). Each
travelling stage of degree n > 0 hides a transfer behind the computation before it, and costs a partial result of the rows that see
its keys: another pass over out in the merge; in backward, FlashAttention's fp32 accumulator of dq zeroed, read and rounded once
more, and the sum of two dq. Seconds beyond the computation itself, per rank:

    link(t)            = LATENCY + bytes of k and v of t tokens / LINK
    travel             = link(all remote keys) + a pass over the rank's own k and v, which are copied beside them
    forward, 0:        what of travel is longer than rows that see own keys alone take, or a head start + (calls + 2) · CALL
    forward, n:        n · (2 bytes for each element of q in those rows / MEMORY) + calls · CALL
                       + Σ stages [link(its keys) - what hides it]; where the kernels add the sink, also a read and a write of out
                       and lse in merges that are calls of their own
    backward, 0:       what of travel is longer than rows that see own keys alone take + link(all remote keys) + calls · CALL
    backward, n:       as forward, with 16 bytes and 2 · link, + link(keys of the last stage)

and STAGES_SLOWER · the computation for n: FlashAttention-3 takes longer for two forward calls. With ``ranges`` token ranges a rank,
0 makes as many kernel calls, or twice as many where documents end within them, as it computes rows with and without remote keys
apart; n makes one for the own keys and half as many as ranges for each stage. Segments of large_rows are more calls in forward, but
in all degrees alike, and too long for their ends to matter.

Calls of a pass that takes long, or very short, run one after the other; those of others in turns on two streams (lanes.py), where
two of them can be under way, each with its fp32 accumulator of dq.

Kernels that can add the sink (fa4) save the pass over out that the merge makes for it, and are slower than FlashAttention-3: they
pay where rows see few keys.

The figures are an H200's and NVLink's, or 400 Gb/s between hosts (docs/benchmarks.md); they decide between plans whose results are
the same, so on another machine only the order of things must be right. ``overlap_degree=n`` overrides the degrees.
"""

from __future__ import annotations

from dataclasses import dataclass

from magi_sink_cp.dist.schedule import HeadStart

# Bytes a second between GPUs of one host and of two; of device memory. FLOP a second of the attention kernels. Seconds.
LINK = {"nvlink": 3.4e11, "network": 4.5e10}
MEMORY = 4.0e12
FLOPS = 6.0e14
LATENCY_S = 20e-6
# A kernel call: its last tiles leave processors idle, fewer where another call takes them (lanes.py).
CALL_S, CALL_ON_TWO_LANES_S = 20e-6, 5e-6
# Bytes for each element of q that one more partial result costs, and FLOP for each visible pair, head and dimension.
PARTIAL_BYTES = {"forward": 2, "backward": 16}
PAIR_FLOPS = {"forward": 4, "backward": 10}
# What stages add to the computation of rows that see remote keys, as a part of it.
STAGES_SLOWER = {"forward": 0.045, "backward": 0.0}
# What a forward that adds the sink takes longer than FlashAttention-3's.
SINK_KERNEL_SLOWER = 0.045
# Processors, and the query rows of one head that the attention kernels give one of them at a time.
PROCESSORS = 132
TILE_ROWS = 128
# Rounds of tiles on all processors from where on the end of a call is no matter.
LARGE_WAVES = 16
# Of computation: below, two streams wait for each other as long as they save; above, the ends of calls are no matter, but the fp32
# accumulators of two calls' dq are.
TWO_LANES_S = (1e-3, 20e-3)
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
        alone_pairs: visible pairs of rows that see own keys alone, and can be computed meanwhile.
        ranges: token ranges that the rank holds.
        documents: of the whole sequence.
        heads, heads_kv, head_dim, element_size: of q, k and v.
    """

    rows: int
    pairs: int
    remote_keys: int
    remote_rows: int
    alone_pairs: int
    ranges: int
    documents: int
    heads: int
    heads_kv: int
    head_dim: int
    element_size: int


@dataclass(frozen=True)
class Overlap:
    """The choices for one kind of call, equal on all ranks.

    Attributes:
        degrees: overlap_degree of forward and backward.
        sink_in_kernel: the forward kernels add the sink; else the merge does.
        head_start: of degree 0 in forward.
        large_rows: neighbouring segments of so many rows are forward calls of their own.
        two_lanes: of forward and backward: calls run on two streams in turns (lanes.py).
    """

    degrees: tuple[int, int]
    sink_in_kernel: bool
    head_start: HeadStart
    large_rows: int
    two_lanes: tuple[bool, bool]


def choose_overlap(work: Work, cp_size: int, link: str, sink_kernel_slower: float | None) -> Overlap:
    """The choices with the least cost.

    Args:
        link: a key of LINK.
        sink_kernel_slower: what kernels that add the sink take longer than the others, as a part of the computation; 0 where they
            are the same. None: there are none.
    """
    degrees = [n for n in range(cp_size) if buffer_tokens(work, n) <= MAX_SHARDS * work.rows] or [cp_size - 1]
    sink_in_kernel = sink_kernel_slower is not None and _pass_s(work) > sink_kernel_slower * _computation_s(work, "forward")
    forward, backward = (
        min(degrees, key=lambda degree: cost_s(work, cp_size, degree, link, way, sink_in_kernel)) for way in ("forward", "backward")
    )
    pair_s = PAIR_FLOPS["forward"] * work.heads * work.head_dim / FLOPS
    head_start = HeadStart(
        pairs=round(LATENCY_S / pair_s),
        pairs_per_key=_token_bytes(work) / LINK[link] / pair_s,
        rows=max(1, PROCESSORS // work.heads) * TILE_ROWS,
    )
    large_rows = -(-LARGE_WAVES * PROCESSORS // work.heads) * TILE_ROWS
    two_lanes = _two_lanes(work, "forward"), _two_lanes(work, "backward")
    return Overlap((forward, backward), sink_in_kernel, head_start, large_rows, two_lanes)


def cost_s(work: Work, cp_size: int, degree: int, link: str, way: str, sink_in_kernel: bool = False) -> float:
    """Seconds beyond the computation itself; ``way`` is "forward" or "backward"."""
    token_bytes = _token_bytes(work)
    trips = 1 if way == "forward" else 2

    def link_s(tokens: float) -> float:
        return LATENCY_S + tokens * token_bytes / LINK[link]

    computation = _computation_s(work, way)
    call_s = CALL_ON_TWO_LANES_S if _two_lanes(work, way) else CALL_S
    if degree == 0:
        calls = work.ranges * (1 if work.documents == 1 else 2)
        travel = link_s(work.remote_keys) + 2 * work.rows * token_bytes / MEMORY
        alone = computation * work.alone_pairs / max(1, work.pairs)
        if way == "backward":
            return max(0.0, travel - alone) + link_s(work.remote_keys) + calls * call_s
        # A head start has a quarter of the rows at most, and their own keys, 1 of cp_size parts of all.
        return max(0.0, travel - max(alone, computation / (4 * cp_size))) + (calls + 2) * call_s
    later = degree * max(1, work.ranges // 2)
    partial = PARTIAL_BYTES[way] * work.remote_rows * work.heads * work.head_dim / MEMORY
    transfer = link_s(work.remote_keys / degree)
    exposed = max(0.0, trips * transfer - computation / (degree + 1))
    merged = degree * partial + later * call_s
    if way == "forward" and sink_in_kernel:  # else the merge that adds the sink reads and writes these rows, and lse, anyway
        merged += 2 * partial + later * call_s + 16 * work.rows * work.heads / MEMORY
    slower = STAGES_SLOWER[way] * work.remote_rows / max(1, work.rows) * computation
    return merged + degree * exposed + slower + (trips - 1) * transfer + call_s


def buffer_tokens(work: Work, degree: int) -> float:
    """Keys that stand together in a stage's buffer, on average."""
    return work.remote_keys / degree if degree else work.remote_keys + work.rows


def _token_bytes(work: Work) -> int:
    """Of one token's k and v."""
    return 2 * work.heads_kv * work.head_dim * work.element_size


def _computation_s(work: Work, way: str) -> float:
    return PAIR_FLOPS[way] * work.pairs * work.heads * work.head_dim / FLOPS


def _two_lanes(work: Work, way: str) -> bool:
    return TWO_LANES_S[0] < _computation_s(work, way) < TWO_LANES_S[1]


def _pass_s(work: Work) -> float:
    """A read and a write of out."""
    return 2 * work.element_size * work.rows * work.heads * work.head_dim / MEMORY
