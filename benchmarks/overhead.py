"""`python -m benchmarks.overhead`: microseconds of one step, where most of it is overhead.

First of one sequence: layers and cells of fastrnn beside torch.nn's, in turn: inference, the forward that autograd
records, and a training step (forward, sum, backward into `.grad`). Then training steps of the cells over the size of
the batch: the engine, asked for by name, beside torch.nn's kernel, on both sides of the rule by which `auto` chooses
between them (`fastrnn.backends.steps_natively`). One thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.backends import steps_natively
from fastrnn.bench.environment import heading
from fastrnn.bench.measure import interleave, summary

KINDS = ("LSTM", "LSTMCell", "GRU", "GRUCell", "RNN", "RNNCell")
MODES = ("inference", "recorded forward", "training step")
SIZES = (16, 128)
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
CELL_SIZES = (64, 192, 256)
BATCHES = (1, 4, 8, 16, 64)


def call(module: nn.Module, x: Tensor, mode: str) -> Callable[[], Any]:
    if mode == "inference":

        def infer() -> Any:
            with torch.inference_mode():
                return module(x)

        return infer
    if mode == "recorded forward":
        return lambda: module(x)
    parameters = list(module.parameters())

    def train() -> None:
        first(module(x)).sum().backward()
        for p in parameters:
            p.grad = None

    return train


def first(out: Any) -> Tensor:
    """y, or a cell's h."""
    h: Tensor = out[0] if isinstance(out, tuple) else out
    return h


def in_turn(theirs: nn.Module, ours: nn.Module, x: Tensor, mode: str, budget: float) -> str:
    """Microseconds of both, and theirs over ours."""
    a, b = (summary(t)["p50"] * 1e6 for t in interleave([call(m, x, mode) for m in (theirs, ours)], budget))
    return f"{a:7.1f} {b:7.1f} {a / b:6.2f}"


def line(kind: str, size: int, budget: float) -> str:
    ours, theirs = getattr(fastrnn, kind)(size, size), getattr(nn, kind)(size, size)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, size) if kind.endswith("Cell") else torch.randn(1, 1, size)
    torch.testing.assert_close(ours(x), theirs(x))  # no figure without the right numbers
    return f"{kind:9} H={size:<4} | " + " | ".join(in_turn(theirs, ours, x, mode, budget) for mode in MODES)


def batch_line(kind: str, batch: int, size: int, budget: float) -> str:
    ours, theirs = getattr(fastrnn, kind)(size, size, backend="cpu"), getattr(nn, kind)(size, size)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(batch, size)
    got, want = (torch.autograd.grad(first(m(x)).sum(), list(m.parameters())) for m in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    taken = "torch.nn" if steps_natively(kind.removesuffix("Cell").lower(), batch, size) else "ours"
    return f"{kind:9} B={batch:<3} H={size:<4} | {in_turn(theirs, ours, x, 'training step', budget)} | {taken}"


def main(budget: float = 0.4) -> None:
    torch.set_num_threads(1)
    print(heading(fastrnn))
    columns = f"{'torch.nn':>7} {'ours':>6} {'ratio':>6}"
    print(f"{'microseconds':16} | " + " | ".join(f"{mode:^22}" for mode in MODES))
    print(f"{'':16} | " + " | ".join(columns for _ in MODES))
    for kind in KINDS:
        for size in SIZES:
            print(line(kind, size, budget), flush=True)
    print(f"\n{'training step':22} | {columns} | auto takes")
    for kind in CELLS:
        for size in CELL_SIZES:
            for batch in BATCHES:
                print(batch_line(kind, batch, size, budget), flush=True)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
