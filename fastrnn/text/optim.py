"""Optimisers, the learning rate at each step, and averaging of weights (ASGD)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .config import RunConfig


class ASGD(torch.optim.ASGD):
    """torch's ASGD, whose step takes the rate it is given: torch's own takes that of the step before (with --warmup,
    schedules and --varied-bptt another one)."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if "eta" in self.state.get(p, {}):
                    self.state[p]["eta"].fill_(group["lr"])
        return super().step(closure)


def make_optimizer(config: RunConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser of `config` over parameter groups."""
    c = config
    shared: dict[str, Any] = {"lr": c.lr, "weight_decay": c.weight_decay}
    if c.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=c.momentum, **shared)
    if c.optimizer == "asgd":  # lambd=0: no decay of its own; t0: averaging begins when `start_averaging` says so
        return ASGD(groups, lambd=0.0, t0=math.inf, **shared)
    kind = torch.optim.Adam if c.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, betas=(c.beta1, c.beta2), **shared)


def schedule(config: RunConfig, step: int, epoch: int, total: int) -> float:
    """The factor on the learning rate at `step` of `total`, in `epoch` (both from 0): a pure function, so that a
    resumed run needs no scheduler state."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "step":
        return config.decay ** max(epoch + 1 - config.decay_start, 0)
    progress = min((step - config.warmup) / max(total - config.warmup, 1), 1.0)
    if config.schedule == "cosine":
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "linear":
        return 1.0 - 0.95 * progress
    return 1.0


def stale_epochs(losses: list[float]) -> int:
    """Epochs since the lowest of `losses` (one per epoch)."""
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def nonmonotonic(losses: list[float], n: int) -> bool:
    """The trigger of NT-ASGD (Merity, Keskar, Socher, 2017): the last loss exceeds the lowest of those before it, the n
    nearest left out."""
    *before, last = losses
    return len(before) > n and last > min(before[:-n])


def averaging(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `optimizer` is an ASGD whose averaging has begun."""
    return isinstance(optimizer, torch.optim.ASGD) and math.isfinite(optimizer.param_groups[0]["t0"])


def start_averaging(optimizer: torch.optim.Optimizer) -> None:
    """The averages are those of the weights from the next step on. (torch's ASGD takes 1 / (step - t0), known at the
    end of a step, as the weight of the step after it.) Weights that are still frozen have taken no step."""
    for group in optimizer.param_groups:
        steps = [float(optimizer.state[p]["step"]) for p in group["params"] if p in optimizer.state]
        group["t0"] = max(steps, default=0.0) - 1


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The averages in place of the weights, where `optimizer` averages; then the weights again."""
    if not averaging(optimizer):
        yield
        return
    swap_averages(optimizer)
    try:
        yield
    finally:
        swap_averages(optimizer)


def swap_averages(optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p in optimizer.state:
                    average = optimizer.state[p]["ax"]
                    weights = p.clone()
                    p.copy_(average)
                    average.copy_(weights)
