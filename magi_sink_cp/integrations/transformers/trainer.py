"""Context parallelism in transformers' Trainer, by accelerate's ParallelismConfig(cp_size=…).

Trainer and accelerate shard a batch for torch's own ring, and refuse every attention but "sdpa".
Two methods are replaced: what accelerate attaches to a model, and what Trainer does to a batch. For
models with another attention than "magi_sink" both do what they did.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from magi_sink_cp.integrations.transformers.attention import NAME
from magi_sink_cp.integrations.transformers.parallel import ContextParallel, check_model

_layout = "auto"


def enable_trainer_context_parallel(layout: str = "auto") -> None:
    """Let Trainer train models with "magi_sink" under accelerate's ParallelismConfig(cp_size=…).

    Call it once before the Trainer is made. Every rank of a cp group then gets the same batch, as
    accelerate's loaders give it, and runs its shard. Losses, gradient norms and evaluation are
    those of one rank. Evaluation is sharded too, and its logits are put together again.

    Args:
        layout: as in :func:`magi_sink_cp.make_cp_plan`.

    Raises:
        ImportError: accelerate is missing, or has no context parallelism.
    """
    try:
        from accelerate import Accelerator
        from transformers import Trainer

        accelerate_method = Accelerator._prepare_cp
        trainer_method = Trainer._prepare_context_parallel_inputs
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "enable_trainer_context_parallel needs accelerate and a transformers whose Trainer has "
            f"context parallelism: {error}"
        ) from error
    global _layout
    _layout = layout
    if not getattr(accelerate_method, "of_magi_sink", False):
        setattr(Accelerator, accelerate_method.__name__, _preparing(accelerate_method))
        setattr(Trainer, trainer_method.__name__, _leaving_inputs(trainer_method))


def _uses_magi_sink(model: Any) -> bool:
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == NAME


def _preparing(original: Callable[..., Any]) -> Callable[..., Any]:
    def _prepare_cp(accelerator: Any, *args: Any) -> Any:
        models = [x for x in args if isinstance(x, torch.nn.Module)]
        if not any(map(_uses_magi_sink, models)):
            return original(accelerator, *args)
        for model in models:
            check_model(model)
            ContextParallel(
                model, accelerator.torch_device_mesh["cp"], _layout,
                unshard_logits="in eval", in_eval=True, share_of_loss=True,
            )  # fmt: skip
        return args

    _prepare_cp.of_magi_sink = True  # type: ignore[attr-defined]
    return _prepare_cp


def _leaving_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def _prepare_context_parallel_inputs(trainer: Any, model: Any, inputs: Any) -> Any:
        if _uses_magi_sink(trainer.accelerator.unwrap_model(model)):
            if trainer.accelerator.parallelism_config is not None and (
                trainer.label_smoother is not None or trainer.compute_loss_func is not None
            ):
                raise ValueError(
                    "label_smoothing_factor and compute_loss_func must be left out under context "
                    "parallelism with magi_sink: they would see a shard of the logits"
                )
            return contextlib.nullcontext, inputs
        return original(trainer, model, inputs)

    return _prepare_context_parallel_inputs
