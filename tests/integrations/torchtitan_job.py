"""torchtitan's own trainer on a small gpt_oss, on CPUs: python -m … flex|sink CP FOLDER [OPTION …].

Prints "RESULT" and a JSON list: (loss, gradient norm) of each step.
"""

from __future__ import annotations

import json
import os
import random
import sys
import types
import zlib
from functools import partial
from pathlib import Path

import torch
import torch._utils
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

SEQ_LEN = 128


def prepare_cpu() -> None:
    """What torchtitan lacks on a machine without an accelerator. Call it before it is imported."""
    torch.set_num_threads(1)
    torch._utils._get_available_device_type = lambda: "cpu"
    cpu = torch.cpu
    cpu.get_device_name = lambda device=None: "cpu"
    cpu.get_device_properties = lambda device=None: types.SimpleNamespace(
        total_memory=1 << 30, name="cpu"
    )
    cpu.reset_peak_memory_stats = cpu.empty_cache = lambda: None
    cpu.memory_stats = lambda device=None: {}
    torch.Tensor.bfloat16 = lambda x, *_, **__: x  # experts compute in bf16 whatever is asked for
    import torch.nn.attention.flex_attention as flex
    from torchtitan.distributed import fsdp, utils
    from torchtitan.models.common import attention

    flex._validate_device = lambda q, k, v: None  # backward on CPUs, which is there uncompiled
    attention.FlexAttention._compiled_flex_attn = staticmethod(flex.flex_attention)
    attention._compiled_create_block_mask = flex.create_block_mask
    utils.set_pg_timeouts = lambda timeout, parallel_dims: None  # a barrier that gloo has not
    disable = fsdp.disable_fsdp_gradient_division

    def disable_and_sum(model) -> None:  # gloo has no sum with a factor
        disable(model)
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.set_force_sum_reduction_for_comms(True)

    fsdp.disable_fsdp_gradient_division = disable_and_sum


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{n}": n + 3 for n in range(97)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def make_documents(_: str):
    from datasets import Dataset

    draw = random.Random(0)
    lengths = [draw.choice([3, 17, 40, 90, 150]) for _ in range(300)]
    texts = [" ".join(f"w{draw.randrange(97)}" for _ in range(length)) for length in lengths]
    return Dataset.from_list([{"text": text} for text in texts])


def make_model(moe_comm_backend: str, attn_backend: str):
    """torchtitan's gpt_oss in small: windows of 16 in every other layer, large sinks."""
    from torchtitan.models import gpt_oss
    from torchtitan.models.common import CosSinRoPE, Embedding, Linear, RMSNorm

    dim, vocabulary = 32, 128
    rope = CosSinRoPE.Config(dim=16, max_seq_len=1024)
    layers = gpt_oss._build_gptoss_layers(
        dim=dim, n_layers=2, hidden_dim=32, num_experts=4, top_k=2, load_balance_coeff=1e-3,
        attn_backend=attn_backend, moe_comm_backend=moe_comm_backend, rope=rope,
    )  # fmt: skip
    for number, layer in enumerate(layers):
        layer.attention = gpt_oss._make_gptoss_attn_config(
            dim=dim, layer_id=number, attn_backend=attn_backend, n_heads=4, n_kv_heads=2,
            head_dim=16, sliding_window_size=None if number % 2 else 16, rope=rope,
        )  # fmt: skip
    normal = {"weight": partial(nn.init.normal_, std=0.5)}
    return gpt_oss.GptOssModel.Config(
        vocab_size=vocabulary,
        dim=dim,
        tok_embeddings=Embedding.Config(
            num_embeddings=vocabulary, embedding_dim=dim, param_init=normal
        ),
        norm=RMSNorm.Config(normalized_shape=dim, param_init=gpt_oss._NORM_INIT),
        lm_head=Linear.Config(in_features=dim, out_features=vocabulary, param_init=normal),
        layers=layers,
    )


def make_config(attention: str, cp: int, folder: Path, options: list[str]):
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
    from torchtitan.config import ParallelismConfig, TrainingConfig
    from torchtitan.distributed.activation_checkpoint import FullAC
    from torchtitan.hf_datasets import DatasetConfig, text_datasets
    from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
    from torchtitan.models import gpt_oss
    from torchtitan.trainer import Trainer

    text_datasets.DATASETS["small"] = DatasetConfig(
        path="none", loader=make_documents, sample_processor=lambda sample: sample["text"]
    )
    gpt_oss.gptoss_configs["small"] = make_model
    converters = None
    if attention == "sink":
        from magi_sink_cp.integrations.torchtitan import SinkAttentionConverter

        converters = [SinkAttentionConverter.Config()]
    spec = gpt_oss.model_registry("small", attn_backend="flex", converters=converters)
    balancer = None if "contiguous" in options else "headtail"
    balancer = "ptrr" if "ptrr" in options else balancer
    spmd_backend = "full_dtensor" if "full_dtensor" in options else "partial_dtensor"
    config = Trainer.Config(
        loss=ChunkedLossWrapper.Config(
            loss_fn=CrossEntropyLoss.Config(global_vocab_size=spec.model.vocab_size)
        ),
        hf_assets_path=str(folder),
        dump_folder=str(folder / "out"),
        metrics=MetricsProcessor.Config(log_freq=1),
        model_spec=spec,
        dataloader=HuggingFaceTextDataLoader.Config(dataset="small"),
        optimizer=default_adamw(lr=3e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=1),
        training=TrainingConfig(
            local_batch_size=2, global_batch_size=4, seq_len=SEQ_LEN, steps=3,
            mixed_precision_param="float32", disable_cuda_graphs="graphs" not in options,
        ),
        parallelism=ParallelismConfig(
            context_parallel_degree=cp, context_parallel_load_balancer=balancer,
            spmd_backend=spmd_backend,
        ),
        checkpoint=CheckpointManager.Config(enable=False),
        activation_checkpoint=FullAC.Config() if "checkpointing" in options else None,
    )  # fmt: skip
    config.debug.seed = 7
    return config


def main(attention: str, cp: str, folder: str, *options: str) -> None:
    os.environ.setdefault("RANK", "0")
    for name, value in (("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "0")
    prepare_cpu()
    from torchtitan.trainer import Trainer

    own = Path(folder) / os.environ["RANK"]
    own.mkdir(exist_ok=True)
    write_tokenizer(own)
    trainer = Trainer(make_config(attention, int(cp), own, list(options)))
    # DTensors draw other values for another sharding: give all runs the same weights.
    with torch.no_grad():
        for name, parameter in trainer.model_parts[0].named_parameters():
            name = name.replace("_checkpoint_wrapped_module.", "")
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            value = torch.randn(parameter.shape, generator=generator)
            value *= 2.0 if "sinks" in name else 0.2
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)
    results: list[tuple[float, float]] = []
    log = trainer.metrics_processor.log

    def record(step, mean, largest, norm, extra_metrics=None):
        results.append((mean, norm))
        return log(step, mean, largest, norm, extra_metrics)

    trainer.metrics_processor.log = record
    try:
        trainer.train()
        if os.environ["RANK"] == "0":
            print("RESULT" + json.dumps(results), flush=True)
    finally:
        trainer.close()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
