"""Train a small gpt-oss by TRL's SFTTrainer; prints its logs as JSON.

[torchrun --nproc-per-node N] trl_job.py CP_SIZE OUTPUT_DIR KIND [resume] [lora]
KIND is padded, completion (labels of the completion alone), padding_free, or prepacked.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer, pack_dataset

from magi_sink_cp.integrations import transformers as magi
from tests.integrations.trainer_job import end, print_result, run_fsdp_on_cpus
from tests.integrations.transformers_models import make_model

BATCH = 4
COLUMNS = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "aux_loss", "num_tokens")


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, **{f"t{number}": number for number in range(1, 97)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t1")),
        pad_token="<pad>",
        eos_token="t2",
        unk_token="t1",
    )


def make_samples(kind: str, first: int, count: int) -> Dataset:
    """Of 12 to 18 tokens; the first 4 have no label."""
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "completion_mask": []}
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(3, 97, (12 + number % 7,), generator=generator).tolist()
        rows["input_ids"].append(ids)
        rows["labels"].append([-100] * 4 + ids[4:])
        rows["completion_mask"].append([0] * 4 + [1] * (len(ids) - 4))
    del rows["labels" if kind == "completion" else "completion_mask"]
    samples = Dataset.from_dict(rows)
    if kind == "prepacked":
        samples = pack_dataset(samples, 40, "bfd")
        samples = samples.select(range(len(samples) // 8 * 8))  # full batches
    return samples


def main(cp_size: int, output_dir: str, kind: str, *options: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    parallel: dict[str, Any] = {}
    if world > 1:
        from accelerate import ParallelismConfig

        magi.enable_trainer_context_parallel()
        parallel = {
            "parallelism_config": ParallelismConfig(cp_size=cp_size),
            "fsdp": "full_shard auto_wrap",
            "fsdp_config": {
                "version": 2,
                "transformer_layer_cls_to_wrap": ["GptOssDecoderLayer"],
            },
        }
    flat = kind in ("padding_free", "prepacked")
    arguments = SFTConfig(
        output_dir=output_dir, use_cpu=True, bf16=False, per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH, gradient_accumulation_steps=2, max_steps=3,
        learning_rate=1e-2, lr_scheduler_type="constant", optim="adamw_torch", logging_steps=1,
        eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=2, report_to=[],
        padding_free=flat, max_length=None if flat else 64, shuffle_dataset=False,
        completion_only_loss=kind == "completion", router_aux_loss_coef=0.1, disable_tqdm=True,
        seed=0, **parallel,
    )  # fmt: skip
    if world > 1:
        run_fsdp_on_cpus(arguments)
    more: dict[str, Any] = {}
    if "lora" in options:
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = SFTTrainer(
        model=make_model("gpt_oss"), args=arguments, train_dataset=make_samples(kind, 0, 48),
        eval_dataset=make_samples(kind, 100, 23 if kind == "padded" else 24),
        processing_class=make_tokenizer(), **more,
    )  # fmt: skip
    before = f"{output_dir}/checkpoint-2" if "resume" in options else None
    trainer.train(resume_from_checkpoint=before)
    print_result(trainer, (*COLUMNS, *(f"eval_{name}" for name in COLUMNS)))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
    end()
