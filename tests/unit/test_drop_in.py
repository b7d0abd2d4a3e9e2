"""The drop-in functions on the CPU: signatures, numbers, every parameter, and the errors."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import sys
import types

import numpy
import pytest
import torch

import magi_sink_cp
from magi_sink_cp import attention_with_sink, compat, set_fallback
from magi_sink_cp.kernels.backends import registry
from magi_sink_cp.kernels.backends.flash import check_flash_2_window, flash_2_maxima
from magi_sink_cp.kernels.checks import make_params
from magi_sink_cp.kernels.protocol import FP8, Varlen
from magi_sink_cp.ops import attention as ops
from tests.support.cases import Case, assert_close, assert_within_plain, errors, make_case, truth
from tests.support.drop_in import (
    DENSE,
    FUNCTIONS,
    KVPACKED,
    QKVPACKED,
    VARLEN,
    has_lse,
    is_varlen,
    lengths,
    needs_equal_heads,
    pack,
    run_drop_in,
)
from tests.support.reference import visible_mask

TOLERANCE = 1e-5

SINK = "sink=None, sink_layout='sh'"
FA3_TAIL = (
    "q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, "
    "softcap=0.0, num_splits=1, "
    "pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False"
)
FA2_TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, "
    "return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
FA4_MODS = "score_mod=None, score_mod_bwd=None, mask_mod=None"
FA4_MASK = (
    "softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, "
    "softcap=0.0, num_splits=1, pack_gqa=None, "
    "deterministic=False"
)
# magi_attn_extensions 1.1.0 (fa2, fa3), which follow FlashAttention 2.8 and 3; fa4: FlashAttention
# 4.0.0b36 with the leading arguments of magi_attn_extensions.
SIGNATURES = {
    "fa3_func_with_sink": f"q, k, v, {SINK}, softmax_scale=None, causal=False, qv=None, {FA3_TAIL}",
    "fa3_varlen_func_with_sink": (
        f"q, k, v, {LENGTHS}, {SINK}, seqused_q=None, seqused_k=None, softmax_scale=None, "
        f"causal=False, qv=None, {FA3_TAIL}"
    ),
    "fa3_qkvpacked_func_with_sink": (
        f"qkv, {SINK}, softmax_scale=None, causal=False, q_descale=None, k_descale=None, "
        "v_descale=None, window_size=(-1, -1), "
        "attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None, sm_margin=0, "
        "return_attn_probs=False"
    ),
    "fa2_func_with_sink": f"q, k, v, {SINK}, {FA2_TAIL}",
    "fa2_varlen_func_with_sink": f"q, k, v, {LENGTHS}, {SINK}, {FA2_TAIL}, block_table=None",
    "fa2_qkvpacked_func_with_sink": f"qkv, {SINK}, {FA2_TAIL}",
    "fa2_kvpacked_func_with_sink": f"q, kv, {SINK}, {FA2_TAIL}",
    "fa2_varlen_qkvpacked_func_with_sink": f"qkv, cu_seqlens, max_seqlen, {SINK}, {FA2_TAIL}",
    "fa2_varlen_kvpacked_func_with_sink": f"q, kv, {LENGTHS}, {SINK}, {FA2_TAIL}",
    "fa4_func_with_sink": (
        f"q, k, v, {SINK}, qv=None, gather_kv_indices=None, {FA4_MASK}, {FA4_MODS}, "
        "aux_tensors=None, aux_scalars=None, "
        "block_sparse_tensors=None, block_sparse_tensors_bwd=None, return_lse=False, "
        "gather_bwd_recompute_p=False, "
        "gather_bwd_token_chunk=None, *, return_attn_probs=False"
    ),
    "fa4_varlen_func_with_sink": (
        "q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, "
        f"{SINK}, qv=None, min_seqlen_k=None, seqused_q=None, seqused_k=None, "
        f"gather_kv_indices=None, page_table=None, {FA4_MASK}, "
        f"{FA4_MODS}, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, "
        "return_lse=False, scheduler_metadata=None, "
        "seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False, "
        "gather_bwd_token_chunk=None, *, return_attn_probs=False"
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_are_those_of_flash_attention_and_the_existing_extension(name):
    parameters = inspect.signature(getattr(magi_sink_cp, name)).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert str(inspect.Signature(plain)) == f"({SIGNATURES[name]})"


def case_for(
    name: str, sink_layout: str | None = "sh", equal_lengths: bool | None = None, **options
) -> Case:
    """A case that the function's layout can hold: packed qkv has as many rows as keys."""
    equal = name in QKVPACKED
    heads_kv = 4 if needs_equal_heads(name) else 2
    shape = {
        "heads": 4,
        "heads_kv": heads_kv,
        "s_sink": 2,
        "sink_layout": sink_layout,
        "with_dlse": has_lse(name),
        **options,
    }
    if is_varlen(name):
        return make_case([7, 0, 12, 1], [7, 0, 12, 1] if equal else [9, 3, 5, 1], **shape)
    return make_case([13], [13 if equal else 9], batch=2, **shape)


MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (4, 2)},
    "causal window": {"causal": True, "window_size": (3, None)},
    "softcap and scale": {"softcap": 1.5, "softmax_scale": 0.3},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("sink_layout", ["sh", "ssh", None])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_matches_the_reference(name, sink_layout, mask):
    case = case_for(name, sink_layout, **mask)
    assert_close(run_drop_in(name, case), truth(case), TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_low_precision_within_twice_the_plain_error(name, dtype):
    heads_kv = 8 if needs_equal_heads(name) else 2
    batch = {} if is_varlen(name) else {"batch": 2}
    sizes = [130, 70] if is_varlen(name) else [200]
    case = make_case(
        sizes,
        sizes,
        heads=8,
        heads_kv=heads_kv,
        head_dim=64,
        s_sink=2,
        dtype=dtype,
        causal=True,
        **batch,
    )
    plain = Case(**{**vars(case), "sink": None})
    assert_within_plain(
        run_drop_in(name, case), truth(case), errors(run_drop_in(name, plain), truth(plain))
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_sink_is_plain_attention(name):
    case = case_for(name, None)
    offsets = {}
    if is_varlen(name):
        cu_q, cu_k = (
            torch.tensor(x, dtype=torch.int32) for x in (case.cu_seqlens_q, case.cu_seqlens_k)
        )
        offsets = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    assert torch.equal(
        run_drop_in(name, case)["out"], attention_with_sink(case.q, case.k, case.v, **offsets)
    )


def test_fa3_qkvpacked_in_both_forms_and_for_grouped_heads():
    # 4 query heads, 2 key heads: the 4-dimensional form
    case = case_for("fa3_qkvpacked_func_with_sink")
    assert_close(run_drop_in("fa3_qkvpacked_func_with_sink", case), truth(case), TOLERANCE)
    equal = case_for("fa3_qkvpacked_func_with_sink", heads_kv=4)  # the 5-dimensional form
    assert_close(run_drop_in("fa3_qkvpacked_func_with_sink", equal), truth(equal), TOLERANCE)


def test_v_may_have_a_head_dim_of_its_own():
    q, k, v = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 5)
    sink = torch.randn(1, 4)
    wide = torch.nn.functional.pad(v, (0, 3))
    for function in (magi_sink_cp.fa3_func_with_sink, attention_with_sink):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, sink)]
        out = function(*leaves, causal=True)
        assert out.shape == (1, 6, 4, 5)
        torch.testing.assert_close(out, function(q, k, wide, sink, causal=True)[..., :5])
        grads = torch.autograd.grad(out.square().sum(), leaves)
        double = [x.double().requires_grad_() for x in leaves]
        exact = function(*double, causal=True)
        for ours, true in zip(
            grads, torch.autograd.grad(exact.square().sum(), double), strict=True
        ):
            torch.testing.assert_close(ours, true.float(), rtol=1e-4, atol=1e-5)


# --- Every parameter of every function changes the result as the reference says, or raises --------

GIVEN = object()


def fp8(x: torch.Tensor) -> torch.Tensor:
    return x.to(FP8)


CHANGES = {  # parameter → a value that must change the result just as the reference says
    "softmax_scale": 0.7,
    "causal": True,
    "window_size": (2, 1),
    "softcap": 1.2,
}
REFUSED = {  # parameter → (a value that the CPU cannot do, the text that says so)
    "attention_chunk": (4, "it has no attention_chunk, and the call sets attention_chunk=4"),
    "dropout_p": (0.2, "it has no dropout_p"),
    "return_attn_probs": (True, "return_attn_probs=True needs dropout_p > 0"),  # of fa2
    "alibi_slopes": (torch.ones(4), "it has no alibi_slopes"),
    "q_descale": (torch.ones(2, 2), "belongs to torch.float8_e4m3fn inputs"),
    "k_descale": (torch.ones(2, 2), "belongs to torch.float8_e4m3fn inputs"),
    "v_descale": (torch.ones(2, 2), "belongs to torch.float8_e4m3fn inputs"),
    "gather_kv_indices": (
        torch.zeros(1),
        "gather_kv_indices is not supported together with a sink",
    ),
    "score_mod": (abs, "score_mod is not supported"),
    "score_mod_bwd": (abs, "score_mod_bwd is not supported"),
    "mask_mod": (abs, "mask_mod is not supported"),
    "aux_tensors": ([], "aux_tensors is not supported"),
    "aux_scalars": ((), "aux_scalars is not supported"),
    "block_sparse_tensors": ((), "block_sparse_tensors is not supported"),
    "block_sparse_tensors_bwd": ((), "block_sparse_tensors_bwd is not supported"),
    "min_seqlen_k": (1, "min_seqlen_k is not supported"),
    "page_table": (torch.zeros(1), "page_table is not supported"),
    "scheduler_metadata": ((), "scheduler_metadata is not supported"),
    "seqlen_k_per_split": (1, "seqlen_k_per_split is not supported"),
    "gather_bwd_recompute_p": (True, "gather_bwd_recompute_p is not supported"),
    "gather_bwd_token_chunk": (1, "gather_bwd_token_chunk is not supported"),
    "disable_scheduler_metadata": (True, "disable_scheduler_metadata is not supported"),
}
REFUSED_IN = {
    ("fa3_func_with_sink", "qv"): (torch.randn(2, 13, 4, 16), "it has no qv"),
    ("fa3_varlen_func_with_sink", "qv"): (torch.randn(20, 4, 16), "it has no qv"),
    ("fa4_func_with_sink", "qv"): (torch.zeros(1), "qv is not supported"),
    ("fa4_varlen_func_with_sink", "qv"): (torch.zeros(1), "qv is not supported"),
}
ELSEWHERE = {  # parameter → the test that shows its effect
    "q", "k", "v", "kv", "qkv", "sink", "sink_layout", "num_heads_q",  # test_matches_the_reference
    "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "cu_seqlens", "max_seqlen",
    "deterministic",  # test_deterministic; on GPUs tests/test_gpu_drop_in.py
    "seqused_q", "seqused_k",  # test_seqused
    "block_table",  # test_block_table
    "num_splits", "pack_gqa", "sm_margin",  # test_hints_do_not_change_the_result
    "learnable_sink", "return_lse",  # test_names_of_flash_attention_4
    "return_attn_probs",  # of fa3 and fa4: test_matches_the_reference takes lse with it
}  # fmt: skip


def parameters():
    for name in FUNCTIONS:
        for parameter in inspect.signature(getattr(magi_sink_cp, name)).parameters:
            yield name, parameter


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n.startswith(("fa3", "fa4"))])
def test_hints_do_not_change_the_result(name):
    """num_splits, pack_gqa and sm_margin are taken on a CPU, and checked."""
    case = case_for(name)
    expected = run_drop_in(name, case)["out"]
    known = inspect.signature(getattr(magi_sink_cp, name)).parameters
    for hint, value in (("num_splits", 2), ("pack_gqa", True), ("sm_margin", 8)):
        if hint in known:
            assert torch.equal(run_drop_in(name, case, **{hint: value})["out"], expected)
            with pytest.raises((TypeError, ValueError), match=f"{hint} must be"):
                run_drop_in(name, case, **{hint: "many"})


@pytest.mark.parametrize(("name", "parameter"), list(parameters()))
def test_no_parameter_is_accepted_and_ignored(name, parameter):
    value, message = REFUSED_IN.get((name, parameter)) or REFUSED.get(parameter) or (None, None)
    case = case_for(name)
    arguments = {**pack(name, case.q, case.k, case.v), "sink": case.sink, **lengths(name, case)}
    function = getattr(magi_sink_cp, name)
    if message is not None and not (parameter == "return_attn_probs" and has_lse(name)):
        with torch.no_grad(), pytest.raises((ValueError, NotImplementedError), match=message):
            function(**arguments, **{parameter: value})
        if parameter == "attention_chunk":
            with pytest.raises(
                ValueError,
                match="attention_chunk: FlashAttention has a forward for this and no backward",
            ):
                function(**{**arguments, "sink": case.sink.requires_grad_()}, attention_chunk=4)
        return
    if parameter in CHANGES:
        changed = case_for(name, **{parameter: CHANGES[parameter]})
        result = run_drop_in(name, changed)
        assert_close(result, truth(changed), TOLERANCE)
        assert not torch.allclose(result["out"], run_drop_in(name, case)["out"])
        return
    assert parameter in ELSEWHERE, f"{parameter} of {name} is not tested anywhere"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_meta_tensors_give_shapes(name):
    case = case_for(name)
    arguments = {**pack(name, case.q, case.k, case.v), "sink": case.sink, **lengths(name, case)}
    out = getattr(magi_sink_cp, name)(
        **{key: x.to("meta") if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
    )
    assert out.is_meta
    assert out.shape == case.q.shape


@pytest.mark.parametrize("name", VARLEN)
def test_lengths(name):
    """max_seqlen may be larger, or None; too small, missing or wrong offsets raise."""
    case = case_for(name, causal=True)
    expected = run_drop_in(name, case)
    function = getattr(magi_sink_cp, name)
    arguments = {
        **pack(name, case.q, case.k, case.v),
        "sink": case.sink,
        "causal": True,
        **lengths(name, case),
    }
    offsets = {name: value for name, value in arguments.items() if name.startswith("cu_seqlens")}
    changes = (
        {"max_seqlen_q": 99, "max_seqlen_k": 99},
        {"max_seqlen_q": None, "max_seqlen_k": None},
        {"max_seqlen_q": numpy.int64(12), "max_seqlen_k": numpy.int32(9)},
        {"max_seqlen_q": torch.tensor(12), "max_seqlen_k": torch.tensor(9, dtype=torch.int32)},
        {name: value.long() for name, value in offsets.items()},
        {name: value.numpy() for name, value in offsets.items()},
        {name: value.tolist() for name, value in offsets.items()},
    )
    for change in changes:
        assert torch.equal(function(**{**arguments, **change}), expected["out"])
    for change, message in (
        ({"max_seqlen_q": 11}, "max_seqlen_q must be an int >= 12"),
        ({"max_seqlen_k": 8.0}, "max_seqlen_k must be an int >= 0"),
        ({"cu_seqlens_k": None}, "must be given together, and cu_seqlens_k is None"),
        (
            {"cu_seqlens_q": arguments["cu_seqlens_q"].short()},
            "cu_seqlens_q must have dtype torch.int32",
        ),
        ({"cu_seqlens_q": arguments["cu_seqlens_q"] + 1}, "cu_seqlens_q must start at 0"),
        ({"cu_seqlens_k": arguments["cu_seqlens_k"][:-1]}, "the same number of documents"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            function(**{**arguments, **change})


@pytest.mark.parametrize("name", ["fa3_varlen_func_with_sink", "fa4_varlen_func_with_sink"])
def test_seqused(name):
    """Rows and keys from seqused on do not exist.

    The result is that of the shortened documents, and empty rows elsewhere.
    """
    used_q, used_k = (
        torch.tensor([4, 0, 12, 1], dtype=torch.int32),
        torch.tensor([9, 2, 0, 1], dtype=torch.int32),
    )
    case = case_for(name, causal=True)
    result = run_drop_in(name, case, seqused_q=used_q, seqused_k=used_k)
    again = run_drop_in(name, case, seqused_q=used_q.long(), seqused_k=used_k.tolist())
    assert all(torch.equal(x, again[key]) for key, x in result.items())
    rows = torch.cat(
        [
            torch.arange(start, start + n)
            for start, n in zip(case.cu_seqlens_q, used_q.tolist(), strict=False)
        ]
    )
    keys = torch.cat(
        [
            torch.arange(start, start + n)
            for start, n in zip(case.cu_seqlens_k, used_k.tolist(), strict=False)
        ]
    )
    short = make_case(used_q.tolist(), used_k.tolist(), s_sink=2, with_dlse=True, causal=True)
    short.q, short.k, short.v, short.dout, short.dlse = (
        case.q[rows],
        case.k[keys],
        case.v[keys],
        case.dout[rows],
        case.dlse[:, rows],
    )
    short.sink = case.sink
    expected = truth(short)
    other = torch.ones(case.q.shape[0], dtype=torch.bool).index_fill(0, rows, False)
    assert not result["out"][other].any()
    assert not result["dq"][other].any()
    torch.testing.assert_close(
        result["lse"][:, other], torch.logsumexp(case.sink, 0)[:, None].expand(-1, int(other.sum()))
    )
    taken = {name: result[name][rows] for name in ("out", "dq")} | {
        name: result[name][keys] for name in ("dk", "dv")
    }
    assert_close(
        {**taken, "lse": result["lse"][:, rows], "dsink": result["dsink"]}, expected, TOLERANCE
    )
    for wrong, error, message in (
        (used_q[:3], ValueError, r"seqused_q must have shape \(4,\), a length for each document"),
        (used_q.float(), TypeError, "seqused_q must have dtype torch.int32 or torch.int64"),
        (used_q + 9, ValueError, "seqused_q must be from 0 to"),
        (used_q.long() + 2**32, ValueError, "seqused_q must fit in int32, got 4294967"),
    ):
        with pytest.raises(error, match=message):
            run_drop_in(name, case, seqused_q=wrong)


@pytest.mark.parametrize("argument", ["seqused_k", "cu_seqlens_q"])
def test_numbers_that_torch_does_not_see_change(argument):
    """int64 lengths that share memory with an array give the result of the array's numbers."""
    q, k, v = (torch.randn(9, 2, 16) for _ in range(3))
    offsets = [0, 4, 9]
    now, later = ([2, 3], [4, 5]) if argument == "seqused_k" else (offsets, [0, 6, 9])
    lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}

    def run(value):
        return magi_sink_cp.fa3_varlen_func_with_sink(
            q, k, v, max_seqlen_q=9, max_seqlen_k=9, causal=True, **(lengths | {argument: value})
        )

    array = numpy.array(now)
    shared = torch.from_numpy(array)
    assert torch.equal(run(shared), run(now))
    array[:] = later
    assert torch.equal(run(shared), run(later))
    assert not torch.equal(run(now), run(later))


def test_no_document_with_seqused():
    empty = torch.zeros(0, 2, 16)
    for used in ([], torch.zeros(0, dtype=torch.int32)):
        out = magi_sink_cp.fa3_varlen_func_with_sink(
            empty, empty, empty, cu_seqlens_q=[0], cu_seqlens_k=[0], max_seqlen_q=0,
            max_seqlen_k=0, seqused_q=used,
        )  # fmt: skip
        assert out.shape == empty.shape


@pytest.mark.parametrize(
    "name", ["fa3_func_with_sink", "fa3_varlen_func_with_sink", "fa3_qkvpacked_func_with_sink"]
)
@pytest.mark.parametrize("descaled", [False, True])
def test_fp8_forward(name, descaled):
    """fp8 inputs times their descales, out in bf16; asking for a gradient raises."""
    case = case_for(name, causal=True)
    batch = 4 if is_varlen(name) else 2
    scales = {f"{x}_descale": torch.rand(batch, 2) + 0.5 for x in "qkv"} if descaled else {}
    low = {
        key: fp8(x) if isinstance(x, torch.Tensor) else x
        for key, x in pack(name, case.q, case.k, case.v).items()
    }
    arguments = {**low, "sink": case.sink, "causal": True, **lengths(name, case)}
    function = getattr(magi_sink_cp, name)
    out = function(**arguments, **scales)
    assert out.dtype == torch.bfloat16

    def wide(x: torch.Tensor, descale: torch.Tensor | None, cu_seqlens: list[int]) -> torch.Tensor:
        x = fp8(x).float()
        if descale is None:
            return x
        per_head = descale.repeat_interleave(x.shape[-2] // 2, dim=1)
        if is_varlen(name):
            rows = [b for b in range(batch) for _ in range(cu_seqlens[b + 1] - cu_seqlens[b])]
            return x * per_head[rows].unsqueeze(-1)
        return x * per_head[:, None, :, None]

    case.q = wide(case.q, scales.get("q_descale"), case.cu_seqlens_q)
    case.k, case.v = (
        wide(x, scales.get(f"{n}_descale"), case.cu_seqlens_k)
        for n, x in (("k", case.k), ("v", case.v))
    )
    expected = truth(case).values["out"]
    assert (out.double() - expected).norm() <= 2**-8 * expected.norm()
    with pytest.raises(
        ValueError, match="fp8 inputs: FlashAttention has a forward for this and no backward"
    ):
        function(**{**arguments, "sink": case.sink.requires_grad_()}, **scales)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="q_descale must be a contiguous torch.float32 tensor"),
    ):
        function(**arguments, q_descale=torch.ones(7, 7))


def test_block_table_needs_the_flash_attn_package():
    name = "fa2_varlen_func_with_sink"
    case = case_for(name)
    arguments = {
        **lengths(name, case),
        "sink": case.sink,
        "block_table": torch.zeros(4, 1, dtype=torch.int32),
    }
    pages = torch.randn(2, 256, 2, 16)
    with torch.no_grad(), pytest.raises(ValueError, match="it has no block_table"):
        magi_sink_cp.fa2_varlen_func_with_sink(case.q, pages, pages, **arguments)
    with pytest.raises(
        ValueError, match="block_table: FlashAttention has a forward for this and no backward"
    ):
        magi_sink_cp.fa2_varlen_func_with_sink(case.q.requires_grad_(), pages, pages, **arguments)
    with pytest.raises(ValueError, match="k must have 4 dimensions"):
        magi_sink_cp.fa2_varlen_func_with_sink(case.q, case.k, case.v, **arguments)
    with pytest.raises(ValueError, match="pages hold a multiple of 256 keys"):
        magi_sink_cp.fa2_varlen_func_with_sink(case.q, pages[:, :16], pages[:, :16], **arguments)
    with pytest.raises(
        ValueError,
        match=r"block_table must be a contiguous torch.int32 tensor \(4, blocks\) on cpu",
    ):
        magi_sink_cp.fa2_varlen_func_with_sink(
            case.q, pages, pages, **{**arguments, "block_table": torch.zeros(3, 1)}
        )


@pytest.mark.parametrize("flag", ["return_lse", "return_attn_probs"])
def test_flags_of_flash_attention_4_are_bools(flag):
    case = case_for("fa4_func_with_sink")
    with pytest.raises(TypeError, match=f"{flag} must be a bool, got None"):
        magi_sink_cp.fa4_func_with_sink(case.q, case.k, case.v, **{flag: None})


def test_names_of_flash_attention_4():
    case = case_for("fa4_func_with_sink")
    sink = torch.randn(4)
    expected = attention_with_sink(case.q, case.k, case.v, sink[None], window_size=(3, -1))
    out, lse = magi_sink_cp.fa4_func_with_sink(
        case.q, case.k, case.v, learnable_sink=sink, window_size=(3, None), return_lse=True
    )
    assert torch.equal(out, expected)
    assert lse.shape == (2, 4, 13)
    with pytest.raises(ValueError, match="two names for the same logits"):
        magi_sink_cp.fa4_func_with_sink(case.q, case.k, case.v, sink[None], learnable_sink=sink)
    with pytest.raises(ValueError, match=r"learnable_sink must be a tensor \(heads,\)"):
        magi_sink_cp.fa4_func_with_sink(case.q, case.k, case.v, learnable_sink=sink[None])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_deterministic(name):
    case = case_for(name)
    first, second = (run_drop_in(name, case, deterministic=True) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"sink": torch.randn(2, 3)},
            ValueError,
            r"sink of sink_layout='sh' must have shape \(s_sink >= 1, 4\)",
        ),
        (
            {"sink_layout": "shd"},
            ValueError,
            r"sink_layout must be one of \('sh', 'ssh'\), got 'shd'",
        ),
        ({"sink_layout": "ssh"}, ValueError, "sink of sink_layout='ssh' must have shape"),
        ({"causal": 1}, TypeError, "causal must be a bool, got 1"),
        ({"window_size": (1, 2, 3)}, ValueError, "window_size must be two ints"),
        ({"softmax_scale": 0.0}, ValueError, "softmax_scale must be finite and > 0, got 0.0"),
        ({"softcap": -1.0}, ValueError, "softcap must be finite and >= 0, got -1.0"),
        ({"deterministic": None}, TypeError, "deterministic must be a bool"),
        ({"return_attn_probs": "no"}, (TypeError, ValueError), "return_attn_probs"),
    ],
)
def test_wrong_calls(name, change, error, message):
    case = case_for(name)
    arguments = {**pack(name, case.q, case.k, case.v), "sink": case.sink, **lengths(name, case)}
    with pytest.raises(error, match=message):
        getattr(magi_sink_cp, name)(**{**arguments, **change})
    first = next(iter(pack(name, case.q, case.k, case.v)))
    for value, expected in (
        (None, TypeError),
        (torch.zeros(3), ValueError),
        (torch.zeros(1, 1, 1, 1, 1, 1), ValueError),
    ):
        with pytest.raises(expected, match=rf"{first} must (be|have)"):
            getattr(magi_sink_cp, name)(**{**arguments, first: value})


@pytest.mark.parametrize("num_heads_q", [None, 0, 3, 8, 5, True, 2.0])
def test_wrong_num_heads_q(num_heads_q):
    with pytest.raises(ValueError, match="num_heads_q must be the number of query heads"):
        magi_sink_cp.fa3_qkvpacked_func_with_sink(torch.randn(1, 4, 8, 16), num_heads_q=num_heads_q)
    with pytest.raises(ValueError, match="num_heads_q is for a 4-dimensional qkv"):
        magi_sink_cp.fa3_qkvpacked_func_with_sink(torch.randn(1, 4, 3, 8, 16), num_heads_q=8)


# --- Which kernels --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_selected_yet(monkeypatch):
    monkeypatch.setattr(registry, "_selected", {})


class _OnCuda:
    """Stands in for a CUDA tensor on a machine without one."""

    device, dtype, shape = torch.device("cuda"), torch.bfloat16, (1, 4, 2, 64)


@pytest.fixture
def fallback():
    yield set_fallback
    set_fallback(False)


CALL = registry.KernelRequest(make_params(64, None, False, (-1, -1), 0.0, False))


@pytest.mark.parametrize("family", ["fa3", "fa4"])
def test_a_gpu_without_the_kernels_says_how_to_get_them_unless_fallback_is_set(
    family, monkeypatch, fallback
):
    monkeypatch.setattr(
        registry,
        "_unavailable",
        lambda backend: None if backend.name == "aten" else "it is not here",
    )
    with pytest.raises(
        ValueError, match=rf"{family}: it is not here\. To get {family}: .*set_fallback\(True\)"
    ):
        registry.select_backend(registry.drop_in_policy(family), _OnCuda(), CALL)
    fallback(True)
    assert registry.select_backend(registry.drop_in_policy(family), _OnCuda(), CALL).name == "aten"
    hint = registry._INSTALL_HINTS["fa3"]
    assert all(way in hint for way in ("hopper", "xformers==0.0.34", "torch.ops.flash_attn_3"))
    with pytest.raises(TypeError, match="enabled must be a bool, got 1"):
        set_fallback(1)


def test_the_fallback_of_fa4_is_the_best_other_backend(monkeypatch, fallback):
    monkeypatch.setattr(
        registry,
        "_unavailable",
        lambda backend: "it is not here" if backend.name == "fa4" else None,
    )
    monkeypatch.setattr(registry.Fa3Backend, "unsupported", lambda *_: None)
    monkeypatch.setattr(registry.Fa3Backend, "describe", lambda self: self.name)
    fallback(True)
    assert registry.select_backend(registry.drop_in_policy("fa4"), _OnCuda(), CALL).name == "fa3"


def test_no_installation_is_proposed_where_none_would_help(monkeypatch):
    class Fp32(_OnCuda):
        dtype = torch.float32

    monkeypatch.setattr(registry, "_unavailable", lambda backend: None)
    monkeypatch.setattr(registry.fa2, "is_installed", lambda: False)
    with pytest.raises(ValueError, match="and q is torch.float32") as raised:
        registry.select_backend(registry.drop_in_policy("fa4"), Fp32(), CALL)
    assert "To get" not in str(raised.value)
    softcapped = registry.KernelRequest(make_params(64, None, False, (-1, -1), 5.0, False))
    with pytest.raises(
        ValueError,
        match=r"aten: it has no softcap.*The flash_attn package, 2\.7 or 2\.8, has softcap",
    ):
        registry.select_backend(registry.drop_in_policy("fa2"), _OnCuda(), softcapped)


def test_a_change_of_set_fallback_does_not_reach_a_backward_under_way(monkeypatch, fallback):
    names = []
    original = registry.select_backend
    monkeypatch.setattr(
        ops, "select_backend", lambda name, *rest: (names.append(name), original(name, *rest))[1]
    )
    q, sink = torch.randn(1, 4, 2, 8, requires_grad=True), torch.randn(1, 2)
    fallback(True)
    out = magi_sink_cp.fa3_func_with_sink(q, q, q, sink)
    fallback(False)
    out.sum().backward()
    assert len(names) == 2
    assert names[0] == names[1]


@pytest.mark.parametrize("backend", ["drop-in fa3", "drop-in nonsense", "", None, 3])
def test_what_drop_in_functions_run_on_is_no_public_backend(backend):
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        attention_with_sink(q, q, q, backend=backend)
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        magi_sink_cp.SinkAttention(2, backend=backend)


def flash_attention_2_mask(
    num_q: int, num_k: int, max_k: int, window_size: tuple[int, int]
) -> torch.Tensor:
    """What FlashAttention-2 makes of a window (csrc/flash_attn/flash_api.cpp): limits of max_k and
    more are dropped, then a limit that is missing beside another one is max_k.
    """
    left, right = (-1 if size >= max_k else size for size in window_size)
    if left >= 0 and right < 0:
        right = max_k
    if left < 0 and right > 0:
        left = max_k
    return visible_mask(num_q, num_k, False, (left, right))


def test_flash_attention_2_is_asked_for_no_mask_that_it_gets_wrong():
    """Every window of every small size.

    Where its mask differs, dense calls are refused, and packed ones get other bounds.
    """
    refused = wrong = 0
    for num_q, num_k, left, right in itertools.product(
        range(1, 10), range(1, 6), range(-1, 11), range(-1, 11)
    ):
        window_size = (left, right)
        true = visible_mask(num_q, num_k, False, window_size)
        differs = not torch.equal(flash_attention_2_mask(num_q, num_k, num_k, window_size), true)
        q, k = torch.empty(1, num_q, 1, 8), torch.empty(1, num_k, 1, 8)
        call = registry.KernelRequest(make_params(8, None, False, window_size, 0.0, False))
        try:
            check_flash_2_window(q, k, call)
        except ValueError as error:
            refused += 1
            text = str(error)
            assert "FlashAttention-2 computes another mask for window_size" in text
            assert differs or right == num_k
        else:
            assert not differs, (num_q, num_k, window_size)
        wrong += differs
        varlen = Varlen(torch.tensor([0, num_q]), torch.tensor([0, num_k]), num_q, num_k)
        check_flash_2_window(q[0], k[0], registry.KernelRequest(call.params, varlen))
        _, max_k = flash_2_maxima(varlen, window_size)
        assert torch.equal(flash_attention_2_mask(num_q, num_k, max_k, window_size), true)
    assert 0 < wrong <= refused


@pytest.mark.parametrize(("name", "bad", "message"), [
    ("fa2_func_with_sink", {"q": None, "alibi_slopes": torch.ones(4)}, "q must be a torch.Tensor"),
    ("fa3_func_with_sink", {"q": None, "qv": torch.ones(1)}, "q must be a torch.Tensor"),
    ("fa3_func_with_sink", {"k": None, "qv": torch.ones(1)}, "k must be a torch.Tensor"),
    ("fa3_func_with_sink", {"qv": torch.ones(1)}, "qv must be a contiguous torch.float32 tensor"),
    ("fa3_func_with_sink", {"q_descale": torch.ones(2, 2).requires_grad_()},
    "q_descale belongs to"),
    ("fa2_func_with_sink", {"alibi_slopes": torch.ones(3)}, r"alibi_slopes must .* or \(2, 4\) on"),
    ("fa2_varlen_func_with_sink", {"cu_seqlens_q": {0, 3}, "alibi_slopes": torch.ones(4)},
    "cu_seqlens_q must be an int32 or int64 tensor, a NumPy"),
    ("fa2_varlen_qkvpacked_func_with_sink", {"cu_seqlens": None},
    "cu_seqlens must be an int32 or int64 tensor, a NumPy"),
    ("fa2_qkvpacked_func_with_sink", {"qkv": torch.zeros(2, 13, 3, 4, 16, dtype=torch.int32)},
    "q of qkv must have a dtype"),
    ("fa4_func_with_sink", {"sink": None, "learnable_sink": torch.ones(5)},
    "learnable_sink must be a tensor"),
])  # fmt: skip
def test_errors_name_what_was_given(name, bad, message):
    case = case_for(name)
    arguments = {**pack(name, case.q, case.k, case.v), "sink": case.sink, **lengths(name, case)}
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(magi_sink_cp, name)(**{**arguments, **bad})


def test_descales_get_no_gradient_and_say_so():
    q = fp8(torch.randn(1, 4, 2, 16))
    with pytest.raises(
        ValueError,
        match="q_descale, fp8 inputs: FlashAttention has a forward for this and no backward",
    ):
        magi_sink_cp.fa3_func_with_sink(q, q, q, q_descale=torch.ones(1, 2).requires_grad_())


def test_fa2_runs_on_the_package_or_on_aten_and_never_falls_through_a_broken_one(monkeypatch):
    monkeypatch.setattr(
        registry,
        "_unavailable",
        lambda backend: "it does not load" if backend.name == "fa2" else None,
    )
    monkeypatch.setattr(registry.fa2, "is_installed", lambda: False)
    assert registry.select_backend(registry.drop_in_policy("fa2"), _OnCuda(), CALL).name == "aten"
    monkeypatch.setattr(registry.fa2, "is_installed", lambda: True)
    registry._selected.clear()
    with pytest.raises(
        ValueError, match="no kernel of the fa2 functions can run this call: fa2: it does not load"
    ):
        registry.select_backend(registry.drop_in_policy("fa2"), _OnCuda(), CALL)


def test_auto_prefers_fa4_where_its_kernels_add_the_sink(monkeypatch):
    monkeypatch.setattr(registry, "_unavailable", lambda backend: None)
    monkeypatch.setattr(registry.Backend, "unsupported", lambda *_: None)
    for kind in (registry.Fa3Backend, registry.Fa4Backend):
        monkeypatch.setattr(kind, "unsupported", lambda *_: None)
        monkeypatch.setattr(kind, "describe", lambda self: self.name)
    for sink, expected in (
        (torch.zeros(1, 4), "fa4"),
        (torch.zeros(2, 4), "fa3"),
        (torch.zeros(9, 1, 4), "fa3"),
        (None, "fa3"),
    ):
        assert (
            registry.select_backend(
                registry.BackendPolicy("auto"), _OnCuda(), CALL, None, sink
            ).name
            == expected
        )


# --- magi_attn_extensions -------------------------------------------------------------------------


def test_compat_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "magi_attn_extensions", raising=False)
    compat.install()
    compat.install()
    import magi_attn_extensions

    for name in FUNCTIONS:
        assert getattr(magi_attn_extensions, name) is getattr(magi_sink_cp, name)
    assert sorted(magi_attn_extensions.__all__) == sorted(FUNCTIONS)
    assert importlib.util.find_spec("magi_attn_extensions") is not None
    monkeypatch.delitem(sys.modules, "magi_attn_extensions")


def test_compat_refuses_to_replace_the_real_one(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "magi_attn_extensions", raising=False)
    (tmp_path / "magi_attn_extensions.py").write_text("real = True")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        RuntimeError,
        match=r"the real magi_attn_extensions is installed \(.*magi_attn_extensions.py\)",
    ):
        compat.install()
    assert "magi_attn_extensions" not in sys.modules
    monkeypatch.setitem(
        sys.modules, "magi_attn_extensions", types.ModuleType("magi_attn_extensions")
    )
    with pytest.raises(RuntimeError, match="the real magi_attn_extensions"):
        compat.install()


def test_names_are_complete():
    assert set(FUNCTIONS) == {
        name for name in magi_sink_cp.__all__ if name.endswith("_func_with_sink")
    }
    assert set(FUNCTIONS) == {*DENSE, *VARLEN, *QKVPACKED, *KVPACKED}
