"""A tiny language-model run, for the tests of the text harness; its users begin with importorskip("lightning")."""

from __future__ import annotations

import pytest
import torch

from fastrnn.text import LmConfig
from fastrnn.text import checkpoint as checkpoints

TEXT = "".join(f"{i}: the quick brown fox jumps over the lazy dog, {i * 7 % 13} times.\n" for i in range(60))
SMALL = {
    "hidden_size": 12,
    "emb_size": 8,
    "batch_size": 4,
    "bptt": 16,
    "device": "cpu",
    "progress": False,
    "compare": 0,
    "sample": 0,
    "report": False,
}


@pytest.fixture(autouse=True)
def one_thread():
    """These models are too small to share: a second thread only waits, and dearly on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config(tmp_path):
    """A run of two epochs of 50 steps, under a second, with dropout, whose masks resuming must continue."""
    (tmp_path / "text.txt").write_text(TEXT)
    return LmConfig(**SMALL, data=str(tmp_path / "text.txt"), out=str(tmp_path / "run"), epochs=2, dropout=0.2)


def quiet(line: str) -> None:
    pass


def final_state(folder) -> dict:
    """What must be equal bit for bit: weights, optimiser, RNG, carried state, and losses of every epoch."""
    saved = checkpoints.load(folder / "last.ckpt")
    run = saved["fastrnn"]["run"]
    history = [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in run["history"]]
    return {
        "weights": saved["state_dict"],
        "optimizer": saved["optimizer_states"],
        "processes": run["processes"],
        "loader": run["loader"],
        "history": history,
        "step": saved["global_step"],
    }


def assert_identical(a, b, where="checkpoint"):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def at_step(monkeypatch, task, step: int, action) -> None:
    """Calls `action` once, in the course of training step number `step` (from 0)."""
    plain, done = task.training_step, []

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == step and not done:
            done.append(True)
            action()
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(task, "training_step", training_step)
