"""Train a small gpt-oss by transformers' Trainer; prints the losses and gradient norms as JSON.

[torchrun --nproc-per-node N] trainer_job.py CP_SIZE OUTPUT_DIR [resume]
"""

from __future__ import annotations

import json
import os
import sys

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from magi_sink_cp.integrations import transformers as magi
from tests.integrations.transformers_models import make_model

BATCH = 4


class Samples(Dataset):
    """Samples of 12 to 18 tokens, padded to 20; the first 4 tokens have no label."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(1, 97, (20,), generator=generator)
        mask = (torch.arange(20) < 12 + index % 7).long()
        labels = ids.masked_fill(mask == 0, -100)
        labels[:4] = -100
        return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def count_rows(prediction) -> dict[str, float]:
    """How many samples compute_metrics gets, and what their logits add up to where labels are."""
    logits, labels = prediction.predictions, prediction.label_ids
    return {"rows": len(labels), "logits": float(abs(logits[labels >= 0]).sum())}


def main(cp_size: int, output_dir: str, resume: bool) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    dp_size = world // cp_size
    options = {}
    if world > 1:
        from accelerate import ParallelismConfig

        magi.enable_trainer_context_parallel()
        sharded = {"dp_shard_size": dp_size} if dp_size > 1 else {}
        options = {
            "parallelism_config": ParallelismConfig(cp_size=cp_size, **sharded),
            "fsdp": "full_shard auto_wrap",
            "fsdp_config": {
                "version": 2,
                "transformer_layer_cls_to_wrap": ["GptOssDecoderLayer"],
                "activation_checkpointing": True,
            },
        }
    arguments = TrainingArguments(
        output_dir=output_dir, use_cpu=True, per_device_train_batch_size=BATCH // dp_size,
        per_device_eval_batch_size=BATCH // dp_size, gradient_accumulation_steps=2, max_steps=3,
        learning_rate=1e-2, lr_scheduler_type="constant", optim="adamw_torch",
        logging_steps=1, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=2,
        report_to=[], seed=0, **options,
    )  # fmt: skip
    if world > 1:
        run_fsdp_on_cpus(arguments)
    trainer = Trainer(
        model=make_model("gpt_oss"), args=arguments, train_dataset=Samples(24),
        eval_dataset=Samples(23), compute_metrics=count_rows,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=f"{output_dir}/checkpoint-2" if resume else None)
    print_result(trainer, ("loss", "grad_norm", "eval_loss", "eval_rows", "eval_logits"))


def run_fsdp_on_cpus(arguments: TrainingArguments) -> None:
    """accelerate has no FSDP on CPUs; what it does on GPUs runs on them."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    assert arguments.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def print_result(trainer: Trainer, names: tuple[str, ...]) -> None:
    """What the trainer has logged under these names."""
    if trainer.is_world_process_zero():
        found = [
            {name: entry[name] for name in names if name in entry}
            for entry in trainer.state.log_history
        ]
        print("RESULT", json.dumps([entry for entry in found if entry]))


def end() -> None:
    """End at once: in an orderly end a thread of gloo, which the Trainer still holds, may abort the
    process (docs/troubleshooting.md).
    """
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:] == ["resume"])
    end()
