"""Small models of transformers that pass sinks to their attention, with weights that matter."""

from __future__ import annotations

from typing import Any

import torch

COMMON = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 512,
    "sliding_window": 5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "layer_types": ["sliding_attention", "full_attention"],
}
OWN: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.1,
    },
    "granite_swa": {"attention_multiplier": 0.3},
    "granitemoe_swa": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.3,
        "router_aux_loss_coef": 0.1,
    },
    "flint": {
        "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "router_aux_loss_coef": 0.1, "mlp_only_layers": [],
    },
    "mimo_v2_flash": {
        "head_dim": 24, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "llama": {"head_dim": 16, "sliding_window": None, "layer_types": None},
}  # fmt: skip


def available() -> list[str]:
    """Those of the models above that this transformers has."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return [name for name in OWN if name in CONFIG_MAPPING_NAMES]


def make_model(model_type: str, **overrides: Any) -> Any:
    """The causal language model in fp32, in training mode, with magi_sink."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from magi_sink_cp.integrations import transformers as magi

    magi.register()
    options = COMMON | OWN[model_type] | overrides
    if options["layer_types"] is None:
        del options["layer_types"], options["sliding_window"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))
    model = model.float().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            large = "sinks" in name
            parameter.copy_(torch.randn_like(parameter) * (2.0 if large else 0.2))
    model.set_attn_implementation("magi_sink")
    return model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def step(model: Any, implementation: str = "magi_sink", **batch: Any) -> Any:
    """(outputs, gradients) of one training step without a cache."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    outputs = model(**batch, use_cache=False)
    outputs.loss.backward()
    return outputs, gradients(model)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


def assert_same(ours: Any, theirs: Any, rows: Any = slice(None), tolerance: float = 1e-5) -> None:
    """Loss, logits in ``rows``, and every gradient, relative to the norm."""
    errors = {
        "loss": error(ours[0].loss, theirs[0].loss),
        "logits": error(ours[0].logits[rows], theirs[0].logits[rows]),
    }
    assert ours[1].keys() == theirs[1].keys()
    errors |= {name: error(ours[1][name], grad) for name, grad in theirs[1].items()}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= tolerance, f"{worst}: {errors[worst]:.1e}"


def batch_of(kind: str, total: int = 21) -> tuple[dict[str, torch.Tensor], Any]:
    """Inputs of three samples, or of one packed row; and the rows that are no padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 97, (3, total), generator=generator)
    if kind == "dense":
        return {"input_ids": ids, "labels": ids}, slice(None)
    if kind == "packed":
        lengths = [total, total + 7, total - 7]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        flat = ids.reshape(1, -1)
        labels = flat.masked_fill(positions == 0, -100)
        return {"input_ids": flat, "labels": labels, "position_ids": positions}, slice(None)
    mask = torch.ones_like(ids)
    # To the right, every sample may be padded: TrainingArguments(pad_to_multiple_of=…) does it.
    for sample, missing in enumerate((5, 2 if kind == "right" else 0, 9)):
        if missing and kind == "right":
            mask[sample, -missing:] = 0
        elif missing:
            mask[sample, :missing] = 0
    labels = ids.masked_fill(mask == 0, -100)
    if kind == "left":  # the last pad predicts it
        labels[torch.arange(3), mask.argmax(1)] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}, mask.bool()


def dense_mask(positions: torch.Tensor, window: int | None) -> torch.Tensor:
    """The additive (1, 1, T, T) mask of packed documents, for eager."""
    document = (positions[0] == 0).cumsum(0)
    row = torch.arange(positions.shape[1])
    distance = row[:, None] - row[None, :]
    sees = (document[:, None] == document[None, :]) & (distance >= 0)
    if window is not None:
        sees &= distance < window
    return torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]
