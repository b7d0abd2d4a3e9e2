"""MagiAttention itself: as the engine across ranks, and its kernel as the backend ffa."""

from __future__ import annotations

import pytest
import torch

from magi_sink_cp import attention_with_sink, backends, engines, masks
from magi_sink_cp.kernels import magi_attention
from tests.distributed import test_engines as engine_tests
from tests.gpu import test_kernels, test_slices
from tests.support.cases import make_case
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.gpu

ENGINES = {info.name: info.reason for info in engines()}
needs_magi = pytest.mark.skipif(bool(ENGINES["magi"]), reason=f"magi: {ENGINES['magi']}")
RANKS = [1, *(pytest.param(n, marks=pytest.mark.gpu(ranks=n)) for n in (2, 3))]
# bf16 out and gradients of plain FlashAttention-3 are 2e-3 to 3e-3 off.
EXACT = torch.bfloat16, 1.2e-2, 64


@pytest.mark.parametrize("engine", ["native", pytest.param("magi", marks=needs_magi)])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_masks_and_sinks(num_ranks, engine):
    run_on_ranks(num_ranks, body, "cuda", engine=engine)


def body(group, device, *, engine) -> None:
    engine_tests.check_masks_and_sinks(group, device, engine, *EXACT)


@needs_magi
@pytest.mark.parametrize("num_ranks", RANKS)
def test_what_a_caller_may_ask(num_ranks):
    run_on_ranks(num_ranks, body_options, "cuda")


def body_options(group, device) -> None:
    engine_tests.check_options(group, device, *EXACT)
    engine_tests.check_softcap(group, device, "magi", *EXACT)  # FA3 may be built without it


@needs_magi
@pytest.mark.parametrize("num_ranks", RANKS)
def test_dsink_reduce_whatever_magi_attention_is_told(num_ranks):
    run_on_ranks(num_ranks, body_reduce, "cuda")


def body_reduce(group, device) -> None:
    engine_tests.check_dsink_reduce(group, device, torch.bfloat16, 64)


@needs_magi
@pytest.mark.parametrize("num_ranks", RANKS)
def test_a_key_that_the_caller_holds(num_ranks):
    run_on_ranks(num_ranks, body_key, "cuda")


def body_key(group, device) -> None:
    engine_tests.check_key(magi_attention.load(), group, device, *EXACT)


@needs_magi
@pytest.mark.gpu(ranks=2)
def test_a_loss_that_reaches_lse_on_one_rank_alone():
    run_on_ranks(2, body_lonely, "cuda")


def body_lonely(group, device) -> None:
    engine_tests.check_lonely_lse(group, device, "magi", *EXACT)


@needs_magi
def test_why_its_own_sinks_are_not_used():
    """A sink of 100 is inf in its lse, and one of -100 is gone."""
    q = torch.randn(64, 2, 64, device="cuda", dtype=torch.bfloat16)
    ranges = torch.tensor([[0, 64]], dtype=torch.int32, device="cuda")
    kinds = torch.tensor([magi_attention.CAUSAL], dtype=torch.int32, device="cuda")
    lses = {}
    for value in (None, 100.0, -100.0):
        sink = None if value is None else torch.full((1, 2), value, device="cuda")
        _, meta = magi_attention.load().flex_flash_attn_func(
            q, q, q, ranges, ranges, kinds, sink=sink
        )
        lses[value] = meta.lse
    assert lses[100.0].isinf().all()
    assert torch.equal(lses[-100.0], lses[None])


@needs_magi
@pytest.mark.gpu(ranks=2)
def test_what_it_refuses():
    run_on_ranks(2, body_refusals, "cuda")


def body_refusals(group, device) -> None:
    engine_tests.check_refusals(group, device, torch.bfloat16, 64)


# --- ffa ----------------------------------------------------------------------------------------


@pytest.fixture
def ffa() -> str:
    if reason := {info.name: info.reason for info in backends()}["ffa"]:
        pytest.skip(f"ffa: {reason}")
    return "ffa"


@pytest.mark.parametrize("mask", test_kernels.MASKS.values(), ids=test_kernels.MASKS.keys())
@pytest.mark.parametrize(("sink_layout", "s_sink"), [("sh", 1), ("sh", 12), ("ssh", 2)])
def test_ffa(ffa, mask, sink_layout, s_sink):
    options = {
        "heads": 8, "heads_kv": 2, "s_sink": s_sink, "sink_layout": sink_layout,
        "dtype": torch.bfloat16, "device": "cuda", **mask,
    }  # fmt: skip
    test_kernels.check(make_case([300], [430], batch=2, head_dim=64, **options), ffa)
    test_kernels.check(make_case([430], [300], batch=2, head_dim=128, **options), ffa)
    lengths = [200, 1, 0, 77, 130, 3], [200, 1, 5, 77, 0, 64]
    test_kernels.check(make_case(*lengths, head_dim=64, **options), ffa)


def test_ffa_and_large_sinks(ffa):
    """Its own sinks would overflow at 100."""
    for scale in (100.0, 1000.0):
        case = make_case(
            [200], [200], batch=1, heads=4, head_dim=64, s_sink=2, sink_scale=scale, causal=True,
            dtype=torch.bfloat16, device="cuda",
        )  # fmt: skip
        test_kernels.check(case, ffa)


@pytest.mark.parametrize("name", test_slices.MASKS)
def test_ffa_and_slices(ffa, name):
    total, slices = test_slices.MASKS[name]

    def attend(inputs):
        return attention_with_sink(*inputs, mask_slices=slices, backend=ffa, return_lse=True)

    test_slices.check(attend, total, slices, torch.device("cuda"))


def test_ffa_is_compiled_and_checkpointed(ffa):
    total, slices = 300, masks.documents([0, 300])
    compiled = torch.compile(attention_with_sink, backend="aot_eager", fullgraph=True)

    def attend(inputs):
        q, k, v = (x[None] for x in inputs[:3])
        out, lse = compiled(q, k, v, inputs[3], causal=True, backend=ffa, return_lse=True)
        return out[0], lse[0]

    test_slices.check(attend, total, slices, torch.device("cuda"))
