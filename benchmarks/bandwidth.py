"""`python -m benchmarks.bandwidth`: how fast a layer with one sequence reads its recurrent weights.

One feature in, so that next to nothing is computed but the recurrence, in inference, one thread. Beside it, in turn,
torch's own product of the same matrix and a vector, and its sum over the same matrix, which does nothing but read.
Gigabytes of W_hh per second, of the fastest fifth of the rounds.
"""

from __future__ import annotations

import sys

import torch

import fastrnn
from fastrnn.bench.environment import heading
from fastrnn.bench.measure import interleave, summary

CELLS = ("LSTM", "GRU", "RNN")
SIZES = (128, 256, 512)
STEPS = 100


def line(cell: str, hidden: int, budget: float) -> str:
    layer = getattr(fastrnn, cell)(1, hidden)
    w, h = layer.weight_hh_l0.detach(), torch.randn(hidden)
    x, out, size = torch.randn(STEPS, 1, 1), torch.empty(w.shape[0]), w.numel() * w.element_size()
    rates = []
    with torch.inference_mode():
        calls = (lambda: layer(x), lambda: torch.mv(w, h, out=out), lambda: w.sum())
        for steps, times in zip((STEPS, 1, 1), interleave(calls, budget), strict=True):
            rates.append(f"{steps * size / summary(times)['p20'] / 1e9:12.0f}")
    return f"{cell:5}{hidden:>5}{size // 1024:>7} KiB" + "".join(rates)


def main(budget: float = 0.5) -> None:
    torch.set_num_threads(1)
    print(heading(fastrnn))
    print(f"{'cell':5}{'H':>5}{'W_hh':>11}{'layer, GB/s':>12}{'torch.mv':>12}{'torch.sum':>12}")
    for cell in CELLS:
        for hidden in SIZES:
            print(line(cell, hidden, budget), flush=True)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
