"""The interface of a method, and the request that a method works on.

A *method* is one algorithm of attention across ranks. It turns a checked call into a state of its
own, once per kind of call. It has a forward and a backward. To add one, write methods/NAME.py and
name it in methods/choose.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from magi_sink_cp.dist.guard.agreement import GroupRef, Signature
from magi_sink_cp.dist.plan import CPPlan
from magi_sink_cp.kernels.protocol import AttentionParams


class CallOptions(NamedTuple):
    """The options of cp_attention_with_sink after their checks. The operators' schema follows them.

    Attributes:
        sink_layout: "sh" or "ssh".
        softmax_scale: None is d^-1/2.
        window_size: (left, right), -1 is unlimited; right is 0 under a causal mask.
        softcap: 0 is none.
        deterministic: backward adds in a fixed order.
        dsink_reduce: "none", "sum" or "avg" over the cp group.
        overlap_degree: None is "auto".
        grad_reduce_dtype: None is fp32 (fp64 for fp64 inputs).
        always_compare: checks == "always".
        backend: of the kernels; "auto" or a name of backends().
        head_dim_v: of v before zeros made it that of k, or of q and k before they made it v's; None
            where they were equal.
    """

    sink_layout: str
    softmax_scale: float | None
    window_size: tuple[int, int]
    softcap: float
    deterministic: bool
    dsink_reduce: str
    overlap_degree: int | None
    grad_reduce_dtype: torch.dtype | None
    always_compare: bool
    backend: str
    head_dim_v: int | None


class CheckedCall(NamedTuple):
    """A call whose tensors and options have been checked against each other and the plan.

    q is (T, H, D) or (B, T, H, D); ``sink`` has two dimensions or more; ``want_lse``: the user gets
    lse, whose gradient may come.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None
    params: AttentionParams
    options: CallOptions
    batch_size: int
    want_lse: bool


class MethodState(Protocol):
    """What a method keeps for one kind of call. It must not refer to the plan, which caches it."""

    @property
    def record(self) -> Mapping[str, object]:
        """What all ranks must have resolved alike, by name."""


@dataclass(frozen=True)
class Request:
    """Everything of one kind of call that is not differentiated.

    Attributes:
        method, state: the algorithm and its state.
        group: the cp group, or None for one device.
        cp_size: its ranks; 1 for one device.
        local_tokens, real_tokens: of the plan, per sample.
        batch_size: samples; 1 without a batch.
        params: mask and scores, as the kernels take them.
        options, requires_grad: what was resolved; of q, k, v and sink.
        want_lse: the user gets lse.
        grad_reduce_dtype: in which dk and dv of several ranks are added.
        signature: what the ranks compare.
    """

    method: Method
    state: Any
    group: GroupRef | None
    cp_size: int
    local_tokens: int
    real_tokens: int
    batch_size: int
    params: AttentionParams
    options: CallOptions
    requires_grad: tuple[bool, ...]
    want_lse: bool
    grad_reduce_dtype: torch.dtype
    signature: Signature

    @property
    def is_padded(self) -> bool:
        """Whether this rank holds rows that are no token of the sequence."""
        return self.real_tokens < self.local_tokens

    def padding(self, device: torch.device) -> Tensor:
        """bool (B·T,): the rows that are no token of the sequence."""
        rows = torch.arange(self.batch_size * self.local_tokens, device=device)
        return rows % max(1, self.local_tokens) >= self.real_tokens


class Method(ABC):
    """One algorithm of attention across ranks.

    Shapes on a rank: T local tokens of all samples, H query heads, H_kv key/value heads, D
    head_dim. Sharded are q, out and dq (T, H, D), k, v, dk and dv (T, H_kv, D), and lse (H, T).
    The sink is replicated, (s_sink, H), or sharded, (T, s_sink, H).
    """

    name: str

    @abstractmethod
    def resolve(self, plan: CPPlan, call: CheckedCall) -> MethodState:
        """The state for calls like this one.

        Raises:
            ValueError: the method cannot run this call; the text names what and why.
        """

    @abstractmethod
    def forward(
        self, request: Request, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, want_lse: bool
    ) -> tuple[Tensor, Tensor]:
        """(out, lse), final: all keys and the sink are included. On padding out is 0.

        If not ``want_lse``, lse need only be right for the backward.
        """

    @abstractmethod
    def backward(
        self,
        request: Request,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        out: Tensor,
        lse: Tensor,
        needs_dsink: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Contiguous dq, dk, dv, and dsink if it is needed.

        lse is +inf on padding, and dlse is 0 there.
        """
