"""The processes of one run: their number, sums over them, and what each is to write. One process needs no group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from .config import RunConfig
from .errors import UserError

FOLDER = "FASTRNN_RUN_FOLDER"  # tells the processes that Lightning starts which folder the first one chose


_alone = False


def joined() -> bool:
    return not _alone and dist.is_available() and dist.is_initialized()


@contextmanager
def alone() -> Iterator[None]:
    """What runs here is this process's own, though others trained with it: they may be gone."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def world() -> int:
    """Processes that train together; 1 before training begins."""
    return dist.get_world_size() if joined() else 1


def rank() -> int:
    return dist.get_rank() if joined() else 0


def is_first() -> bool:
    """Whether this process chooses folders, writes and speaks. Known before the processes have found each other,
    from the variables of torchrun, SLURM and Lightning's own launcher."""
    return not any(int(os.environ.get(name) or 0) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))


def gather(value: Any) -> list[Any]:
    """`value` of every process, in the order of ranks. All processes must call it."""
    if not joined():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def total(sums: dict[str, Any]) -> dict[str, Any]:
    """Sums (numbers or tensors) over all processes, by name, added in the order of ranks."""
    parts = gather(sums)
    names = dict.fromkeys(name for part in parts for name in part)  # a process may have had no batch
    return {name: sum(part[name] for part in parts if name in part) for name in names}


def largest(value: int, device: torch.device) -> int:
    """The largest `value` of all processes."""
    if not joined():
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def check_launch(config: RunConfig, resume: bool) -> None:
    """Raises UserError where --devices and --nodes are not what a launcher started, or no folder is agreed on."""
    started = os.environ.get("WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else None
    if started is not None and int(started) != config.world:
        raise UserError(
            f"torchrun started {started} processes, but --devices {config.devices} --nodes {config.nodes} asks for "
            f"{config.world}"
        )
    if started is not None and config.world > 1 and config.out is None and not resume:
        raise UserError("a run that torchrun starts needs --out FOLDER, the same for all processes")


def share(count: int) -> slice:
    """This process's part of `count` columns or examples: a block, equal parts where `count` divides."""
    size, index = world(), rank()
    return slice(count * index // size, count * (index + 1) // size)
