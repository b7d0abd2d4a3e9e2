"""MagiAttention's own pipeline test, where it has sinks, and this package on the same inputs.

MagiAttention's reference in fp64 and its tolerances judge out, lse, dq, dk and dv of both. It only
prints the error of dsink, so dsink is held against MagiAttention's own here, and against fp64 in
test_engines.py.

MagiAttention's tests are in its repository, not in its package: MAGI_ATTENTION_SOURCE names a
checkout of the version that is installed. Its kernels are compiled at their first use, 20 of them
for the whole test. Variables of its harness choose fewer: MAGI_ATTENTION_TEST_DTYPE=torch.bfloat16,
MAGI_ATTENTION_TEST_HEAD_DIM=64, MAGI_ATTENTION_TEST_NUM_HEADS=8_2.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from magi_sink_cp import cp_attention_with_sink, engines, make_cp_plan
from magi_sink_cp.dist.planning.mask import SLICE_TYPES

SOURCE = os.environ.get("MAGI_ATTENTION_SOURCE")
REASON = {info.name: info.reason for info in engines()}["magi"]
if REASON:
    pytest.skip(f"magi: {REASON}", allow_module_level=True)
if SOURCE is None:
    pytest.skip(
        "MAGI_ATTENTION_SOURCE names no checkout of MagiAttention, where its tests are",
        allow_module_level=True,
    )

pytestmark = pytest.mark.gpu


def load_pipeline() -> Any:
    """MagiAttention's module, by path: its folder of tests has the name of ours."""
    path = Path(SOURCE) / "tests" / "test_pipeline.py"
    spec = importlib.util.spec_from_file_location("magi_attention_test_pipeline", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pipeline = load_pipeline()
CONFIGS = dict(pipeline.TestPipelineBaseWithWorldSize1.test_pipeline._param_info)["attn_config"]
WITH_SINKS = {
    config[pipeline.NAME]: config
    for config in CONFIGS
    if config.get("total_seqlen_sink") and not config.get(pipeline.PROFILE_ONLY)
}


class TestBesideOurs(pipeline.TestPipelineBaseWithWorldSize1):
    """On one rank."""

    backend = "nccl"  # its harness takes gloo where there is one GPU

    def setUp(self) -> None:
        chosen = {
            "MAGI_ATTENTION_TEST_ATTN_CONFIG": ",".join(WITH_SINKS),
            "MAGI_ATTENTION_TEST_BACKEND": str(pipeline.MagiAttentionKernelBackend.FFA),
            "MAGI_ATTENTION_SANITY_CHECK": "1",
            # Its deterministic kernels and its packed heads are kernels of their own.
            "MAGI_ATTENTION_DETERMINISTIC_MODE": "0",
            "MAGI_ATTENTION_FLATTEN_HEAD_GROUPS": "0",
            "MAGI_ATTENTION_DSINK_ALL_REDUCE_OP": "sum",  # its default leaves each rank's share
        }
        patch = mock.patch.dict(os.environ, chosen)
        patch.start()
        self.addCleanup(patch.stop)
        super().setUp()

    def test_pipeline(self) -> None:
        """Its loop passes over what its variables leave out: here every config must have run."""
        self.seen: set[str] = set()
        super().test_pipeline()
        assert self.seen == {
            name
            for name, config in WITH_SINKS.items()
            if self.world_size not in config.get(pipeline.SKIP_WORLD_SIZE, [])
        }

    def _assert_close_to_torch_ref(self, **given: Any) -> None:
        self.seen |= {name for name in WITH_SINKS if f"[{name}]" in given["test_case"]}
        super()._assert_close_to_torch_ref(**given)
        for engine in ("native", "magi"):
            case = f"{given['test_case']}, this package's engine {engine}"
            print(f"[test_pipeline] beside: {case}", flush=True)
            ours = self.attend(engine, given)
            super()._assert_close_to_torch_ref(**given | ours | {"test_case": case})
            theirs, dsink = given["grad_total_sink"], ours["grad_total_sink"]
            error = float((dsink - theirs).norm() / theirs.norm())
            assert error < 0.02, f"dsink of {case}: {error}"

    def attend(self, engine: str, given: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What this package computes, under the names of its reference's arguments."""
        slices = [
            ((q.start, q.end), (k.start, k.end), SLICE_TYPES[kind])
            for q, k, kind in zip(
                given["q_ranges"], given["k_ranges"], given["attn_type_map"], strict=True
            )
        ]
        total = given["total_seqlen_q"]
        plan = make_cp_plan(total, group=self.nccl_group, mask_slices=slices, engine=engine)
        q, k, v = (plan.shard(given[f"total_{x}"].detach()).requires_grad_() for x in "qkv")
        sink = given["total_sink"].detach().clone().requires_grad_()
        out, lse = cp_attention_with_sink(
            q, k, v, sink,
            plan=plan,
            softmax_scale=given["softmax_scale"],
            return_lse=True,
            dsink_reduce="sum",
        )  # fmt: skip
        out.backward(plan.shard(given["grad_total_out"]))
        return {
            "total_out": plan.unshard(out.detach()),
            "total_lse": plan.unshard(lse.detach(), dim=1).t().contiguous(),
            "grad_total_q": plan.unshard(q.grad),
            "grad_total_k": plan.unshard(k.grad),
            "grad_total_v": plan.unshard(v.grad),
            "grad_total_sink": sink.grad,
        }


@pytest.mark.gpu(count=2)
class TestBesideOursOnTwoRanks(TestBesideOurs):
    world_size = 2
