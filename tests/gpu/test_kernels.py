"""One GPU: attention_with_sink on fa3 and aten against the fp64 reference.

Its error is at most twice that of the plain kernel.
"""

from __future__ import annotations

import pytest
import torch

from magi_sink_cp import attention_with_sink, backends
from magi_sink_cp.kernels.backends.registry import BackendPolicy, select_backend
from magi_sink_cp.kernels.checks import make_params
from magi_sink_cp.kernels.dsink import sink_gradient
from magi_sink_cp.kernels.merge import merge, merge_torch
from magi_sink_cp.kernels.protocol import KernelRequest, Partial, RowDelta, Varlen
from tests.support.cases import Case, assert_within_plain, errors, make_case, run, truth

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["fa3", "aten"])
def backend(request) -> str:
    reasons = {info.name: info.reason for info in backends()}
    if reasons[request.param]:
        pytest.skip(f"backend {request.param} is not available here: {reasons[request.param]}")
    return request.param


def without_sink(case: Case) -> Case:
    return Case(**{**vars(case), "sink": None})


def run_on(case: Case, backend: str) -> dict[str, torch.Tensor]:
    offsets = {}
    if case.q.dim() == 3:
        for name, values in (
            ("cu_seqlens_q", case.cu_seqlens_q),
            ("cu_seqlens_k", case.cu_seqlens_k),
        ):
            offsets[name] = torch.tensor(values, dtype=torch.int32, device=case.q.device)
    return run(attention_with_sink, case, backend=backend, **offsets)


def plain_errors(case: Case, backend: str) -> dict[str, float]:
    plain_case = Case(**{**vars(without_sink(case)), "dlse": None})
    return errors(run_on(plain_case, backend), truth(plain_case))


def check(case: Case, backend: str) -> None:
    assert_within_plain(run_on(case, backend), truth(case), plain_errors(case, backend))


MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (37, 21)},
    "causal window": {"causal": True, "window_size": (64, 0)},
    "left window": {"window_size": (50, -1)},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_dense(backend, mask, sink_layout, head_dim, dtype):
    case = make_case(
        [300],
        [430],
        batch=2,
        heads=8,
        heads_kv=2,
        head_dim=head_dim,
        s_sink=2,
        sink_layout=sink_layout,
        dtype=dtype,
        device="cuda",
        **mask,
    )
    check(case, backend)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads_kv", [1, 8])
def test_packed(backend, mask, sink_layout, head_dim, heads_kv):
    case = make_case(
        [200, 1, 0, 77, 130, 3],
        [200, 1, 5, 77, 0, 64],
        heads=8,
        heads_kv=heads_kv,
        head_dim=head_dim,
        s_sink=3,
        sink_layout=sink_layout,
        dtype=torch.bfloat16,
        device="cuda",
        **mask,
    )
    check(case, backend)


@pytest.mark.parametrize("head_dim", [8, 32, 72, 96, 160, 192, 256])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_head_dims(backend, head_dim, packed, causal):
    lengths = (
        {"lengths_q": [90, 200], "lengths_k": [90, 200]}
        if packed
        else {"lengths_q": [290], "lengths_k": [290], "batch": 1}
    )
    check(
        make_case(
            **lengths,
            heads=4,
            heads_kv=2,
            head_dim=head_dim,
            dtype=torch.bfloat16,
            device="cuda",
            causal=causal,
        ),
        backend,
    )


@pytest.mark.parametrize("sizes", [(257, 64), (64, 257), (1, 1), (1, 300), (300, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_and_rows_without_a_key(backend, sizes, causal):
    case = make_case(
        [sizes[0]],
        [sizes[1]],
        batch=1,
        heads=4,
        heads_kv=4,
        head_dim=64,
        dtype=torch.bfloat16,
        device="cuda",
        causal=causal,
    )
    # A row that sees one key is exact without a sink (out = v, dq = 0) and is not with one, so the
    # bound is the error on 64 keys. There, dP - delta does not average over keys what delta has
    # from out's two roundings: √2.
    usual = make_case(
        [64],
        [64],
        batch=1,
        heads=4,
        heads_kv=4,
        head_dim=64,
        dtype=torch.bfloat16,
        device="cuda",
        causal=causal,
    )
    plain, usual_plain = plain_errors(case, backend), plain_errors(usual, backend)
    bound = {name: max(plain[name], usual_plain[name]) for name in plain}
    assert_within_plain(run_on(case, backend), truth(case), bound, factor=2 * 2**0.5)


@pytest.mark.parametrize("value", [-1e4, float("-inf"), -30.0, 100.0])
def test_extreme_sinks(backend, value):
    case = make_case(
        [128],
        [128],
        batch=1,
        heads=4,
        heads_kv=2,
        head_dim=64,
        s_sink=2,
        dtype=torch.bfloat16,
        device="cuda",
        causal=True,
    )
    case.sink[:, 0] = value
    case.sink[1, 1] = value
    check(case, backend)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
def test_gradient_of_lse(backend, packed, sink_layout):
    lengths = (
        {"lengths_q": [90, 200], "lengths_k": [90, 200]}
        if packed
        else {"lengths_q": [290], "lengths_k": [290], "batch": 2}
    )
    case = make_case(
        **lengths,
        sink_layout=sink_layout,
        head_dim=64,
        dtype=torch.bfloat16,
        device="cuda",
        causal=True,
        with_dlse=True,
    )
    check(case, backend)


@pytest.mark.parametrize("size", [1e-9, 1e-5, 1e5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_of_lse_of_any_size(backend, size, dtype):
    """A z-loss over many tokens sends 1e-9 into lse, which fp16 cannot hold.

    dq and dk are right where their dtype can hold them.
    """
    case = make_case([90], [90], batch=1, head_dim=64, dtype=dtype, device="cuda", with_dlse=True)
    case.dout = torch.zeros_like(case.dout)
    case.dlse = case.dlse * size
    result, expected = run_on(case, backend), truth(case)
    for name in ("dq", "dk"):
        true = expected.values[name]
        if true.abs().max() < torch.finfo(dtype).max:  # where the result can be held at all
            allowed = (
                2 * torch.finfo(dtype).eps * true.norm()
                + torch.finfo(dtype).smallest_normal * true.numel() ** 0.5
            )
            assert (result[name].double() - true).norm() <= allowed, name


def test_documents_of_one_row_and_of_none(backend):
    """Full mask, grouped heads, max_seqlen_q = 1.

    A kernel that packs the heads of one row must not count the empty document.
    """
    check(
        make_case(
            [1, 0, 1],
            [70, 5, 64],
            heads=8,
            heads_kv=2,
            head_dim=64,
            dtype=torch.bfloat16,
            device="cuda",
        ),
        backend,
    )


@pytest.mark.gpu(count=2)
def test_tensors_on_another_than_the_current_gpu(backend):
    case = make_case(
        [100], [100], batch=1, head_dim=64, dtype=torch.bfloat16, device="cuda:1", causal=True
    )
    assert torch.cuda.current_device() == 0
    check(case, backend)


def test_views_that_are_not_aligned(backend):
    base = torch.randn(1, 50, 2, 100, device="cuda", dtype=torch.bfloat16)
    view = base[..., 3:67]
    sink = torch.randn(1, 2, device="cuda")
    expected = attention_with_sink(*(view.contiguous() for _ in range(3)), sink, backend=backend)
    assert torch.equal(attention_with_sink(view, view, view, sink, backend=backend), expected)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("lengths", [[200, 1, 0, 77, 130, 3], [1], [64, 64], [500]])
def test_fa3_hands_over_delta(head_dim, mask, lengths):
    """The padding of varlen softmax_d is what RowDelta says.

    The dsink from it has the digits of dsink from out and dout in fp64.
    """
    case = make_case(
        lengths,
        lengths,
        heads=4,
        heads_kv=2,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        device="cuda",
    )
    params = make_params(
        case.q.shape[-1],
        None,
        mask.get("causal", False),
        mask.get("window_size", (-1, -1)),
        0.0,
        False,
    )
    cu_seqlens = torch.tensor(case.cu_seqlens_q, dtype=torch.int32, device="cuda")
    varlen = Varlen(cu_seqlens, cu_seqlens, max(lengths), max(lengths))
    call = KernelRequest(params, varlen)
    fa3 = select_backend(BackendPolicy("fa3"), case.q, call)
    out, lse = merge([fa3.forward(case.q, case.k, case.v, call)], case.sink)
    delta = fa3.backward(case.dout, case.q, case.k, case.v, Partial(out, lse), call).delta
    assert delta is not None, "softmax_d has a padding that backward_block does not know"
    assert delta.block > 0
    from_delta = sink_gradient(case.sink, lse, delta)
    from_out = sink_gradient(case.sink, lse, None, out, case.dout)
    exact = -(
        torch.exp(case.sink.double()[:, :, None] - lse.double())
        * (out.double() * case.dout.double()).sum(-1).T
    ).sum(-1)
    for result in (from_delta, from_out):
        torch.testing.assert_close(
            result.double(), exact, rtol=2e-5, atol=2e-5 * exact.abs().max().item()
        )


@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
def test_merge_kernel_equals_its_twin(sink_layout, dense, head_dim):
    torch.manual_seed(0)
    leading, rows, heads = ((2,) if dense else ()), 301, 6
    partials = []
    for start, count, dtype in (
        (0, 301, torch.float32),
        (50, 251, torch.bfloat16),
        (7, 100, torch.float16),
        (0, 301, torch.bfloat16),
    ):
        out = torch.randn(*leading, count, heads, head_dim, device="cuda").to(dtype)
        lse = torch.randn(*leading, heads, count, device="cuda") * 5
        lse[..., ::7] = float("-inf")
        partials.append(Partial(out, lse, start))
    shape = (3, heads) if sink_layout == "sh" else (*leading, rows, 3, heads)
    sink = torch.randn(shape, device="cuda") * 5
    for count in range(1, 5):
        expected = (
            torch.empty(*leading, rows, heads, head_dim, device="cuda"),
            torch.empty(*leading, heads, rows, device="cuda"),
        )
        merge_torch(partials[:count], sink, *expected)
        target = torch.full_like(expected[0], float("nan"))
        result = merge(partials[:count], sink, out=target)
        torch.testing.assert_close(result[0], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result[1], expected[1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
def test_gradients_that_autograd_expanded(backend, sink_layout):
    """sum().backward() sends expanded gradients, all strides 0, into out and lse."""
    case = make_case(
        [70],
        [70],
        batch=2,
        head_dim=64,
        sink_layout=sink_layout,
        dtype=torch.bfloat16,
        device="cuda",
        with_dlse=True,
    )
    case.dout, case.dlse = torch.ones_like(case.dout), torch.ones_like(case.dlse)
    expected = run_on(case, backend)
    case.dout = torch.ones((), dtype=torch.bfloat16, device="cuda").expand_as(case.dout)
    case.dlse = torch.ones((), device="cuda").expand_as(case.dlse)
    for name, value in run_on(case, backend).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-3)


def test_deterministic_backward(backend):
    case = make_case(
        [2000],
        [2000],
        batch=2,
        heads=8,
        heads_kv=2,
        head_dim=128,
        dtype=torch.bfloat16,
        device="cuda",
        causal=True,
    )
    runs = [run(attention_with_sink, case, backend=backend, deterministic=True) for _ in range(3)]
    for other in runs[1:]:
        for name, value in other.items():
            assert torch.equal(value, runs[0][name]), f"{name} differs between runs"


def test_dsink_is_deterministic_and_keeps_its_digits_over_64k_rows():
    torch.manual_seed(0)
    rows, heads, head_dim = 65536, 8, 128
    out, dout = (torch.randn(rows, heads, head_dim, device="cuda").bfloat16() for _ in range(2))
    lse, sink = torch.randn(heads, rows, device="cuda") + 3, torch.randn(2, heads, device="cuda")
    per_row = (out.double() * dout.double()).sum(-1).T
    exact = -(torch.exp(sink.double()[:, :, None] - lse.double()) * per_row).sum(-1)
    delta = RowDelta(per_row.float().contiguous(), rows)
    for arguments in ((delta,), (None, out, dout)):
        results = [sink_gradient(sink, lse, *arguments) for _ in range(3)]
        assert all(torch.equal(results[0], other) for other in results[1:])
        assert ((results[0] - exact).norm() / exact.norm()).item() < 2e-6


def test_large_offsets():
    """More than 2^31 elements of out: the kernels' indices are 64-bit."""
    rows, heads, head_dim = 2**18 + 64, 64, 128
    out = torch.ones(rows, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    lse = torch.zeros(heads, rows, device="cuda")
    merged, merged_lse = merge([Partial(out, lse)], torch.zeros(1, heads, device="cuda"))
    assert merged.data_ptr() == out.data_ptr()
    assert (merged[-1] == 0.5).all()
    assert (merged[::4096] == 0.5).all()
    torch.testing.assert_close(merged_lse[:, -1], torch.full((heads,), 2.0, device="cuda").log())
    dsink = sink_gradient(torch.zeros(1, heads, device="cuda"), merged_lse, None, merged, merged)
    torch.testing.assert_close(
        dsink, torch.full((1, heads), -rows * head_dim * 0.25 * 0.5, device="cuda")
    )


def test_softcap_is_named_as_what_a_build_lacks(backend):
    case = make_case(
        [32], [32], batch=1, head_dim=64, dtype=torch.bfloat16, device="cuda", softcap=5.0
    )
    plain = KernelRequest(make_params(case.q.shape[-1], None, False, (-1, -1), 0.0, False))
    lacks_softcap = backend == "aten" or (
        backend == "fa3"
        and "xformers" in select_backend(BackendPolicy("fa3"), case.q, plain).describe()
    )
    if lacks_softcap:
        with pytest.raises(ValueError, match="softcap"):
            attention_with_sink(case.q, case.k, case.v, backend=backend, softcap=5.0)
    else:
        check(case, backend)


def test_non_contiguous_inputs(backend):
    packed = torch.randn(2, 100, 3, 8, 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = packed.unbind(2)
    sink = torch.randn(1, 8, device="cuda")
    expected = attention_with_sink(
        q.contiguous(), k.contiguous(), v.contiguous(), sink, backend=backend
    )
    assert torch.equal(attention_with_sink(q, k, v, sink, backend=backend), expected)
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(attention_with_sink(transposed, k, v, sink, backend=backend), expected)
    strided = torch.empty(2, 100, 8, 128, device="cuda", dtype=torch.bfloat16)[..., ::2].copy_(q)
    assert torch.equal(attention_with_sink(strided, k, v, sink, backend=backend), expected)
