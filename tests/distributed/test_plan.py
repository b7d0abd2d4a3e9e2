"""The plan across ranks: sharding and its gradients, and agreement on every argument."""

from __future__ import annotations

import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

from magi_sink_cp import cp_attention_with_sink, make_cp_plan
from magi_sink_cp.dist.guard import late as late_module
from magi_sink_cp.dist.guard.late import AT_ONCE, GroupAgreement, group_agreement
from magi_sink_cp.dist.transport import choose as choose_module
from magi_sink_cp.dist.transport.symmetric import SymmetricMemory
from tests.support.ranks import run_on_ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("total", [0, 1, 5, 12, 37])
def test_shard_and_unshard(num_ranks, total):
    run_on_ranks(num_ranks, body_shard, total=total)


def body_shard(group, device, *, total) -> None:
    plan = make_cp_plan(total, group=group, cu_seqlens=[0, total // 3, total // 3, total])
    assert plan.cp_size == dist.get_world_size(group)
    assert plan.rank == dist.get_rank(group)
    assert plan.local_tokens * plan.cp_size - plan.pad_tokens == total
    assert plan.local_tokens % 2 == 0 or plan.cp_size == 1
    positions = torch.cat([torch.arange(total // 3), torch.arange(total - total // 3)])
    assert torch.equal(plan.unshard(plan.position_ids), positions)
    assert torch.equal(plan.shard(positions), plan.position_ids)
    assert plan.unshard(plan.token_mask).all()
    assert int(plan.token_mask.sum()) == plan.real_tokens
    assert plan.token_mask[: plan.real_tokens].all(), "padding comes last"
    for dtype in (
        torch.float32,
        torch.bfloat16,
        torch.int64,
        torch.int16,
        torch.bool,
        torch.complex64,
    ):
        x = torch.arange(total * 6).view(2, total, 3).to(dtype)
        local = plan.shard(x, dim=1)
        assert local.shape == (2, plan.local_tokens, 3)
        assert not local[:, ~plan.token_mask].any()
        assert torch.equal(plan.unshard(local, dim=-2), x)
    labels = plan.shard(torch.arange(total), fill=-100)
    assert (labels[~plan.token_mask] == -100).all()
    assert torch.equal(plan.unshard(labels), torch.arange(total))
    z = torch.randn(total, 2, dtype=torch.complex64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(plan.unshard(plan.shard(z).conj()), z.conj())
    assert torch.equal(plan.unshard(plan.shard(z).conj().imag), -z.imag)

    assert plan.unshard(plan.shard(torch.zeros(total, 0))).shape == (total, 0)

    # Gradients of a loss that every rank computes from the whole tensor: the same, whole, on every
    # rank.
    x, weight = (
        torch.randn(total, 2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    x.requires_grad_()
    (plan.unshard(plan.shard(x) * 3) * weight).sum().backward()
    torch.testing.assert_close(x.grad, 3 * weight)


def test_device_mesh():
    run_on_ranks(4, body_device_mesh)


def body_device_mesh(group, device) -> None:
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("dp", "cp"))
    with pytest.raises(
        ValueError, match=r"group must be a 1-D DeviceMesh .* got one of shape \(2, 2\)"
    ):
        make_cp_plan(8, group=mesh)
    plan = make_cp_plan(8, group=mesh["cp"])
    assert plan.cp_size == 2
    assert plan.rank == dist.get_rank() % 2
    # Differs between cp groups.
    x = torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(dist.get_rank() // 2))
    local = plan.shard(x)
    assert torch.equal(plan.unshard(local), x)
    out = cp_attention_with_sink(local, local, local, torch.zeros(1, 2), plan=plan)
    alone = make_cp_plan(8)
    torch.testing.assert_close(
        plan.unshard(out), cp_attention_with_sink(x, x, x, torch.zeros(1, 2), plan=alone)
    )


DISAGREEMENTS = {
    "total_tokens": lambda rank: {"total_tokens": 10 + (rank == 1)},
    "cu_seqlens": lambda rank: {"total_tokens": 10, "cu_seqlens": [0, 4 + (rank == 0), 10]},
}


@pytest.mark.parametrize("what", DISAGREEMENTS)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_plans_that_disagree_raise_on_every_rank(num_ranks, what):
    run_on_ranks(num_ranks, body_plan_disagreement, what=what)


def body_plan_disagreement(group, device, *, what) -> None:
    with pytest.raises(
        ValueError, match=rf"make_cp_plan: all ranks .* the same {what}.* got rank 0: .*, rank 1: "
    ):
        make_cp_plan(group=group, **DISAGREEMENTS[what](dist.get_rank(group)))
    assert make_cp_plan(10, group=group).local_tokens > 0, "the group still works"


@pytest.mark.parametrize("wrong_rank", [0, 1])
def test_an_invalid_argument_on_one_rank_raises_on_every_rank(wrong_rank):
    run_on_ranks(2, body_plan_error, wrong_rank=wrong_rank)


def body_plan_error(group, device, *, wrong_rank) -> None:
    rank = dist.get_rank(group)
    cu_seqlens = torch.tensor([0, 7 if rank == wrong_rank else 10], dtype=torch.int32)
    own = "^cu_seqlens must end at the number of tokens, 10, got 7"
    other = f"make_cp_plan: cp rank {wrong_rank} was given .* ValueError: cu_seqlens must end"
    with pytest.raises(ValueError, match=own if rank == wrong_rank else other):
        make_cp_plan(10, group=group, cu_seqlens=cu_seqlens)


CALLS = {
    "head counts": (lambda rank: {"heads": 4 if rank else 2}, "batch, heads, heads_kv, head_dim"),
    "dtype": (lambda rank: {"dtype": torch.float32 if rank else torch.float64}, "dtype"),
    "sinks": (lambda rank: {"s_sink": 1 + rank}, r"sink \(s_sink, dtype\)"),
    "causal": (lambda rank: {"causal": bool(rank)}, "mask and scores"),
    "window_size": (lambda rank: {"window_size": (3 + rank, 0)}, "mask and scores"),
    "softmax_scale": (lambda rank: {"softmax_scale": 1.0 + rank}, "mask and scores"),
    "deterministic": (lambda rank: {"deterministic": bool(rank)}, "mask and scores"),
    "sink_layout": (lambda rank: {"sink_layout": "ssh" if rank else "sh"}, "sink_layout"),
    "dsink_reduce": (lambda rank: {"dsink_reduce": "sum" if rank else "none"}, "dsink_reduce"),
    "requires_grad": (lambda rank: {"requires_grad": bool(rank)}, "requires_grad of q, k, v, sink"),
}


@pytest.mark.parametrize("what", CALLS)
def test_calls_that_disagree_raise_on_every_rank(what):
    run_on_ranks(2, body_call_disagreement, what=what)


def call(
    plan, *, heads=2, dtype=torch.float32, s_sink=1, requires_grad=False, tokens=None, **arguments
):
    q = torch.randn(
        plan.local_tokens if tokens is None else tokens,
        heads,
        4,
        dtype=dtype,
        requires_grad=requires_grad,
    )
    rows = (plan.local_tokens,) if arguments.get("sink_layout") == "ssh" else ()
    return cp_attention_with_sink(
        q, q, q, torch.zeros(*rows, s_sink, heads), plan=plan, **arguments
    )


def body_call_disagreement(group, device, *, what) -> None:
    change, named = CALLS[what]
    plan = make_cp_plan(12, group=group)
    with pytest.raises(
        ValueError,
        match=rf"cp_attention_with_sink: all ranks .* the same {named}, got rank 0: .*, rank 1: ",
    ):
        call(plan, **change(dist.get_rank(group)))
    assert call(plan).shape == (plan.local_tokens, 2, 4), "the group still works"


def test_an_invalid_call_on_one_rank_raises_on_every_rank():
    run_on_ranks(2, body_call_error)


def body_call_error(group, device) -> None:
    plan = make_cp_plan(12, group=group)
    own = "^q must have the plan's local_tokens, 6, as its tokens, got"
    other = "cp_attention_with_sink: cp rank 1 was given .* q must have the plan's local_tokens"
    rank = dist.get_rank(group)
    with pytest.raises(ValueError, match=own if rank else other):
        call(plan, tokens=5 if rank else None)
    # What is prepared before the comparison must not fail on one rank alone.
    dense = torch.zeros(6, 2, 4)
    for wrong in (
        (torch.zeros(6, 2, 0), dense),
        (dense.to_sparse(), torch.zeros(6, 2, 8).to_sparse()),
    ):
        q, v = wrong if rank else (dense, dense)
        with pytest.raises((TypeError, ValueError), match=None if rank else "cp rank 1 was given"):
            cp_attention_with_sink(q, q, v, plan=plan)


@pytest.mark.parametrize("on_gpus", [False, True])
@pytest.mark.parametrize("checks", ["auto", "always"])
def test_how_often_a_signature_is_compared(on_gpus, checks):
    run_on_ranks(2, body_compared, on_gpus=on_gpus, checks=checks)


def body_compared(group, device, *, on_gpus, checks) -> None:
    """Every call on a CPU group, or as asked; once for each new signature of a group on GPUs."""
    compared = []

    def recording(function):
        def run(*arguments):
            compared.append(function.__name__)
            return function(*arguments)

        return run

    plan = make_cp_plan(12, group=group)
    plan.agreement.in_every_call = not on_gpus
    with (
        mock.patch.object(late_module, "agree", recording(late_module.agree)),
        mock.patch.object(GroupAgreement, "compare", recording(GroupAgreement.compare)),
    ):
        for heads in (2, 4, 2, 4):
            call(plan, heads=heads, checks=checks)
    assert len(compared) == (2 if on_gpus and checks == "auto" else 4)


LATER = {
    "both signatures seen before": (lambda rank: {"softmax_scale": 0.1 + rank}, "mask and scores"),
    "one new signature": (lambda rank: {"softmax_scale": 0.3 if rank else 0.1}, "mask and scores"),
    "grad mode": (
        lambda rank: {"softmax_scale": 0.1, "requires_grad": rank == 0},
        "requires_grad of q, k, v, sink",
    ),
}


@pytest.mark.parametrize(
    "what", [*LATER, "another plan", "another function", "invalid on one rank"]
)
def test_later_calls_that_disagree_raise_on_every_rank(what):
    run_on_ranks(2, body_later, what=what)


def body_later(group, device, *, what) -> None:
    plan, rank = make_cp_plan(12, group=group), dist.get_rank(group)
    for scale in (0.1, 1.1):
        call(plan, softmax_scale=scale)
    if what in LATER:
        change, named = LATER[what]
        with pytest.raises(ValueError, match=f"the same {named}, got rank 0: .*, rank 1: "):
            call(plan, **change(rank))
    elif what == "another plan":
        other = make_cp_plan(12, group=group, cu_seqlens=[0, 5, 12])
        for in_every_call in (True, False):  # on GPUs a signature is compared once for each plan
            plan.agreement.in_every_call = other.agreement.in_every_call = in_every_call
            with pytest.raises(
                ValueError, match=r"the same plan \(sha256\), got rank 0: .*, rank 1: "
            ):
                call(other if rank else plan, softmax_scale=0.7)
        plan.agreement.in_every_call = True
    elif what == "another function":
        with pytest.raises(
            ValueError,
            match="the same call, got rank 0: 'cp_attention_with_sink', rank 1: 'make_cp_plan'",
        ):
            make_cp_plan(12, group=group) if rank else call(plan, softmax_scale=0.1)
    else:
        own, other = (
            "softmax_scale must be finite and > 0, got -1",
            "cp rank 1 was given something invalid",
        )
        with pytest.raises(ValueError, match=own if rank else other):
            call(plan, softmax_scale=-1.0 if rank else 0.1)
        q = torch.randn(6, 2, 4)
        cp_attention_with_sink(q, q, q, None, plan=plan)
        with pytest.raises(
            ValueError,
            match=r"k must be dense \(torch.strided\), got torch.sparse_coo" if rank else other,
        ):
            cp_attention_with_sink(q, q.to_sparse() if rank else q, q, None, plan=plan)
    assert call(plan, softmax_scale=0.1).shape == (6, 2, 4), "the group still works"


def test_what_is_compared_late_is_read_before_the_step_ends():
    run_on_ranks(3, body_late)


def body_late(group, device) -> None:
    """After AT_ONCE plans no rank waits for a comparison, and all still hear of a difference."""
    with mock.patch.object(late_module._Gathered, "has_come", return_value=False):
        check_late(group)


def check_late(group) -> None:
    rank, agreement = dist.get_rank(group), group_agreement(group)
    agreement.forget()

    def plan_and_call(**options):
        plan = make_cp_plan(12, group=group)
        plan.agreement.in_every_call = False  # as on GPUs
        return call(plan, softmax_scale=0.25, **options)

    for step in range(AT_ONCE + 3):
        plan_and_call()
        assert len(agreement._pending) == max(0, step + 1 - AT_ONCE)
    if rank == 1:
        agreement.fail(TypeError("invalid here"), "a call")
    else:
        agreement.compare({"step": 0}, late_kind(agreement), "a call")
        with pytest.raises(ValueError, match="rank 1 was given something invalid, so no rank goes"):
            agreement.read(wait=True)
    plan_and_call()
    assert not agreement._pending, "after a difference everything is read at once again"
    for _ in range(AT_ONCE):
        agreement.compare({"step": 0}, "a kind", "a call")
    agreement.compare({"step": rank // 2}, "a kind", "a call")
    with pytest.raises(ValueError, match=r"a call: .* cp ranks \[2\] made others than cp rank 0"):
        agreement.read(wait=True)
    with pytest.raises(ValueError, match="the same step, got rank 0: 0, rank 1: 0, rank 2: 1"):
        agreement.compare({"step": rank // 2}, "a kind", "a call")
    for late_rank in (0, 1):  # ranks that read differently go on together
        for _ in range(AT_ONCE):
            agreement.compare({"step": 0}, "a kind", "a call")
        mine = rank == late_rank
        agreement.compare({"step": 0}, "a kind", "a call", at_once=not mine)
        if mine:
            agreement.compare({"step": 1}, "a kind", "a call")
            with pytest.raises(ValueError, match="must make the same plans and calls"):
                agreement.read(wait=True)
        else:
            with pytest.raises(ValueError, match="must make the same plans and calls"):
                agreement.compare({"step": 0}, "a kind", "a call", at_once=True)
        agreement.forget()


def late_kind(agreement) -> str:
    """A kind of comparison that is late by now."""
    return next(kind for kind, times in agreement._compared.items() if times >= AT_ONCE)


def test_devices_from_which_nothing_travels():
    run_on_ranks(2, body_devices)


def body_devices(group, device) -> None:
    plan = make_cp_plan(12, group=group)
    without = r"x must be on a device for which the cp group has a backend, \[.*'cpu'.*\], got meta"
    whole = torch.zeros(12, device="meta")
    with pytest.raises(ValueError, match=without):
        plan.unshard(whole[:6])
    with pytest.raises(ValueError, match=without):
        plan.shard(whole.clone().requires_grad_())
    assert plan.shard(whole).shape == (6,), "without a gradient nothing travels"
    with torch.no_grad():
        assert plan.shard(whole.clone().requires_grad_()).shape == (6,)
    with FakeTensorMode():
        on_0, on_1 = (torch.zeros(6, device=f"cuda:{i}") for i in range(2))
    wrong = "the current device must be the plan's, cuda:1, got cuda:0"
    alone = make_cp_plan(6)
    with (
        mock.patch.object(plan, "device", torch.device("cuda", 1)),
        mock.patch.object(plan.agreement, "_device", torch.device("cuda", 1)),
        mock.patch.object(alone, "device", torch.device("cuda", 1)),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        mock.patch.object(torch.cuda, "device") as device_for,
    ):
        with pytest.raises(ValueError, match="x must be on the plan's device, cuda:1, got cuda:0"):
            plan.unshard(on_0)
        with pytest.raises(ValueError, match=wrong):
            plan.unshard(on_1)
        with pytest.raises(ValueError, match=wrong):
            call(plan)
        with mock.patch.object(torch.ops.magi_sink_cp, "unshard", return_value=on_1):
            assert alone.unshard(on_1) is on_1, "without a group nothing travels"
    assert device_for.call_args_list == [mock.call(torch.device("cuda", 1))] * 3, (
        "where the ranks compare"
    )


def test_unshard_of_tensors_that_differ_raises_on_every_rank():
    run_on_ranks(2, body_unshard_disagreement)


def body_unshard_disagreement(group, device) -> None:
    plan, rank = make_cp_plan(12, group=group), dist.get_rank(group)
    with pytest.raises(
        ValueError,
        match=r"CPPlan.unshard .* the same shape but for dim, got rank 0: \[2\], rank 1: \[3\]",
    ):
        plan.unshard(torch.zeros(6, 2 + rank))
    with pytest.raises(
        ValueError, match="the same dtype, got rank 0: 'torch.float32', rank 1: 'torch.float64'"
    ):
        plan.unshard(torch.zeros(6, dtype=torch.float64 if rank else torch.float32))
    with pytest.raises(
        ValueError,
        match="x must have the plan's local_tokens, 6, along dim 0"
        if rank
        else "cp rank 1 was given something",
    ):
        plan.unshard(torch.zeros(6 + rank, 2))
    with pytest.raises(
        TypeError if rank else ValueError, match="x must be a torch.Tensor, got NoneType"
    ):
        plan.unshard(None if rank else torch.zeros(6, 2))
    with pytest.raises(ValueError, match="dim must be a dimension of x, .* got True"):
        plan.unshard(torch.zeros(6, 6), dim=True if rank else 0)
    with pytest.raises(
        ValueError, match=r"x must be dense \(torch.strided\), got torch.sparse_coo"
    ):
        plan.unshard(torch.zeros(6, 6).to_sparse() if rank else torch.zeros(6, 6))


@pytest.mark.parametrize("what", ["a device", "a number", "a text"])
def test_any_failure_on_one_rank_raises_on_every_rank(what):
    """Also failures that are no ValueError, and texts that grow when they are encoded."""
    run_on_ranks(2, body_any_failure, what=what)


def body_any_failure(group, device, *, what) -> None:
    arguments = {
        "a device": {"cu_seqlens": torch.empty(2, dtype=torch.int32, device="meta")},
        "a number": {"cu_seqlens": [0, 10**400]},
        "a text": {"layout": "\N{GRINNING FACE}" * 400},
    }[what]
    rank = dist.get_rank(group)
    with pytest.raises(Exception, match="" if rank else "cp rank 1 was given something invalid"):
        make_cp_plan(10, group=group, **(arguments if rank else {}))
    assert make_cp_plan(10, group=group).local_tokens > 0, "the group still works"


def test_a_rank_outside_the_group():
    run_on_ranks(3, body_outside)


def body_outside(group, device) -> None:
    """What new_group gives to a rank that is not in it is refused there, and the members go on."""
    with pytest.raises((ValueError, TypeError), match="group must"):
        make_cp_plan(8, group=dist.GroupMember.NON_GROUP_MEMBER)


@pytest.mark.parametrize("held", [False, True])
def test_a_plan_does_not_keep_its_group_alive(held):
    """destroy_process_group then ends gloo's threads.

    One that outlives Python's own end aborts the process.
    """
    code = (
        "import torch.distributed as dist; from magi_sink_cp import make_cp_plan\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "plan = make_cp_plan(8, group=dist.group.WORLD)\n"
        "assert plan.group is dist.group.WORLD\n"
        f"held = {'dist.group.WORLD' if held else None}\n"
        "dist.destroy_process_group()\n"
        "try: plan.group\n"
        "except RuntimeError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "the plan's process group has been destroyed; make a new plan" in result.stdout


def test_auto_falls_back_where_symmetric_memory_is_not_possible():
    run_on_ranks(2, body_fall_back)


def body_fall_back(group, device) -> None:
    """As on GPUs without NVLink: one warning on the first rank, and NCCL.

    Asked for by name, an error on every rank.
    """
    rank = dist.get_rank(group)
    on_gpus = mock.patch.object(choose_module, "group_device", return_value=torch.device("cuda"))
    nccl = mock.patch.object(choose_module, "backend_for", return_value="nccl")
    refused = mock.patch.object(choose_module, "connect", return_value="cp rank 1: no NVLink")
    with (
        on_gpus,
        nccl,
        refused as connect,
        mock.patch.object(choose_module._log, "warning") as warning,
    ):
        for _ in range(2):
            assert choose_module.choose_transport("auto", group).name == "nccl"
        with pytest.raises(
            RuntimeError,
            match="transport='symm_mem' is not possible in this group: cp rank 1: no NVLink; use "
            "'auto'",
        ):
            choose_module.choose_transport("symm_mem", group)
        assert connect.call_count == 1
        assert warning.call_count == (1 if rank == 0 else 0)
    del choose_module._symmetric[group]
    choose_module._warned.discard(group)
    over_pcie = SymmetricMemory(
        rank, 2, mock.MagicMock(), "cp rank 1: GPU 0000:03:00.0 has no active NVLink"
    )
    connected = mock.patch.object(choose_module, "connect", return_value=over_pcie)
    with on_gpus, nccl, connected, mock.patch.object(choose_module._log, "warning") as warning:
        for _ in range(2):
            assert choose_module.choose_transport("auto", group).name == "nccl"
        assert choose_module.choose_transport("symm_mem", group) is over_pcie, (
            "asked for by name it is taken"
        )
        assert [call.args[1] for call in warning.call_args_list] == [
            "symmetric memory would not use NVLink in this group (cp rank 1: GPU 0000:03:00.0 has "
            "no active NVLink); "
            "transport='symm_mem' takes it"
        ] * (rank == 0)
    del choose_module._symmetric[group]
    choose_module._warned.discard(group)
    with pytest.raises(
        ValueError, match="transport='symm_mem' is for GPUs, and the group's backend is"
    ):
        make_cp_plan(12, group=group, transport="symm_mem")
    with pytest.raises(
        ValueError,
        match=r"transport='nccl' needs a group with that backend for its device \(cpu\), got",
    ):
        make_cp_plan(12, group=group, transport="nccl")
    assert make_cp_plan(12, group=group, transport="gloo").transport.name == "gloo"
