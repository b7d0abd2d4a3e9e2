"""Hugging Face transformers: attention with sinks, and context parallelism around a whole model.

from magi_sink_cp.integrations import transformers as magi

magi.register()
model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="magi_sink")
magi.context_parallel(model, group)
loss = model(input_ids=ids, labels=labels, attention_mask=mask).loss
"""

from magi_sink_cp.integrations.transformers.attention import register
from magi_sink_cp.integrations.transformers.batch import document_offsets, shard_batch
from magi_sink_cp.integrations.transformers.losses import cp_load_balancing_loss, global_loss
from magi_sink_cp.integrations.transformers.parallel import (
    ContextParallel,
    context_parallel,
)
from magi_sink_cp.integrations.transformers.trainer import enable_trainer_context_parallel

__all__ = [
    "ContextParallel",
    "context_parallel",
    "cp_load_balancing_loss",
    "document_offsets",
    "enable_trainer_context_parallel",
    "global_loss",
    "register",
    "shard_batch",
]
