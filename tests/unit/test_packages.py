"""The fa2, fa3 and fa4 backends over stand-ins for the packages, which compute with the cpu backend
and take no other arguments.

What the packages' functions are called, take and return is written here as their files have it
(flash_attn 2.7.4 and 2.8.3, both builds of FlashAttention-3, flash-attn-4 4.0.0b36); the numbers
are compared with the reference.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor

from magi_sink_cp import fa3_func_with_sink
from magi_sink_cp.kernels.backends import fa2, fa3, fa4
from magi_sink_cp.kernels.backends.cpu import CpuBackend
from magi_sink_cp.kernels.checks import make_params
from magi_sink_cp.kernels.dsink import sink_gradient
from magi_sink_cp.kernels.merge import merge
from magi_sink_cp.kernels.protocol import (
    Dropout,
    Extras,
    Gradients,
    KernelRequest,
    Partial,
    RowDelta,
    Varlen,
)
from tests.support.cases import Case, assert_close, make_case, truth

INF = float("inf")


def call_of(causal, window, softcap, scale, cu_q, cu_k, max_q, max_k) -> KernelRequest:
    varlen = None if cu_q is None else Varlen(cu_q, cu_k, max_q, max_k)
    return KernelRequest(make_params(8, scale, causal, window, softcap, False), varlen)


def run_backend(backend, case: Case, **changes) -> dict[str, Tensor]:
    """forward, merge, backward and dsink, as magi_sink_cp.ops puts them together."""
    varlen = None
    if case.q.dim() == 3:
        cu_q, cu_k = (
            torch.tensor(x, dtype=torch.int32) for x in (case.cu_seqlens_q, case.cu_seqlens_k)
        )
        varlen = Varlen(cu_q, cu_k, case.q.shape[0], case.k.shape[0])
    options = (
        {"causal": False, "window_size": (-1, -1), "softcap": 0.0, "softmax_scale": None}
        | case.options
        | changes
    )
    params = make_params(
        case.q.shape[-1], options.pop("softmax_scale"), deterministic=False, **options
    )
    call = KernelRequest(params, varlen)
    partial = backend.forward(case.q, case.k, case.v, call)
    out, lse = merge([partial], case.sink)
    packed = torch.empty(*case.k.shape[:-2], 2, *case.k.shape[-2:])
    into = Gradients(torch.empty_like(case.q), *packed.unbind(-3), None)
    saved = Partial(out, lse, dropout=partial.dropout)
    grads = backend.backward(case.dout, case.q, case.k, case.v, saved, call, case.dlse, into)
    assert grads.dk.data_ptr() == packed.data_ptr(), "the gradient was not written where it belongs"
    dsink = sink_gradient(case.sink, lse, grads.delta, out, case.dout, case.dlse)
    return {"out": out, "lse": lse, "dq": grads.dq, "dk": grads.dk, "dv": grads.dv, "dsink": dsink}


CASES = {
    "dense": {"batch": 2},
    "dense, rows without a key": {"batch": 2, "causal": True},
    "varlen": {"causal": True},
    "window": {"batch": 1, "window_size": (3, 2)},
    "softcap": {"batch": 1, "softcap": 1.5},
}


def case_of(options: dict) -> Case:
    sizes = ([9], [6]) if "batch" in options else ([5, 0, 7], [6, 2, 3])
    return make_case(*sizes, head_dim=8, s_sink=2, with_dlse=True, **options)


# --- FlashAttention-2 -----------------------------------------------------------------------------


def flash_attn(version: str) -> tuple[types.ModuleType, types.ModuleType, list[dict]]:
    """A package ``flash_attn`` with the interface of 2.7 and 2.8.

    It reports lse = +inf for rows without a key, as FA2 does.
    """
    seen: list[dict] = []

    def forward(q, k, v, call, dropout_p, extra) -> tuple[Tensor, ...]:
        seen.append({"dropout_p": dropout_p, **extra})
        partial = CpuBackend().forward(q, k, v, call)
        rng_state = torch.tensor([7, 9]) if dropout_p > 0 else torch.empty(2, dtype=torch.int64)
        return (
            partial.out,
            partial.lse.masked_fill(partial.lse == -INF, INF),
            torch.ones(3),
            rng_state,
        )

    def backward(dout, q, k, v, out, lse, dq, dk, dv, call, extra) -> Tensor:
        assert not torch.isneginf(lse).any(), "FlashAttention-2 wants +inf for rows without a key"
        seen.append(extra)
        grads = CpuBackend().backward(
            dout, q, k, v, Partial(out, lse.masked_fill(lse == INF, -INF)), call
        )
        for target, value in ((dq, grads.dq), (dk, grads.dk), (dv, grads.dv)):
            target.copy_(value)
        return grads.delta.values

    interface = types.ModuleType("flash_attn.flash_attn_interface")

    def _flash_attn_forward(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        return_softmax,
    ):
        call = call_of(
            causal, (window_size_left, window_size_right), softcap, softmax_scale, None, None, 0, 0
        )
        return forward(
            q,
            k,
            v,
            call,
            dropout_p,
            {"alibi_slopes": alibi_slopes, "return_softmax": return_softmax},
        )

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False, block_table=None,
        leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        window = (window_size_left, window_size_right)
        call = call_of(
            causal,
            window,
            softcap,
            softmax_scale,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
        )
        return forward(
            q, k, v, call, dropout_p, {"alibi_slopes": alibi_slopes, "block_table": block_table}
        )

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        call = call_of(
            causal, (window_size_left, window_size_right), softcap, softmax_scale, None, None, 0, 0
        )
        extra = {
            "rng_state": rng_state,
            "alibi_slopes": alibi_slopes,
            "deterministic": deterministic,
            "dropout_p": dropout_p,
        }
        return backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, call, extra)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        deterministic, rng_state=None,
        zero_tensors=False,
    ):  # fmt: skip
        window = (window_size_left, window_size_right)
        call = call_of(
            causal,
            window,
            softcap,
            softmax_scale,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
        )
        return backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, call, {"rng_state": rng_state})

    for function in (
        _flash_attn_forward,
        _flash_attn_varlen_forward,
        _flash_attn_backward,
        _flash_attn_varlen_backward,
    ):
        setattr(interface, function.__name__, function)
    package = types.ModuleType("flash_attn")
    package.__version__ = version
    package.__path__ = []
    package.flash_attn_interface = interface
    for module in (package, interface):
        module.__spec__ = types.SimpleNamespace(name=module.__name__, origin="stand-in")
    return package, interface, seen


@pytest.fixture
def flash_attn_2(monkeypatch, request):
    package, interface, seen = flash_attn(getattr(request, "param", "2.8.3"))
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    fa2._library.cache_clear()
    yield seen
    fa2._library.cache_clear()


@pytest.mark.parametrize("flash_attn_2", ["2.7.4.post1", "2.8.3"], indirect=True)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_fa2(flash_attn_2, options):
    case = case_of(options)
    assert_close(run_backend(fa2.Fa2Backend(), case), truth(case), 1e-5)
    # Forward, backward, and the second backward that brings the gradient of lse.
    assert len(flash_attn_2) == 3


def test_fa2_passes_on_dropout_alibi_and_pages(flash_attn_2):
    case, backend = case_of({"batch": 2}), fa2.Fa2Backend()
    slopes = torch.rand(4)
    call = KernelRequest(
        make_params(8, None, False, (-1, -1), 0.0, True, dropout_p=0.25),
        extras=Extras(alibi_slopes=slopes),
    )
    partial = backend.forward(case.q, case.k, case.v, call, want_probs=True)
    assert flash_attn_2[-1] == {"dropout_p": 0.25, "alibi_slopes": slopes, "return_softmax": True}
    assert isinstance(partial.dropout, Dropout)
    assert torch.equal(partial.dropout.attn_probs, torch.ones(3))
    # As the operator's fake implementation has it.
    assert partial.dropout.rng_state.dtype == torch.uint64
    backend.backward(case.dout, case.q, case.k, case.v, partial, call)
    last = flash_attn_2[-1]
    assert torch.equal(last.pop("rng_state"), torch.tensor([7, 9]))
    assert last == {"alibi_slopes": slopes, "deterministic": True, "dropout_p": 0.25}
    packed = case_of({})
    cu_q, cu_k = (
        torch.tensor(x, dtype=torch.int32) for x in (packed.cu_seqlens_q, packed.cu_seqlens_k)
    )
    table = torch.zeros(3, 1, dtype=torch.int32)
    varlen_call = KernelRequest(
        make_params(8, None, False, (-1, -1), 0.0, False),
        Varlen(cu_q, cu_k, 7, 6),
        Extras(block_table=table),
    )
    backend.forward(packed.q, packed.k, packed.v, varlen_call)
    assert flash_attn_2[-1]["block_table"] is table


@pytest.mark.parametrize("flash_attn_2", ["2.6.3", "3.0.0"], indirect=True)
def test_fa2_refuses_other_versions(flash_attn_2):
    with pytest.raises(fa2.NotUsableError, match=r"flash_attn 2\.7 and 2\.8 are supported"):
        fa2._library()


def test_fa2_refuses_another_interface(flash_attn_2):
    del sys.modules["flash_attn.flash_attn_interface"]._flash_attn_backward
    with pytest.raises(fa2.NotUsableError, match="_flash_attn_backward lacks dropout_p"):
        fa2._library()


def test_flash_attention_4_alone_is_not_flash_attention_2(monkeypatch, tmp_path):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    fa2._library.cache_clear()
    assert not fa2.is_installed()
    with pytest.raises(
        fa2.NotUsableError,
        match=r"flash_attn 2\.7 or 2\.8 is not installed \(a flash_attn that holds",
    ):
        fa2._library()
    fa2._library.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        del sys.modules[name]


@pytest.mark.parametrize("kind", ["ImportError", "RuntimeError"])
def test_a_broken_flash_attn_says_so(monkeypatch, tmp_path, kind):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text(
        f"raise {kind}('undefined symbol: _ZN3c10')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    fa2._library.cache_clear()
    assert fa2.is_installed()
    with pytest.raises(
        fa2.NotUsableError, match="installed but does not load: undefined symbol: _ZN3c10"
    ):
        fa2._library()
    fa2._library.cache_clear()


# --- FlashAttention-3 -----------------------------------------------------------------------------


def flash_attn_3(softmax_d_index: int, num_returned: int) -> tuple[fa3._Library, list[dict]]:
    """The operators with the arguments of both builds.

    softmax_d is one of 5 or of 8 tensors. In a varlen call each document's part is padded.
    """
    seen: list[dict] = []

    def fwd(
        q, k, v, *, q_v=None, out=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None,
        seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
        is_causal=False, window_size_left=-1,
        window_size_right=-1, attention_chunk=0, softcap=0.0, num_splits=0, pack_gqa=None,
        sm_margin=0,
    ):  # fmt: skip
        assert num_splits >= 1, (
            "0 would let the kernel choose, and the default of flash_attn_func is 1"
        )
        seen.append({"q_v": q_v, "attention_chunk": attention_chunk, "num_splits": num_splits,
        "pack_gqa": pack_gqa,
                     "sm_margin": sm_margin, "seqused_k": seqused_k,
                     "q_descale": q_descale})  # fmt: skip
        window = (window_size_left, window_size_right)
        call = call_of(
            is_causal,
            window,
            softcap,
            softmax_scale,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
        )
        partial = CpuBackend().forward(q, k, v, call)
        return partial.out, partial.lse, torch.empty(0), torch.empty(0)

    def bwd(
        dout, q, k, v, out, softmax_lse, *, dq=None, dk=None, dv=None, cu_seqlens_q=None,
        cu_seqlens_k=None, seqused_q=None,
        seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None, is_causal=False,
        window_size_left=-1,
        window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        window = (window_size_left, window_size_right)
        call = call_of(
            is_causal,
            window,
            softcap,
            softmax_scale,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
        )
        grads = CpuBackend().backward(dout, q, k, v, Partial(out, softmax_lse), call)
        for target, value in ((dq, grads.dq), (dk, grads.dk), (dv, grads.dv)):
            target.copy_(value)
        delta = grads.delta.values
        if cu_seqlens_q is None:
            softmax_d = torch.cat([delta, torch.full((*delta.shape[:-1], 5), 99.0)], -1)
        else:
            block = fa3.backward_block(q.shape[-1], max_seqlen_q, max_seqlen_k, call.params)
            starts = cu_seqlens_q.tolist()
            softmax_d = torch.full(
                (q.shape[1], -(-(q.shape[0] + (len(starts) - 1) * block) // block) * block), 99.0
            )
            for b in range(len(starts) - 1):
                padded = (starts[b] + b * block) // block * block
                softmax_d[:, padded : padded + starts[b + 1] - starts[b]] = delta[
                    :, starts[b] : starts[b + 1]
                ]
        returned = [torch.full((1,), 99.0) for _ in range(num_returned)]
        returned[softmax_d_index] = softmax_d
        return returned

    return fa3._Library("a stand-in", fwd, bwd, softmax_d_index, True, "q_v"), seen


@pytest.mark.parametrize(("softmax_d_index", "num_returned"), [(3, 8), (0, 5)])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_fa3(monkeypatch, options, softmax_d_index, num_returned):
    library, _ = flash_attn_3(softmax_d_index, num_returned)
    monkeypatch.setattr(fa3, "_library", lambda: library)
    case = case_of(options)
    assert_close(run_backend(fa3.Fa3Backend(), case), truth(case), 1e-5)


def test_fa3_passes_on_what_only_its_kernels_have(monkeypatch):
    library, seen = flash_attn_3(0, 5)
    monkeypatch.setattr(fa3, "_library", lambda: library)
    case = case_of({"batch": 2})
    qv, descale = torch.randn(2, 9, 4, 8), torch.ones(2, 2)
    params = make_params(
        8,
        None,
        False,
        (-1, -1),
        0.0,
        False,
        attention_chunk=4,
        num_splits=3,
        pack_gqa=True,
        sm_margin=7,
    )
    fa3.Fa3Backend().forward(
        case.q, case.k, case.v, KernelRequest(params, None, Extras(qv=qv, q_descale=descale))
    )
    assert seen == [{"q_v": qv, "attention_chunk": 4, "num_splits": 3, "pack_gqa": True,
                     "sm_margin": 7, "seqused_k": None,
                     "q_descale": descale}]  # fmt: skip


# --- FlashAttention-4 -----------------------------------------------------------------------------


def flash_attn_4() -> tuple[fa4._Library, list[dict]]:
    seen: list[dict] = []

    def fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None, softmax_scale=None, causal=False, softcap=None, window_size_left=None,
        window_size_right=None,
        learnable_sink=None, num_splits=1, pack_gqa=None, return_lse=False, out=None,
    ):  # fmt: skip
        assert return_lse
        seen.append(
            {"learnable_sink": learnable_sink, "num_splits": num_splits, "pack_gqa": pack_gqa}
        )
        window = tuple(
            -1 if size is None else size for size in (window_size_left, window_size_right)
        )
        assert window[1] == 0 or not causal
        call = call_of(
            causal,
            window,
            softcap,
            softmax_scale,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
        )
        partial = CpuBackend().forward(q, k, v, call, out)
        if learnable_sink is None:
            return partial.out, partial.lse, None, None, None
        overflows = ~torch.isneginf(partial.lse) & (learnable_sink.unsqueeze(-1) - partial.lse > 88)
        merged, lse = merge([partial], learnable_sink[None])
        return merged, lse.masked_fill(overflows, float("inf")), None, None, None

    def bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0,
        window_size_left=None, window_size_right=None,
        cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        seqused_q=None, seqused_k=None, deterministic=False, dq=None, dk=None, dv=None,
        dlse=None, learnable_sink=None,
    ):  # fmt: skip
        window = tuple(
            -1 if size is None else size for size in (window_size_left, window_size_right)
        )
        call = call_of(
            causal,
            window,
            softcap,
            softmax_scale,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
        )
        into = None if dq is None else Gradients(dq, dk, dv, None)
        grads = CpuBackend().backward(dout, q, k, v, Partial(out, lse), call, dlse, into)
        if learnable_sink is None:
            return grads.dq, grads.dk, grads.dv
        return (
            grads.dq,
            grads.dk,
            grads.dv,
            sink_gradient(learnable_sink[None], lse, grads.delta, out, dout, dlse)[0],
        )

    return fa4._Library("a stand-in", fwd, bwd), seen


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_fa4_with_the_correction(monkeypatch, options):
    library, _ = flash_attn_4()
    monkeypatch.setattr(fa4, "_library", lambda: library)
    case = case_of(options)
    assert_close(run_backend(fa4.Fa4Backend(), case), truth(case), 1e-5)


def test_fa4_with_its_own_sink(monkeypatch):
    library, seen = flash_attn_4()
    monkeypatch.setattr(fa4, "_library", lambda: library)
    backend, case = fa4.Fa4Backend(), case_of({"batch": 2, "causal": True})
    case.sink = case.sink[:1]
    call = KernelRequest(
        make_params(8, None, True, (-1, -1), 0.0, False, num_splits=2, pack_gqa=False)
    )
    partial = backend.forward_with_sink(case.q, case.k, case.v, case.sink, call)
    assert torch.equal(seen[0]["learnable_sink"], case.sink[0])
    assert (seen[0]["num_splits"], seen[0]["pack_gqa"]) == (2, False)
    grads, dsink = backend.backward_with_sink(
        case.dout, case.q, case.k, case.v, case.sink, partial, call, case.dlse, None
    )
    result = {
        "out": partial.out,
        "lse": partial.lse,
        "dq": grads.dq,
        "dk": grads.dk,
        "dv": grads.dv,
        "dsink": dsink,
    }
    assert_close(result, truth(case), 1e-5)


def test_a_flash_attn_4_that_raises_anything_is_a_reason_not_a_crash(monkeypatch, tmp_path):
    """A mismatch with the CUTLASS DSL shows as an AttributeError from deep inside its import."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    (tmp_path / "flash_attn" / "cute" / "interface.py").write_text(
        "raise AttributeError('module cutlass.cute has no attribute x')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    fa4._library.cache_clear()
    with pytest.raises(
        fa4.NotUsableError,
        match="installed but does not load: module cutlass.cute has no attribute x",
    ):
        fa4._library()
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        del sys.modules[name]


def test_a_flash_attn_4_of_another_interface_is_named(monkeypatch):
    module = types.ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd = lambda q, k, v: None
    module._flash_attn_bwd = lambda q, k, v: None
    monkeypatch.setattr(
        fa4.importlib.util, "find_spec", lambda name: types.SimpleNamespace(name=name)
    )
    monkeypatch.setattr(fa4.importlib, "import_module", lambda name: module)
    fa4._library.cache_clear()
    with pytest.raises(
        fa4.NotUsableError,
        match="_flash_attn_fwd lacks softmax_scale, .*; 4.0.0b36 is known to work",
    ):
        fa4._library()


# --- Where the existing extension is wrong or slow ------------------------------------------------


def test_lse_and_out_are_the_kernels_own_memory(monkeypatch):
    """No copy between the kernel and the caller.

    The correction is in place, in FlashAttention's layout.
    """
    written = []
    original = CpuBackend._forward

    def recording(self, *arguments):
        partial = original(self, *arguments)
        written.append((partial.out.data_ptr(), partial.lse.data_ptr()))
        return partial

    monkeypatch.setattr(CpuBackend, "_forward", recording)
    q, sink = torch.randn(2, 6, 4, 8), torch.randn(2, 4)
    out, lse = fa3_func_with_sink(q, q, q, sink, return_attn_probs=True)
    assert written == [(out.data_ptr(), lse.data_ptr())]
    assert lse.shape == (2, 4, 6)


@pytest.mark.parametrize("from_delta", [True, False])
def test_dsink_keeps_its_digits_over_64k_rows(from_delta):
    """Σ_d out · dout in fp32 and sums in fixed order.

    Five digits over 65,536 rows of bf16, where a bf16 product has three.
    """
    torch.manual_seed(0)
    out, dout = (torch.randn(65536, 2, 16).bfloat16() for _ in range(2))
    lse, sink = torch.randn(2, 65536) + 3, torch.randn(1, 2)
    weight = torch.exp(sink.double().T - lse.double())
    exact = -(weight * (out.double() * dout.double()).sum(-1).T).sum(-1)
    in_bf16 = -(weight * (out * dout).sum(-1, dtype=torch.float32).double().T).sum(-1)
    delta = (
        RowDelta((out.float() * dout.float()).sum(-1).T.contiguous(), 65536) if from_delta else None
    )
    ours = sink_gradient(sink, lse, delta, out, dout)
    error, theirs = (ours[0] - exact).norm() / exact.norm(), (in_bf16 - exact).norm() / exact.norm()
    assert error <= 2e-5
    assert error < theirs / 5
