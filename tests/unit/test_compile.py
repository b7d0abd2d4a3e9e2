"""The operators on the CPU in torch.compile, opcheck, checkpointing, autocast, double backward."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import magi_sink_cp
from magi_sink_cp import attention_with_sink
from magi_sink_cp.ops import attention as ops
from tests.support.cases import Case, make_case
from tests.support.drop_in import (
    FUNCTIONS,
    has_lse,
    is_varlen,
    lengths,
    needs_equal_heads,
    pack,
    record_operator_calls,
)

NAMES = (*FUNCTIONS, "attention_with_sink")


def case_for(name: str, size: int, sink_layout: str = "sh") -> Case:
    shape = {
        "heads": 4,
        "heads_kv": 4 if needs_equal_heads(name) else 2,
        "s_sink": 2,
        "sink_layout": sink_layout,
        "causal": True,
    }
    return (
        make_case([size, 3], [size, 3], **shape)
        if is_varlen(name)
        else make_case([size], [size], batch=2, **shape)
    )


def arguments_of(name: str, case: Case) -> tuple[dict, list[torch.Tensor]]:
    """Keyword arguments with leaves that require gradients, and these leaves with the sink's."""
    packed = pack(name, case.q, case.k, case.v)
    sink = case.sink.clone().requires_grad_()
    leaves = [x.requires_grad_() for x in packed.values() if isinstance(x, torch.Tensor)]
    return {
        **packed,
        "sink": sink,
        "sink_layout": case.sink_layout,
        "causal": True,
        **lengths(name, case),
    }, [*leaves, sink]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("sink_layout", ["sh", "ssh"])
@pytest.mark.parametrize("name", NAMES)
def test_one_graph_for_any_length(name, sink_layout):
    """Forward and backward, no graph break, and lengths that change do not compile again."""
    function = getattr(magi_sink_cp, name)
    with_lse = {"return_attn_probs": True} if has_lse(name) and name in FUNCTIONS else {}

    def layer(**arguments):
        out = function(**arguments, **with_lse)
        return (out[0] * 2, out[1]) if with_lse else (out * 2,)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    first = 0
    for size in (10, 12, 7):
        case = case_for(name, size, sink_layout)
        arguments, leaves = arguments_of(name, case)
        results, expected = compiled(**arguments), layer(**arguments)
        cotangents = [torch.randn_like(x) for x in results]
        for ours, true in zip(results, expected, strict=True):
            assert torch.equal(ours, true)
        taken = zip(
            *(torch.autograd.grad(x, leaves, cotangents) for x in (results, expected)), strict=True
        )
        for ours, true in taken:
            assert torch.equal(ours, true)
        # Dynamo may start over once, to fix what was a symbolic float.
        first = first or counter.frame_count
    assert counter.frame_count == first


def test_automatic_dynamic_shapes_compile_twice():
    """Without dynamic=True: once for the first length, once for all others."""
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v, sink: attention_with_sink(q, k, v, sink, causal=True),
        fullgraph=True,
        backend=frames,
    )
    for size in (10, 12, 7, 31):
        case = case_for("fa3_func_with_sink", size)
        compiled(case.q, case.k, case.v, case.sink)
    assert frames.frame_count == 2


def test_a_longest_length_that_depends_on_data():
    """max_seqlen from .item() inside the compiled region, as packing code computes it."""
    case = case_for("fa3_varlen_func_with_sink", 9)

    def layer(q, k, v, cu_seqlens):
        longest = cu_seqlens.diff().max().item()
        return magi_sink_cp.fa3_varlen_func_with_sink(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True
        )

    cu_seqlens = torch.tensor(case.cu_seqlens_q, dtype=torch.int32)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(
            case.q, case.k, case.v, cu_seqlens
        )
    assert torch.equal(compiled, layer(case.q, case.k, case.v, cu_seqlens))


def test_a_wrong_call_raises_while_it_is_compiled():
    compiled = torch.compile(attention_with_sink, backend="aot_eager")
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 4, 2, 8)
    with pytest.raises(Exception, match="the heads of k and v must divide the heads of q"):
        compiled(q, k, k)


@pytest.mark.parametrize("sink_layout", ["sh", "ssh", None])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, sink_layout, monkeypatch):
    """Schema, fakes, autograd and dynamic shapes of the operator calls that the function makes."""
    case = case_for(name, 6, sink_layout or "sh")
    arguments, leaves = arguments_of(name, case)
    if sink_layout is None:
        arguments["sink"], leaves = None, leaves[:-1]
    calls = record_operator_calls(monkeypatch)
    out = getattr(magi_sink_cp, name)(**arguments)
    torch.autograd.grad(out, leaves, case.dout)
    assert len(calls) == 2
    (forward, values), (backward, backward_values) = calls
    torch.library.opcheck(forward, values)  # with inputs that require gradients
    detached = torch.utils._pytree.tree_map(
        lambda x: x.detach() if isinstance(x, torch.Tensor) else x, backward_values
    )
    static = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(backward, detached, test_utils=static)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing(name, use_reentrant):
    case = case_for(name, 9)
    arguments, leaves = arguments_of(name, case)
    function = getattr(magi_sink_cp, name)
    expected = torch.autograd.grad(function(**arguments), leaves, case.dout)
    names = [key for key, x in arguments.items() if any(x is leaf for leaf in leaves)]

    def block(*tensors):
        return function(**{**arguments, **dict(zip(names, tensors, strict=True))})

    checkpoint(block, *leaves, use_reentrant=use_reentrant).backward(case.dout)
    assert all(torch.equal(x.grad, true) for x, true in zip(leaves, expected, strict=True))


def test_who_watches_sees_the_operators():
    """Dispatch modes and tensor subclasses get the registered operators.

    A plain call need not pay for the dispatcher.
    """

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    case = case_for("fa3_func_with_sink", 5)
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.sink)]
    with Names() as mode:
        attention_with_sink(*leaves).sum().backward()
    assert "magi_sink_cp.attention_forward.default" in mode.seen
    assert "magi_sink_cp.attention_backward.default" in mode.seen
    expected = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad = None
    attention_with_sink(*leaves).sum().backward()
    assert all(torch.equal(x.grad, true) for x, true in zip(leaves, expected, strict=True))

    class Subclass(torch.Tensor):
        pass

    assert ops.is_watched([case.q.as_subclass(Subclass)])
    assert not ops.is_watched([case.q, None, torch.nn.Parameter(case.q)])


def test_selective_checkpointing_can_save_the_operator(monkeypatch):
    """The operator is seen by name, so that a policy can keep its result instead of computing it
    twice.
    """
    case = case_for("fa3_func_with_sink", 9)
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.sink)]
    runs = []
    original = ops.merge
    monkeypatch.setattr(ops, "merge", lambda *a, **k: (runs.append(1), original(*a, **k))[1])
    for saved, expected in (([torch.ops.magi_sink_cp.attention_forward.default], 1), ([], 2)):
        runs.clear()
        contexts = functools.partial(
            create_selective_checkpoint_contexts,
            lambda _, operator, *args, saved=saved, **kwargs: (
                CheckpointPolicy.MUST_SAVE
                if operator in saved
                else CheckpointPolicy.PREFER_RECOMPUTE
            ),
        )
        out = checkpoint(attention_with_sink, *leaves, use_reentrant=False, context_fn=contexts)
        out.square().sum().backward()
        assert len(runs) == expected


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name):
    """Like flash_attn_func, which computes in the dtype that it is given."""
    case = case_for(name, 9)
    arguments, leaves = arguments_of(name, case)
    function = getattr(magi_sink_cp, name)
    expected = function(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        out = function(**arguments)
        grads = torch.autograd.grad(out, leaves, case.dout)
    assert torch.equal(out, expected)
    assert all(
        torch.equal(x, y)
        for x, y in zip(grads, torch.autograd.grad(expected, leaves, case.dout), strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_raises(name):
    case = case_for(name, 5)
    arguments, leaves = arguments_of(name, case)
    dout = case.dout.requires_grad_()
    grads = torch.autograd.grad(
        getattr(magi_sink_cp, name)(**arguments), leaves, dout, create_graph=True
    )
    with pytest.raises(RuntimeError, match="attention with sinks has no second derivative"):
        grads[0].sum().backward()
