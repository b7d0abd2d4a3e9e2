"""Context parallelism in transformers' Trainer, by accelerate's ParallelismConfig(cp_size=…).

Trainer and accelerate shard a batch for torch's own ring, and refuse every attention but "sdpa".
Three methods are replaced: what accelerate attaches to a model, what Trainer does to a batch, and
what accelerate gathers in evaluation. For models with another attention than "magi_sink" they do
what they did.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from magi_sink_cp.integrations.transformers.attention import NAME
from magi_sink_cp.integrations.transformers.parallel import (
    ContextParallel,
    attached_to,
    check_model,
)
from magi_sink_cp.integrations.transformers.trl import meet_trl

_layout = "auto"
_PREPARED = "_magi_sink_models"


def enable_trainer_context_parallel(layout: str = "auto") -> None:
    """Let Trainer, and TRL's SFTTrainer (1.16), train models with "magi_sink" under accelerate's
    ParallelismConfig(cp_size=…).

    Call it once before the Trainer is made. Every rank of a cp group then gets the same batch, as
    accelerate's loaders give it, and runs its shard. Losses, gradient norms and evaluation are
    those of one rank. Evaluation is sharded too, and its logits are put together again; each
    sample counts once.

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
        gather_method = Accelerator.gather_for_metrics
        setattr(Accelerator, gather_method.__name__, _gathering_once(gather_method))


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
        setattr(accelerator, _PREPARED, models)
        return args

    _prepare_cp.of_magi_sink = True  # type: ignore[attr-defined]
    return _prepare_cp


def _gathering_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """In evaluation the ranks of a cp group have the same samples: they count once, and without
    those that fill a last batch. In training each rank has numbers of its own tokens: all count.
    """

    @functools.wraps(original)
    def gather_for_metrics(
        accelerator: Any, input_data: Any, use_gather_object: bool = False
    ) -> Any:
        models = getattr(accelerator, _PREPARED, None)
        if models is None or use_gather_object:
            return original(accelerator, input_data, use_gather_object)
        gathered = accelerator.gather(input_data)
        if any(model.training for model in models):
            return gathered
        from accelerate.utils import recursively_apply

        mesh = accelerator.torch_device_mesh
        first_of_cp = mesh.mesh.select(mesh.mesh_dim_names.index("cp"), 0)
        ranks = first_of_cp.flatten().sort().values.tolist()
        state = accelerator.gradient_state
        rows = state.remainder if state.end_of_dataloader and state.remainder > 0 else None

        def choose(x: Any) -> Any:
            of_ranks = x.unflatten(0, (accelerator.num_processes, -1))
            return of_ranks[ranks].flatten(0, 1)[:rows]

        return recursively_apply(choose, gathered)

    return gather_for_metrics


def _leaving_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def _prepare_context_parallel_inputs(trainer: Any, model: Any, inputs: Any) -> Any:
        unwrapped = trainer.accelerator.unwrap_model(model)
        if _uses_magi_sink(unwrapped):
            if trainer.accelerator.parallelism_config is not None and (
                trainer.label_smoother is not None or trainer.compute_loss_func is not None
            ):
                raise ValueError(
                    "label_smoothing_factor and compute_loss_func must be left out under context "
                    "parallelism with magi_sink: they would see a shard of the logits"
                )
            attached = attached_to(unwrapped)
            if attached is not None:
                meet_trl(trainer, attached)
            return contextlib.nullcontext, inputs
        return original(trainer, model, inputs)

    return _prepare_context_parallel_inputs
