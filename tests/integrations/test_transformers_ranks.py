"""A model of transformers across ranks gives what it gives on one device."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from tests.integrations.transformers_models import (
    assert_same,
    available,
    batch_of,
    error,
    gradients,
    make_model,
    step,
)
from tests.support.ranks import run_on_ranks

# Packed granite_swa and mimo_v2_flash: without experts, and with a head_dim of its own for v.
CASES = [
    ("gpt_oss", "dense"), ("gpt_oss", "right"), ("gpt_oss", "left"), ("gpt_oss", "packed"),
    ("granite_swa", "packed"), ("mimo_v2_flash", "packed"), ("llama", "right"),
]  # fmt: skip
CASES = [case for case in CASES if case[0] in available()]
WITH_ROUTERS = sorted({"gpt_oss", "granitemoe_swa", "flint"} & {*available()})


def averaged(model, group) -> dict[str, torch.Tensor]:
    """The gradients as DDP over the cp group leaves them."""
    grads = gradients(model)
    for grad in grads.values():
        dist.all_reduce(grad, group=group)
        grad /= dist.get_world_size(group)
    return grads


def parallel_step(model, group, *, layout="auto", **batch):
    from magi_sink_cp.integrations import transformers as magi

    attached = magi.context_parallel(model, group, layout=layout, unshard_logits=True)
    try:
        model.zero_grad()
        outputs = model(**batch)
        outputs.loss.backward()
        return outputs, averaged(model, group)
    finally:
        attached.remove()


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_training_step(num_ranks, name, kind):
    run_on_ranks(num_ranks, body_step, name=name, kind=kind)


def body_step(group, device, *, name, kind) -> None:
    batch, rows = batch_of(kind)
    model = make_model(name)
    expected = step(model, **batch)
    for layout in ("auto", "balanced"):
        assert_same(parallel_step(model, group, layout=layout, **batch), expected, rows)


@pytest.mark.parametrize("name", WITH_ROUTERS)
def test_router_losses(name):
    run_on_ranks(2, body_router, name=name)


def body_router(group, device, *, name) -> None:
    batch, rows = batch_of("right")
    model = make_model(name)
    expected = step(model, **batch, output_router_logits=True)
    plain = step(model, **batch)
    assert (
        error(expected[1]["model.embed_tokens.weight"], plain[1]["model.embed_tokens.weight"])
        > 1e-3
    )
    ours = parallel_step(model, group, **batch, output_router_logits=True)
    assert_same(ours, expected, rows)
    assert error(ours[0].aux_loss, expected[0].aux_loss) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    run_on_ranks(2, body_checkpointing, reentrant=reentrant)


def body_checkpointing(group, device, *, reentrant) -> None:
    batch, rows = batch_of("right")
    model = make_model("gpt_oss")
    expected = step(model, **batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.get_input_embeddings().register_forward_hook(lambda *x: x[2].requires_grad_())
    assert_same(parallel_step(model, group, **batch), expected, rows)


def test_two_samples_at_once_and_accumulation():
    run_on_ranks(2, body_accumulation)


def body_accumulation(group, device) -> None:
    """num_items_in_batch is of all micro-batches, as Trainer gives it."""
    from magi_sink_cp.integrations import transformers as magi

    model = make_model("gpt_oss")
    batches = [batch_of("dense", total)[0] for total in (21, 16)]
    items = sum(3 * (batch["labels"].shape[1] - 1) for batch in batches)
    expected = copy.deepcopy(model)
    for batch in batches:
        expected(**batch, num_items_in_batch=items, use_cache=False).loss.backward()
    magi.context_parallel(model, group)
    for batch in batches:
        model(**batch, num_items_in_batch=items).loss.backward()
    ours = averaged(model, group)
    assert max(error(ours[name], grad) for name, grad in gradients(expected).items()) < 1e-5


def test_a_loop_of_ones_own():
    run_on_ranks(3, body_own_loop)


def body_own_loop(group, device) -> None:
    """With plans that are made ahead."""
    from magi_sink_cp import prefetch_plans
    from magi_sink_cp.integrations import transformers as magi

    model = make_model("gpt_oss")
    batches = [batch_of(kind) for kind in ("right", "packed", "dense")]
    expected = [step(model, **batch) for batch, _ in batches]
    plans = prefetch_plans(
        [batch for batch, _ in batches], group=group, cu_seqlens=magi.document_offsets
    )
    for (batch, plan), truth in zip(plans, expected, strict=True):
        sharded = magi.shard_batch(batch, plan=plan)
        model.zero_grad()
        loss = magi.global_loss(model(**sharded).loss, plan)
        loss.backward()
        assert error(loss, truth[0].loss) < 1e-5
        ours = averaged(model, group)
        assert max(error(ours[name], grad) for name, grad in truth[1].items()) < 1e-5


@pytest.mark.parametrize("way", ["shifted after sharding", "mean of means", "aux mean of means"])
def test_wrong_ways_are_far_off(way):
    """What the integration must not do: these would be noticed."""
    run_on_ranks(2, body_wrong, way=way)


def body_wrong(group, device, *, way) -> None:
    from magi_sink_cp.integrations import transformers as magi

    batch, _ = batch_of("right")
    batch["labels"][1:] = -100  # so the ranks have other numbers of labels
    model = make_model("gpt_oss")
    with_router = way == "aux mean of means"
    truth = step(model, **batch, output_router_logits=with_router)
    sharded = magi.shard_batch(batch, group)
    plan = sharded["cp_plan"]
    if way == "shifted after sharding":
        labels = torch.nn.functional.pad(batch["labels"], (1, 0), value=-100)[:, :-1]
        unshifted = magi.shard_batch({**batch, "shift_labels": labels}, plan=plan)["labels"]
        labels = torch.nn.functional.pad(unshifted, (0, 1), value=-100)[:, 1:]
        sharded |= {"labels": labels, "shift_labels": labels.contiguous()}
    elif way == "mean of means":
        del sharded["num_items_in_batch"]
    model.zero_grad()
    outputs = model(**sharded, output_router_logits=with_router)
    loss = magi.global_loss(outputs.loss, plan)
    if way != "shifted after sharding":
        loss = loss / 2
    loss.backward()
    ours = averaged(model, group)
    worst = max(error(ours[name], grad) for name, grad in truth[1].items())
    assert worst > 1e-2, f"{way} went unnoticed: {worst:.1e}"


def test_gradients_of_embeddings_and_of_whole_logits():
    run_on_ranks(2, body_embeddings)


def body_embeddings(group, device) -> None:
    """What reaches inputs_embeds, and a loss of one's own on unsharded logits, in averages."""
    from magi_sink_cp.integrations import transformers as magi

    batch, _ = batch_of("dense")
    model = make_model("llama")
    labels = batch["labels"]
    weight = torch.linspace(-1, 1, 97)

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad()
        embeds = model.get_input_embeddings()(batch["input_ids"])
        outputs = model(inputs_embeds=embeds, labels=labels)
        assert next(iter(outputs)) == "loss"
        (outputs.loss + (outputs.logits * weight).mean()).backward()
        return gradients(model)

    expected = run()
    magi.context_parallel(model, group, unshard_logits=True)
    run()
    ours = averaged(model, group)
    assert max(error(ours[name], grad) for name, grad in expected.items()) < 1e-5


@pytest.mark.parametrize("what", ["labels", "tokens", "a wrong shape"])
def test_batches_that_differ_are_named_on_every_rank(what):
    run_on_ranks(2, body_differ, what=what)


def body_differ(group, device, *, what) -> None:
    from magi_sink_cp.integrations import transformers as magi

    batch, _ = batch_of("right")
    text = "entries" if what == "labels" else "input_ids"
    if dist.get_rank(group) == 1 and what == "labels":
        del batch["labels"]
    elif dist.get_rank(group) == 1 and what == "tokens":
        batch["input_ids"] = batch["input_ids"].clone()
        batch["input_ids"][0, 0] += 1
    elif what == "a wrong shape":
        text = "attention_mask must be"
        if dist.get_rank(group) == 1:
            batch["attention_mask"] = batch["attention_mask"][:, :-1]
    with pytest.raises(ValueError, match=text):
        magi.shard_batch(batch, group)


def test_what_a_shard_cannot_give():
    from magi_sink_cp.integrations import transformers as magi

    model = make_model("llama")
    magi.context_parallel(model)
    batch, _ = batch_of("dense")
    with pytest.raises(ValueError, match="logits_to_keep must be left out"):
        model(**batch, logits_to_keep=4)
    with pytest.raises(ValueError, match="return_dict must not be False"):
        model(**batch, return_dict=False)
    magi.context_parallel(model, unshard_logits=True)  # in place of the first
    assert model(**batch).logits.shape == (3, 21, 97)


def test_where_it_is_off():
    run_on_ranks(2, body_off)


def body_off(group, device) -> None:
    from magi_sink_cp.integrations import transformers as magi

    batch, _ = batch_of("dense")
    model = make_model("gpt_oss").eval()
    expected = model(**batch)
    tokens = model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False)
    magi.context_parallel(model, group)
    assert torch.equal(model(**batch).logits, expected.logits)
    assert torch.equal(
        model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False), tokens
    )
    magi.context_parallel(model, group, in_eval=True, unshard_logits=True)
    outputs = model(**batch)
    assert outputs.logits.shape == expected.logits.shape
    assert error(outputs.loss, expected.loss) < 1e-5


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_lora(num_ranks):
    pytest.importorskip("peft")
    run_on_ranks(num_ranks, body_lora)


def body_lora(group, device) -> None:
    """PEFT: the hook on the wrapped model, or on the model before it is wrapped."""
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    from magi_sink_cp.integrations import transformers as magi

    def with_lora(model):
        torch.manual_seed(1)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        wrapped = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.2)
        return wrapped.train()

    batch, _ = batch_of("right")
    batch["output_router_logits"] = True
    truth = step(with_lora(make_model("gpt_oss")), **batch)
    assert any("lora_" in name for name in truth[1])
    for before in (False, True):
        model = make_model("gpt_oss")
        if before:
            magi.context_parallel(model, group)
        model = with_lora(model)
        if not before:
            magi.context_parallel(model, group)
        loss = model(**batch).loss
        loss.backward()
        assert error(loss, truth[0].loss) < 1e-5
        for name, grad in averaged(model, group).items():
            assert error(grad, truth[1][name]) < 1e-5, name
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="cannot shard PEFT's virtual tokens"):
        magi.context_parallel(get_peft_model(make_model("gpt_oss"), prompts), group)


def test_data_parallel_beside():
    run_on_ranks(4, body_dp)


def body_dp(group, device) -> None:
    """FSDP2 over a flattened dp 2 × cp 2 mesh averages over all four ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from magi_sink_cp.integrations import transformers as magi

    model = make_model("gpt_oss")
    kinds = ("right", "dense")
    truths = [step(model, **batch_of(kind)[0]) for kind in kinds]
    expected = {name: (grad + truths[1][1][name]) / 2 for name, grad in truths[0][1].items()}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    everyone = mesh._flatten("all")
    for layer in model.model.layers:
        fully_shard(layer, mesh=everyone)
    fully_shard(model, mesh=everyone)
    magi.context_parallel(model, mesh["cp"])
    dp = mesh.get_local_rank("dp")
    model.zero_grad()
    loss = model(**batch_of(kinds[dp])[0]).loss
    loss.backward()
    assert error(loss, truths[dp][0].loss) < 1e-5
    for name, parameter in model.named_parameters():
        if name in expected:
            assert error(parameter.grad.full_tensor(), expected[name]) < 1e-5, name


# --- What is refused ----------------------------------------------------------------------------


def test_models_that_cannot_be_sharded():
    from magi_sink_cp.integrations import transformers as magi

    model = make_model("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"attn_implementation='magi_sink', got 'eager'"):
        magi.context_parallel(model)
    model.set_attn_implementation("magi_sink")
    with pytest.raises(
        ValueError, match="knows the loss of causal language models, got LlamaModel"
    ):
        magi.context_parallel(model.model)
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="cannot shard rotary embeddings of the type 'dynamic'"):
        magi.context_parallel(model)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"labels": torch.ones(1, 3)}, r"must hold input_ids .* got the keys \['labels'\]"),
        ({"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(3)}, r"\(2, 3\), got \(3,\)"),
        ({"input_ids": torch.ones(2, 3), "position_ids": torch.ones(2, 4)}, "with 3 tokens, got"),
        (
            {"input_ids": torch.ones(2, 3), "cu_seq_lens_q": torch.tensor([0, 6])},
            "without padding, got 2 rows",
        ),
    ],
)
def test_batches(batch, text):
    from magi_sink_cp.integrations import transformers as magi

    with pytest.raises(ValueError, match=text):
        magi.shard_batch(batch)


def test_a_plan_of_other_documents():
    from magi_sink_cp import make_cp_plan
    from magi_sink_cp.integrations import transformers as magi

    with pytest.raises(ValueError, match="the batch's 6 tokens .* got one for 5"):
        magi.shard_batch({"input_ids": torch.ones(2, 3)}, plan=make_cp_plan(5))
