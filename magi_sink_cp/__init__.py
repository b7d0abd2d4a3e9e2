"""Attention with learnable sinks, exact, forward and backward, on one device and across context-parallel ranks."""

from magi_sink_cp.attention import attention_with_sink
from magi_sink_cp.dist.attention import cp_attention_with_sink
from magi_sink_cp.dist.plan import CPPlan, make_cp_plan
from magi_sink_cp.kernels.registry import BackendInfo, backends
from magi_sink_cp.module import SinkAttention

__version__ = "0.1.0"

__all__ = [
    "BackendInfo",
    "CPPlan",
    "SinkAttention",
    "attention_with_sink",
    "backends",
    "cp_attention_with_sink",
    "make_cp_plan",
]
