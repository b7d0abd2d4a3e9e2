"""Exact attention with learnable sinks, on one device and across context-parallel ranks."""

from magi_sink_cp import compat, masks
from magi_sink_cp.attention import attention_with_sink
from magi_sink_cp.cp_attention import cp_attention_with_sink
from magi_sink_cp.dist import shard as _shard  # noqa: F401 (registers its operators)
from magi_sink_cp.dist.magi_engine import EngineInfo, engines
from magi_sink_cp.dist.make_plan import make_cp_blueprint, make_cp_plan
from magi_sink_cp.dist.plan import CPPlan
from magi_sink_cp.dist.planning.blueprint import CPBlueprint
from magi_sink_cp.drop_in.fa2 import (
    fa2_func_with_sink,
    fa2_kvpacked_func_with_sink,
    fa2_qkvpacked_func_with_sink,
    fa2_varlen_func_with_sink,
    fa2_varlen_kvpacked_func_with_sink,
    fa2_varlen_qkvpacked_func_with_sink,
)
from magi_sink_cp.drop_in.fa3 import (
    fa3_func_with_sink,
    fa3_qkvpacked_func_with_sink,
    fa3_varlen_func_with_sink,
)
from magi_sink_cp.drop_in.fa4 import fa4_func_with_sink, fa4_varlen_func_with_sink
from magi_sink_cp.kernels.backends.registry import BackendInfo, backends, set_fallback
from magi_sink_cp.module import SinkAttention
from magi_sink_cp.ops import flops as _flops  # noqa: F401 (registers the formulas)
from magi_sink_cp.prefetch import prefetch_plans

__version__ = "0.1.0"

__all__ = [
    "BackendInfo",
    "CPBlueprint",
    "CPPlan",
    "EngineInfo",
    "SinkAttention",
    "attention_with_sink",
    "backends",
    "compat",
    "cp_attention_with_sink",
    "engines",
    "fa2_func_with_sink",
    "fa2_kvpacked_func_with_sink",
    "fa2_qkvpacked_func_with_sink",
    "fa2_varlen_func_with_sink",
    "fa2_varlen_kvpacked_func_with_sink",
    "fa2_varlen_qkvpacked_func_with_sink",
    "fa3_func_with_sink",
    "fa3_qkvpacked_func_with_sink",
    "fa3_varlen_func_with_sink",
    "fa4_func_with_sink",
    "fa4_varlen_func_with_sink",
    "make_cp_blueprint",
    "make_cp_plan",
    "masks",
    "prefetch_plans",
    "set_fallback",
]
