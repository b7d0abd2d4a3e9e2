"""Call any drop-in function with the tensors of a Case, packed as it wants them, and take its
gradients apart again.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

import magi_sink_cp
from magi_sink_cp.ops import attention as ops
from tests.support.cases import Case

DENSE = ("fa3_func_with_sink", "fa2_func_with_sink", "fa4_func_with_sink")
VARLEN = ("fa3_varlen_func_with_sink", "fa2_varlen_func_with_sink", "fa4_varlen_func_with_sink")
QKVPACKED = (
    "fa3_qkvpacked_func_with_sink",
    "fa2_qkvpacked_func_with_sink",
    "fa2_varlen_qkvpacked_func_with_sink",
)
KVPACKED = ("fa2_kvpacked_func_with_sink", "fa2_varlen_kvpacked_func_with_sink")
FUNCTIONS = (*DENSE, *VARLEN, *QKVPACKED, *KVPACKED)


def is_varlen(name: str) -> bool:
    return "varlen" in name


def needs_equal_heads(name: str) -> bool:
    """Whether its packed form holds as many key heads as query heads (fa3's has the
    4-dimensional form for the others).
    """
    return name in ("fa2_qkvpacked_func_with_sink", "fa2_varlen_qkvpacked_func_with_sink")


def has_lse(name: str) -> bool:
    """Whether return_attn_probs gives lse without dropout."""
    return not name.startswith("fa2")


def pack(name: str, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor | int]:
    """The tensor arguments by name, detached."""
    with torch.no_grad():
        if name in KVPACKED:
            return {"q": q.clone(), "kv": torch.stack([k, v], dim=-3)}
        if name not in QKVPACKED:
            return {"q": q.clone(), "k": k.clone(), "v": v.clone()}
        if q.shape[-2] == k.shape[-2]:
            return {"qkv": torch.stack([q, k, v], dim=-3)}
        return {"qkv": torch.cat([q, k, v], dim=-2), "num_heads_q": q.shape[-2]}


def unpack(name: str, tensors: list[Tensor], num_heads_q: int | None) -> tuple[Tensor, ...]:
    """dq, dk, dv from gradients in the function's layout."""
    if name in KVPACKED:
        return tensors[0], *tensors[1].unbind(-3)
    if name not in QKVPACKED:
        return tuple(tensors)
    if num_heads_q is None:
        return tensors[0].unbind(-3)
    heads_kv = (tensors[0].shape[-2] - num_heads_q) // 2
    return tensors[0].split([num_heads_q, heads_kv, heads_kv], dim=-2)


def lengths(name: str, case: Case) -> dict[str, object]:
    """The length arguments of a varlen function."""
    if not is_varlen(name):
        return {}
    cu_q, cu_k = (
        torch.tensor(x, dtype=torch.int32, device=case.q.device)
        for x in (case.cu_seqlens_q, case.cu_seqlens_k)
    )
    max_q, max_k = (
        max(b - a for a, b in itertools.pairwise(x)) for x in (case.cu_seqlens_q, case.cu_seqlens_k)
    )
    if "varlen_qkvpacked" in name:
        return {"cu_seqlens": cu_q, "max_seqlen": max_q}
    return {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": max_q,
        "max_seqlen_k": max_k,
    }


def run_drop_in(name: str, case: Case, function=None, **arguments: object) -> dict[str, Tensor]:
    """out, lse (where the function gives it) and gradients, like tests.support.cases.run."""
    function = function or getattr(magi_sink_cp, name)
    packed = pack(name, case.q, case.k, case.v)
    leaves = [x.requires_grad_() for x in packed.values() if isinstance(x, Tensor)]
    sink = None if case.sink is None else case.sink.detach().clone().requires_grad_()
    options = dict(case.options)
    if name.startswith("fa4") and "window_size" in options:
        # FlashAttention-4 writes "unlimited" as None, the others as -1.
        options["window_size"] = tuple(None if x == -1 else x for x in options["window_size"])
    if has_lse(name):
        options["return_attn_probs"] = True
    result = function(
        **packed,
        sink=sink,
        sink_layout=case.sink_layout,
        **lengths(name, case),
        **options,
        **arguments,
    )
    out, lse = result if has_lse(name) else (result, None)
    outputs, grads = [out], [case.dout.to(out.dtype)]
    if lse is not None and case.dlse is not None:
        outputs.append(lse)
        grads.append(case.dlse)
    *taken, dsink = [
        *torch.autograd.grad(outputs, [*leaves, *([] if sink is None else [sink])], grads),
        None,
    ][: len(leaves) + 1]
    values = {"out": out.detach(), "lse": None if lse is None else lse.detach()}
    values |= dict(
        zip(("dq", "dk", "dv"), unpack(name, taken, packed.get("num_heads_q")), strict=True)
    ) | {"dsink": dsink}
    return {key: value for key, value in values.items() if value is not None}


def record_operator_calls(monkeypatch) -> list[tuple[object, tuple]]:
    """From here on single-device attention calls its operators: a list of (operator, arguments)."""
    calls = []

    def record(operator):
        def call(*arguments):
            calls.append((operator, arguments))
            return operator(*arguments)

        return call

    class Forward:
        default, dropout = record(ops._forward_op.default), record(ops._forward_op.dropout)

    monkeypatch.setattr(ops, "is_watched", lambda tensors: True)
    monkeypatch.setattr(ops, "_forward_op", Forward)
    monkeypatch.setattr(ops, "_backward_op", record(ops._backward_op))
    return calls
