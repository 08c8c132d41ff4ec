"""`python -m benchmarks.overhead`: microseconds of one step of one sequence, where most of it is overhead.

Layers and cells of fastrnn beside torch.nn's, in turn: inference, the forward that autograd records, and a training
step (forward, sum, backward into `.grad`). One thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.bench.environment import describe
from fastrnn.bench.measure import interleave, summary

KINDS = ("LSTM", "LSTMCell", "GRU", "GRUCell", "RNN", "RNNCell")
MODES = ("inference", "recorded forward", "training step")
SIZES = (16, 128)


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
        out = module(x)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        for p in parameters:
            p.grad = None

    return train


def line(kind: str, size: int, budget: float) -> str:
    ours, theirs = getattr(fastrnn, kind)(size, size), getattr(nn, kind)(size, size)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, size) if kind.endswith("Cell") else torch.randn(1, 1, size)
    torch.testing.assert_close(ours(x), theirs(x))  # no figure without the right numbers
    cells = []
    for mode in MODES:
        a, b = (summary(t)["p50"] * 1e6 for t in interleave([call(m, x, mode) for m in (theirs, ours)], budget))
        cells.append(f"{a:7.1f} {b:7.1f} {a / b:6.2f}")
    return f"{kind:9} H={size:<4} | " + " | ".join(cells)


def main(budget: float = 0.5) -> None:
    torch.set_num_threads(1)
    facts = describe(fastrnn)
    print(f"{facts['cpu']}; torch {facts['torch']}, commit {facts['commit']}, 1 thread")
    print(f"{'microseconds':16} | " + " | ".join(f"{mode:^22}" for mode in MODES))
    print(f"{'':16} | " + " | ".join(f"{'torch.nn':>7} {'ours':>6} {'ratio':>6}" for _ in MODES))
    for kind in KINDS:
        for size in SIZES:
            print(line(kind, size, budget), flush=True)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
