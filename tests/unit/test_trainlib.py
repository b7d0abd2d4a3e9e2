"""What the training scripts share: a save that is cut short, signals."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
trainlib = importlib.import_module("trainlib")


def make_run(weight: float) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(model.weight, weight)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("renames", range(2))
def test_a_save_that_is_cut_short_leaves_a_whole_checkpoint(tmp_path, monkeypatch, renames):
    """Whichever rename it does not reach; the next save works too."""
    trainlib.save_checkpoint(tmp_path, *make_run(1.0), {"next_step": 1}, None)
    rename, done = Path.rename, []

    def cut_short(self: Path, target: Path) -> Path:
        if self.parent != tmp_path:  # of torch's own files
            return rename(self, target)
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(self)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", cut_short)
        with pytest.raises(KeyboardInterrupt):
            trainlib.save_checkpoint(tmp_path, *make_run(2.0), {"next_step": 2}, None)
    model, optimizer = make_run(0.0)
    assert trainlib.load_checkpoint(tmp_path, model, optimizer, {"next_step": 0}) == {
        "next_step": 1
    }
    assert (model.weight == 1.0).all()
    trainlib.save_checkpoint(tmp_path, *make_run(3.0), {"next_step": 3}, None)
    trainlib.load_checkpoint(tmp_path, model, optimizer, {"next_step": 0})
    assert (model.weight == 3.0).all()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_no_checkpoint_is_none(tmp_path):
    (tmp_path / "checkpoint.new").mkdir()  # of a first save that was cut short
    assert trainlib.whole_checkpoint(tmp_path) is None


def test_signals_while_training():
    """torchrun passes on a SIGTERM that the scheduler has sent to each rank too."""
    before = signal.getsignal(signal.SIGTERM)
    with trainlib.Interrupt() as interrupt:
        assert not interrupt.seen
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.seen
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
