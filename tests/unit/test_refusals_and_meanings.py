"""What has one meaning is taken; what has none is refused by name. Second derivatives raise."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, hvp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

import magi_sink_cp
from magi_sink_cp import attention_with_sink, compat, cp_attention_with_sink, make_cp_plan
from tests.support.cases import assert_close, make_case, run, truth
from tests.support.drop_in import FUNCTIONS, is_varlen, lengths, needs_equal_heads, pack

NO_SECOND = "attention with sinks has no second derivative"


def case_of(name: str, **options):
    shape = {"heads_kv": 4 if needs_equal_heads(name) else 2, **options}
    if is_varlen(name):
        return make_case([6, 3], [6, 3], **shape)
    return make_case([6], [6], batch=2, **shape)


def call_of(name: str, case):
    """The function of q alone (or of qkv), the other inputs fixed."""
    if name == "attention_with_sink":
        return case.q, lambda q: attention_with_sink(q, case.k, case.v, case.sink)
    if name == "cp_attention_with_sink":
        plan = make_cp_plan(6)
        q, k, v = (x[0] for x in (case.q, case.k, case.v))
        return q, lambda q: cp_attention_with_sink(q, k, v, case.sink, plan=plan)
    packed = pack(name, case.q, case.k, case.v)
    first = next(iter(packed))
    others = {key: x for key, x in packed.items() if key != first}
    function, fixed = getattr(magi_sink_cp, name), {"sink": case.sink, **lengths(name, case)}
    return packed[first], lambda x: function(**{first: x}, **others, **fixed)


EVERY = (*FUNCTIONS, "attention_with_sink", "cp_attention_with_sink")


@pytest.mark.parametrize("name", EVERY)
def test_a_gradient_penalty_raises(name):
    """No incoming gradient requires a gradient, so once_differentiable would not notice."""
    x, function = call_of(name, case_of(name))
    x = x.clone().requires_grad_()
    out = function(x)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True)
    assert grad.requires_grad, "else a penalty would count as 0"
    with pytest.raises(RuntimeError, match=NO_SECOND):
        (out.sum() + grad.square().sum()).backward()


@pytest.mark.parametrize("name", EVERY)
def test_hessian_and_hvp_raise(name):
    x, function = call_of(name, case_of(name))
    with pytest.raises(RuntimeError, match=NO_SECOND):
        hessian(lambda x: function(x).square().sum(), x)
    with pytest.raises(RuntimeError, match=NO_SECOND):
        hvp(lambda x: function(x).square().sum(), x, torch.ones_like(x))


@pytest.mark.parametrize("name", EVERY)
def test_create_graph_alone_is_no_error(name):
    """Who differentiates other parts of the graph again is left alone."""
    x, function = call_of(name, case_of(name))
    x, other = x.clone().requires_grad_(), torch.tensor(2.0, requires_grad=True)
    loss = function(x).sum() + other**3
    expected = torch.autograd.grad(function(x).sum(), x)[0]
    grad_x, grad_other = torch.autograd.grad(loss, (x, other), create_graph=True)
    torch.testing.assert_close(grad_x.detach(), expected)
    assert torch.autograd.grad(grad_other, other)[0] == 12


@pytest.mark.parametrize("name", EVERY)
def test_a_sink_of_one_per_head_has_two_shapes(name):
    case = case_of(name)
    results = []
    for shape in ((1, 4), (4,)):
        sink = case.sink.reshape(shape).clone().requires_grad_()
        case_for = case_of(name)
        case_for.sink = sink
        x, function = call_of(name, case_for)
        out = function(x)
        (dsink,) = torch.autograd.grad(out.sum(), sink)
        assert dsink.shape == sink.shape
        assert dsink.stride() == sink.stride(), "DDP warns of other strides"
        results.append((out.detach(), dsink.reshape(4)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "window_size",
    [
        [2, 0],
        torch.Size((2, 0)),
        torch.tensor([2, 0]),
        np.array([2, 0]),
        (np.int64(2), np.int32(0)),
        (torch.tensor(2), 0),
    ],
)
def test_a_window_of_any_kind_of_ints(window_size):
    case = make_case([7], [7], batch=1)
    expected = run(attention_with_sink, case, window_size=(2, 0))
    result = run(attention_with_sink, case, window_size=window_size)
    assert all(torch.equal(result[name], value) for name, value in expected.items())
    plan = make_cp_plan(7)
    q, k, v = (x[0] for x in (case.q, case.k, case.v))
    out = cp_attention_with_sink(q, k, v, case.sink, plan=plan, window_size=window_size)
    torch.testing.assert_close(out, expected["out"][0])


def test_none_is_unlimited_in_a_window():
    case = make_case([7], [7], batch=1)
    for given, meant in (((None, 0), (-1, 0)), ((None, None), (-1, -1)), ((3, None), (3, -1))):
        expected = run(attention_with_sink, case, window_size=meant)
        assert torch.equal(
            run(attention_with_sink, case, window_size=given)["out"], expected["out"]
        )


def test_a_window_of_128_keys_holds_the_querys_own():
    """gpt-oss: 128 keys are window_size=(127, 0)."""
    q, v = torch.zeros(1, 200, 1, 8), torch.eye(200).view(1, 200, 1, 200)
    out = attention_with_sink(q, q, v, causal=True, window_size=(127, 0))
    assert (out[0, 199, 0] > 0).sum() == 128


@pytest.mark.parametrize("name", ["fa4_func_with_sink", "fa4_varlen_func_with_sink"])
def test_negative_limits_of_flash_attention_4(name):
    """There -1 is a number of tokens; (-1, -1) alone is what everybody means by it."""
    x, function = call_of(name, case_of(name))
    case = case_of(name)
    arguments = {**pack(name, case.q, case.k, case.v), "sink": case.sink, **lengths(name, case)}
    fa4 = getattr(magi_sink_cp, name)
    for unlimited in ((None, None), (-1, -1)):
        assert torch.equal(fa4(**arguments, window_size=unlimited), function(x))
    with pytest.raises(ValueError, match=r"reads a negative limit .* write \(None, 0\)"):
        fa4(**arguments, window_size=(-1, 0))
    with pytest.raises(ValueError, match=r"write \(3, None\)"):
        fa4(**arguments, window_size=(3, -1))


def test_numpy_flags_and_floats():
    case = make_case([7], [7], batch=1)
    expected = run(attention_with_sink, case, causal=True, softmax_scale=0.5)
    options = {"causal": np.bool_(True), "softmax_scale": np.float32(0.5)}
    assert torch.equal(run(attention_with_sink, case, **options)["out"], expected["out"])
    plan = make_cp_plan(np.int64(7), cu_seqlens=np.array([0, 3, 7]))
    assert plan.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3]
    for offsets in (torch.tensor([0, 3, 7]), [0, np.int64(3), 7], (0, 3, 7)):
        assert make_cp_plan(7, cu_seqlens=offsets).documents == plan.documents


def test_autocast_unites_dtypes():
    """Rotary positions leave q and k in fp32 beside a v in bf16."""
    case = make_case([7], [7], batch=1)
    q, k, v = (x.bfloat16().requires_grad_() for x in (case.q, case.k, case.v))
    expected = attention_with_sink(q, k, v, case.sink)
    plan = make_cp_plan(7)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attention_with_sink(q.float(), k.float(), v, case.sink)
        local = cp_attention_with_sink(q[0].float(), k[0].float(), v[0], case.sink, plan=plan)
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, expected)
    assert local.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="q, k and v must have one dtype"):
        attention_with_sink(q.float(), k.float(), v, case.sink)


def test_positional_arguments_of_flash_attention_2():
    """dropout_p, softmax_scale, causal by position hit sink and sink_layout: the error says so."""
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(TypeError, match=r"sink must be .* got float \(0.0\).*pass the arguments"):
        magi_sink_cp.fa2_func_with_sink(q, q, q, 0.0, None, True)


def test_a_plan_is_of_this_process():
    plan = make_cp_plan(7)
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="a CPPlan cannot be pickled or copied"):
            attempt(plan)


def test_ambient_modes_do_not_reach_a_plan():
    case = make_case([9], [9])
    with torch.inference_mode():
        inferred = make_cp_plan(9, cu_seqlens=[0, 4, 9])
    with torch.device("meta"):
        on_meta = make_cp_plan(9, cu_seqlens=[0, 4, 9])
    torch.set_default_dtype(torch.float64)
    try:
        doubled = make_cp_plan(9, cu_seqlens=[0, 4, 9])
    finally:
        torch.set_default_dtype(torch.float32)
    for plan in (inferred, on_meta, doubled):
        assert plan.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]
        assert not plan.position_ids.is_inference()
        q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
        with torch.device("meta"):
            out = cp_attention_with_sink(q, k, v, case.sink, plan=plan)
        out.backward(case.dout)
        assert q.grad is not None


@pytest.fixture
def mesh():
    """A DeviceMesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("argument", ["q", "k", "v", "sink"])
def test_a_dtensor_is_refused_by_name(argument, mesh):
    case = make_case([7], [7], batch=1)
    tensors = {"q": case.q, "k": case.k, "v": case.v, "sink": case.sink}
    tensors[argument] = DTensor.from_local(tensors[argument], mesh)
    message = rf"{argument} must be a plain tensor, got a DTensor .* {argument}.to_local\(\)"
    with pytest.raises(TypeError, match=message):
        attention_with_sink(**tensors)
    local = {name: x[0] if name != "sink" else x for name, x in tensors.items()}
    with pytest.raises(TypeError, match=message):
        cp_attention_with_sink(**local, plan=make_cp_plan(7))
    with pytest.raises(TypeError, match="x must be a plain tensor"):
        make_cp_plan(7).shard(DTensor.from_local(case.q[0], mesh))


@pytest.mark.parametrize("wrong", [[1.0], 0.5, np.zeros((7, 2, 4)), "q"], ids=repr)
def test_what_is_no_tensor_is_refused_by_name(wrong):
    case = make_case([7], [7], batch=1)
    for name in ("q", "k", "v", "sink"):
        tensors = {"q": case.q, "k": case.k, "v": case.v, "sink": case.sink} | {name: wrong}
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor"):
            attention_with_sink(**tensors)
        local = {
            key: x[0] if isinstance(x, Tensor) and key != "sink" else x
            for key, x in tensors.items()
        }
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor"):
            cp_attention_with_sink(**local, plan=make_cp_plan(7))


def test_forward_mode_is_refused():
    """A tangent that an operator drops would be a derivative of 0."""
    case, plan = make_case([7], [7], batch=1), make_cp_plan(7)
    x = case.q[0]
    for function in (plan.shard, plan.unshard):
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            torch.func.jvp(lambda x, run=function: run(x).sum(), (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), FlopCounterMode(display=False):
        q = forward_ad.make_dual(case.q, torch.ones_like(case.q))
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            attention_with_sink(q, case.k, case.v, case.sink)
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            cp_attention_with_sink(q[0], case.k[0], case.v[0], case.sink, plan=plan)


def test_many_plans_that_are_let_go_before_backward():
    x = torch.arange(6.0).requires_grad_()
    sum(make_cp_plan(6).shard(x).sum() for _ in range(100)).backward()
    assert x.grad.tolist() == [100.0] * 6


def test_shard_of_channels_last_is_contiguous():
    x = torch.randn(2, 6, 3, 4).contiguous(memory_format=torch.channels_last)
    assert make_cp_plan(6).shard(x, 1).is_contiguous()


@pytest.mark.parametrize(
    ("dtype", "fill"), [(torch.int64, 0.5), (torch.bool, 5), (torch.uint8, -100)]
)
def test_fill_must_fit_the_dtype(dtype, fill):
    with pytest.raises(ValueError, match="fill must be a value that"):
        make_cp_plan(6).shard(torch.zeros(6, dtype=dtype), fill=fill)
    assert make_cp_plan(6).shard(torch.zeros(6, dtype=torch.int64), fill=np.int64(-100)).any() == 0


def test_flop_counts_leave_out_what_seqused_leaves_out():
    q, k, v = (torch.randn(10, 2, 4) for _ in "qkv")
    offsets = torch.tensor([0, 4, 10], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        magi_sink_cp.fa3_varlen_func_with_sink(
            q, k, v, offsets, offsets, 6, 6, seqused_q=[2, 3], seqused_k=[1, 2]
        )
    assert counter.get_total_flops() == 4 * (2 * 1 + 3 * 2) * 2 * 4


def test_flop_counts():
    """4·pairs·h·d forward, 2.5 times that backward; masks and documents as they are."""

    def count(function, *leaves) -> int:
        with FlopCounterMode(display=False) as counter:
            function(*(x.clone().requires_grad_() for x in leaves)).sum().backward()
        return counter.get_total_flops()

    dense = make_case([8], [8], batch=2)
    tensors = dense.q, dense.k, dense.v
    per_pair = 4 * 4 * 16 * 7 // 2  # heads, head_dim, forward and backward
    for options, pairs in (({}, 64), ({"causal": True}, 36), ({"window_size": (2, 0)}, 21)):
        flops = count(lambda *x, o=options: attention_with_sink(*x, dense.sink, **o), *tensors)
        assert flops == 2 * pairs * per_pair
    packed = make_case([5, 3], [5, 3])
    offsets = torch.tensor([0, 5, 8], dtype=torch.int32)
    cu_seqlens = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    tensors = packed.q, packed.k, packed.v
    flops = count(lambda *x: attention_with_sink(*x, causal=True, **cu_seqlens), *tensors)
    assert flops == (15 + 6) * per_pair
    plan = make_cp_plan(8, cu_seqlens=[0, 5, 8])
    flops = count(lambda *x: cp_attention_with_sink(*x, plan=plan), *tensors)
    assert flops == (15 + 6) * per_pair


def test_labels_are_padded_with_what_is_asked_for():
    plan = make_cp_plan(5)
    with pytest.raises(TypeError, match="fill must be a number, got '-100'"):
        plan.shard(torch.zeros(5), fill="-100")
    with pytest.raises(ValueError, match="fill must be 0 for a tensor that requires a gradient"):
        plan.shard(torch.zeros(5, requires_grad=True), fill=-100)


# --- Rows that do not exist ---------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["fa3_varlen_func_with_sink", "fa4_varlen_func_with_sink"])
@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
def test_whatever_stands_behind_seqused_reaches_nothing(name, sink_layout, bad):
    lengths_of = [6, 4, 5]
    used_q = torch.tensor([4, 0, 5], dtype=torch.int32)
    used_k = torch.tensor([3, 4, 5], dtype=torch.int32)
    clean = make_case(lengths_of, lengths_of, with_dlse=True, sink_layout=sink_layout, causal=True)
    starts = clean.cu_seqlens_q[:-1]
    rows = [r for s, n, u in zip(starts, lengths_of, used_q.tolist(), strict=True)
            for r in range(s + u, s + n)]  # fmt: skip
    keys = [r for s, n, u in zip(starts, lengths_of, used_k.tolist(), strict=True)
            for r in range(s + u, s + n)]  # fmt: skip
    results = []
    for value in (0.0, bad):
        case = copy.deepcopy(clean)
        for x in (case.q, case.dout):
            x[rows] = value
        for x in (case.k, case.v):
            x[keys] = value
        case.dlse[:, rows] = value
        if sink_layout == "ssh":
            case.sink[rows] = value
        results.append(run_varlen(getattr(magi_sink_cp, name), case, used_q=used_q, used_k=used_k))
    kept = [r for r in range(15) if r not in rows]
    for key, value in results[0].items():
        other = results[1][key]
        if key == "lse" and sink_layout == "ssh":  # a row's lse is its own sink's
            value, other = value[:, kept], other[:, kept]
        assert torch.equal(value, other), key
        assert value.isfinite().all(), key


def run_varlen(function, case, used_q, used_k):
    offsets = torch.tensor(case.cu_seqlens_q, dtype=torch.int32)
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.sink)]
    out, lse = function(
        *leaves[:3], offsets, offsets, 6, 6, leaves[3], case.sink_layout,
        seqused_q=used_q, seqused_k=used_k, causal=True, return_attn_probs=True,
    )  # fmt: skip
    grads = torch.autograd.grad((out, lse), leaves, (case.dout, case.dlse))
    names = ("out", "lse", "dq", "dk", "dv", "dsink")
    return dict(zip(names, (out.detach(), lse.detach(), *grads), strict=True))


# --- magi_attn_extensions -----------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """compat.install() for one test."""
    finders = list(sys.meta_path)
    for name in [name for name in sys.modules if name.startswith("magi_attn_extensions")]:
        monkeypatch.delitem(sys.modules, name)
    compat.install()
    yield
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.startswith("magi_attn_extensions")]:
        del sys.modules[name]


@pytest.mark.parametrize("family", ["fa2", "fa3", "fa4"])
def test_the_extensions_modules_as_they_exist_upstream(installed, family):
    module = importlib.import_module(f"magi_attn_extensions.{family}_interface_with_sink")
    expected = {name for name in FUNCTIONS if name.startswith(family)}
    assert set(module.__all__) == expected
    for name in expected:
        assert getattr(module, name) is getattr(magi_sink_cp, name)
    assert importlib.reload(module) is module
    package = importlib.import_module("magi_attn_extensions")
    assert getattr(package, f"{family}_interface_with_sink") is module  # without its import
    assert importlib.reload(package) is package
    assert importlib.util.find_spec("magi_attn_extensions").origin is None
    with pytest.raises(ModuleNotFoundError, match="dsa_interface"):
        importlib.import_module("magi_attn_extensions.dsa_interface")


@pytest.mark.parametrize("is_imported", [False, True])
def test_an_empty_folder_of_that_name_is_not_the_real_one(monkeypatch, tmp_path, is_imported):
    (tmp_path / "magi_attn_extensions").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    monkeypatch.delitem(sys.modules, "magi_attn_extensions", raising=False)
    if is_imported:
        importlib.import_module("magi_attn_extensions")
    compat.install()
    try:
        assert importlib.import_module("magi_attn_extensions").fa3_func_with_sink
    finally:
        sys.meta_path[:] = finders
        for name in [name for name in sys.modules if name.startswith("magi_attn_extensions")]:
            del sys.modules[name]


def test_pytorchs_flash_kernels_and_tiles_agree():
    """The cpu backend takes either; both are exact, with and without a gradient of lse."""
    for with_dlse in (False, True):  # tiles, where a gradient of lse is asked for
        for causal in (False, True):
            case = make_case([70], [70], batch=2, causal=causal, with_dlse=with_dlse)
            assert_close(run(attention_with_sink, case), truth(case), 1e-5)
