"""transformers' models with attn_implementation="magi_sink" on one device, against eager."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.integrations.transformers_models import (  # noqa: E402
    assert_same,
    available,
    batch_of,
    dense_mask,
    error,
    make_model,
    step,
)

AVAILABLE = available()


@pytest.fixture(scope="module")
def models():
    made: dict[str, torch.nn.Module] = {}

    def get(name: str):
        if name not in made:
            made[name] = make_model(name)
        return made[name]

    return get


@pytest.mark.parametrize("kind", ["dense", "right", "left"])
@pytest.mark.parametrize("name", AVAILABLE)
def test_training_step(models, name, kind):
    batch, rows = batch_of(kind)
    assert_same(step(models(name), **batch), step(models(name), "eager", **batch), rows)


def eager_packed(model, batch):
    masks = {
        kind: dense_mask(batch["position_ids"], window)
        for kind, window in (("full_attention", None), ("sliding_attention", 5))
    }
    mask = masks if model.config.model_type != "llama" else masks["full_attention"]
    return step(model, "eager", **batch, attention_mask=mask)


@pytest.mark.parametrize("form", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("name", AVAILABLE)
def test_packed_documents(models, name, form):
    batch, _ = batch_of("packed")
    expected = eager_packed(models(name), batch)
    if form == "cu_seq_lens":
        starts = (batch["position_ids"][0] == 0).nonzero()[:, 0]
        offsets = torch.nn.functional.pad(starts, (0, 1), value=63)  # int64
        batch |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
        batch |= dict.fromkeys(("max_length_q", "max_length_k"), offsets.diff().max())
    assert_same(step(models(name), **batch), expected)


def test_eager_attends_across_packed_documents(models):
    """Why the tests above give it masks: gpt-oss makes none from position_ids."""
    batch, _ = batch_of("packed")
    ours, _ = step(models("gpt_oss"), **batch)
    eager, _ = step(models("gpt_oss"), "eager", **batch)
    assert error(eager.logits, ours.logits) > 0.1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["dense", "left"])
def test_gradient_checkpointing(models, kind, reentrant):
    model = copy.deepcopy(models("gpt_oss"))
    batch, rows = batch_of(kind)
    expected = step(model, "eager", **batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.get_input_embeddings().register_forward_hook(lambda *x: x[2].requires_grad_())
    assert_same(step(model, **batch), expected, rows)


def test_autocast(models):
    batch, _ = batch_of("dense")
    expected, _ = step(models("gpt_oss"), "eager", **batch)
    errors = {}
    for name in ("eager", "magi_sink"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs, _ = step(models("gpt_oss"), name, **batch)
        errors[name] = error(outputs.logits, expected.logits)
    assert errors["magi_sink"] <= 1.5 * errors["eager"], errors


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", AVAILABLE)
def test_generate(models, name, cache, padded):
    model = models(name)
    batch, _ = batch_of("left")
    mask = batch["attention_mask"] if padded else torch.ones_like(batch["attention_mask"])
    tokens = []
    model.eval()
    for implementation in ("eager", "magi_sink"):
        model.set_attn_implementation(implementation)
        tokens.append(
            model.generate(
                batch["input_ids"],
                attention_mask=mask,
                max_new_tokens=12,
                do_sample=False,
                cache_implementation=cache,
                pad_token_id=0,
                disable_compile=True,
            )
        )
    model.train()
    assert torch.equal(*tokens)


def test_padding_beside_packed_documents(models):
    """One pad token does not let documents see each other."""
    batch, _ = batch_of("packed")
    expected, _ = step(models("gpt_oss"), **batch)
    padded = {name: torch.nn.functional.pad(x, (0, 3)) for name, x in batch.items()}
    padded["labels"][:, -3:] = -100
    mask = (torch.arange(66) < 63).long()[None]
    ours, _ = step(models("gpt_oss"), **padded, attention_mask=mask)
    assert error(ours.logits[:, :63], expected.logits) < 1e-5


@pytest.mark.parametrize("cut", [3, 10])
def test_a_prompt_in_two_parts_whose_end_is_all_padding(models, cut):
    model = models("gpt_oss").eval()
    batch, _ = batch_of("right")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    rows = mask.bool()
    logits = {}
    for implementation in ("eager", "magi_sink"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            first = model(ids[:, :cut], attention_mask=mask[:, :cut], use_cache=True)
            name = next(name for name in ("cache", "past_key_values") if name in first)
            second = model(ids[:, cut:], attention_mask=mask, use_cache=True, **{name: first[name]})
        logits[implementation] = torch.cat([first.logits, second.logits], dim=1)[rows]
    model.train()
    assert error(logits["magi_sink"], logits["eager"]) < 1e-5


@torch.inference_mode()
def test_inference_mode():
    model = make_model("gpt_oss").eval()
    batch, rows = batch_of("left")
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ours = model(**given).logits[rows]
    tokens = model.generate(**given, max_new_tokens=4, do_sample=False)
    model.set_attn_implementation("eager")
    assert error(ours, model(**given).logits[rows]) < 1e-5
    assert torch.equal(tokens, model.generate(**given, max_new_tokens=4, do_sample=False))


def test_compile(models):
    model = models("gpt_oss")
    batch, _ = batch_of("dense")
    expected = step(model, **batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    outputs = compiled(**batch, use_cache=False)
    outputs.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same((outputs, grads), expected)


def test_compiled_packed_documents_are_not_missed(models):
    """Compiled, nobody reads position_ids; documents must come as cu_seq_lens_q."""
    model = models("gpt_oss")
    batch, _ = batch_of("packed")
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="pass cu_seq_lens_q too, under torch.compile"):
        torch.compile(model, backend="aot_eager")(**batch, use_cache=False)


def test_bidirectional_windows():
    if "openai_privacy_filter" not in (
        transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    ):
        pytest.skip(f"transformers {transformers.__version__} has no openai_privacy_filter")
    from magi_sink_cp.integrations import transformers as magi

    magi.register()
    config = transformers.AutoConfig.for_model(
        "openai_privacy_filter", num_hidden_layers=2, hidden_size=64, intermediate_size=48,
        head_dim=16, num_attention_heads=4, num_key_value_heads=2, sliding_window=3, vocab_size=97,
        num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForTokenClassification.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (2.0 if "sinks" in name else 0.2))
    for kind in ("dense", "right"):
        batch, rows = batch_of(kind)
        labels = batch.pop("labels").clamp(max=2)
        results = {
            name: step(model, name, **batch, labels=labels) for name in ("eager", "magi_sink")
        }
        assert_same(results["magi_sink"], results["eager"], rows)


# --- What is refused ----------------------------------------------------------------------------


def test_dense_masks(models):
    batch, _ = batch_of("dense")
    mask = torch.zeros(3, 1, 21, 21)
    with pytest.raises(ValueError, match="dense masks of one's own are not honoured"):
        step(models("llama"), **batch, attention_mask=mask)


def test_other_kinds_of_masks():
    from transformers.masking_utils import chunked_causal_mask_function, or_masks

    from magi_sink_cp.integrations.transformers.masks import existing_keys

    chunked = or_masks(chunked_causal_mask_function(4, torch.zeros(1)))
    with pytest.raises(ValueError, match="knows causal, bidirectional.*asks for 'or_masks"):
        existing_keys(1, 8, q_length=8, mask_function=chunked)


@pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="its Phimoe has an attention of its own"
)
def test_a_window_that_is_in_the_mask_alone(monkeypatch):
    """Noticed by the config too, not by the model's name alone; without a window it runs."""
    from magi_sink_cp.integrations.transformers import attention

    attention.register()
    monkeypatch.setattr(attention, "_REFUSED_MODELS", frozenset())
    config = transformers.PhimoeConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, num_local_experts=2,
    )  # fmt: skip
    ids = torch.ones(1, 9, dtype=torch.long)
    for window in (4, None):
        config.sliding_window = window
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.set_attn_implementation("magi_sink")
        if window:
            with pytest.raises(ValueError, match="does not honour windows that are in the mask"):
                model(ids)
        else:
            assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"dropout": 0.1}, "has no dropout, got 0.1"),
        ({"output_attentions": True}, "keeps no weights"),
        ({"position_bias": torch.zeros(1)}, "does not honour position_bias"),
        ({"model_type": "deepseek_v4"}, "does not honour what deepseek_v4 passes"),
        ({"cu_seq_lens_q": torch.tensor([0, 4]), "batch": 2}, "batch of one packed row"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 4]), "attention_mask": torch.zeros(1, 4)},
            "got an attention_mask with padding",
        ),
        ({"cp_plan": "a plan", "attention_mask": torch.ones(1, 4)}, "must be None beside cp_plan"),
    ],
)
def test_arguments(given, text):
    from types import SimpleNamespace

    from magi_sink_cp.integrations.transformers.attention import magi_sink_attention

    given = dict(given)
    module = torch.nn.Module()
    module.config = SimpleNamespace(model_type=given.pop("model_type", "gpt_oss"))
    module.is_causal = True
    q = torch.zeros(given.pop("batch", 1), 2, 4, 8)
    mask = given.pop("attention_mask", None)
    with pytest.raises(ValueError, match=text):
        magi_sink_attention(module, q, q, q, mask, **given)
