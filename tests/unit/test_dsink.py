"""The gradient of the sinks: kernel, twin, padded delta, digits."""

from __future__ import annotations

import pytest
import torch

from magi_sink_cp.kernels.backends.fa3 import backward_block
from magi_sink_cp.kernels.dsink import sink_gradient, sink_gradient_torch, sink_gradient_triton
from magi_sink_cp.kernels.protocol import AttentionParams, RowDelta

KERNELS = {"torch": sink_gradient_torch, "triton": sink_gradient_triton}
if torch.cuda.is_available():  # there the Triton kernel is compiled, and tests/gpu runs it
    del KERNELS["triton"]


@pytest.fixture(params=KERNELS.keys())
def kernel(request):
    return KERNELS[request.param]


def exact(sink, lse, delta, dlse):
    """Σ exp(z - lse)·(dlse - delta) in fp64, from the definition."""
    weight_of = (
        (lambda j: sink[j][:, None])
        if sink.dim() == 2
        else (lambda j: sink[..., j, :].transpose(-1, -2))
    )
    term = (0 if dlse is None else dlse.double()) - delta.double()
    guarded = lse.double().masked_fill(torch.isneginf(lse), float("inf"))
    # (…, H, T)
    columns = [torch.exp(weight_of(j).double() - guarded) * term for j in range(sink.shape[-2])]
    if sink.dim() == 2:
        return torch.stack([c.sum(-1) if c.dim() == 2 else c.sum((0, -1)) for c in columns])
    return torch.stack([c.transpose(-1, -2) for c in columns], dim=-2)


@pytest.mark.parametrize("leading", [(), (2,)])
@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
@pytest.mark.parametrize("source", ["delta", "out"])
@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("rows", [1, 70, 1500])
def test_matches_definition(kernel, leading, sink_layout, source, with_dlse, rows):
    torch.manual_seed(0)
    heads, head_dim, s_sink = 3, 24, 2
    sink = torch.randn(*(() if sink_layout == "sh" else (*leading, rows)), s_sink, heads)
    sink[..., 0, 0] = float("-inf")
    lse = torch.randn(*leading, heads, rows) + 2
    lse[..., 0] = float("-inf")
    out, dout = torch.randn(2, *leading, rows, heads, head_dim)
    dlse = torch.randn_like(lse) if with_dlse else None
    delta = (out.double() * dout.double()).sum(-1).transpose(-1, -2)
    # A kernel's delta may be wider than the rows.
    wide = torch.full((*leading, heads, rows + 9), float("nan"))
    wide[..., :rows] = delta
    arguments = (RowDelta(wide, rows), None, None) if source == "delta" else (None, out, dout)
    result = kernel(sink, lse, *arguments, dlse)
    expected = exact(sink, lse, delta, dlse)
    assert result.shape == sink.shape
    torch.testing.assert_close(result.double(), expected, rtol=2e-5, atol=2e-5 * rows**0.5)


@pytest.mark.parametrize("block", [64, 80, 96, 128])
@pytest.mark.parametrize("lengths", [[5], [200, 1, 0, 77, 0, 130, 3], [0, 0, 64], [1] * 20])
def test_padded_delta(kernel, block, lengths):
    """FlashAttention-3's varlen layout.

    Document b starts at (cu_seqlens[b] + b·block) // block · block; the gaps hold anything.
    """
    torch.manual_seed(0)
    heads = 2
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    rows = sum(lengths)
    delta = torch.randn(heads, rows)
    padded = torch.full(
        (heads, (rows + len(lengths) * block + block - 1) // block * block), float("nan")
    )
    for b, (lo, hi) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)):
        start = (lo + b * block) // block * block
        padded[:, start : start + hi - lo] = delta[:, lo:hi]
    sink, lse = torch.randn(1, heads), torch.randn(heads, rows) + 2
    result = kernel(sink, lse, RowDelta(padded, rows, block, cu_seqlens), None, None, None)
    torch.testing.assert_close(result.double(), exact(sink, lse, delta, None), rtol=1e-5, atol=1e-5)
    longer = torch.randn(heads, rows + 7)  # rows behind the last document contribute nothing
    dlse = torch.randn_like(longer)
    result = kernel(sink, longer, RowDelta(padded, rows, block, cu_seqlens), None, None, dlse)
    dlse[:, rows:] = float("nan")
    longer[:, rows + 1] = float("nan")
    extended = torch.nn.functional.pad(delta, (0, 7))
    torch.testing.assert_close(
        result.double(),
        exact(sink, longer[:, :rows], extended[:, :rows], dlse[:, :rows]),
        rtol=1e-4,
        atol=1e-4,
    )


def test_keeps_its_digits_over_many_rows(kernel):
    """bf16 out and dout, 16k rows.

    Products in fp32 leave dsink the digits of fp32, products in bf16 two or three.
    """
    torch.manual_seed(0)
    out, dout = torch.randn(2, 16384, 1, 16).bfloat16()
    lse, sink = torch.randn(1, 16384) + 3, torch.randn(1, 1)
    expected = exact(sink, lse, (out.double() * dout.double()).sum(-1).T, None)
    result = kernel(sink, lse, None, out, dout, None)
    in_bf16 = exact(sink, lse, (out * dout).sum(-1, dtype=torch.float32).T, None)
    assert ((result - expected).norm() / expected.norm()).item() < 5e-6
    assert ((in_bf16 - expected).norm() / expected.norm()).item() > 1e-4
    assert torch.equal(result, kernel(sink, lse, None, out, dout, None))


def test_needs_a_source_of_delta():
    with pytest.raises(ValueError, match="needs delta, or out and dout"):
        sink_gradient(torch.zeros(1, 2), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("head_dim", "window_size", "softcap", "expected"),
    [
        (64, (-1, -1), 0.0, 128),
        (64, (-1, 0), 5.0, 96),
        (96, (-1, -1), 0.0, 64),
        (128, (-1, -1), 0.0, 80),
        (128, (-1, 0), 0.0, 64),
        (128, (100, 5), 0.0, 64),
        (128, (5000, 5000), 0.0, 80),
        (192, (-1, -1), 0.0, 64),
    ],
)
def test_fa3_backward_block(head_dim, window_size, softcap, expected):
    assert (
        backward_block(head_dim, 1000, 1000, AttentionParams(1.0, window_size, softcap)) == expected
    )


@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
def test_gradients_that_autograd_expanded(kernel, sink_layout):
    """sum().backward() sends expanded gradients, whose strides are all 0."""
    torch.manual_seed(0)
    rows, heads, head_dim = 40, 3, 8
    sink = torch.randn(*(() if sink_layout == "sh" else (rows,)), 2, heads)
    lse, out = torch.randn(heads, rows) + 2, torch.randn(rows, heads, head_dim)
    dout, dlse = torch.ones(()).expand_as(out), torch.ones(()).expand_as(lse)
    result = kernel(sink, lse, None, out, dout, dlse)
    torch.testing.assert_close(
        result.double(), exact(sink, lse, out.double().sum(-1).T, dlse), rtol=1e-5, atol=1e-5
    )
