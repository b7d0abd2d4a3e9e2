"""Which method computes a call. A new method is named here, and nowhere else."""

from __future__ import annotations

from magi_sink_cp.dist.methods.base import Method
from magi_sink_cp.dist.methods.magi import MagiAttention
from magi_sink_cp.dist.methods.ring import Ring
from magi_sink_cp.dist.plan import CPPlan

# By the plan's engine.
METHODS: dict[str, Method] = {"native": Ring(), "magi": MagiAttention()}


def choose_method(plan: CPPlan) -> Method:
    """The method for the calls of a plan."""
    return METHODS[plan.engine]
