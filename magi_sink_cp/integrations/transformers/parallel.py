"""Context parallelism around a whole model: each rank gets the whole batch, and runs its shard.

A batch becomes one packed row of its tokens, without padding: each sample, or each packed document,
is a document of the plan. Labels are shifted before, so that the token behind a shard's last one is
the label of that one. The plan travels to every layer as the keyword ``cp_plan`` of forward.
"""

from __future__ import annotations

import hashlib
import inspect
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from magi_sink_cp.dist.guard.late import agree_outside_plans
from magi_sink_cp.dist.plan import CPPlan, make_cp_plan, process_group
from magi_sink_cp.integrations.transformers.attention import NAME
from magi_sink_cp.integrations.transformers.losses import (
    cp_load_balancing_loss,
    global_loss,
    scale_gradient,
)
from magi_sink_cp.integrations.transformers.masks import find_documents, pack_existing

_IGNORED = -100
# Arguments of forward that shard_batch reads, and does not hand on as they are.
_READ = (
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "shift_labels",
    "num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
)  # fmt: skip
_TOKENS = ("input_ids", "inputs_embeds")
_ATTRIBUTE = "_magi_sink_context_parallel"
_BATCH = "the batch of a model under context parallelism"
_CACHES = ("cache", "past_key_values")
# Rotary embeddings that depend on the largest position, of which each rank sees its own.
_REFUSED_ROPE = ("dynamic", "longrope")


class _Row(NamedTuple):
    """A batch as one packed row.

    Attributes:
        shape: (batch, tokens) of the batch.
        rows: int64, which of the flattened tokens exist; None if all.
        offsets: of the documents in the packed row.
    """

    shape: tuple[int, int]
    rows: Tensor | None
    offsets: list[int]

    def packed(self, x: Tensor) -> Tensor:
        """(batch, tokens, …) → (tokens that exist, …)."""
        flat = x.flatten(0, 1)
        return flat if self.rows is None else flat[self.rows]

    def spread(self, x: Tensor) -> Tensor:
        """(tokens that exist, …) → (batch, tokens, …), 0 on padding."""
        if self.rows is not None:
            whole = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
            x = whole.index_copy(0, self.rows, x)
        return x.unflatten(0, self.shape)


def _as_row(batch: Mapping[str, Any]) -> _Row:
    tokens = next((batch[name] for name in _TOKENS if batch.get(name) is not None), None)
    if not isinstance(tokens, Tensor) or tokens.dim() not in (2, 3):
        raise ValueError(
            "the batch must hold input_ids (batch, tokens) or inputs_embeds (batch, tokens, "
            f"hidden), got the keys {sorted(batch)}"
        )
    shape = tokens.shape[0], tokens.shape[1]
    mask, positions, offsets = (
        batch.get(name) for name in ("attention_mask", "position_ids", "cu_seq_lens_q")
    )
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != shape:
            given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attention_mask must be (batch, tokens), {shape}, got {given}")
        mask = None if bool(mask.all()) else mask.bool()
    if positions is not None and (positions.dim() != 2 or positions.shape[1] != shape[1]):
        raise ValueError(
            f"position_ids must be (batch or 1, tokens), with {shape[1]} tokens, got "
            f"{tuple(positions.shape)}"
        )
    if offsets is not None:
        if shape[0] != 1 or mask is not None:
            raise ValueError(
                "cu_seq_lens_q are offsets in a batch of one packed row without padding, got "
                f"{shape[0]} rows{'' if mask is None else ' with padding'}"
            )
        return _Row(shape, None, offsets.tolist())
    if mask is not None:
        packed = pack_existing(mask, positions)
        return _Row(shape, packed.rows, packed.cu_seqlens.tolist())
    documents = None
    if positions is not None:
        documents = find_documents(positions.expand(shape[0], -1))
    if documents is not None:
        return _Row(shape, None, documents.cu_seqlens.tolist())
    return _Row(shape, None, [sample * shape[1] for sample in range(shape[0] + 1)])


def _shift_labels(batch: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """(batch, tokens): the token behind each one, or what was given as shift_labels."""
    name = "labels" if batch.get("shift_labels") is None else "shift_labels"
    labels: Tensor | None = batch.get(name)
    if labels is None:
        return None
    if not isinstance(labels, Tensor) or labels.shape != shape:
        given = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"{name} must be (batch, tokens), {shape}, got {given}")
    if name == "shift_labels":
        return labels
    return torch.nn.functional.pad(labels, (0, 1), value=_IGNORED)[..., 1:]


def _record_of(batch: Mapping[str, Any], labels: Tensor | None) -> dict[str, object]:
    """What all ranks must have alike: a loader that is not replicated over cp is noticed."""
    record: dict[str, object] = {
        "entries": sorted(name for name, x in batch.items() if x is not None)
    }
    for name, x in (("input_ids", batch.get("input_ids")), ("labels", labels)):
        if x is not None:
            content = x.detach().cpu().contiguous().numpy().tobytes()
            record[f"{name} (sha256)"] = hashlib.sha256(content).hexdigest()[:16]
            record[f"shape of {name}"] = list(x.shape)
    return record


def document_offsets(batch: Mapping[str, Any]) -> list[int]:
    """The offsets of the documents that :func:`shard_batch` makes of a batch.

    For plans that are made ahead: ``prefetch_plans(loader, group=group,
    cu_seqlens=document_offsets)``.
    """
    return _as_row(batch).offsets


def shard_batch(
    batch: Mapping[str, Any],
    group: ProcessGroup | DeviceMesh | None = None,
    *,
    layout: str = "auto",
    plan: CPPlan | None = None,
) -> dict[str, Any]:
    """This rank's shard of a batch, as the arguments of a model's forward.

    Every rank of the group must call this with the same batch. The model's loss is then this
    rank's share of the mean over all labels: :func:`global_loss` makes it the whole one.

    Args:
        batch: input_ids or inputs_embeds, and where there are any attention_mask (batch, tokens),
            position_ids, labels or shift_labels, num_items_in_batch, cu_seq_lens_q. Other entries
            stay as they are.
        group: the cp group, or None for one device.
        layout: as in :func:`magi_sink_cp.make_cp_plan`.
        plan: one that was made ahead, of :func:`document_offsets`, in place of group and layout.

    Returns:
        input_ids or inputs_embeds (1, local tokens, …), position_ids and labels and shift_labels
        (1, local tokens), num_items_in_batch, cp_plan, use_cache False.

    Raises:
        ValueError: the batch or the plan does not fit.
    """
    return _shard(batch, group, layout, plan)[0]


def _shard(
    batch: Mapping[str, Any],
    group: ProcessGroup | DeviceMesh | None,
    layout: str,
    plan: CPPlan | None = None,
) -> tuple[dict[str, Any], _Row]:
    """What :func:`shard_batch` returns, and the row that the batch became."""
    cp_group = process_group(group) if plan is None else plan.group
    try:
        row = _as_row(batch)
        labels = _shift_labels(batch, row.shape)
        if plan is not None and plan.total_tokens != row.offsets[-1]:
            raise ValueError(
                f"the plan must be for the batch's {row.offsets[-1]} tokens that are no padding, "
                f"got one for {plan.total_tokens}"
            )
    except Exception as error:  # the other ranks must hear of it
        if cp_group is not None:
            agree_outside_plans(error, cp_group, _BATCH, _BATCH)
        raise
    if cp_group is not None:
        agree_outside_plans(_record_of(batch, labels), cp_group, _BATCH, _BATCH)
    if plan is None:
        plan = make_cp_plan(row.offsets[-1], group=group, cu_seqlens=row.offsets, layout=layout)
    sharded = {name: value for name, value in batch.items() if name not in _READ}

    def shard(x: Tensor, fill: float = 0) -> Tensor:
        return plan.shard(row.packed(x), fill=fill)[None]

    if batch.get("input_ids") is not None:
        sharded["input_ids"] = shard(batch["input_ids"])
    if batch.get("inputs_embeds") is not None:
        # By index: the gradient is that of this rank's rows, to be averaged as all others.
        rows = row.packed(batch["inputs_embeds"])
        order = plan.shard(torch.arange(len(rows), device=rows.device))
        sharded["inputs_embeds"] = (rows[order] * plan.token_mask[:, None].to(rows.dtype))[None]
    positions = batch.get("position_ids")
    if positions is None:
        device = next(batch[x] for x in _TOKENS if batch.get(x) is not None).device
        positions = torch.arange(row.shape[1], device=device)[None]
    sharded["position_ids"] = shard(positions.expand(row.shape))
    if labels is not None:
        sharded["labels"] = sharded["shift_labels"] = shard(labels, _IGNORED)
        items = batch.get("num_items_in_batch")
        if items is None:
            items = (row.packed(labels) != _IGNORED).sum()
        sharded["num_items_in_batch"] = items
    sharded["cp_plan"], sharded["use_cache"] = plan, False
    return sharded, row


class ContextParallel:
    """What :func:`context_parallel` has attached to a model; ``remove()`` takes it off again."""

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
        self._signature = inspect.signature(model.forward)
        before = getattr(model, _ATTRIBUTE, None)
        if before is not None:
            before.remove()
        setattr(model, _ATTRIBUTE, self)
        self._rows: weakref.WeakKeyDictionary[CPPlan, tuple[_Row, bool]] = (
            weakref.WeakKeyDictionary()
        )
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

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
        sharded, row = _shard(given, self._group, self._layout)
        sharded.pop("labels", None)  # _after computes the loss, of all ranks
        self._rows[sharded["cp_plan"]] = row, "num_items_in_batch" in given
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

    def _after(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> Any:
        plan = kwargs.get("cp_plan")
        known = None if plan is None else self._rows.pop(plan, None)
        if plan is None or known is None:
            return outputs
        row, items_given = known
        loss = aux_loss = None
        if kwargs.get("shift_labels") is not None:
            loss = model.loss_function(
                logits=outputs.logits, labels=None,
                vocab_size=model.config.get_text_config().vocab_size,
                num_items_in_batch=kwargs["num_items_in_batch"],
                shift_labels=kwargs["shift_labels"],
            )  # fmt: skip
        if outputs.get("aux_loss") is not None and outputs.get("router_logits"):
            outputs.aux_loss = cp_load_balancing_loss(
                outputs.router_logits, model.num_experts, model.num_experts_per_tok, plan
            )
            aux_loss = model.router_aux_loss_coef * outputs.aux_loss
        if loss is not None:
            loss = self._put_together(loss, aux_loss, items_given, plan, model.training)
            outputs = type(outputs)(**{**outputs, "loss": loss})  # the first entry, as it was
        if self._unshard_logits is True or (self._unshard_logits and not model.training):
            local = scale_gradient(outputs.logits[0], plan.cp_size)  # gradients are averaged
            outputs.logits = row.spread(plan.unshard(local))
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
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    refused = [each["rope_type"] for each in kinds if each.get("rope_type") in _REFUSED_ROPE]
    if refused:
        raise ValueError(
            f"context_parallel cannot shard rotary embeddings of the type {refused[0]!r}: they "
            "depend on the largest position, of which each rank sees its own"
        )
