"""`python -m benchmarks.saving`: bytes kept for backward and the time of a training step, save="gates" and "states".

torch.nn stands beside. Bytes are those of the tensors that autograd saves, each memory once, without the
parameters and the input; of torch.nn's fused CPU kernel the workspace is one of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.bench.environment import heading
from fastrnn.bench.measure import interleave, summary

SHAPES = ((100, 32, 256), (35, 20, 208), (512, 8, 128), (20, 64, 512))  # T, B, H


def step(module: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], Any]:
    parameters = list(module.parameters())

    def run() -> Any:
        return torch.autograd.grad(module(x)[0], parameters, dy)

    return run


def bytes_saved(module: nn.Module, x: Tensor) -> int:
    """Kept by autograd after one forward."""
    seen: dict[int, int] = {}

    def pack(a: Tensor) -> Tensor:
        seen[a.untyped_storage().data_ptr()] = a.untyped_storage().nbytes()
        return a

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: a):
        _kept = module(x)
    for a in (*module.parameters(), x):
        seen.pop(a.untyped_storage().data_ptr(), None)
    return sum(seen.values())


def measure(cell: str, shape: tuple[int, int, int], budget: float) -> list[str]:
    steps, batch, hidden = shape
    x, dy = torch.randn(steps, batch, hidden), torch.randn(steps, batch, hidden)
    theirs = getattr(nn, cell)(hidden, hidden)
    modules = [theirs]
    for save in ("gates", "states"):
        module = getattr(fastrnn, cell)(hidden, hidden, save=save)
        module.load_state_dict(theirs.state_dict())
        modules.append(module)
    want = step(modules[0], x, dy)()
    for module in modules[1:]:  # no figure without the right numbers
        for a, b in zip(step(module, x, dy)(), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    times = [summary(t)["p50"] for t in interleave([step(m, x, dy) for m in modules], budget)]
    kept = [bytes_saved(m, x) / 2**20 for m in modules]
    cells = [f"{k:8.1f} {1e3 * t:9.2f}" for k, t in zip(kept, times, strict=True)]
    ratios = f"{kept[2] / kept[1]:6.2f} {times[2] / times[1]:6.2f}"
    return [f"{cell:4} {steps:4} {batch:3} {hidden:4} | " + " | ".join(cells) + f" | {ratios}"]


def main(budget: float = 2.0) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(heading(fastrnn))
    print("forward and backward, fp32")
    print("cell    T   B    H |  torch.nn MiB, ms  |  gates    MiB, ms  |  states   MiB, ms  | states/gates: MiB, ms")
    for cell in ("LSTM", "GRU"):
        for shape in SHAPES:
            print(*measure(cell, shape, budget), sep="\n", flush=True)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
