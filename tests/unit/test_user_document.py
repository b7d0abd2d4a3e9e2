"""Every Python snippet of the user's document runs, in both sink layouts, and its results are those
of the fp64 reference.

On a GPU the snippets run as they stand; without one, device and dtype are swapped for the CPU's.
Two of the blocks use ``nhq`` without defining it: it is defined here as their ``nh``, and nothing
else is changed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from magi_sink_cp import backends, compat
from tests.support.cases import Case, assert_close, assert_within_plain, errors, truth
from tests.support.drop_in import run_drop_in

DOCUMENT = Path(__file__).parent.parent / "support" / "data" / "magi_attn_extensions_readme.md"
TITLE = re.compile(r"^#### Basic Usage for (\w+)$\s+```python\n(.*?)```", re.MULTILINE | re.DOTALL)
SNIPPETS = dict(TITLE.findall(DOCUMENT.read_text(encoding="utf-8")))


def test_every_snippet_is_found():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert len(SNIPPETS) == text.count("```python") == 9
    assert all(f"import {name}\n" in code for name, code in SNIPPETS.items())


@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet(name, sink_layout, monkeypatch):
    on_gpu = torch.cuda.is_available()
    if (
        on_gpu
        and name.startswith("fa3")
        and (reason := {b.name: b.reason for b in backends()}["fa3"])
    ):
        pytest.skip(f"FlashAttention-3 is not available here: {reason}")
    code = SNIPPETS[name].replace('sink_layout = "sh"', f'sink_layout = "{sink_layout}"')
    if not on_gpu:
        for old, new in (
            ("torch.cuda.current_device()", '"cpu"'),
            ("torch.bfloat16", "torch.float32"),
            ("2048", "256"),
        ):
            assert old in code
            code = code.replace(old, new)
    monkeypatch.delitem(sys.modules, "magi_attn_extensions", raising=False)
    compat.install()
    namespace: dict = {"nhq": 8} if "nh, hd" in code else {}
    torch.manual_seed(0)
    exec(compile(code, f"{DOCUMENT.name}: {name}", "exec"), namespace)
    monkeypatch.delitem(sys.modules, "magi_attn_extensions")

    case, result = case_of(namespace, name), result_of(namespace)
    if not on_gpu:
        assert_close(result, truth(case), 1e-5)
        return
    plain = Case(**{**vars(case), "sink": None})
    assert_within_plain(result, truth(case), errors(run_drop_in(name, plain), truth(plain)))


def split(packed: torch.Tensor, namespace: dict) -> list[torch.Tensor]:
    """The q, k, v (or k, v) of a packed tensor or of its gradient."""
    if packed.shape[-3] in (2, 3):
        return list(packed.unbind(-3))
    nhq, nhk = namespace["nhq"], namespace["nhk"]
    return list(packed.split([nhq, nhk, nhk], dim=-2))


def case_of(namespace: dict, name: str) -> Case:
    if "qkv" in namespace:
        q, k, v = split(namespace["qkv"].detach(), namespace)
    elif "kv" in namespace:
        q, (k, v) = namespace["q"].detach(), split(namespace["kv"].detach(), namespace)
    else:
        q, k, v = (namespace[x].detach() for x in "qkv")
    cu_q = namespace.get("cu_seqlens_q", namespace.get("cu_seqlens"))
    cu_k = namespace.get("cu_seqlens_k", namespace.get("cu_seqlens"))
    offsets = ([0, q.shape[1]], [0, k.shape[1]]) if cu_q is None else (cu_q.tolist(), cu_k.tolist())
    return Case(
        q,
        k,
        v,
        namespace["sink"].detach(),
        namespace["do"].detach(),
        None,
        *offsets,
        {"causal": namespace["causal"]},
    )


def result_of(namespace: dict) -> dict[str, torch.Tensor]:
    if "dqkv" in namespace:
        dq, dk, dv = split(namespace["dqkv"], namespace)
    elif "dkv" in namespace:
        dq, (dk, dv) = namespace["dq"], split(namespace["dkv"], namespace)
    else:
        dq, dk, dv = (namespace[f"d{x}"] for x in "qkv")
    result = {
        "out": namespace["out"].detach(),
        "dq": dq,
        "dk": dk,
        "dv": dv,
        "dsink": namespace["dsink"],
    }
    return result | ({"lse": namespace["lse"].detach()} if "lse" in namespace else {})
