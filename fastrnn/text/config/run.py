"""The options that every training task shares, and what a derived configuration is made with."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import UserError

SEEDS = 2**32  # torch takes 64 bits, and those of processes and passes are made from the run's


def option(default: Any, help: str, free: bool = False) -> Any:
    """A dataclass field with the text that `--help` shows for it.

    `free`: it may change when a run is continued, as it makes neither another model nor another order of its data.
    """
    return dataclasses.field(default=default, metadata={"help": help, "free": free})


@dataclasses.dataclass
class RunConfig:
    """What every training task shares."""

    optimizer: Literal["sgd", "adam", "adamw", "asgd"] = option("adamw", "optimiser; asgd: averaged SGD (--nonmono)")
    lr: float = option(0.004, "learning rate at its highest")
    momentum: float = option(0.0, "momentum of sgd")
    beta1: float = option(0.9, "decay of the mean of gradients, adam and adamw")
    beta2: float = option(0.999, "decay of the mean of squared gradients, adam and adamw")
    nonmono: int = option(
        5, "asgd: average from when the validation loss exceeds the best before the N epochs before it"
    )
    weight_decay: float = option(0.0, "weight decay")
    clip: float = option(1.0, "largest gradient norm; 0 switches clipping off")
    accumulate: int = option(1, "batches whose gradients are averaged for one step")
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "arithmetic; bf16 and fp16 by autocast")
    epochs: int = option(6, "passes over the training data (stretches the cosine schedule)", free=True)
    max_steps: int = option(-1, "stop after so many steps; -1: no limit", free=True)
    patience: int = option(0, "stop after so many epochs without a lower validation loss; 0: never", free=True)
    schedule: Literal["constant", "cosine", "linear", "step", "plateau"] = option(
        "cosine",
        "constant; cosine, linear: down to a twentieth over the run; step: times --decay each epoch after "
        "--decay-start; plateau: times --decay when the validation loss does not fall",
    )
    warmup: int = option(0, "steps over which the learning rate rises from 0")
    decay: float = option(0.5, "factor of the schedules step and plateau")
    decay_start: int = option(4, "schedule step: epochs at the full rate")
    seed: int = option(1, "seed of weights, dropout, order and samples")
    threads: int = option(0, "CPU threads; 0: torch's choice", free=True)
    device: str = option("auto", "auto, cpu, cuda or mps", free=True)
    devices: int = option(1, "processes on each machine, one device each")
    nodes: int = option(1, "machines")
    strategy: Literal["auto", "ddp", "fsdp"] = option(
        "auto", "how processes share the work; auto: ddp where several; fsdp: the weights are shared out, too"
    )
    out: str | None = option(
        None, "folder of the run; the first free of runs/TASK-001, -002, ... by default", free=True
    )
    save_every: int = option(500, "steps between checkpoints within an epoch; 0: at the ends of epochs only", free=True)
    log_every: int = option(50, "steps between rows of the metrics file", free=True)
    tensorboard: bool = option(False, "log for TensorBoard, too (needs the extra [tensorboard])", free=True)
    report: bool = option(True, "curves as PNG and a report as HTML at the end", free=True)
    progress: bool | None = option(None, "progress bar; by default where the output is a terminal", free=True)

    def __post_init__(self) -> None:
        check_choices(self)
        at_least(self, 1, "epochs", "log_every", "accumulate", "devices", "nodes", "nonmono")
        at_least(self, 0, "weight_decay", "clip", "warmup", "decay_start", "threads", "save_every", "patience")
        below(self, 1, "momentum", "beta1", "beta2")
        below(self, SEEDS, "seed")
        if not 0 < self.lr < math.inf:
            raise UserError(f"--lr must be a positive number, got {self.lr}")
        if not 0 < self.decay <= 1:
            raise UserError(f"--decay must lie in (0, 1], got {self.decay}")
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(f"--max-steps must be at least 1, or -1 for no limit, got {self.max_steps}")

    @property
    def world(self) -> int:
        """Processes over all machines."""
        return self.devices * self.nodes


def flag(name: str) -> str:
    """The command-line option of a field."""
    return "--" + name.replace("_", "-")


def at_least(config: Any, least: float, *names: str) -> None:
    """Raises UserError if a named field of `config` is below `least` or not finite."""
    for name in names:
        value = getattr(config, name)
        if not least <= value < math.inf:
            raise UserError(f"{flag(name)} must be at least {least}, got {value}")


def below(config: Any, limit: float, *names: str) -> None:
    """Raises UserError if a named field of `config` lies outside [0, limit)."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < limit:
            raise UserError(f"{flag(name)} must lie in [0, {limit}), got {value}")


def check_choices(config: Any) -> None:
    """Raises UserError if a field of a Literal type holds something else (Python callers are not checked by types)."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise UserError(f"{flag(name)} must be one of {', '.join(map(str, get_args(hint)))}, got {value}")


def resumed(saved: Any, given: dict[str, Any]) -> Any:
    """The configuration of a continued run: the `saved` one with what the user `given` again.

    Raises UserError if an option that is not free differs from the saved run.
    """
    fields = saved.__dataclass_fields__
    for name, value in given.items():
        if not fields[name].metadata["free"] and getattr(saved, name) != value:
            raise UserError(f"{flag(name)} {value} differs from the {getattr(saved, name)} of the run to be resumed")
    return dataclasses.replace(saved, **given)
