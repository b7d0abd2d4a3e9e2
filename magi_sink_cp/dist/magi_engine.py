"""The two engines of a plan, and a sequence as MagiAttention dispatches it.

With engine "native" this package plans, moves keys and calls kernels. With "magi" MagiAttention
does, through its public API (magi_attention.api): it deals the tokens to the ranks, and its
calc_attn computes attention without a sink, which this package adds (dist/methods/magi.py).
"""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed import ProcessGroup

from magi_sink_cp.dist.guard.agreement import GroupRef, all_gather, group_device
from magi_sink_cp.dist.planning.blueprint import CPBlueprint
from magi_sink_cp.dist.planning.layout import RankRanges, union
from magi_sink_cp.dist.planning.mask import CAUSAL, SLICE_TYPES, Bands, Slice, Window
from magi_sink_cp.kernels import magi_attention
from magi_sink_cp.kernels.magi_attention import Backward
from magi_sink_cp.kernels.protocol import NotUsableError

ENGINES = ("native", "magi")
DETERMINISTIC = "MAGI_ATTENTION_DETERMINISTIC_MODE"
EXACT_REDUCE = "MAGI_ATTENTION_BACKWARD_HIGH_PRECISION_REDUCE"
KEPT_KEYS = "MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE"
# Variables that may differ between the ranks: where its kernels are built, what it prints.
_OF_A_MACHINE = ("WORKSPACE", "BUILD", "JIT", "LOG", "PROFILE", "DEBUG")


@dataclass(frozen=True)
class EngineInfo:
    """One row of :func:`engines`.

    Attributes:
        name: what make_cp_plan's ``engine=`` takes.
        available: whether this process can use it.
        reason: why not; empty if it is available.
    """

    name: str
    available: bool
    reason: str


def engines() -> tuple[EngineInfo, ...]:
    """Both engines, with whether this process can use them, and why not.

    Where magi_attention is installed it is imported, which takes seconds.
    """
    reason = _missing_magi() or ""
    return EngineInfo("native", True, ""), EngineInfo("magi", not reason, reason)


def check_engine(name: object, magi_key: object) -> str:
    """The name of the engine; "auto" is native, or magi where a key of its own is given.

    Raises:
        ValueError: it is none, or this process cannot use it.
    """
    if not isinstance(name, str) or name not in ("auto", *ENGINES):
        raise ValueError(f"engine must be 'auto' or one of {list(ENGINES)}, got {name!r}")
    if name == "native" and magi_key is not None:
        raise ValueError("engine must be 'magi' or 'auto' beside magi_key, got 'native'")
    chosen = "magi" if name == "magi" or magi_key is not None else "native"
    if chosen == "magi" and (reason := _missing_magi()):
        raise ValueError(f"engine='magi' is not available: {reason}")
    return chosen


def _missing_magi() -> str | None:
    try:
        magi_attention.load()
    except NotUsableError as error:
        return str(error)
    return magi_attention.missing_gpu()


class Sizes(NamedTuple):
    """What of a call's tensors belongs to a key."""

    heads: int
    heads_kv: int
    head_dim: int


# The sizes of each group's latest kind of call. A plan's first key is made with them, so that the
# calls need no second one. Timed by hand with 64k tokens and two ranks, a plan and its first call
# then took 62 ms in place of 108.
_latest_sizes: weakref.WeakKeyDictionary[ProcessGroup, Sizes] = weakref.WeakKeyDictionary()
_FIRST_SIZES = Sizes(1, 1, 64)


class MagiDispatch:
    """A sequence that MagiAttention has dealt to the ranks of a group.

    Attributes:
        key: its DistAttnRuntimeKey, by which the tokens were dealt.
        layout: the token ranges of every rank; those from total_tokens on are padding.
        learned: the backward of each kind of call, from its first forward that needs gradients.
    """

    def __init__(self, key: Any, slices: Sequence[Slice], group: ProcessGroup) -> None:
        """Every rank of the group must call this.

        Args:
            slices: the mask of ``key``.
        """
        self.key = key
        self.layout = _read_layout(key, group)
        self._slices = tuple(slices)
        self._group = GroupRef(group)
        self._keys: dict[object, Any] = {}
        self.learned: dict[object, Backward] = {}

    def key_for(
        self, window: Window, slices: tuple[Slice, ...], sizes: Sizes, overlap_degree: int | None
    ) -> Any:
        """The key for a mask on this layout. Every rank must ask for the same, in one order.

        Args:
            window: tells the masks of one plan apart.
            slices: the mask.
            overlap_degree: None is what the first key's config says.
        """
        asked = window, sizes, overlap_degree
        found = self._keys.get(asked)
        if found is None:
            found = self._keys[asked] = self._make_key(slices, sizes, overlap_degree)
        return found

    def _make_key(self, slices: tuple[Slice, ...], sizes: Sizes, overlap_degree: int | None) -> Any:
        _latest_sizes[self._group()] = sizes
        own = Sizes(self.key.num_heads_q, self.key.num_heads_kv, self.key.head_dim)
        if overlap_degree is None and (slices, sizes) == (self._slices, own):
            return self.key
        api, config = magi_attention.load(), self.key.dist_attn_config
        if overlap_degree is not None:
            overlap = dataclasses.replace(
                config.overlap_config,
                degree=overlap_degree,
                mode=api.AttnOverlapMode.STATIC,
                max_num_chunks=max(config.overlap_config.max_num_chunks, overlap_degree),
            )
            config = dataclasses.replace(config, overlap_config=overlap)
        return api.make_flex_key_for_new_mask_after_dispatch(
            *as_ranges(slices),
            self.key,
            num_heads_q=sizes.heads,
            num_heads_kv=sizes.heads_kv,
            head_dim=sizes.head_dim,
            dist_attn_config=config,
        )


def dispatch(total_tokens: int, slices: Sequence[Slice], group: ProcessGroup) -> MagiDispatch:
    """Let MagiAttention deal a sequence with this mask. Every rank of the group must call this.

    Raises:
        ValueError: it refuses.
    """
    api = magi_attention.load()
    sizes = _latest_sizes.get(group, _FIRST_SIZES)
    try:
        key = api.magi_attn_flex_key(
            *as_ranges(slices),
            total_seqlen_q=total_tokens,
            total_seqlen_k=total_tokens,
            num_heads_q=sizes.heads,
            num_heads_kv=sizes.heads_kv,
            head_dim=sizes.head_dim,
            pad_size=0,  # which means that it chooses
            cp_group_or_mesh=group,
        )
    except AssertionError as error:
        raise ValueError(f"MagiAttention cannot make this plan: {error}") from error
    return MagiDispatch(key, slices, group)


def check_key(key: object) -> None:
    """Raise TypeError unless this is a key."""
    kind = magi_attention.load().DistAttnRuntimeKey
    if not isinstance(key, kind):
        raise TypeError(
            "magi_key must be a DistAttnRuntimeKey of magi_attention, as magi_attn_flex_key "
            f"returns it, got {type(key).__name__}"
        )


def mask_of_key(key: Any) -> tuple[int, list[Slice]]:
    """(total_tokens without padding, the mask) of a key.

    Raises:
        ValueError: a plan cannot follow it.
    """
    if key.uneven_shard:
        raise ValueError(
            "magi_key must give every rank as many tokens: make it without uneven_shard"
        )
    if key.total_seqlen_q != key.total_seqlen_k:
        raise ValueError(
            "magi_key must have queries and keys of the same tokens, got "
            f"{key.total_seqlen_q} and {key.total_seqlen_k}"
        )
    total = key.total_seqlen_q - key.pad_size
    triples = zip(key.q_ranges, key.k_ranges, key.attn_mask_type, strict=True)
    slices = [((q.start, q.end), (k.start, k.end), str(kind.value)) for q, k, kind in triples]
    return total, [(q, k, kind) for q, k, kind in slices if q[0] < q[1] and k[0] < k[1]]


def what_key_says(
    key: Any, total_tokens: object, group: object, mask_slices: object
) -> tuple[int, list[Slice]]:
    """total_tokens and the mask that a key says.

    Raises:
        ValueError: one of these arguments is given too, or no plan can follow the key.
    """
    beside = {"total_tokens": total_tokens, "group": group, "mask_slices": mask_slices}
    if given := [name for name, value in beside.items() if value is not None]:
        raise ValueError(f"{' and '.join(given)} must be left out beside magi_key, which says it")
    return mask_of_key(key)


def check_plan(
    total_tokens: object,
    layout: str,
    transport: str,
    group: ProcessGroup | None,
    blueprint: CPBlueprint,
) -> None:
    """Raise ValueError unless MagiAttention can make this plan."""
    if group is None or group_device(group).type != magi_attention.DEVICE_TYPE:
        raise ValueError(
            "engine='magi' must have a cp group with NCCL, also for one rank (torchrun "
            f"--nproc-per-node 1), got {'none' if group is None else 'one without it'}"
        )
    if isinstance(total_tokens, CPBlueprint):
        raise ValueError(
            "engine='magi' must be given total_tokens: MagiAttention plans with the group, so a "
            "blueprint cannot be made ahead"
        )
    for name, value in (("layout", layout), ("transport", transport)):
        if value != "auto":
            raise ValueError(
                f"{name} must be left at 'auto' with engine='magi', which chooses it, got {value!r}"
            )
    if not slices_of_bands(blueprint.bands(CAUSAL)):
        raise ValueError("engine='magi' must be given a mask in which some query sees a key")
    if blueprint.total_tokens < blueprint.cp_size:
        raise ValueError(
            f"engine='magi' must be given a token for each of the {blueprint.cp_size} ranks, got "
            f"total_tokens={blueprint.total_tokens}"
        )


def slices_of_bands(bands: Bands) -> tuple[Slice, ...]:
    """The mask as slices, in the order of the bands."""
    parts = magi_attention.rectangles_of_bands(*bands)
    columns = [np.stack(column, axis=1).ravel().tolist() for column in zip(*parts, strict=True)]
    return tuple(
        ((q_lo, q_hi), (k_lo, k_hi), SLICE_TYPES[kind])
        for q_lo, q_hi, k_lo, k_hi, kind in zip(*columns, strict=True)
        if q_lo < q_hi and k_lo < k_hi
    )


def is_set(variable: str) -> bool:
    """Whether one of MagiAttention's switches is on. They are only read."""
    return os.environ.get(variable, "0") == "1"


def variables() -> str:
    """Those by which MagiAttention computes or communicates in another way, for comparison."""
    names = [name for name in sorted(os.environ) if name.startswith("MAGI_ATTENTION_")]
    own = [name for name in names if not any(part in name for part in _OF_A_MACHINE)]
    return ", ".join(f"{name}={os.environ[name]}" for name in own)


def as_ranges(slices: Sequence[Slice]) -> tuple[Any, Any, list[str]]:
    """The queries, keys and types of slices as MagiAttention takes them."""
    from_ranges = magi_attention.load().AttnRanges.from_ranges
    queries, keys, kinds = zip(*slices, strict=True)
    return from_ranges([list(q) for q in queries]), from_ranges([list(k) for k in keys]), [*kinds]


def _read_layout(key: Any, group: ProcessGroup) -> tuple[RankRanges, ...]:
    """The ranges of every rank, by dispatching the tokens' numbers.

    Chunks of padding alone are dealt in the order of the ranks: which is whose does not matter.
    """
    device = group_device(group)
    total, size = key.total_seqlen_q - key.pad_size, key.chunk_size
    tokens = torch.arange(total, device=device)
    own = magi_attention.load().dispatch(tokens, key, pad_value=-1)
    starts = own[::size].contiguous()  # of its chunks
    every = all_gather(
        starts.view(torch.uint8), group, "make_cp_plan: gathering MagiAttention's layout"
    )
    padding = iter(range(-(-total // size) * size, key.total_seqlen_q, size))
    layout = []
    for row in every.view(torch.int64).tolist():
        chunks = [next(padding) if start < 0 else start for start in row]
        layout.append(union([(start, start + size) for start in chunks]))
    return tuple(layout)
