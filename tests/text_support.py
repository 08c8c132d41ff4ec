"""A tiny language-model run, for the tests of the text harness; its users begin with importorskip("lightning")."""

from __future__ import annotations

import pytest
import torch

from fastrnn.text import LmConfig

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
