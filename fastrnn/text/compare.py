"""The step time of one model with fastrnn's layers and with torch.nn's, measured in one process, interleaved."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def compare_layers(
    models: Mapping[str, nn.Module], batches: Iterable[Any], loss: Callable[[str, Any], Tensor], clip: float, steps: int
) -> dict[str, float]:
    """Median milliseconds of a training step (forward, backward, clip, SGD) of each of `models`, in turn.

    `loss(name, batch)` runs the named model forward. All see the same batches.
    """
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=1e-3) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    given = list(itertools.islice(batches, steps + 2))
    for model in models.values():
        model.train()
    for step in range(steps + 2):
        order = list(models) if step % 2 == 0 else list(models)[::-1]
        for name in order:
            start = time.perf_counter()
            torch.autograd.backward(loss(name, given[step % len(given)]))
            nn.utils.clip_grad_norm_(models[name].parameters(), clip or 1.0)
            optimizers[name].step()
            optimizers[name].zero_grad()
            if step >= 2:  # the first steps allocate and pack
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(t) for name, t in times.items()}


def describe_times(times: dict[str, float], steps: int) -> str:
    ratio = times["torch"] / times["fastrnn"]
    return (
        f"training step of this model: fastrnn {times['fastrnn']:.1f} ms, torch.nn {times['torch']:.1f} ms "
        f"({ratio:.2f} x; median of {steps} each, interleaved)"
    )
