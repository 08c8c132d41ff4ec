"""The CUDA kernels on the CPU emulator, built by `make .venv/.emulator`, behind the backend that serves the GPU."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrnn import backends, ops
from fastrnn.backends.cuda import Cuda
from fastrnn.backends.triton.precision import fp32_precision

ROOT = Path(__file__).resolve().parent.parent


def load() -> Any:
    """None if it is not built; one that is built and does not load is an error."""
    folder = Path(os.environ.get("FASTRNN_EMULATOR_PATH", ROOT / "build" / "emulator"))
    if not (folder / f"_emulator{EXTENSION_SUFFIXES[0]}").exists():
        return None
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("_emulator")
    finally:
        del sys.path[0]


EMULATOR = load()
needs_emulator = pytest.mark.skipif(EMULATOR is None, reason="the emulator is not built: make .venv/.emulator")
needs_races = pytest.mark.skipif(
    EMULATOR is None or not EMULATOR.detects_races, reason="no detector of races in this build"
)


class Emulated(Cuda):
    """The backend on CPU tensors; `forced` says what the plan must choose, by direction."""

    def __init__(self, module: Any = EMULATOR) -> None:
        super().__init__(lambda: (module, ""), "cpu")
        self.module = module
        self.forced: dict[bool, tuple[int, int]] = {}  # (blocks, variant)
        self.asked: dict[str, int] = {}  # of the plan: kernel, groups, warps

    def plan(
        self, cell: str, number: int, backward: bool, streams: int, batch: int, hidden: int, index: int = 0
    ) -> Any:
        code, (blocks, variant) = self.module.cells.index(cell), self.forced.get(backward, (0, -1))
        limits = self._limits(index)
        return self.module.plan(code, number, backward, streams, batch, hidden, limits, blocks, variant, **self.asked)


NUMBERS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


@pytest.fixture
def emulated(monkeypatch):
    """A function that returns the backend set up for one of NUMBERS."""
    backend = Emulated()
    for module in (backends, ops):  # in the place of the one for the GPU
        monkeypatch.setitem(module.BACKENDS, "cuda", backend)
    backends.clear_choices()
    with contextlib.ExitStack() as stack:

        def prepare(number: str) -> Emulated:
            stack.enter_context(fp32_precision("tf32" if number == "tf32" else "ieee"))
            return backend

        yield prepare
    EMULATOR.schedule()
    backends.clear_choices()
