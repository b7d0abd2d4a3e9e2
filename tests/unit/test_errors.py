"""Every wrong argument raises before any kernel runs, naming the argument, what came and what is
allowed.
"""

from __future__ import annotations

import pytest
import torch

from magi_sink_cp import SinkAttention, attention_with_sink, cp_attention_with_sink, make_cp_plan
from magi_sink_cp.kernels.backends import registry


@pytest.fixture(autouse=True)
def no_kernel_runs(monkeypatch):
    def forbidden(*_):
        raise AssertionError("a kernel ran on invalid input")

    monkeypatch.setattr(registry.CpuBackend, "_forward", forbidden)


def tensors(*shapes, dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for shape in shapes]


Q, K = (2, 6, 4, 8), (2, 5, 2, 8)
INT32 = torch.int32

DENSE = [
    (
        {"q": torch.randn(6, 4, 8)},
        ValueError,
        r"q must have 4 dimensions \(batch, seqlen, heads, head_dim\), got shape \(6, 4, 8\)",
    ),
    ({"k": torch.randn(5, 2, 8)}, ValueError, r"k must have 4 dimensions .* got shape \(5, 2, 8\)"),
    ({"q": [1.0]}, TypeError, "q must be a torch.Tensor, got list"),
    (
        {"q": torch.ones(Q, dtype=torch.int64)},
        TypeError,
        "q must have a dtype of torch.float16, .* got torch.int64",
    ),
    (
        {"k": torch.randn(K).bfloat16()},
        TypeError,
        "one dtype, got q torch.float32 and k torch.bfloat16",
    ),
    ({"v": torch.randn(K, device="meta")}, ValueError, "one device, got q on cpu and v on meta"),
    (
        {"v": torch.randn(2, 4, 2, 8)},
        ValueError,
        r"k and v must have one shape, got k \(2, 5, 2, 8\) and v \(2, 4, 2, 8\)",
    ),
    (
        {"k": torch.randn(2, 5, 2, 6), "v": torch.randn(2, 5, 2, 6)},
        ValueError,
        "one head_dim .* got q 8, k 6 and v 6",
    ),
    (
        {"k": torch.randn(2, 5, 3, 8), "v": torch.randn(2, 5, 3, 8)},
        ValueError,
        "must divide the heads of q .* got q 4 and k 3",
    ),
    (
        {"k": torch.randn(1, 5, 2, 8), "v": torch.randn(1, 5, 2, 8)},
        ValueError,
        "one batch size, got q 2 and k 1",
    ),
    ({"sink": torch.randn(3)}, ValueError, r"shape \(s_sink >= 1, 4\) or \(4,\) .* got \(3,\)"),
    ({"sink": torch.randn(0, 4)}, ValueError, r"shape \(s_sink >= 1, 4\) .* got \(0, 4\)"),
    ({"sink": torch.randn(1, 3)}, ValueError, r"got \(1, 3\)"),
    ({"sink": torch.randn(2, 6, 1, 4)}, ValueError, r"sink_layout='sh' must have shape"),
    (
        {"sink": torch.randn(1, 4), "sink_layout": "ssh"},
        ValueError,
        r"sink_layout='ssh' must have shape \(2, 6, s_sink >= 1, 4\)",
    ),
    ({"sink": torch.randn(2, 5, 1, 4), "sink_layout": "ssh"}, ValueError, r"got \(2, 5, 1, 4\)"),
    (
        {"sink": torch.randn(1, 4), "sink_layout": "hs"},
        ValueError,
        r"sink_layout must be one of \('sh', 'ssh'\), got 'hs'",
    ),
    (
        {"sink": torch.ones(1, 4, dtype=torch.int32)},
        TypeError,
        "sink must have a dtype of .* got torch.int32",
    ),
    (
        {"sink": torch.randn(1, 4).double()},
        TypeError,
        "sink must have a dtype of .* got torch.float64",
    ),
    (
        {"sink": torch.randn(1, 4, device="meta")},
        ValueError,
        r"sink must be on the device of q \(cpu\), got meta",
    ),
    ({"sink": 0.5}, TypeError, "sink must be a torch.Tensor or None, got float"),
    (
        {"sink": torch.zeros(1, 4).to_sparse()},
        ValueError,
        r"sink must be dense \(torch.strided\), got torch.sparse_coo",
    ),
    (
        {"backend": "fa9"},
        ValueError,
        r"backend must be 'auto' or one of \['fa3', .*'aten', 'ffa', 'cpu'\], got 'fa9'",
    ),
    ({"window_size": (1,)}, ValueError, r"window_size must be two ints .* got \(1,\)"),
    ({"window_size": (-2, 0)}, ValueError, r"window_size must be two ints .* got \(-2, 0\)"),
    ({"window_size": 128}, ValueError, "window_size must be two ints .* got 128"),
    ({"softmax_scale": 0.0}, ValueError, "softmax_scale must be finite and > 0, got 0.0"),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite and > 0, got nan"),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a float, got '1'"),
    ({"softmax_scale": True}, TypeError, "softmax_scale must be a float, got True"),
    ({"softmax_scale": 10**400}, ValueError, "softmax_scale must be finite and > 0, got 1000"),
    (
        {"window_size": (2**31, 0)},
        ValueError,
        r"window_size must be two ints .* got \(2147483648, 0\)",
    ),
    (
        {"window_size": (True, False)},
        ValueError,
        r"window_size must be two ints .* got \(True, False\)",
    ),
    ({"softcap": -1.0}, ValueError, "softcap must be finite and >= 0, got -1.0"),
    ({"causal": "yes"}, TypeError, "causal must be a bool, got 'yes'"),
    (
        {"max_seqlen_q": 5},
        ValueError,
        "max_seqlen_q belongs to cu_seqlens_q and cu_seqlens_k, which are not given",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), DENSE)
def test_dense(change, error, message):
    arguments = dict(zip("qkv", tensors(Q, K, K), strict=True)) | change
    with pytest.raises(error, match=message):
        attention_with_sink(**arguments)


def cu(*values, dtype=INT32):
    return torch.tensor(values, dtype=dtype)


PACKED = [
    ({"cu_seqlens_q": cu(1, 6)}, ValueError, r"cu_seqlens_q must start at 0, got \[1, 6\]"),
    (
        {"cu_seqlens_q": cu(0, 4, 3, 6), "cu_seqlens_k": cu(0, 1, 2, 5)},
        ValueError,
        "cu_seqlens_q must not fall, but entry 2 is 3 after 4",
    ),
    (
        {"cu_seqlens_q": cu(0, 5)},
        ValueError,
        "cu_seqlens_q must end at the number of tokens, 6, got 5",
    ),
    (
        {"cu_seqlens_k": cu(0, 6)},
        ValueError,
        "cu_seqlens_k must end at the number of tokens, 5, got 6",
    ),
    ({"cu_seqlens_k": cu(0, 2, 5)}, ValueError, "same number of documents, got 1 and 2"),
    ({"cu_seqlens_k": None}, ValueError, "must be given together, and cu_seqlens_k is None"),
    (
        {"cu_seqlens_q": cu(0, 6, dtype=torch.int16)},
        TypeError,
        "cu_seqlens_q must have dtype torch.int32 or torch.int64, got torch.int16",
    ),
    (
        {"cu_seqlens_q": {0, 6}},
        TypeError,
        "cu_seqlens_q must be an int32 or int64 tensor, a NumPy array or a",
    ),
    (
        {"cu_seqlens_q": cu(0, 6)[None]},
        ValueError,
        r"cu_seqlens_q must have shape \(documents \+ 1,\), got \(1, 2\)",
    ),
    (
        {"cu_seqlens_q": cu()},
        ValueError,
        r"cu_seqlens_q must have shape \(documents \+ 1,\), got \(0,\)",
    ),
    ({"cu_seqlens_q": cu(0, 9, 6, 9)[::2]}, ValueError, "cu_seqlens_q must be contiguous"),
    (
        {"cu_seqlens_q": torch.empty(2, dtype=INT32, device="meta")},
        ValueError,
        r"cu_seqlens_q must be on the device of q \(cpu\), got meta",
    ),
    (
        {"max_seqlen_q": 5},
        ValueError,
        "max_seqlen_q must be an int >= 6, the longest document of cu_seqlens_q, got 5",
    ),
    (
        {"q": torch.randn(1, 6, 4, 8)},
        ValueError,
        r"q must have 3 dimensions \(total, heads, head_dim\), as cu_seqlens are given",
    ),
    (
        {"sink": torch.randn(5, 1, 4), "sink_layout": "ssh"},
        ValueError,
        r"shape \(6, s_sink >= 1, 4\) .* got \(5, 1, 4\)",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), PACKED)
def test_packed(change, error, message):
    arguments = dict(zip("qkv", tensors((6, 4, 8), (5, 2, 8), (5, 2, 8)), strict=True))
    arguments |= {"cu_seqlens_q": cu(0, 6), "cu_seqlens_k": cu(0, 5)} | change
    with pytest.raises(error, match=message):
        attention_with_sink(**arguments)


def test_a_changed_cu_seqlens_is_checked_again():
    q, k = tensors((6, 4, 8), (6, 2, 8))
    offsets = cu(0, 6)
    for end, message in ((5, "got 5"), (7, "got 7")):
        offsets[1] = end
        with pytest.raises(ValueError, match=message):
            attention_with_sink(q, k, k, cu_seqlens_q=offsets, cu_seqlens_k=offsets)


PLAN = [
    ({"total_tokens": 2.0}, TypeError, "total_tokens must be an int, got 2.0"),
    ({"total_tokens": -1}, ValueError, "total_tokens must be >= 0, got -1"),
    (
        {"layout": ["zigzag"]},
        ValueError,
        r"layout must be one of .*'zigzag_documents'\], got \['zigzag'\]",
    ),
    (
        {"transport": "rdma"},
        ValueError,
        r"transport must be one of \('auto', 'nccl', 'gloo', 'symm_mem'\), got 'rdma'",
    ),
    (
        {"layout": "striped"},
        ValueError,
        r"layout must be one of .*'zigzag_documents'\], got 'striped'",
    ),
    (
        {"cu_seqlens": cu(0, 9)},
        ValueError,
        "cu_seqlens must end at the number of tokens, 10, got 9",
    ),
    (
        {"cu_seqlens": [0, 7, 5, 10]},
        ValueError,
        "cu_seqlens must not fall, but entry 2 is 5 after 7",
    ),
    ({"cu_seqlens": [1, 10]}, ValueError, r"cu_seqlens must start at 0, got \[1, 10\]"),
    (
        {"cu_seqlens": 10},
        TypeError,
        "cu_seqlens must be an int32 or int64 tensor, a NumPy array, a sequence of ints or None",
    ),
    ({"cu_seqlens": [0, 6.0, 10]}, TypeError, "cu_seqlens must hold ints, got 6.0 at entry 1"),
    ({"cu_seqlens": [False, 10]}, TypeError, "cu_seqlens must hold ints, got False at entry 0"),
    (
        {"cu_seqlens": cu(0, 10, dtype=torch.int16)},
        TypeError,
        "cu_seqlens must have dtype torch.int32",
    ),
    (
        {"group": "world"},
        TypeError,
        "group must be a ProcessGroup, a 1-D DeviceMesh or None, got str",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), PLAN)
def test_make_cp_plan(change, error, message):
    with pytest.raises(error, match=message):
        make_cp_plan(**({"total_tokens": 10} | change))


CP = [
    ({"plan": None}, TypeError, "plan must come from make_cp_plan, got NoneType"),
    (
        {"q": torch.randn(9, 4, 8)},
        ValueError,
        r"q must have the plan's local_tokens, 10, as its tokens, got \(9, 4, 8\)",
    ),
    (
        {"k": torch.randn(9, 2, 8), "v": torch.randn(9, 2, 8)},
        ValueError,
        r"k must have the plan's local_tokens, 10",
    ),
    ({"overlap_degree": -1}, ValueError, r"overlap_degree must be an int >= 0 or 'auto', got -1"),
    (
        {"overlap_degree": "all"},
        ValueError,
        r"overlap_degree must be an int >= 0 or 'auto', got 'all'",
    ),
    (
        {"overlap_degree": True},
        ValueError,
        r"overlap_degree must be an int >= 0 or 'auto', got True",
    ),
    (
        {"grad_reduce_dtype": torch.float16},
        ValueError,
        r"grad_reduce_dtype must be torch.float32 or the dtype of k, torch.float32, got",
    ),
    ({"checks": "never"}, ValueError, r"checks must be one of \('auto', 'always'\), got 'never'"),
    (
        {"q": torch.randn(10, 4)},
        ValueError,
        r"q must have 3 dimensions \(plan.local_tokens, heads, head_dim\) or \(batch, plan",
    ),
    (
        {"q": torch.randn(1, 10, 4, 8)},
        ValueError,
        r"k must have 4 dimensions \(batch, plan.local_tokens, heads, head_dim\)",
    ),
    (
        {"sink": torch.randn(9, 1, 4), "sink_layout": "ssh"},
        ValueError,
        r"shape \(10, s_sink >= 1, 4\)",
    ),
    (
        {"dsink_reduce": "max"},
        ValueError,
        r"dsink_reduce must be one of \('none', 'sum', 'avg'\), got 'max'",
    ),
    (
        {"sink": torch.randn(10, 1, 4), "sink_layout": "ssh", "dsink_reduce": "sum"},
        ValueError,
        "dsink_reduce='sum' is for sink_layout='sh'",
    ),
    (
        {"dsink_reduce": "sum"},
        ValueError,
        "dsink_reduce='sum' reduces the gradient of a sink, and sink is None",
    ),
    ({"window_size": (4, 0, 0)}, ValueError, r"window_size must be two ints .* got \(4, 0, 0\)"),
    ({"backend": "nope"}, ValueError, "backend must be 'auto' or one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), CP)
def test_cp_attention_with_sink(change, error, message):
    arguments = dict(zip("qkv", tensors((10, 4, 8), (10, 2, 8), (10, 2, 8)), strict=True))
    with pytest.raises(error, match=message):
        cp_attention_with_sink(
            **(arguments | {"plan": make_cp_plan(10, cu_seqlens=cu(0, 10))} | change)
        )


def test_plan_shard():
    plan = make_cp_plan(9, cu_seqlens=cu(0, 9))
    with pytest.raises(
        ValueError, match=r"x must have the plan's total_tokens, 9, along dim 0, got shape \(8,\)"
    ):
        plan.shard(torch.zeros(8))
    with pytest.raises(
        ValueError,
        match=r"x must have the plan's local_tokens, 9, along dim 1, got shape \(9, 10\)",
    ):
        plan.unshard(torch.zeros(9, 10), dim=1)
    for dim in (1, "s"):
        with pytest.raises(ValueError, match=f"dim must be a dimension of x, .* got {dim!r}"):
            plan.shard(torch.zeros(9), dim=dim)
    with pytest.raises(
        ValueError, match=r"x must be dense \(torch.strided\), got torch.sparse_coo"
    ):
        plan.shard(torch.zeros(9).to_sparse())
    with pytest.raises(TypeError, match="x must be a torch.Tensor, got list"):
        plan.shard([1])


def test_sink_attention():
    with pytest.raises(ValueError, match="num_sinks must be an int >= 1, got 0"):
        SinkAttention(4, 0)
    for wrong in (2.5, True):
        with pytest.raises(ValueError, match=f"num_heads must be an int >= 1, got {wrong}"):
            SinkAttention(wrong)
    with pytest.raises(ValueError, match="window_size must be two ints"):
        SinkAttention(4, window_size=(-5, 0))
    with pytest.raises(ValueError, match="dsink_reduce must be one of"):
        SinkAttention(4, dsink_reduce="mean")
    with pytest.raises(ValueError, match="init_std must be finite and >= 0, got -1"):
        SinkAttention(4, init_std=-1)
    with pytest.raises(TypeError, match="init_std must be a float, got '0.02'"):
        SinkAttention(4, init_std="0.02")
    for dtype in (torch.int32, torch.complex64, "float32"):
        with pytest.raises(
            TypeError, match=rf"dtype must be one of \(None, torch.float16, .* got {dtype!r}"
        ):
            SinkAttention(4, dtype=dtype)
    plan = make_cp_plan(6, cu_seqlens=cu(0, 6))
    q, k = tensors((6, 4, 8), (6, 2, 8))
    with pytest.raises(
        ValueError, match="plan already holds the documents; got cu_seqlens_q beside it"
    ):
        SinkAttention(4)(q, k, k, plan=plan, cu_seqlens_q=cu(0, 6))
