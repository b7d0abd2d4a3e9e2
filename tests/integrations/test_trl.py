"""TRL's SFTTrainer with ParallelismConfig(cp_size=…) logs what it logs in one process."""

from __future__ import annotations

import importlib.util
from functools import partial

import pytest

if importlib.util.find_spec("trl") is None:
    pytest.skip(
        "trl is not installed: make integrations (it takes 300 MB, for its datasets)",
        allow_module_level=True,
    )

from tests.integrations.test_trainer import run_job

run = partial(run_job, module="trl_job")


@pytest.mark.parametrize("kind", ["padded", "completion", "padding_free", "prepacked"])
def test_logs(tmp_path, kind):
    """Losses, gradient norms, evaluation, and what TRL counts; with accumulation and router losses.

    "padded" has a last batch of the evaluation that is not full. "prepacked" goes on from its
    checkpoint, where TRL counts tokens anew.
    """
    expected = run(1, 1, tmp_path / "one", kind)
    assert len(expected) == 4, "three steps and an evaluation"
    assert {"loss", "grad_norm", "num_tokens", "aux_loss"} <= {*expected[0]}
    for ours, theirs in zip(run(2, 2, tmp_path / "two", kind), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    if kind == "prepacked":
        resumed = run(2, 2, tmp_path / "two", kind, "resume")
        for ours, theirs in zip(resumed, expected, strict=True):
            for entry in (ours, theirs):
                entry.pop("num_tokens", None), entry.pop("eval_num_tokens", None)
            assert ours == pytest.approx(theirs, rel=1e-5)


def test_lora(tmp_path):
    pytest.importorskip("peft")
    expected = run(1, 1, tmp_path / "one", "padding_free", "lora")
    for ours, theirs in zip(
        run(2, 2, tmp_path / "two", "padding_free", "lora"), expected, strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-5)
