"""One GPU: the drop-in functions on FlashAttention's kernels, within twice the plain kernel's own
error, without host waits, in CUDA graphs, compiled and checkpointed.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import magi_sink_cp
from magi_sink_cp import attention_with_sink, backends
from magi_sink_cp.kernels.backends.registry import BackendPolicy, drop_in_policy, select_backend
from magi_sink_cp.kernels.checks import make_params
from magi_sink_cp.kernels.protocol import FP8
from magi_sink_cp.ops import attention as ops
from tests.support.cases import Case, assert_within_plain, errors, make_case, truth
from tests.support.drop_in import (
    FUNCTIONS,
    has_lse,
    is_varlen,
    lengths,
    needs_equal_heads,
    pack,
    record_operator_calls,
    run_drop_in,
)

pytestmark = pytest.mark.gpu

MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (37, 21)},
    "causal window": {"causal": True, "window_size": (64, -1)},
}


@functools.cache
def missing(family: str) -> str:
    """Why the kernels of a family are not here, or an empty string.

    The fa2_* functions always have PyTorch's own.
    """
    return {info.name: info.reason for info in backends()}["aten" if family == "fa2" else family]


@pytest.fixture(params=FUNCTIONS)
def name(request) -> str:
    if reason := missing(request.param[:3]):
        pytest.skip(f"{request.param[:3]} is not available here: {reason}")
    return request.param


def case_for(
    name: str,
    heads_kv: int,
    sink_layout: str | None = "sh",
    dtype=torch.bfloat16,
    head_dim: int = 64,
    **options,
) -> Case:
    heads_kv = 8 if needs_equal_heads(name) else heads_kv
    shape = {
        "heads": 8,
        "heads_kv": heads_kv,
        "head_dim": head_dim,
        "s_sink": 2,
        "sink_layout": sink_layout,
        "dtype": dtype,
    }
    equal = "qkvpacked" in name
    if is_varlen(name):
        lengths_q = [200, 1, 0, 77, 130]
        return make_case(
            lengths_q, lengths_q if equal else [150, 3, 5, 77, 0], device="cuda", **shape, **options
        )
    return make_case([300], [300 if equal else 260], batch=2, device="cuda", **shape, **options)


@functools.cache
def plain_errors(
    name: str, heads_kv: int, dtype: torch.dtype, head_dim: int, mask: str
) -> dict[str, float]:
    case = case_for(name, heads_kv, None, dtype, head_dim, **MASKS[mask])
    return errors(run_drop_in(name, case), truth(case))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads_kv", [8, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
def test_matrix(name, sink_layout, head_dim, dtype, heads_kv, mask):
    if heads_kv == 2 and needs_equal_heads(name):
        pytest.skip("its packed layout holds equal heads only")
    if name.startswith("fa4") and (heads_kv, head_dim, dtype) not in (
        (2, 64, torch.bfloat16),
        (2, 128, torch.float16),
    ):
        pytest.skip(
            "each of fa4's kernels takes seconds to compile: bf16 at 64 and fp16 at 128, grouped "
            "heads, stand for all"
        )
    case = case_for(
        name, heads_kv, sink_layout, dtype, head_dim, with_dlse=has_lse(name), **MASKS[mask]
    )
    assert_within_plain(
        run_drop_in(name, case), truth(case), plain_errors(name, heads_kv, dtype, head_dim, mask)
    )


@pytest.mark.parametrize("s_sink", [1, 2])
@pytest.mark.parametrize("mask", ["full", "causal window"])
def test_softcap(name, mask, s_sink):
    """Where the kernels have softcap, within the plain error; else it raises, by name."""
    case = case_for(name, 2, softcap=3.0, **MASKS[mask])
    case.sink = case.sink[:s_sink]
    plain = Case(**{**vars(case), "sink": None})
    if lacks_softcap(name):
        with pytest.raises(ValueError, match="softcap"):
            run_drop_in(name, case)
        return
    assert_within_plain(
        run_drop_in(name, case), truth(case), errors(run_drop_in(name, plain), truth(plain))
    )


def lacks_softcap(name: str) -> bool:
    """Whether this build has no softcap.

    Such are PyTorch's FlashAttention-2, and xformers' FlashAttention-3, which also has no fp8.
    """
    q = torch.empty(1, 1, 1, 64, device="cuda", dtype=torch.bfloat16)
    call = ops.KernelRequest(make_params(64, None, False, (-1, -1), 0.0, False))
    described = select_backend(drop_in_policy(name[:3]), q, call).describe()
    return described.startswith("aten") or "xformers" in described


@pytest.mark.parametrize("special", [float("-inf"), 100.0, -100.0, -1e4])
def test_extreme_sinks(name, special):
    """One sink a head, which fa4 adds in its own kernels, and rows without a key."""
    case = case_for(name, 2, causal=True)
    case.sink = case.sink[:1].clone()
    case.sink[0, ::2] = special
    result, expected = run_drop_in(name, case), truth(case)
    assert not any(value.isnan().any() for value in result.values())
    plain = Case(**{**vars(case), "sink": None})
    bound = errors(run_drop_in(name, plain), truth(plain))
    bound["lse"] = max(bound.get("lse", 0.0), 1e-6)  # where lse is the sink, one rounding to fp32
    result.pop(
        "dsink"
    ) if special == -1e4 else None  # fp32 knows an lse of -1e4 to 1e-3: test_attention.py
    assert_within_plain(result, expected, bound)


def arguments_of(name: str, case: Case) -> tuple[dict, list[torch.Tensor]]:
    """Keyword arguments with leaves that require gradients, and these leaves with the sink's."""
    packed = pack(name, case.q, case.k, case.v)
    sink = case.sink.clone().requires_grad_()
    leaves = [x.requires_grad_() for x in packed.values() if isinstance(x, torch.Tensor)]
    return {
        **packed,
        "sink": sink,
        "sink_layout": case.sink_layout,
        "causal": True,
        **lengths(name, case),
    }, [*leaves, sink]


@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
def test_the_host_never_waits(name, sink_layout):
    case = case_for(name, 2, sink_layout)
    arguments, leaves = arguments_of(name, case)
    function = getattr(magi_sink_cp, name)

    def step():
        out = function(**arguments)
        torch.autograd.grad(out, leaves, case.dout)

    step()  # compiles
    # Never seen before.
    arguments = {
        key: x.clone() if key.startswith("cu_seqlens") else x for key, x in arguments.items()
    }
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
def test_cuda_graph_of_forward_and_backward(name, sink_layout):
    case = case_for(name, 2, sink_layout)
    arguments, leaves = arguments_of(name, case)
    function = getattr(magi_sink_cp, name)

    def step():
        out = function(**arguments)
        return out, *torch.autograd.grad(out, leaves, case.dout)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in leaves:
            x.copy_(torch.randn_like(x))
    graph.replay()
    for ours, expected in zip(captured, step(), strict=True):
        # Atomics of dq; wrong inputs would differ by 1.
        torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(captured[0], function(**arguments))


def test_compiled_without_a_graph_break_and_for_any_length(name):
    function = getattr(magi_sink_cp, name)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **x: function(**x) * 2, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        shape = {
            "heads": 8,
            "heads_kv": 8 if needs_equal_heads(name) else 2,
            "head_dim": 64,
            "dtype": torch.bfloat16,
            "device": "cuda",
        }
        sizes = [64 * batch, 32]
        case = (
            make_case(sizes, sizes, **shape)
            if is_varlen(name)
            else make_case([96 * batch], [96 * batch], batch=2, **shape)
        )
        arguments, leaves = arguments_of(name, case)
        with torch._dynamo.config.patch(error_on_recompile=batch > 2):
            out = compiled(**arguments)
            grads = torch.autograd.grad(out, leaves, case.dout)
        eager = function(**arguments) * 2
        assert torch.equal(out, eager)
        for ours, expected in zip(
            grads, torch.autograd.grad(eager, leaves, case.dout), strict=True
        ):
            assert (ours - expected).float().norm() <= 2e-2 * expected.float().norm()
    torch._dynamo.reset()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(name, use_reentrant):
    case = case_for(name, 2)
    arguments, leaves = arguments_of(name, case)
    function = getattr(magi_sink_cp, name)
    expected = torch.autograd.grad(function(**arguments), leaves, case.dout)

    names = [key for key, x in arguments.items() if any(x is leaf for leaf in leaves)]

    def block(*tensors):
        return function(**{**arguments, **dict(zip(names, tensors, strict=True))})

    checkpoint(block, *leaves, use_reentrant=use_reentrant).backward(case.dout)
    for x, true in zip(leaves, expected, strict=True):
        assert (x.grad - true).float().norm() <= 1e-2 * true.float().norm()


def test_autocast_changes_nothing(name):
    case = case_for(name, 2)
    arguments, _ = arguments_of(name, case)
    function = getattr(magi_sink_cp, name)
    expected = function(**arguments)
    with torch.autocast("cuda", torch.float16):
        out = function(**arguments)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
def test_opcheck(name, sink_layout, monkeypatch):
    """torch.library.opcheck over the operator calls that the function makes.

    Schema, fake shapes and strides, dynamic shapes.
    """
    case = case_for(name, 2, sink_layout)
    calls = record_operator_calls(monkeypatch)
    run_drop_in(name, case, deterministic=True)
    assert len(calls) == 2
    for operator, arguments in tuple(calls):  # opcheck makes more calls
        detached = [
            [x.detach() if isinstance(x, torch.Tensor) else x for x in a] if isinstance(a, list)
            else a.detach() if isinstance(a, torch.Tensor) else a
            for a in arguments
        ]  # fmt: skip
        torch.library.opcheck(
            operator,
            tuple(detached),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@pytest.mark.parametrize("varlen", [False, True])
def test_dropout_of_fa2(varlen):
    """S_dmask says what was dropped; out, lse and all gradients are those of that mask."""
    name = "fa2_varlen_func_with_sink" if varlen else "fa2_func_with_sink"
    shape = {
        "heads": 4,
        "heads_kv": 2,
        "head_dim": 64,
        "dtype": torch.bfloat16,
        "device": "cuda",
        "s_sink": 2,
    }
    case = make_case([128], [128], **shape) if varlen else make_case([128], [128], batch=2, **shape)
    arguments, leaves = arguments_of(name, case)
    torch.manual_seed(1)
    out, lse, probs = getattr(magi_sink_cp, name)(
        **arguments, dropout_p=0.3, return_attn_probs=True
    )
    grads = torch.autograd.grad(out, leaves, case.dout)
    q, k, v, sink = (x.double().detach().requires_grad_() for x in leaves)
    dense = [
        x if x.dim() == 4 else x[None]
        for x in (q, k.repeat_interleave(2, -2), v.repeat_interleave(2, -2))
    ]
    scores = torch.einsum("bqhd,bkhd->bhqk", dense[0], dense[1]) * 64**-0.5
    scores = scores.masked_fill(torch.ones(128, 128, device="cuda").triu(1).bool(), float("-inf"))
    exact_lse = torch.logaddexp(scores.logsumexp(-1), sink.logsumexp(0)[None, :, None])
    kept = (probs >= 0) & ~torch.signbit(probs)
    weights = torch.exp(scores - exact_lse.unsqueeze(-1)) * kept[..., :128, :128] / 0.7
    exact = torch.einsum("bhqk,bkhd->bqhd", weights, dense[2])
    exact = exact[0] if varlen else exact
    assert (out - exact).norm() <= 1e-2 * exact.norm()
    torch.testing.assert_close(
        lse.double(), (exact_lse[0] if varlen else exact_lse).detach(), rtol=1e-5, atol=1e-5
    )
    for ours, true in zip(
        grads, torch.autograd.grad(exact, (q, k, v, sink), case.dout.double()), strict=True
    ):
        assert (ours - true).norm() <= 1e-2 * true.norm()
    torch.manual_seed(1)
    assert torch.equal(getattr(magi_sink_cp, name)(**arguments, dropout_p=0.3), out)
    compiled = torch.compile(
        lambda **x: getattr(magi_sink_cp, name)(**x, dropout_p=0.3), fullgraph=True
    )
    dropped = compiled(**arguments)
    assert not torch.equal(dropped, getattr(magi_sink_cp, name)(**arguments))


def test_parameters_of_fa3_that_only_kernels_have():
    """attention_chunk, qv, and v with its own head_dim, in a forward.

    num_splits, pack_gqa and sm_margin do not change the result.
    """
    if reason := missing("fa3"):
        pytest.skip(reason)
    q, k, v = (torch.randn(2, 256, h, 64, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2))
    sink = torch.randn(2, 8, device="cuda")
    function = magi_sink_cp.fa3_func_with_sink

    def reference(scores, v):
        lse = torch.logaddexp(scores.logsumexp(-1), sink.double().logsumexp(0)[None, :, None])
        return torch.einsum(
            "bhqk,bkhd->bqhd",
            torch.exp(scores - lse.unsqueeze(-1)),
            v.double().repeat_interleave(4, 2),
        )

    def product(a, b):
        return torch.einsum("bqhd,bkhd->bhqk", a.double(), b.double().repeat_interleave(4, 2))

    scores, row = product(q, k) / 8, torch.arange(256, device="cuda")
    plain = function(q, k, v, sink)
    assert (plain - reference(scores, v)).norm() <= 1e-2 * plain.norm()
    for arguments in (
        {"num_splits": 3},
        {"pack_gqa": True},
        {"pack_gqa": False},
        {"sm_margin": 16},
    ):
        torch.testing.assert_close(
            function(q, k, v, sink, **arguments), plain, rtol=1e-2, atol=1e-2
        )
    chunked = reference(scores.masked_fill(row[:, None] // 64 != row // 64, float("-inf")), v)
    assert (function(q, k, v, sink, attention_chunk=64) - chunked).norm() <= 1e-2 * chunked.norm()
    wide_v, qv = (
        torch.randn(2, 256, 2, 512, device="cuda", dtype=q.dtype),
        torch.randn(2, 256, 8, 512, device="cuda", dtype=q.dtype),
    )
    mla = reference((product(q, k) + product(qv, wide_v)) * 576**-0.5, wide_v)
    assert (function(q, k, wide_v, sink, qv=qv) - mla).norm() <= 1e-2 * mla.norm()
    for arguments in ({"attention_chunk": 64}, {"qv": qv, "v": wide_v}):
        with pytest.raises(
            ValueError, match="FlashAttention has a forward for this and no backward"
        ):
            function(**{"q": q, "k": k, "v": v, "sink": sink.clone().requires_grad_(), **arguments})
    deep_q, deep_k = (torch.randn(2, 256, h, 192, device="cuda", dtype=q.dtype) for h in (8, 2))
    v128 = torch.randn(2, 256, 2, 128, device="cuda", dtype=q.dtype)
    deep = reference(product(deep_q, deep_k) * 192**-0.5, v128)
    assert (function(deep_q, deep_k, v128, sink) - deep).norm() <= 1e-2 * deep.norm()


def test_fp8_is_refused_by_a_build_without_it_or_right():
    if reason := missing("fa3"):
        pytest.skip(reason)
    q, k, v = (torch.randn(2, 256, h, 64, device="cuda").to(FP8) for h in (8, 2, 2))
    sink = torch.randn(2, 8, device="cuda")
    if lacks_softcap("fa3"):
        with pytest.raises(ValueError, match="has no fp8"):
            magi_sink_cp.fa3_func_with_sink(q, k, v, sink)
        return
    out = magi_sink_cp.fa3_func_with_sink(q, k, v, sink)
    expected = attention_with_sink(*(x.bfloat16() for x in (q, k, v)), sink)
    assert (out - expected).norm() <= 0.1 * expected.norm()


def test_seqused_of_fa3():
    """The kernel leaves rows that do not exist unwritten.

    Here they are rows without a key, forward and backward.
    """
    if reason := missing("fa3"):
        pytest.skip(reason)
    name = "fa3_varlen_func_with_sink"
    case = make_case(
        [200, 0, 77, 1],
        [150, 5, 77, 0],
        heads=8,
        heads_kv=2,
        head_dim=64,
        dtype=torch.bfloat16,
        with_dlse=True,
        causal=True,
    )
    used_q, used_k = (
        torch.tensor([90, 0, 77, 1], dtype=torch.int32),
        torch.tensor([60, 2, 0, 0], dtype=torch.int32),
    )
    exact = {**vars(case), "q": case.q.float(), "k": case.k.float(), "v": case.v.float()}
    expected = run_drop_in(name, Case(**exact), seqused_q=used_q, seqused_k=used_k)
    on_gpu = Case(
        **{key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in vars(case).items()}
    )
    result = run_drop_in(name, on_gpu, seqused_q=used_q.cuda(), seqused_k=used_k.cuda())
    for key, value in result.items():
        assert (value.cpu().float() - expected[key]).norm() <= 1e-2 * expected[key].norm(), key


@pytest.mark.parametrize("argument", ["cu_seqlens", "seqused_k"])
def test_a_cuda_graph_reads_int64_lengths_anew(argument):
    """Its replays convert what the tensor holds by then, also where a call before it did so."""
    if reason := missing("fa3"):
        pytest.skip(reason)
    q, k, v = (torch.randn(300, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    offsets = torch.tensor([0, 120, 300], device="cuda")
    used = torch.tensor([60, 90], device="cuda") if argument == "seqused_k" else None
    changed, later = (offsets, [0, 200, 300]) if used is None else (used, [100, 20])

    def step():
        return magi_sink_cp.fa3_varlen_func_with_sink(
            q, k, v, offsets, offsets, 300, 300, causal=True, seqused_k=used
        )

    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        graph.replay()
        before = captured.clone()
        changed.copy_(torch.tensor(later, device="cuda"))
        graph.replay()
        assert torch.equal(captured, step())
        assert not torch.equal(captured, before)


def test_dsink_keeps_its_digits_over_64k_rows():
    """The existing extension multiplies out and dout in bf16.

    Delta comes in fp32 here, on every backend.
    """
    torch.manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, 65536, h, 64, device="cuda", dtype=torch.bfloat16) for h in (2, 1, 1, 2)
    )
    for family in ("fa3", "fa4", "aten"):
        if missing("fa2" if family == "aten" else family):
            continue
        sink = torch.randn(1, 2, device="cuda", requires_grad=True)
        out, lse = attention_with_sink(
            q, k, v, sink, window_size=(128, 0), backend=family, return_lse=True
        )
        (dsink,) = torch.autograd.grad(out, sink, dout)
        weight = torch.exp(sink.detach().double()[:, :, None] - lse.double())  # (1, 2, rows)
        exact = -(weight * (out.double() * dout.double()).sum(-1).transpose(1, 2)).sum(-1)
        in_bf16 = -(
            weight * (out * dout).sum(-1, dtype=torch.float32).double().transpose(1, 2)
        ).sum(-1)
        ours, theirs = (
            (dsink - exact).norm() / exact.norm(),
            (in_bf16 - exact).norm() / exact.norm(),
        )
        assert ours <= 2e-5, (family, ours)
        assert ours < theirs / 5, (family, ours, theirs)


def test_fa3_hands_its_softmax_d_to_dsink(monkeypatch):
    if reason := missing("fa3"):
        pytest.skip(reason)
    seen = []
    original = ops.sink_gradient
    monkeypatch.setattr(
        ops,
        "sink_gradient",
        lambda sink, lse, delta, *rest: (seen.append(delta), original(sink, lse, delta, *rest))[1],
    )
    for name in ("fa3_func_with_sink", "fa3_varlen_func_with_sink", "fa3_qkvpacked_func_with_sink"):
        run_drop_in(name, case_for(name, 2, causal=True))
    assert len(seen) == 3
    assert all(delta is not None for delta in seen)


def test_fa4_adds_one_sink_itself_and_auto_prefers_it_there(monkeypatch):
    if reason := missing("fa4"):
        pytest.skip(reason)
    calls = []
    original = ops.merge

    def counting(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(ops, "merge", counting)
    q = torch.randn(1, 64, 4, 64, device="cuda", dtype=torch.bfloat16)
    for sink, layout, merges in (
        (torch.randn(1, 4), "sh", 0),
        (torch.randn(2, 4), "sh", 1),
        (torch.randn(1, 64, 1, 4), "ssh", 1),
    ):
        calls.clear()
        attention_with_sink(q, q, q, sink.cuda(), sink_layout=layout)
        assert len(calls) == merges
        calls.clear()
        magi_sink_cp.fa4_func_with_sink(q, q, q, sink.cuda(), layout)
        assert len(calls) == merges


def test_each_first_call_compiles_one_kernel_and_the_next_process_none(tmp_path):
    code = (
        "import torch; from magi_sink_cp import fa2_func_with_sink as f; from pathlib import Path; "
        f"count = lambda: len(list(Path({str(tmp_path)!r}).rglob('*.cubin'))); "
        "q = torch.randn(1, 64, 2, 64, device='cuda', dtype=torch.bfloat16, requires_grad=True); "
        "s = torch.randn(1, 2, device='cuda', requires_grad=True); a = count(); o = f(q, q, q, "
        "s); b = count(); "
        "o.sum().backward(); torch.cuda.synchronize(); print(b - a, count() - b)"
    )
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    results = [
        subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        for _ in range(2)
    ]
    assert [r.stdout.split() for r in results] == [["1", "1"], ["0", "0"]], results[0].stderr


def test_fa4_refuses_the_head_dims_that_were_not_checked():
    if reason := missing("fa4"):
        pytest.skip(reason)
    q = torch.randn(1, 64, 4, 72, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match="it is used with a head_dim of 64, 96, 128, 192, 256, and q has 72"
    ):
        magi_sink_cp.fa4_func_with_sink(q, q, q)
    call = ops.KernelRequest(make_params(72, None, False, (-1, -1), 0.0, False))
    assert select_backend(BackendPolicy("auto"), q, call, None, torch.zeros(1, 4)).name != "fa4"


@pytest.mark.parametrize("window_size", [(50, -1), (-1, 100), (20, 100)])
def test_windows_of_more_queries_than_keys(name, window_size):
    """FlashAttention-2 computes another mask for these.

    Dense it is refused, packed it gets the bounds that make it right.
    """
    if "qkvpacked" in name:
        pytest.skip("as many keys as queries")
    shape = {
        "heads": 8,
        "heads_kv": 2,
        "head_dim": 64,
        "dtype": torch.bfloat16,
        "device": "cuda",
        "window_size": window_size,
    }
    case = (
        make_case([257, 40], [64, 64], **shape)
        if is_varlen(name)
        else make_case([257], [64], batch=2, **shape)
    )
    if name.startswith("fa2") and not is_varlen(name):
        with pytest.raises(ValueError, match="FlashAttention-2 computes another mask"):
            run_drop_in(name, case)
        return
    plain = Case(**{**vars(case), "sink": None})
    assert_within_plain(
        run_drop_in(name, case),
        truth(case),
        dict.fromkeys(errors(run_drop_in(name, plain), truth(plain)), 0.005),
    )


@pytest.mark.parametrize("family", ["fa3", "fa2"])
def test_rows_behind_the_last_document_leave_dsink_right(family):
    """Buffers are often longer than what they hold; the kernels leave the rest unwritten."""
    if reason := missing(family):
        pytest.skip(reason)
    function = getattr(magi_sink_cp, f"{family}_varlen_func_with_sink")
    q, k, v, dout = (
        torch.randn(500, h, 64, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2, 8)
    )
    sink = torch.randn(1, 8, device="cuda", requires_grad=True)
    cu_seqlens = torch.tensor([0, 100, 333], dtype=torch.int32, device="cuda")
    garbage = torch.full((64, 500, 8, 64), float("nan"), device="cuda", dtype=torch.bfloat16)
    del garbage  # what the next outputs are allocated from
    out = function(q, k, v, cu_seqlens, cu_seqlens, 233, 233, sink, causal=True)
    (dsink,) = torch.autograd.grad(out, sink, dout)
    short = function(q[:333], k[:333], v[:333], cu_seqlens, cu_seqlens, 233, 233, sink, causal=True)
    assert torch.equal(out[:333], short)
    assert not out[333:].any()
    torch.testing.assert_close(
        dsink, torch.autograd.grad(short, sink, dout[:333])[0], rtol=1e-4, atol=1e-4
    )


def test_deterministic(name):
    case = case_for(name, 2, causal=True, with_dlse=has_lse(name))
    first, second = (run_drop_in(name, case, deterministic=True) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_fa4_has_no_splits_on_hopper():
    if (reason := missing("fa4")) or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip(reason or "needs Hopper")
    q = torch.randn(1, 64, 4, 64, device="cuda", dtype=torch.bfloat16)
    for num_splits in (0, 2):
        with pytest.raises(ValueError, match="it has num_splits=1 alone on Hopper"):
            magi_sink_cp.fa4_func_with_sink(q, q, q, num_splits=num_splits)


def test_the_signatures_of_the_installed_flash_attention_4_are_covered():
    """Every parameter of its functions is one of ours, with the same default."""
    if reason := missing("fa4"):
        pytest.skip(reason)
    interface = importlib.import_module("flash_attn.cute.interface")
    for theirs, ours in (
        ("flash_attn_func", "fa4_func_with_sink"),
        ("flash_attn_varlen_func", "fa4_varlen_func_with_sink"),
    ):
        known = inspect.signature(getattr(magi_sink_cp, ours)).parameters
        for parameter in inspect.signature(getattr(interface, theirs)).parameters.values():
            assert known[parameter.name].default == parameter.default


def test_fa2_pads_an_odd_head_dim():
    case = make_case(
        [100],
        [100],
        batch=2,
        heads=4,
        heads_kv=2,
        head_dim=20,
        dtype=torch.bfloat16,
        device="cuda",
        causal=True,
    )
    plain = Case(**{**vars(case), "sink": None})
    bound = errors(run_drop_in("fa2_func_with_sink", plain), truth(plain))
    assert_within_plain(run_drop_in("fa2_func_with_sink", case), truth(case), bound)


def test_lengths_converted_under_inference_mode_serve_training():
    """A tensor that is made under inference_mode could not be saved for backward."""
    q = torch.randn(300, 8, 64, device="cuda", dtype=torch.bfloat16)
    offsets = torch.tensor([0, 120, 300], device="cuda")
    lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    with torch.inference_mode():
        expected = magi_sink_cp.attention_with_sink(q, q, q, causal=True, **lengths)
    q.requires_grad_()
    out = magi_sink_cp.attention_with_sink(q, q, q, causal=True, **lengths)
    out.sum().backward()
    assert torch.equal(out, expected)
