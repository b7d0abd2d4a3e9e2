"""SinkAttention: the sink parameter as a module, on one device or across ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from magi_sink_cp.attention import attention_with_sink
from magi_sink_cp.cp_attention import cp_attention_with_sink
from magi_sink_cp.dist.plan import CPPlan
from magi_sink_cp.dist.resolve import DSINK_REDUCTIONS
from magi_sink_cp.kernels.backends.registry import check_backend_name
from magi_sink_cp.kernels.checks import FLOATS, as_count, as_float, make_params


class SinkAttention(nn.Module):
    """Attention with learnable sink logits that it owns.

    They are the parameter ``sink`` (num_sinks, num_heads). It runs on one device, or across ranks
    if it is called with a plan.

    Args:
        num_heads: query heads h.
        num_sinks: s_sink >= 1.
        init_std: standard deviation of the normal distribution from which the logits start
            (gpt-oss: 0.02).
        softmax_scale, causal, window_size, softcap, deterministic, backend: as in
            :func:`magi_sink_cp.attention_with_sink`.
        dsink_reduce: as in :func:`magi_sink_cp.cp_attention_with_sink`. It has no effect without a
            plan, where dsink is whole.
        device, dtype: of ``sink``; fp32 by default, or fp16, bf16, fp64 (for q in fp64). None is
            torch's default.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """

    def __init__(
        self,
        num_heads: int,
        num_sinks: int = 1,
        *,
        init_std: float = 0.02,
        softmax_scale: float | None = None,
        causal: bool | None = None,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
        dsink_reduce: str = "none",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__()
        num_heads, num_sinks = as_count("num_heads", num_heads), as_count("num_sinks", num_sinks)
        allowed = (None, *FLOATS)
        if dtype not in allowed:
            raise TypeError(f"dtype must be one of {allowed}, got {dtype!r}")
        if dsink_reduce not in DSINK_REDUCTIONS:
            raise ValueError(
                f"dsink_reduce must be one of {DSINK_REDUCTIONS}, got {dsink_reduce!r}"
            )
        check_backend_name(backend)
        # Raises here what does not depend on q.
        make_params(
            1,
            softmax_scale,
            True if causal is None else causal,
            window_size,
            softcap,
            deterministic,
        )
        self.init_std = as_float("init_std", init_std, zero_allowed=True)
        self.dsink_reduce = dsink_reduce
        self.options: dict[str, Any] = {
            "softmax_scale": softmax_scale,
            "causal": causal,
            "window_size": window_size,
            "softcap": softcap,
            "deterministic": deterministic,
            "backend": backend,
        }
        self.sink = nn.Parameter(torch.empty(num_sinks, num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the logits anew."""
        nn.init.normal_(self.sink, std=self.init_std)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        plan: CPPlan | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """cp_attention_with_sink on local tokens with ``plan``, else attention_with_sink.

        Args:
            q, k, v: as those functions take them.
            plan: of make_cp_plan.
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: packed documents; not beside a
                plan.
            return_lse: also return lse.

        Raises:
            ValueError: cu_seqlens or max_seqlen beside a plan, which already knows the documents.
        """
        lengths: dict[str, Any] = {
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_k,
            "max_seqlen_q": max_seqlen_q,
            "max_seqlen_k": max_seqlen_k,
        }
        if plan is None:
            causal = self.options["causal"]
            options = self.options | {"causal": True if causal is None else causal}
            return attention_with_sink(
                q, k, v, self.sink, return_lse=return_lse, **lengths, **options
            )
        if given := [name for name, value in lengths.items() if value is not None]:
            raise ValueError(
                f"plan already holds the documents; got {', '.join(given)} beside it. Pass them "
                "to make_cp_plan"
            )
        return cp_attention_with_sink(
            q,
            k,
            v,
            self.sink,
            plan=plan,
            dsink_reduce=self.dsink_reduce,
            return_lse=return_lse,
            **self.options,
        )

    def extra_repr(self) -> str:
        num_sinks, num_heads = self.sink.shape
        return f"num_heads={num_heads}, num_sinks={num_sinks}, " + ", ".join(
            f"{k}={v}" for k, v in self.options.items()
        )
