"""Context parallelism around a whole model: each rank gets the whole batch, and runs its shard.

The plan travels to every layer as the keyword ``cp_plan`` of forward.
"""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from magi_sink_cp.dist.plan import CPPlan
from magi_sink_cp.integrations.transformers.attention import NAME
from magi_sink_cp.integrations.transformers.batch import Row, shard_whole
from magi_sink_cp.integrations.transformers.losses import (
    cp_load_balancing_loss,
    global_loss,
    scale_gradient,
)

_ATTRIBUTE = "_magi_sink_context_parallel"
_CACHES = ("cache", "past_key_values")
# Rotary embeddings that depend on the largest position, of which each rank sees its own.
_REFUSED_ROPE = ("dynamic", "longrope")
# What TRL's fused head gives for each token, in place of logits.
_PER_TOKEN = (
    "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask",
)  # fmt: skip


@dataclass
class _Running:
    """A batch between the model's two hooks.

    Attributes:
        row: what it became.
        items_given: whether num_items_in_batch came with it.
        shifted: whether shift_labels came with it.
        router_logits: of the model, where its outputs do not hold them.
    """

    row: Row
    items_given: bool
    shifted: bool
    router_logits: Any = None


class ContextParallel:
    """What :func:`context_parallel` has attached to a model; ``remove()`` takes it off again.

    Attributes:
        local_per_token: in training, leave what TRL's fused head gives for each token to each rank,
            for a trainer that adds the ranks' up.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        group: ProcessGroup | DeviceMesh | None,
        layout: str,
        unshard_logits: bool | str,
        in_eval: bool,
        share_of_loss: bool = False,
    ) -> None:
        """Attach the hooks.

        Args:
            unshard_logits: True, False or "in eval".
            share_of_loss: give each rank's share of the loss, for a trainer that adds them up.
        """
        self._group, self._layout = group, layout
        self._unshard_logits, self._in_eval = unshard_logits, in_eval
        self._share_of_loss = share_of_loss
        self.local_per_token = False
        self._signature = inspect.signature(model.forward)
        before = attached_to(model)
        if before is not None:
            before.remove()
        setattr(model, _ATTRIBUTE, self)
        self._running: weakref.WeakKeyDictionary[CPPlan, _Running] = weakref.WeakKeyDictionary()
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
        inner: Any = model
        if hasattr(inner, "get_base_model"):  # PEFT's
            inner = inner.get_base_model()
        backbone = getattr(inner, "base_model", None)
        if isinstance(backbone, torch.nn.Module) and backbone is not inner:
            self._hooks.append(backbone.register_forward_hook(self._keep_routers, with_kwargs=True))

    def remove(self) -> None:
        """Let the model run whole batches again."""
        for hook in self._hooks:
            hook.remove()

    def _before(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = self._named(args, kwargs)
        is_off = not (model.training or self._in_eval) or given.get("cp_plan") is not None
        if is_off or any(given.get(name) is not None for name in _CACHES):
            return None
        if given.get("logits_to_keep") not in (None, 0):
            raise ValueError(
                "logits_to_keep must be left out under context parallelism: the last rows of a "
                "shard are not the last ones of the batch"
            )
        if given.get("return_dict") is False:
            raise ValueError("return_dict must not be False under context parallelism")
        given = {name: value for name, value in given.items() if value is not None}
        sharded, row = shard_whole(given, self._group, self._layout)
        sharded.pop("labels", None)  # _after computes the loss, of all ranks
        self._running[sharded["cp_plan"]] = _Running(
            row, "num_items_in_batch" in given, "shift_labels" in given
        )
        return (), {**sharded, "return_dict": True}

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of forward by name."""
        named: dict[str, Any] = {}
        bound = self._signature.bind_partial(*args, **kwargs)
        for name, value in bound.arguments.items():
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                named |= value
            elif kind is not inspect.Parameter.VAR_POSITIONAL:
                named[name] = value
        return named

    def _keep_routers(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> None:
        """TRL's fused head takes their loss over its own tokens, and does not give them."""
        plan = kwargs.get("cp_plan")
        running = None if plan is None else self._running.get(plan)
        if running is not None:
            running.router_logits = getattr(outputs, "router_logits", None)

    def _after(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> Any:
        plan = kwargs.get("cp_plan")
        running = None if plan is None else self._running.pop(plan, None)
        if plan is None or running is None:
            return outputs
        loss = aux_loss = None
        is_fused = outputs.get("logits") is None and outputs.get("log_probs") is not None
        if is_fused:
            items = torch.as_tensor(kwargs["num_items_in_batch"]).clamp(min=1)
            loss = -outputs.log_probs.sum() / items
        elif kwargs.get("shift_labels") is not None:
            loss = model.loss_function(
                logits=outputs.logits, labels=None,
                vocab_size=model.config.get_text_config().vocab_size,
                num_items_in_batch=kwargs["num_items_in_batch"],
                shift_labels=kwargs["shift_labels"],
            )  # fmt: skip
        routers = running.router_logits or outputs.get("router_logits")
        if outputs.get("aux_loss") is not None and routers:
            outputs.aux_loss = cp_load_balancing_loss(
                routers, model.num_experts, model.num_experts_per_tok, plan
            )
            aux_loss = model.router_aux_loss_coef * outputs.aux_loss
        if loss is not None:
            loss = self._put_together(loss, aux_loss, running.items_given, plan, model.training)
            outputs = type(outputs)(**{**outputs, "loss": loss})  # the first entry, as it was
        if is_fused:
            if not (self.local_per_token and model.training):
                _unshard_per_token(outputs, running, plan)
        elif self._unshard_logits is True or (self._unshard_logits and not model.training):
            local = scale_gradient(outputs.logits[0], plan.cp_size)  # gradients are averaged
            outputs.logits = running.row.spread(plan.unshard(local))
        return outputs

    def _put_together(
        self,
        loss: Tensor,
        aux_loss: Tensor | None,
        items_given: bool,
        plan: CPPlan,
        training: bool,
    ) -> Tensor:
        """This rank's share of the loss of the labels, and all of the router's."""
        if not self._share_of_loss:
            loss = global_loss(loss, plan)
            return loss if aux_loss is None else loss + aux_loss
        if not training:  # the same on every rank: of an uneven last batch some are left out
            loss = global_loss(loss, plan) / plan.cp_size
        if aux_loss is not None:
            loss = loss + aux_loss / plan.cp_size
        # Trainer adds the shares up if it counts the labels, else it takes their mean.
        return loss if items_given else loss * plan.cp_size


def attached_to(model: torch.nn.Module) -> ContextParallel | None:
    """What was attached last."""
    return getattr(model, _ATTRIBUTE, None)


def _unshard_per_token(outputs: Any, running: _Running, plan: CPPlan) -> None:
    """Give the fields of TRL's fused head for the whole batch, in the shape that they have on one
    rank.
    """
    names = [name for name in _PER_TOKEN if outputs.get(name) is not None]
    dtype = outputs.log_probs.dtype
    local = torch.stack([outputs[name][0].to(dtype) for name in names], dim=-1)
    whole = running.row.spread(plan.unshard(scale_gradient(local, plan.cp_size)))
    if not running.shifted:
        whole = whole[:, :-1]  # nothing follows the last token
    for name, field in zip(names, whole.unbind(-1), strict=True):
        outputs[name] = field.to(outputs[name].dtype)


def context_parallel(
    model: torch.nn.Module,
    group: ProcessGroup | DeviceMesh | None = None,
    *,
    layout: str = "auto",
    unshard_logits: bool = False,
    in_eval: bool = False,
) -> ContextParallel:
    """Let a model's forward run each rank's shard of the batch that it is given.

    Every rank of the group must call forward with the same batch: input_ids or inputs_embeds, with
    labels, attention_mask, position_ids or cu_seq_lens_q as without context parallelism. The loss
    is that of the whole batch, the mean over its labels, on every rank. Average the gradients over
    the cp group, as DDP and FSDP do over theirs: a dp × cp mesh flattened, for example.

    A forward with a cache, and so generate(), runs the whole batch on every rank.

    Args:
        model: a causal language model with attn_implementation="magi_sink".
        group: the cp group: a ProcessGroup, a 1-D DeviceMesh, or None for one device.
        layout: as in :func:`magi_sink_cp.make_cp_plan`.
        unshard_logits: give (batch, tokens, vocabulary) logits, 0 on padding. Else they are
            (1, local tokens, vocabulary): this rank's.
        in_eval: shard in eval mode too.

    Raises:
        ValueError: the model has another attention, or cannot be sharded.
    """
    check_model(model)
    return ContextParallel(model, group, layout, unshard_logits, in_eval)


def check_model(model: Any) -> None:
    """Raise ValueError if the model's attention is another one, or if it cannot be sharded."""
    config: Any = getattr(model, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if implementation != NAME:
        raise ValueError(
            f"context_parallel needs a model with attn_implementation={NAME!r}, got "
            f"{implementation!r}; call register(), and pass it to from_pretrained, or call "
            f"model.set_attn_implementation({NAME!r})"
        )
    if getattr(model, "loss_type", None) != "ForCausalLM":
        raise ValueError(
            "context_parallel knows the loss of causal language models, got "
            f"{type(model).__name__}; use shard_batch, and global_loss, in a loop of your own"
        )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "context_parallel cannot shard PEFT's virtual tokens (prompt learning); use LoRA, or "
            "another method that adds no tokens"
        )
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    refused = [each["rope_type"] for each in kinds if each.get("rope_type") in _REFUSED_ROPE]
    if refused:
        raise ValueError(
            f"context_parallel cannot shard rotary embeddings of the type {refused[0]!r}: they "
            "depend on the largest position, of which each rank sees its own"
        )
