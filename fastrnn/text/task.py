"""What a training task is: a LightningModule that resumes exactly, alone or as one of several processes.

A task loads its data (`load`), trains and scores batches, and puts its results together (`finish`). The learning rate,
clipping, sums over tokens and processes, and what a checkpoint holds are written here, once.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import checkpoint as checkpoints
from .config import RunConfig
from .distributed import gather, rank, total, world
from .errors import UserError
from .optim import averaged, averaging, make_optimizer, nonmonotonic, schedule, start_averaging

Echo = Callable[[str], None]
TENSORBOARD = "--tensorboard needs tensorboard: pip install 'fastrnn[tensorboard]'"
MATPLOTLIB = "pictures need matplotlib: pip install 'fastrnn[train]', or --report false"


@dataclasses.dataclass
class Data:
    """What a task trains on. `mark` tells whether a resumed run has the data that it began with."""

    name: str
    mark: str
    tokenizer: dict[str, Any]  # plain data, kept in the checkpoint
    train: Any  # loaders: iterables with __len__, state_dict and load_state_dict
    valid: Any


@dataclasses.dataclass
class Result:
    """What a run reached; `history` has one row per epoch."""

    folder: Path
    model: nn.Module
    history: list[dict[str, float]]
    seconds: float


class Task(L.LightningModule):
    """A task sets `name` and `Config` and implements the methods that raise NotImplementedError."""

    model: Any  # the network, made by the task's own __init__
    name: ClassVar[str]
    Config: ClassVar[type[RunConfig]]

    def __init__(self, config: RunConfig, data: Data) -> None:
        super().__init__()
        self.config, self.data = config, data
        self.history: list[dict[str, float]] = []  # one row per finished epoch
        self.best = math.inf  # lowest validation loss so far
        self.plateau_factor = 1.0
        self.seconds = 0.0  # spent training, over all the sittings of this run
        self.train_sums: dict[str, Any] = {}  # of this process in this epoch: "loss", "count", and the task's own
        self.valid_sums: dict[str, Any] = {}
        self.clock, self.sitting, self.sitting_seconds = time.perf_counter(), 0.0, 0.0  # tokens since `clock`
        self.sharded = False
        self._rng: dict[str, Tensor] | None = None
        self._evaluated: AbstractContextManager[None] = nullcontext()

    # --- what a task implements -----------------------------------------------------------------------------------

    @classmethod
    def configure(cls, config: Any) -> Any:
        """The configuration of a new run, where files that it names decide some of it."""
        return config

    @classmethod
    def packages(cls, config: Any) -> dict[str, str]:
        """What a run of `config` imports later, some of it at its end, and the message where it is missing."""
        found = {"matplotlib": MATPLOTLIB} if config.report else {}
        return {**found, "tensorboard": TENSORBOARD} if config.tensorboard else found

    @classmethod
    def load(cls, config: Any, saved: dict[str, Any] | None) -> Any:
        """The Data of `config`; the tokenizer is that of `saved`, a checkpoint's head, where there is one."""
        raise NotImplementedError

    def describe(self) -> list[str]:
        """What is to be trained on what, for the beginning of the report."""
        raise NotImplementedError

    def scores(self, sums: dict[str, Any]) -> dict[str, float]:
        """Figures of an epoch from the summed `sums` of its validation; must hold `valid_loss`."""
        raise NotImplementedError

    def describe_epoch(self, row: dict[str, float]) -> str:
        raise NotImplementedError

    def finish(self, folder: Path, echo: Echo) -> Result:
        """Scores the best checkpoint, shows examples, and returns what the run reached."""
        raise NotImplementedError

    @classmethod
    def evaluate(cls, path: str, data: str | None, split: str | None, batch_size: int, layer: str | None) -> list[str]:
        """The score of the checkpoint at `path` on `data`, or on a split of what it was trained on; in lines."""
        raise NotImplementedError

    def extra_state(self) -> dict[str, Any]:
        """What the task itself needs to go on, of this process, such as a hidden state."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        pass

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    # --- a step ---------------------------------------------------------------------------------------------------

    def trained(self, tokens: int, **sums: float) -> None:
        """Accounts for a training batch: its `sums` ("loss" and "count" at least) and its tokens."""
        self.check_finite("training", sums["loss"])
        add(self.train_sums, sums)
        self.sitting += tokens * world()
        self.log("train_loss", sums["loss"] / max(sums["count"], 1), prog_bar=True, batch_size=1)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=1)
        self.log("tokens_per_s", self.sitting / max(time.perf_counter() - self.clock, 1e-9), batch_size=1)

    def check_finite(self, what: str, loss: float) -> None:
        if not math.isfinite(loss):
            where = f"epoch {self.trainer.current_epoch + 1}, step {self.trainer.global_step}"
            raise UserError(
                f"the {what} loss is {loss} in {where}: try a lower --lr or --clip; {self.config.out} keeps the "
                "checkpoints from before"
            )

    def validated(self, **sums: Any) -> None:
        self.check_finite("validation", sums["loss"])
        add(self.valid_sums, sums)

    def configure_model(self) -> None:
        """Lightning calls this when the processes have found each other, and again for each loop."""
        if self.config.strategy == "fsdp" and not self.sharded:
            from .sharding import shard

            shard(self.model, self.device_mesh)
            self.sharded = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.config, self.parameter_groups())

    def lr_factor(self, batch: Any, group: dict[str, Any]) -> float:
        """A task's own factor on the learning rate of a parameter group at this batch; 0 freezes the group."""
        return 1.0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        steps = -(-int(self.trainer.num_training_batches) // self.config.accumulate)
        last = self.config.epochs * steps
        if self.config.max_steps > 0:
            last = min(last, self.config.max_steps)
        factor = schedule(self.config, self.trainer.global_step, self.trainer.current_epoch, last)
        for group in self.trainer.optimizers[0].param_groups:
            own = self.lr_factor(batch, group)
            group["lr"] = self.config.lr * factor * self.plateau_factor * own
            for parameter in group["params"]:
                parameter.requires_grad_(own > 0)  # through frozen layers, no gradient is carried

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clips, after the scaler of fp16 has been taken off, and logs the norm before it."""
        largest = self.config.clip or math.inf
        norm = nn.utils.clip_grad_norm_([p for p in self.parameters() if p.grad is not None], largest)
        self.log("grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm, batch_size=1)

    # --- an epoch -------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        if self._rng is not None:
            torch.set_rng_state(self._rng["cpu"])
            if "cuda" in self._rng:
                torch.cuda.set_rng_state(self._rng["cuda"])
            self._rng = None
        elif world() > 1:  # the weights are the same everywhere, dropout is not
            torch.manual_seed(self.config.seed * 100_003 + rank())

    def on_train_epoch_start(self) -> None:
        self.train_sums = {}
        self.clock, self.sitting = time.perf_counter(), 0.0

    def on_validation_epoch_start(self) -> None:
        self.valid_sums = {}
        self.sitting_seconds = time.perf_counter() - self.clock
        self._evaluated = averaged(self.trainer.optimizers[0])
        self._evaluated.__enter__()

    def on_validation_epoch_end(self) -> None:
        self._evaluated.__exit__(None, None, None)
        self.valid_sums = total(self.valid_sums)
        self.log_dict(self.scores(self.valid_sums), batch_size=1)

    def end_epoch(self) -> dict[str, float]:
        """The row of `history` for the epoch just trained and validated."""
        sums = total(self.train_sums)
        row = {"train_loss": sums["loss"] / max(sums["count"], 1), **self.scores(self.valid_sums)}
        row["tokens_per_s"] = self.sitting / max(self.sitting_seconds, 1e-9)
        return row

    def epoch_ended(self, row: dict[str, float]) -> bool:
        """Enters `row` into the history; returns whether its validation loss is the lowest so far."""
        self.history.append(row)
        better = row["valid_loss"] < self.best
        self.best = min(self.best, row["valid_loss"])
        if self.config.schedule == "plateau" and not better:
            self.plateau_factor *= self.config.decay
        optimizer = self.trainer.optimizers[0]
        losses = [r["valid_loss"] for r in self.history]
        waiting = self.config.optimizer == "asgd" and not averaging(optimizer)
        if waiting and nonmonotonic(losses, self.config.nonmono):
            start_averaging(optimizer)
        return better

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state()
        own = gather({"rng": rng, "sums": self.train_sums, "extra": self.extra_state()})
        run = {name: getattr(self, name) for name in ("history", "best", "plateau_factor", "seconds")}
        checkpoint["fastrnn"] = {
            "format": checkpoints.FORMAT,
            "task": self.name,
            "config": dataclasses.asdict(self.config),
            "tokenizer": self.data.tokenizer,
            "data": self.data.mark,
            "versions": checkpoints.versions(),
            "run": {**run, "processes": own, "loader": self.data.train.state_dict()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        run = dict(checkpoint["fastrnn"]["run"])
        processes = run.pop("processes")
        if len(processes) != world():
            raise UserError(f"--resume: the run had {len(processes)} processes, not {world()}")
        own = processes[rank()]
        self.data.train.load_state_dict(run.pop("loader"))  # Lightning does so within an epoch, not between two
        self._rng, self.train_sums = own["rng"], own["sums"]
        self.load_extra_state(own["extra"])
        for name, value in run.items():
            setattr(self, name, value)


def add(sums: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value
