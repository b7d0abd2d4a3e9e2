"""A batch as one packed row, and each rank's shard of it.

Padding is left out: each sample, or each packed document, is a document of the plan. Labels are
shifted before, so that the token behind a shard's last one is the label of that one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from magi_sink_cp.dist.guard.late import agree_outside_plans
from magi_sink_cp.dist.make_plan import make_cp_plan, process_group
from magi_sink_cp.dist.plan import CPPlan
from magi_sink_cp.integrations.transformers.masks import find_documents, pack_existing

_IGNORED = -100
# Arguments of forward that shard_batch reads, and does not hand on as they are.
_READ = (
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "shift_labels",
    "num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    "seq_idx",
)  # fmt: skip
_TOKENS = ("input_ids", "inputs_embeds")
_BATCH = "the batch of a model under context parallelism"


class Row(NamedTuple):
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


def _as_row(batch: Mapping[str, Any]) -> Row:
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
        return Row(shape, None, offsets.tolist())
    if mask is not None:
        packed = pack_existing(mask, positions)
        return Row(shape, packed.rows, packed.cu_seqlens.tolist())
    documents = None
    if positions is not None:
        documents = find_documents(positions.expand(shape[0], -1))
    if documents is not None:
        return Row(shape, None, documents.cu_seqlens.tolist())
    return Row(shape, None, [sample * shape[1] for sample in range(shape[0] + 1)])


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
    return shard_whole(batch, group, layout, plan)[0]


def shard_whole(
    batch: Mapping[str, Any],
    group: ProcessGroup | DeviceMesh | None,
    layout: str,
    plan: CPPlan | None = None,
) -> tuple[dict[str, Any], Row]:
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
