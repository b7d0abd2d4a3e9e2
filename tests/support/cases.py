"""What the tests share: random cases, the fp64 truth, and the tolerance rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.support.reference import document_mask, reference_attention

NAMES = ("out", "lse", "dq", "dk", "dv", "dsink")


@dataclass
class Case:
    """Inputs of one attention call with the gradients that will flow into its results."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None
    dout: Tensor
    dlse: Tensor | None
    cu_seqlens_q: list[int]
    cu_seqlens_k: list[int]
    options: dict = field(default_factory=dict)  # causal, window_size, softcap, softmax_scale

    @property
    def sink_layout(self) -> str:
        return "ssh" if self.sink is not None and self.sink.dim() > 2 else "sh"

    def mask(self) -> Tensor:
        lengths_q, lengths_k = self.cu_seqlens_q, self.cu_seqlens_k
        return document_mask(
            lengths_q,
            lengths_k,
            self.options.get("causal", False),
            self.options.get("window_size", (-1, -1)),
        )


def make_case(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    *,
    heads: int = 4,
    heads_kv: int = 2,
    head_dim: int = 16,
    s_sink: int = 1,
    sink_layout: str | None = "sh",
    sink_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    with_dlse: bool = False,
    seed: int = 0,
    batch: int = 0,
    **options: object,
) -> Case:
    """A random case; packed, or with batch > 0 dense with lengths_q = [sq], lengths_k = [sk]."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    leading = (batch,) if batch else ()
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    sink = None
    if sink_layout is not None:
        rows = () if sink_layout == "sh" else (*leading, total_q)
        stats = torch.float64 if dtype == torch.float64 else torch.float32
        sink = draw(*rows, s_sink, heads, dtype=stats) * sink_scale
    return Case(
        q=draw(*leading, total_q, heads, head_dim),
        k=draw(*leading, total_k, heads_kv, head_dim),
        v=draw(*leading, total_k, heads_kv, head_dim),
        sink=sink,
        dout=draw(*leading, total_q, heads, head_dim),
        dlse=draw(*leading, heads, total_q, dtype=torch.float32) if with_dlse else None,
        cu_seqlens_q=offsets(lengths_q),
        cu_seqlens_k=offsets(lengths_k),
        options=dict(options),
    )


def offsets(lengths: Sequence[int]) -> list[int]:
    result = [0]
    for length in lengths:
        result.append(result[-1] + length)
    return result


@dataclass
class Truth:
    """The reference's results, and per result the norm that an error is measured against.

    dq and dk can cancel to nothing (dq of a row that sees one key is 0), where rounding would be
    infinitely large beside them: their scale is at least 0.1 an element, a tenth of the terms that
    they sum. Each entry of dsink has a scale of its own, the size that Σ_i p_i (dout_i·out_i -
    dlse_i) has for dout of random direction and an out of at least a tenth of v, so that the
    largest sinks do not drown the others and a sum that happens to cancel is no error.
    """

    values: dict[str, Tensor]
    scales: dict[str, float]
    dsink_scale: Tensor | None = None


def truth(case: Case) -> Truth:
    """out, lse and gradients of the fp64 reference."""
    leaves = [
        None if x is None else x.detach().double().requires_grad_()
        for x in (case.q, case.k, case.v, case.sink)
    ]
    scores = {
        name: case.options[name] for name in ("softcap", "softmax_scale") if name in case.options
    }
    values = _collect(*reference_attention(*leaves, case.mask(), **scores), leaves, case)
    scales = {
        name: value.masked_fill(torch.isneginf(value), 0.0).norm().item()
        for name, value in values.items()
    }
    for name in ("dq", "dk"):
        scales[name] = max(scales[name], 0.1 * values[name].numel() ** 0.5)
    if case.sink is None:
        return Truth(values, scales)
    # (…, T, H)
    lse = values["lse"].masked_fill(torch.isneginf(values["lse"]), float("inf")).transpose(-1, -2)
    squares = (values["out"].square() + 0.01).sum(-1) * case.dout.double().square().mean(-1)
    if case.dlse is not None:
        squares = squares + case.dlse.double().transpose(-1, -2).square()
    # (…, T, s_sink, H)
    terms = torch.exp(case.sink.double() - lse.unsqueeze(-2)).square() * squares.unsqueeze(-2)
    per_entry = terms.flatten(0, -3).sum(0) if case.sink.dim() == 2 else terms
    return Truth(values, scales, torch.maximum(per_entry.sqrt(), values["dsink"].abs()))


def run(function, case: Case, **arguments: object) -> dict[str, Tensor]:
    """out, lse and gradients of ``function(q, k, v, sink, …, return_lse=True)``."""
    leaves = [
        None if x is None else x.detach().clone().requires_grad_()
        for x in (case.q, case.k, case.v, case.sink)
    ]
    out, lse = function(
        *leaves, sink_layout=case.sink_layout, return_lse=True, **case.options, **arguments
    )
    return _collect(out, lse, leaves, case)


def _collect(
    out: Tensor, lse: Tensor, leaves: list[Tensor | None], case: Case
) -> dict[str, Tensor]:
    outputs, gradients = [out], [case.dout.to(out.dtype)]
    if case.dlse is not None:
        # A row that sees nothing has lse = -inf; no finite gradient belongs to it.
        outputs.append(lse)
        gradients.append(case.dlse.to(lse.dtype))
    wanted = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(outputs, wanted, gradients)
    return dict(zip(NAMES, [out.detach(), lse.detach(), *grads], strict=False))


def errors(result: dict[str, Tensor], expected: Truth) -> dict[str, float]:
    """Per result: the norm of its error over the truth's scale.

    -inf must stand where the truth has it; NaN passes no bound.
    """
    measured = {}
    for name, value in result.items():
        value, true = value.double().cpu(), expected.values[name].double().cpu()
        assert value.shape == true.shape, (
            f"{name}: shape {tuple(value.shape)}, expected {tuple(true.shape)}"
        )
        infinite = torch.isneginf(true)
        assert torch.equal(torch.isneginf(value), infinite), (
            f"{name}: -inf does not stand where the reference has it"
        )
        if name == "dsink" and value.numel():
            assert expected.dsink_scale is not None
            # fp32 cannot hold the smallest: 1e-30 beside them is nothing.
            measured[name] = (
                ((value - true) / (expected.dsink_scale.cpu() + 1e-30))
                .square()
                .mean()
                .sqrt()
                .item()
            )
            continue
        difference = (value - true).masked_fill(infinite, 0.0).norm().item()
        measured[name] = difference / max(expected.scales[name], 1e-30) if difference != 0 else 0.0
    return measured


def assert_close(result: dict[str, Tensor], expected: Truth, tolerance: float) -> None:
    measured = errors(result, expected)
    for name, error in measured.items():
        assert error <= tolerance, (
            f"{name}: relative error {error:.3g} exceeds {tolerance:.3g} (all: {measured})"
        )


def assert_within_plain(
    result: dict[str, Tensor], expected: Truth, plain: dict[str, float], factor: float = 2.0
) -> None:
    """Each error is at most ``factor`` times the error of the same backend without a sink.

    dsink has no counterpart there: it inherits the error of out, which is rounded twice, by the
        kernel and by the merge (√2).
    """
    measured = errors(result, expected)
    for name, error in measured.items():
        reference = 2**0.5 * plain["out"] if name == "dsink" else plain[name]
        # lse of plain fp32 statistics can be exact to the last bit; one fp32 rounding is always
        # allowed.
        assert error <= factor * max(reference, 2e-7), (
            f"{name}: {error:.3g} > {factor} × {reference:.3g} (all: {measured}; plain: {plain})"
        )
