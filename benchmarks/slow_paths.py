"""`python -m benchmarks.slow_paths`: what the less usual ways of a call cost, as multiples of forward and backward.

Beside each stands torch.nn's multiple of its own forward and backward, or why there is none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import fastrnn
from fastrnn.bench.environment import heading
from fastrnn.bench.measure import interleave, summary

SHAPES = ((35, 20, 128), (100, 4, 64))  # T, B, H
SAMPLES, MEMBERS = 16, 4
Ways = dict[str, Callable[[], Any]]


def ways(library: ModuleType, cell: str, shape: tuple[int, int, int]) -> Ways:
    steps, batch, hidden = shape
    torch.manual_seed(0)
    module = getattr(library, cell)(hidden, hidden)
    parameters = list(module.parameters())
    p = {name: a.detach() for name, a in module.named_parameters()}
    stacked, _ = stack_module_state([getattr(library, cell)(hidden, hidden) for _ in range(MEMBERS)])
    stacked = {name: a.detach() for name, a in stacked.items()}
    x = torch.randn(steps, batch, hidden, requires_grad=True)
    samples = torch.randn(SAMPLES, steps, 1, hidden)

    def loss(q: dict[str, Tensor], a: Tensor) -> Tensor:
        y: Tensor = functional_call(module, q, (a,))[0]
        return y.float().square().sum()

    def plain() -> Any:
        return torch.autograd.grad(module(x)[0].square().sum(), [x, *parameters])

    def double() -> Any:
        (g,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), parameters, allow_unused=True)

    def autocast() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            value = module(x)[0].float().square().sum()
        return torch.autograd.grad(value, [x, *parameters])

    def loop() -> Any:
        return [torch.autograd.grad(module(a)[0].square().sum(), parameters) for a in samples]

    return {
        "forward and backward": plain,
        "double backward": double,
        "jvp": lambda: jvp(lambda a: module(a)[0], (x.detach(),), (x.detach(),)),
        "autocast, bf16": autocast,
        f"gradients of {SAMPLES} samples, a loop": loop,
        f"gradients of {SAMPLES} samples, vmap(grad)": lambda: vmap(grad(loss), (None, 0))(p, samples),
        f"ensemble of {MEMBERS}, vmap(grad)": lambda: vmap(grad(loss), (0, None))(stacked, x.detach()),
    }


def measure(cell: str, shape: tuple[int, int, int], budget: float) -> list[str]:
    columns = []
    for library in (fastrnn, nn):
        made, runs, why = ways(library, cell, shape), {}, {}
        for name, call in made.items():
            try:
                call()
            except (RuntimeError, NotImplementedError) as error:
                why[name] = str(error).splitlines()[0][:60]
            else:
                runs[name] = call
        times = interleave(list(runs.values()), budget)
        columns.append(({n: summary(t)["p50"] for n, t in zip(runs, times, strict=True)}, why))
    (ours, failed), (theirs, why) = columns
    assert not failed, failed
    base, lines = "forward and backward", []
    for name, t in ours.items():
        line = f"{cell:4} {shape!s:14} {name:36} {1e3 * t:9.2f} ms {t / ours[base]:7.2f} |"
        other = f"{1e3 * theirs[name]:9.2f} ms {theirs[name] / theirs[base]:7.2f}" if name in theirs else why[name]
        lines.append(f"{line} {other}")
    return lines


def main(budget: float = 4.0) -> None:
    torch.set_num_threads(1)
    print(heading(fastrnn))
    print("fp32; ratios to forward and backward")
    print("cell (T, B, H)      way                                      fastrnn           | torch.nn")
    for cell in ("LSTM", "GRU"):
        for shape in SHAPES:
            print(*measure(cell, shape, budget), sep="\n", flush=True)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
