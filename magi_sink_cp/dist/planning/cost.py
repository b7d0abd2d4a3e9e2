"""The cost model behind ``overlap_degree="auto"``.

It chooses between plans whose results are the same: how the keys travel, and which kernels add the
sink. Degree 0 gathers all keys at once, and computes no row twice. Each travelling stage of degree
n > 0 hides a transfer behind the computation before it, at the price of one more partial result of
the rows that see its keys: another pass over out in the merge. In backward it costs
FlashAttention's fp32 accumulator of dq, which is zeroed, read and rounded once more, and the sum of
two dq.

Seconds beyond the computation itself, per rank:

    link(t)       = LATENCY + bytes of k and v of t tokens / LINK
    travel        = link(all remote keys) + a pass over the own keys that are copied beside them
    forward, 0:   what of travel is longer than the rows that see own keys alone + calls · CALL
    backward, 0:  the same + link(all remote keys), for the way home
    forward, n:   n · (STAGE + 2 bytes per element of q in those rows / MEMORY) + calls · CALL
                  + Σ stages [link(its keys) - what hides it]; if the kernels add the sink, also a
                  read and a write of out and lse, in merges that are calls of their own
    backward, n:  as forward, with 16 bytes and 2 · link, + link(keys of the last stage)

and STAGES_SLOWER · the computation for n: FlashAttention-3 takes longer for two forward calls. With
``ranges`` token ranges per rank, degree 0 makes as many kernel calls. Where documents end inside
them it makes two, and one for each range and one more in backward; or, with kernels that leave no
gaps, twice as many as ranges. Degree n makes one for the own keys and half as many as ranges per
stage.

Passes that are neither very short nor very long run their calls in turns on two streams
(methods/lanes.py). Kernels that add the sink (fa4) save the merge's pass over out and are slower
than FlashAttention-3: they pay where rows see few keys.

The figures are an H200's, with NVLink or 400 Gb/s between hosts (docs/benchmarks.md). On another
machine only the order of things must be right. ``overlap_degree=n`` overrides the degrees.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from magi_sink_cp.dist.planning.schedule import Mask

# Bytes per second between GPUs of one host and of two; of device memory.
LINK = {"nvlink": 3.4e11, "network": 4.5e10}
MEMORY = 4.0e12
# FLOP per second of the attention kernels.
FLOPS = 6.0e14
LATENCY_S = 20e-6
# The last tiles of a kernel call leave processors idle, fewer if another call takes them.
CALL_S, CALL_ON_TWO_LANES_S = 20e-6, 5e-6
# What a travelling stage costs whatever its size: a merge or sum of its own, one more wait.
STAGE_S = 35e-6
# Bytes per element of q that one more partial result costs.
PARTIAL_BYTES = {"forward": 2, "backward": 16}
# FLOP per visible pair, head and dimension.
PAIR_FLOPS = {"forward": 4, "backward": 10}
# What stages add to the computation of rows that see remote keys, as a part of it.
STAGES_SLOWER = {"forward": 0.045, "backward": 0.0}
# How much longer a forward that adds the sink takes than FlashAttention-3's.
SINK_KERNEL_SLOWER = 0.045
# Processors, and the query rows of one head that a kernel gives one of them at a time.
PROCESSORS = 132
TILE_ROWS = 128
# A tile that FlashAttention-3's backward starts, and finds no keys for: it starts as many for every
# document as for the longest. What one call less is worth, the host's time included.
IDLE_TILE_S, JOINED_CALL_S = 6e-9, 40e-6
# From so many rounds of tiles on, the idle processors at the end of a call do not matter.
LARGE_WAVES = 16
# Computation of a pass, in seconds. Below, two streams wait for each other as long as they save.
# Above, the ends of calls do not matter, but the fp32 accumulators of two calls' dq do.
TWO_LANES_S = (1e-3, 20e-3)
# All buffers of a pass together, for keys and in backward for gradients too, hold at most so many
# times the rank's own keys, on every rank: they do not grow with cp_size.
MAX_SHARDS = {"forward": 4, "backward": 8}
# Numbers of travelling stages to choose from, besides cp_size - 1.
_DEGREES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)


class CallSizes(NamedTuple):
    """What the cost of a call depends on besides the plan and the window."""

    batch_size: int
    heads: int
    heads_kv: int
    head_dim: int
    element_size: int
    # Whether the kernels can leave rows between a call's segments to other calls; those that add
    # the sink cannot.
    leaves_gaps: bool


@dataclass(frozen=True)
class Work:
    """One rank's share of a call, on average over the ranks.

    Attributes:
        rows: query tokens.
        pairs: visible (query, key) pairs.
        remote_keys: tokens that travel to the rank.
        own_keys: own tokens that rows see which also see some of these.
        remote_rows: rows that see any of the remote keys.
        alone_pairs: visible pairs of rows that see own keys alone, computed meanwhile.
        ranges: token ranges that the rank holds.
        documents: of the whole sequence.
        heads, heads_kv, head_dim, element_size: of q, k and v.
        leaves_gaps: as in CallSizes.
    """

    rows: int
    pairs: int
    remote_keys: int
    own_keys: int
    remote_rows: int
    alone_pairs: int
    ranges: int
    documents: int
    heads: int
    heads_kv: int
    head_dim: int
    element_size: int
    leaves_gaps: bool


@dataclass(frozen=True)
class Overlap:
    """The choices for one kind of call, equal on all ranks.

    Attributes:
        degrees: overlap_degree of forward and backward.
        sink_in_kernel: the forward kernels add the sink; else the merge does.
        large_rows: neighbouring segments of so many rows are forward calls of their own.
        idle_tiles: as in :class:`~magi_sink_cp.dist.planning.packing.Gaps`, for backward.
        two_lanes: for forward and backward, whether calls run in turns on two streams.
    """

    degrees: tuple[int, int]
    sink_in_kernel: bool
    large_rows: int
    idle_tiles: int
    two_lanes: tuple[bool, bool]


def make_work(mask: Mask, sizes: CallSizes) -> Work:
    """The :class:`Work` of a call over a mask of ``sizes.batch_size`` samples."""
    share = mask.share()
    return Work(
        rows=mask.local_tokens,
        pairs=mask.pairs() // mask.cp_size,
        remote_keys=share.remote_keys,
        own_keys=share.own_keys,
        remote_rows=share.remote_rows,
        alone_pairs=share.alone_pairs,
        ranges=mask.most_ranges,
        documents=mask.num_bands,
        heads=sizes.heads,
        heads_kv=sizes.heads_kv,
        head_dim=sizes.head_dim,
        element_size=sizes.element_size,
        leaves_gaps=sizes.leaves_gaps,
    )


def choose_overlap(
    work: Work,
    cp_size: int,
    link: str,
    sink_kernel_slower: float | None,
    buffers: Callable[[int], tuple[int, int]],
) -> Overlap:
    """The choices with the least cost, of those whose buffers are small enough on every rank.

    Args:
        link: a key of LINK.
        sink_kernel_slower: how much longer kernels that add the sink take than the others, as a
            part of the computation; 0 if they are the same kernels, None if there are none.
        buffers: Mask.buffers.
    """
    sink_in_kernel = False
    if sink_kernel_slower is not None:
        sink_in_kernel = _pass_s(work) > sink_kernel_slower * _computation_s(work, "forward")

    def cheapest(direction: str) -> int:
        return min(
            _fitting_degrees(work, cp_size, direction, buffers),
            key=lambda n: cost_s(work, cp_size, n, link, direction, sink_in_kernel),
        )

    return Overlap(
        degrees=(cheapest("forward"), cheapest("backward")),
        sink_in_kernel=sink_in_kernel,
        large_rows=-(-LARGE_WAVES * PROCESSORS // work.heads) * TILE_ROWS,
        idle_tiles=int(JOINED_CALL_S / (work.heads * IDLE_TILE_S)),
        two_lanes=(_two_lanes(work, "forward"), _two_lanes(work, "backward")),
    )


def _fitting_degrees(
    work: Work, cp_size: int, direction: str, buffers: Callable[[int], tuple[int, int]]
) -> list[int]:
    """The degrees to choose from: those whose buffers hold MAX_SHARDS times the own keys at most.

    More stages have smaller buffers, so the smallest number of stages that fits is searched by
    halving. With one rank a stage they always fit.
    """
    if cp_size == 1:
        return [0]

    def fits(degree: int) -> bool:
        keys, gradients = buffers(degree)
        tokens = keys if direction == "forward" else keys + gradients
        return min(2, max(1, degree)) * tokens <= MAX_SHARDS[direction] * work.rows

    stages = [n for n in _DEGREES if n < cp_size - 1] + [cp_size - 1]
    fewest = bisect_left(stages, True, hi=len(stages) - 1, key=fits)
    return ([0] if fits(0) else []) + stages[fewest:]


def cost_s(
    work: Work,
    cp_size: int,
    degree: int,
    link: str,
    direction: str,
    sink_in_kernel: bool = False,
) -> float:
    """Seconds beyond the computation itself; ``direction`` is "forward" or "backward"."""
    token_bytes = _token_bytes(work)
    call_s = CALL_ON_TWO_LANES_S if _two_lanes(work, direction) else CALL_S

    def link_s(tokens: float) -> float:
        return LATENCY_S + tokens * token_bytes / LINK[link]

    computation = _computation_s(work, direction)
    if degree == 0:
        gaps = work.leaves_gaps and not (sink_in_kernel and direction == "forward")
        calls = work.ranges
        if work.documents > 1:
            calls = _calls_over_documents(work, direction) if gaps else 2 * work.ranges
        travel = link_s(work.remote_keys) + 2 * work.own_keys * token_bytes / MEMORY
        alone = computation * work.alone_pairs / max(1, work.pairs)
        home = link_s(work.remote_keys) if direction == "backward" else 0.0
        return max(0.0, travel - alone) + home + calls * call_s
    trips = 1 if direction == "forward" else 2
    later_calls = degree * max(1, work.ranges // 2)
    partial = PARTIAL_BYTES[direction] * _row_elements(work, work.remote_rows) / MEMORY
    transfer = link_s(work.remote_keys / degree)
    exposed = max(0.0, trips * transfer - computation / (degree + 1))
    merged = degree * (STAGE_S + partial) + later_calls * call_s
    if direction == "forward" and sink_in_kernel:
        # Else the merge that adds the sink reads and writes these rows, and lse, anyway.
        merged += 2 * partial + later_calls * call_s + 16 * work.rows * work.heads / MEMORY
    slower = STAGES_SLOWER[direction] * work.remote_rows / max(1, work.rows) * computation
    return merged + degree * exposed + slower + (trips - 1) * transfer + call_s


def _calls_over_documents(work: Work, direction: str) -> int:
    """Calls of degree 0, with gaps, where documents end inside the ranges."""
    return 2 if direction == "forward" else work.ranges + 1


def _token_bytes(work: Work) -> int:
    """Bytes of one token's k and v."""
    return 2 * work.heads_kv * work.head_dim * work.element_size


def _row_elements(work: Work, rows: int) -> int:
    """Elements of so many rows of q."""
    return rows * work.heads * work.head_dim


def _computation_s(work: Work, direction: str) -> float:
    return PAIR_FLOPS[direction] * _row_elements(work, work.pairs) / FLOPS


def _two_lanes(work: Work, direction: str) -> bool:
    return TWO_LANES_S[0] < _computation_s(work, direction) < TWO_LANES_S[1]


def _pass_s(work: Work) -> float:
    """A read and a write of out."""
    return 2 * work.element_size * _row_elements(work, work.rows) / MEMORY
