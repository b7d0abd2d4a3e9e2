"""The sum of gradient contributions.

The Triton kernel against its twin, rounding, and memory that is shared.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_sink_cp.kernels.accumulate import (
    MAX_TERMS,
    Term,
    accumulate,
    accumulate_torch,
    accumulate_triton,
)
from magi_sink_cp.kernels.triton_support import unspecial

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = DEVICE == "cuda"  # Triton's interpreter cuts bf16 and fp16 off instead of rounding them


def draw_terms(rows: int, spans, dtype, device):
    """For each (start, stop) a tensor with more rows than the term: at its end or its beginning."""
    generator = torch.Generator().manual_seed(rows)
    terms = []
    for number, (start, stop) in enumerate(spans):
        first = number % 3
        tensor = torch.randn(first + stop - start + 1, 3, 20, generator=generator).to(device, dtype)
        terms.append(Term(tensor, first, start, stop))
    return terms


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(1, 200),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_the_kernel_equals_its_twin_and_an_exact_sum(data, rows, dtype):
    spans = data.draw(
        st.lists(
            st.tuples(st.integers(0, rows), st.integers(0, rows)).map(sorted),
            min_size=1,
            max_size=MAX_TERMS,
        )
    )
    terms = draw_terms(rows, spans, dtype, DEVICE)
    exact = torch.zeros(rows, 3, 20, dtype=torch.float64, device=DEVICE)
    for term in terms:
        exact[term.start : term.stop] += term.tensor[
            term.first : term.first + term.stop - term.start
        ].double()
    results = []
    for function in (accumulate_torch, accumulate_triton):
        out = torch.full((rows, 3, 20), float("nan"), dtype=dtype, device=DEVICE)
        function(terms, out)
        torch.testing.assert_close(
            out.double(),
            exact.to(dtype).double(),
            rtol=1e-6 if dtype == torch.float32 else 1e-2,
            atol=1e-5,
        )
        results.append(out)
    if EXACT or dtype == torch.float32:
        assert torch.equal(*results), "both add in fp32 in the order of the terms and round once"


@pytest.mark.parametrize("function", [accumulate_torch, accumulate_triton])
def test_in_place(function):
    terms = draw_terms(50, [(0, 50), (7, 30)], torch.bfloat16, DEVICE)
    out = terms[0].tensor[:50]
    expected = out.float()
    expected[7:30] += terms[1].tensor[1:24].float()
    function(terms, out)
    torch.testing.assert_close(
        out, expected.to(torch.bfloat16), rtol=0 if EXACT else 1e-2, atol=0 if EXACT else 1e-2
    )


def test_misuse():
    out = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=f"accumulate takes 1 to {MAX_TERMS} terms, got 0"):
        accumulate([], out)
    accumulate([Term(torch.zeros(0, 2), 0, 0, 0)], torch.zeros(0, 2))  # nothing to do


@pytest.mark.parametrize("value", [0, 1, 2, 16, 17, 48, 2**26, -1, -16])
def test_no_row_number_is_compiled_for(value):
    """Triton would make 1 a constant and multiples of 16 a promise, also in a tuple, and launch
    that code for other numbers.
    """
    specialize = getattr(pytest.importorskip("triton._C.libtriton"), "native_specialize_impl", None)
    if specialize is None:
        pytest.skip(reason="this Triton decides elsewhere what it compiles for")
    backend = pytest.importorskip("triton.backends.compiler").BaseBackend
    (kind,), (promise,) = specialize(backend, (unspecial(value),), False, True, True)
    assert (kind, promise) == ("i32", "")
    assert unspecial(value) >> 4 == value
