"""Megatron-LM: a core_attention with learnable sinks, with context parallelism by transfer of keys.

Megatron's own modules take sinks (softmax_type="learnable") under context parallelism through
Transformer Engine's all-to-all alone. Give this class to a layer's specification in their place:

    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from magi_sink_cp.integrations.megatron import SinkDotProductAttention

    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention.submodules.core_attention = SinkDotProductAttention

Formats: sbhd, sharded as Megatron shards a batch (zigzag), and thd, sharded as Transformer Engine
shards packed documents (zigzag in each document).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from magi_sink_cp.attention import attention_with_sink
from magi_sink_cp.cp_attention import cp_attention_with_sink
from magi_sink_cp.dist.make_plan import make_cp_plan
from magi_sink_cp.dist.plan import CPPlan
from magi_sink_cp.kernels.caching import BoundedCache

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)
_TYPES = ("vanilla", "off-by-one", "learnable")

# Plans of sbhd batches by their length, for each cp group.
_plans: weakref.WeakKeyDictionary[ProcessGroup, BoundedCache[int, CPPlan]] = (
    weakref.WeakKeyDictionary()
)


class SinkDotProductAttention(MegatronModule):
    """Scaled dot-product attention; ``softmax_type`` of the config says which sink it has.

    "vanilla" has none, "off-by-one" a logit of 0, "learnable" the parameter ``softmax_offset``,
    (heads of this tensor-parallel rank,). Its gradient is this cp rank's share, which Megatron sums
    up with those of all parameters.

    Args:
        config: of the model. context_parallel_size, window_size, window_attn_skip_freq,
            softmax_type and attention_dropout are honoured; the last one must be 0.
        layer_number: from 1 on.
        attn_mask_type: causal, padding_causal or no_mask.
        softmax_scale: factor on q·k; None is kv_channels^-1/2.
        cp_comm_type: not read: keys travel as the plan says.
        pg_collection: the process groups, with ``tp`` and ``cp``; None takes Megatron's globals.

    Raises:
        ValueError: the config asks for what this attention has not.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(f"attention_dropout must be 0, got {dropout}")
        if config.softmax_type not in _TYPES:
            raise ValueError(f"softmax_type must be one of {_TYPES}, got {config.softmax_type!r}")
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.pg_collection, self.attn_mask_type = pg_collection, attn_mask_type
        heads = config.num_attention_heads // pg_collection.tp.size()
        scale = 1 / math.sqrt(k_channels or config.kv_channels)
        scale = scale if softmax_scale is None else softmax_scale
        if config.apply_query_key_layer_scaling:
            scale /= max(1, layer_number)
        self.softmax_scale = scale
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, max(1, layer_number)
        )
        self.window_size: Sequence[int] = tuple(config.window_size) if windowed else (-1, -1)
        self.softmax_offset: Tensor | None = None
        if config.softmax_type != "vanilla":
            device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
            self._make_offset(torch.zeros(heads, device=device, dtype=config.params_dtype))

    def _make_offset(self, offset: Tensor) -> None:
        """As a parameter where it is learnt; else as a buffer, which moves with the module."""
        del self.softmax_offset
        if self.config.softmax_type != "learnable":
            self.register_buffer("softmax_offset", offset, persistent=False)
            return
        self.softmax_offset = torch.nn.Parameter(offset)
        if self.config.perform_initialization:
            self.config.init_method(self.softmax_offset)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attention of this rank's queries.

        Args:
            query: (s, b, h, d), or packed (t, h, d) with packed_seq_params; key and value likewise.
            attention_mask: not read under a causal mask type.
            packed_seq_params: offsets of the whole sequence, of all cp ranks.

        Returns:
            (s, b, h·d), or (t, h, d).

        Raises:
            ValueError: the mask, the bias or the documents are what this attention has not.
        """
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        if attention_bias is not None:
            raise ValueError("attention_bias must be None: this attention adds none")
        causal = mask_type in _CAUSAL
        if not causal and (mask_type != AttnMaskType.no_mask or attention_mask is not None):
            raise ValueError(
                f"attn_mask_type must be causal, padding_causal, or no_mask without an "
                f"attention_mask, got {mask_type}"
            )
        options: dict[str, Any] = {
            "softmax_scale": self.softmax_scale,
            "causal": causal,
            "window_size": self.window_size,
        }
        group = self.pg_collection.cp
        if packed_seq_params is None:
            q, k, v = (x.transpose(0, 1) for x in (query, key, value))
            if dist.get_world_size(group) == 1:
                out = attention_with_sink(q, k, v, self.softmax_offset, **options)
            else:
                plan = _plan_of_length(query.shape[0], group)
                out = cp_attention_with_sink(q, k, v, self.softmax_offset, plan=plan, **options)
            assert isinstance(out, Tensor), "lse was not asked for"
            return out.transpose(0, 1).flatten(2)
        group = packed_seq_params.cp_group or group
        offsets = _offsets(packed_seq_params, causal)
        if dist.get_world_size(group) == 1:
            of_keys = packed_seq_params.cu_seqlens_kv_padded
            of_keys = packed_seq_params.cu_seqlens_kv if of_keys is None else of_keys
            out = attention_with_sink(
                query, key, value, self.softmax_offset,
                cu_seqlens_q=offsets, cu_seqlens_k=of_keys, **options,
            )  # fmt: skip
        else:
            plan = _plan_of_documents(packed_seq_params, offsets, group)
            out = cp_attention_with_sink(
                query, key, value, self.softmax_offset, plan=plan, **options
            )
        assert isinstance(out, Tensor), "lse was not asked for"
        return out

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Any:
        """The softmax_offset over the tensor-parallel ranks, as Megatron's own module has it."""
        learnable = self.config.softmax_type == "learnable"
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True) if learnable else {},
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.pg_collection.tp,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


def _plan_of_length(local_tokens: int, group: ProcessGroup) -> CPPlan:
    """Of a sequence of which every rank holds two chunks; equal ones are planned once."""
    plans = _plans.get(group)
    if plans is None:
        plans = _plans[group] = BoundedCache(64)
    plan = plans.get(local_tokens)
    if plan is None:
        total = local_tokens * dist.get_world_size(group)
        plan = plans[local_tokens] = make_cp_plan(total, group=group, layout="zigzag")
    return plan


def _offsets(packed: PackedSeqParams, causal: bool) -> Tensor:
    """Where the documents begin in memory, their padding included."""
    if packed.qkv_format not in (None, "thd"):
        raise ValueError(f"qkv_format must be 'thd', got {packed.qkv_format!r}")
    padded: Tensor | None = packed.cu_seqlens_q_padded
    if padded is None:
        return packed.cu_seqlens_q
    if not causal:
        raise ValueError(
            "cu_seqlens_q_padded must be None without a causal mask, under which no token sees the "
            "padding behind it"
        )
    return padded


def _plan_of_documents(packed: PackedSeqParams, offsets: Tensor, group: ProcessGroup) -> CPPlan:
    """The plan of these documents; all layers are given the same PackedSeqParams."""
    known = getattr(packed, "_magi_sink_plan", None)
    if known is None or known[0] is not offsets:
        plan = make_cp_plan(
            int(offsets[-1]), group=group, cu_seqlens=offsets, layout="zigzag_documents"
        )
        known = packed._magi_sink_plan = offsets, plan
    made: CPPlan = known[1]
    return made
