"""What TRL's trainers, which compute their own loss, make of a sharded batch."""

from __future__ import annotations

import sys
from typing import Any

from magi_sink_cp.integrations.transformers.parallel import ContextParallel


def meet_trl(trainer: Any, attached: ContextParallel) -> None:
    """Let TRL's SFTTrainer count each token once. Other trainers are left as they are.

    SFTTrainer adds up the ranks' losses of their own tokens, over the labels of the whole batch,
    and the ranks' entropy and accuracy. It counts the tokens of a batch once for every rank that
    was given it, and corrects that for tp alone.

    Raises:
        ValueError: it is another trainer of TRL, or an SFTTrainer before 1.15.
    """
    bases = [base for base in type(trainer).__mro__ if base.__module__.startswith("trl.")]
    if not bases:
        return
    if not any(base.__name__ == "SFTTrainer" for base in bases):
        raise ValueError(
            "context parallelism with magi_sink knows Trainer and TRL's SFTTrainer, got "
            f"{type(trainer).__name__}: its loss is not one of labels alone"
        )
    if not hasattr(sys.modules.get("trl.trainer.utils"), "add_fused_lm_head"):
        raise ValueError(
            "context parallelism with magi_sink needs a TRL whose SFTTrainer has a fused LM head "
            "(1.15 or newer): an older one compares whole labels with a shard of the logits"
        )
    config = trainer.accelerator.parallelism_config
    attached.local_per_token = trainer.model_accepts_loss_kwargs
    trainer._tp_size = config.tp_size * config.cp_size
