"""Which engines there are, masks as MagiAttention's slices, and a backward that is borrowed."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magi_sink_cp import attention_with_sink, backends, engines, make_cp_plan
from magi_sink_cp.dist.magi_engine import mask_of_key, slices_of_bands
from magi_sink_cp.dist.planning.mask import FAR, Bands
from magi_sink_cp.kernels import magi_attention
from magi_sink_cp.kernels.backends.cpu import CpuBackend
from magi_sink_cp.kernels.backends.ffa import FfaBackend
from magi_sink_cp.kernels.checks import make_params
from magi_sink_cp.kernels.magi_attention import Backward
from magi_sink_cp.kernels.protocol import KernelRequest, NotUsableError, Varlen
from tests.support import magi_twin
from tests.support.cases import errors, make_case, run, truth
from tests.support.slices import dense


@pytest.fixture
def look_again(monkeypatch):
    """What is installed is looked for once in a process."""
    monkeypatch.setattr(magi_attention, "_load", magi_attention._load.__wrapped__)
    for name in [name for name in sys.modules if name.split(".")[0] == "magi_attention"]:
        monkeypatch.delitem(sys.modules, name)


PACKAGES = {
    "the placeholder of the registry": ({"__init__.py": ""}, "empty placeholder"),
    "without its extension": (
        {"__init__.py": "", "api.py": ""}, "does not load with its compiled extension"
    ),
    "that fails": ({"__init__.py": "raise RuntimeError('no GPU')"}, "RuntimeError: no GPU"),
    "of another time": (
        {"__init__.py": "", "magi_attn_ext.py": "", "api.py": "AttnRanges = 1"},
        "magi_attention.api has no AttnOverlapMode",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PACKAGES)
def test_a_package_that_is_not_whole_is_not_there(tmp_path, monkeypatch, look_again, kind):
    files, reason = PACKAGES[kind]
    folder = tmp_path / "magi_attention"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(NotUsableError, match=reason):
        magi_attention.load()
    assert reason in {info.name: info.reason for info in engines()}["magi"]


def test_asking_for_what_is_not_there(monkeypatch, look_again):
    monkeypatch.setattr(magi_attention.importlib.util, "find_spec", lambda name: None)
    native, magi = engines()
    assert (native.name, native.available, native.reason) == ("native", True, "")
    assert (magi.name, magi.available) == ("magi", False)
    assert magi.reason.startswith("magi_attention is not installed: https://")
    assert make_cp_plan(12).engine == "native"
    for arguments in ({"engine": "magi"}, {"magi_key": object()}):
        with pytest.raises(ValueError, match="engine='magi' is not available: .* not installed"):
            make_cp_plan(*([] if "magi_key" in arguments else [12]), **arguments)
    x = torch.zeros(1, 4, 2, 8)
    if not {info.name: info.available for info in backends()}["ffa"]:
        with pytest.raises(ValueError, match="backend='ffa' is not available: "):
            attention_with_sink(x, x, x, backend="ffa")


LIMIT = st.integers(-13, 13)


@given(
    spans=st.tuples(*[st.lists(st.integers(0, 12), min_size=2, max_size=2, unique=True)] * 2),
    lo=LIMIT | st.just(-FAR),
    hi=LIMIT | st.just(FAR),
)
def test_bands_as_slices(spans, lo, hi):
    """By the definition of its four types, pair by pair; NumPy's arrays and torch's alike."""
    (q_lo, q_hi), (k_lo, k_hi) = map(sorted, spans)
    if lo > hi:
        lo, hi = hi, lo
    band = [np.array([x]) for x in (q_lo, q_hi, k_lo, k_hi, lo, hi)]
    q, k = torch.arange(12)[:, None], torch.arange(12)
    seen = (q_lo <= q) & (q < q_hi) & (k_lo <= k) & (k < k_hi) & (lo <= k - q) & (k - q <= hi)
    slices = slices_of_bands(Bands(*band))
    assert torch.equal(dense(slices, 12), seen.long())
    assert len(slices) <= 3
    ours = magi_attention.rectangles_of_bands(*band)
    theirs = magi_attention.rectangles_of_bands(*map(torch.from_numpy, band))
    for one, other in zip(ours, theirs, strict=True):
        for x, y in zip(one, other, strict=True):
            assert np.array_equal(x, y.numpy())


def test_the_padding_of_a_key_is_no_part_of_its_mask():
    def ranges(*pairs):
        return [SimpleNamespace(start=a, end=b) for a, b in pairs]

    key = SimpleNamespace(
        total_seqlen_q=12, total_seqlen_k=12, uneven_shard=False, pad_size=2,
        q_ranges=ranges((0, 4), (4, 10), (10, 12)), k_ranges=ranges((0, 4), (2, 10), (0, 0)),
        attn_mask_type=[SimpleNamespace(value=kind) for kind in ("causal", "bi_causal", "full")],
    )  # fmt: skip
    assert mask_of_key(key) == (10, [((0, 4), (0, 4), "causal"), ((4, 10), (2, 10), "bi_causal")])


class Scaled(torch.autograd.Function):
    """out = q + k + v, whose backward is dout · factor · lse, with what it has saved."""

    @staticmethod
    def forward(ctx, q, k, v, factor, joined):
        out, lse = q + k + v, q.sum(-1)
        ctx.save_for_backward(q, *([torch.cat([k, v])] if joined else [k, v]), out, None, lse)
        ctx.factor = factor
        return out, lse

    @staticmethod
    def backward(ctx, dout, *args):
        (*_, lse) = ctx.saved_tensors
        grad = dout * ctx.factor * lse[..., None]
        return grad, grad, grad, None, None


@pytest.mark.parametrize("joined", [False, True])
def test_a_backward_runs_on_the_out_and_lse_that_it_is_given(joined):
    q, k, v = (torch.randn(3, 2, 8, requires_grad=True) for _ in range(3))
    out, lse = Scaled.apply(q, k, v, 7.0, joined)
    known = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
    learned = Backward(out, known)
    dout, other = torch.randn_like(out), torch.full_like(lse, 2.0)
    grads = learned(dout, {**known, "lse": other})
    assert all(torch.equal(grad, dout * 14) for grad in grads)
    with pytest.raises(NotUsableError, match="does not save mask"):
        Backward(out, {**known, "mask": torch.zeros(1)})
    with pytest.raises(NotUsableError, match="saves a torch.float32 .* that is not known here"):
        Backward(out, {name: x for name, x in known.items() if name != "lse"})
    with pytest.raises(NotUsableError, match=r"is no torch.autograd.Function"):
        Backward(out.exp(), known)
    out.grad_fn.mask = object()  # of this call
    with pytest.raises(NotUsableError, match="keeps mask, a object, that is not known here"):
        Backward(out, known)
    Backward(out, known, objects=("mask",))


# --- The backend ffa, on a twin of its kernel ---------------------------------------------------


WINDOWS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (7, 5)},
    "causal window": {"causal": True, "window_size": (11, 0)},
    "left window": {"window_size": (9, -1)},
    "right window": {"window_size": (-1, 4)},
}


@pytest.mark.parametrize("mask", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize(("sink_layout", "s_sink"), [("sh", 1), ("sh", 12), ("ssh", 2)])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_ffa(mask, sink_layout, s_sink, softcap):
    """Samples of other lengths than their keys, and documents, some of them empty."""
    options = {
        "heads": 4, "heads_kv": 2, "head_dim": 16, "s_sink": s_sink, "sink_layout": sink_layout,
        "dtype": torch.float64, "softcap": softcap, "with_dlse": True, **mask,
    }  # fmt: skip
    sizes = ([30], [43]), ([43], [30])
    dense_cases = [make_case(*each, batch=2, **options) for each in sizes]
    offsets = [0, 20, 21, 21, 28], [0, 20, 21, 26, 26]
    lengths = ([b - a for a, b in itertools.pairwise(edges)] for edges in offsets)
    packed = make_case(*lengths, **options)
    cu_seqlens = (torch.tensor(edges, dtype=torch.int32) for edges in offsets)
    arguments = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens, strict=True))
    with magi_twin.installed():
        for case, more in (*((case, {}) for case in dense_cases), (packed, arguments)):
            found = run(attention_with_sink, case, backend="ffa", **more)
            for name, error in errors(found, truth(case)).items():
                assert error < 1e-7, f"{name}: {error:.3g}"


def test_ffa_of_some_rows_and_keys():
    """seqused: the other rows see nothing."""
    q, k, v = (torch.randn(30, heads, 16, dtype=torch.float64) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, 12, 30], dtype=torch.int32)
    used = torch.tensor([7, 18], dtype=torch.int32), torch.tensor([12, 5], dtype=torch.int32)
    varlen = Varlen(cu_seqlens, cu_seqlens, 18, 18, *used)
    request = KernelRequest(make_params(16, None, True, (4, 0), 0.0, False), varlen)
    with magi_twin.installed():
        ours = FfaBackend().forward(q, k, v, request)
    theirs = CpuBackend().forward(q, k, v, request)
    torch.testing.assert_close((ours.out, ours.lse), (theirs.out, theirs.lse))
