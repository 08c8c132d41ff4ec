"""What every training task shares: the Lightning trainer and its parts, the schedule, saving, stopping, reporting.

A task is a `Task` (a LightningModule with a few more words); `fit` trains it, continues it, and stops it cleanly.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.loggers import CSVLogger

from . import checkpoint as checkpoints
from .callbacks import ProgressBar, Saver, Stopper
from .config import RunConfig
from .errors import UserError


class Task(L.LightningModule):
    """A LightningModule that resumes exactly. A task sets `name`, implements the steps and `describe_epoch`.

    `extra_state` / `load_extra_state` carry what the task itself needs to go on, such as a hidden state.
    """

    name: str

    def __init__(self, config: RunConfig, data_mark: str) -> None:
        super().__init__()
        self.config = config
        self.data_mark = data_mark  # tells whether a resumed run has the data it began with
        self.history: list[dict[str, float]] = []  # one row per finished epoch
        self.best = math.inf  # lowest validation loss so far
        self.plateau_factor = 1.0
        self.seconds = 0.0  # spent training, over all the sittings of this run
        self._rng: dict[str, torch.Tensor] | None = None

    def vocabulary_state(self) -> dict[str, Any]:
        raise NotImplementedError

    def extra_state(self) -> dict[str, Any]:
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        pass

    def end_epoch(self) -> dict[str, float]:
        """The row of `history` for the epoch just trained and validated; must hold `valid_loss`."""
        raise NotImplementedError

    def describe_epoch(self, row: dict[str, float]) -> str:
        raise NotImplementedError

    def configure_optimizers(self) -> torch.optim.Optimizer:
        c = self.config
        kinds: dict[str, type[torch.optim.Optimizer]] = {
            "sgd": torch.optim.SGD,
            "adam": torch.optim.Adam,
            "adamw": torch.optim.AdamW,
        }
        return kinds[c.optimizer](self.parameters(), lr=c.lr, weight_decay=c.weight_decay)  # type: ignore[call-arg]

    def on_train_start(self) -> None:
        if self._rng is not None:
            torch.set_rng_state(self._rng["cpu"])
            if "cuda" in self._rng:
                torch.cuda.set_rng_state(self._rng["cuda"])
            self._rng = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        total = self.config.epochs * int(self.trainer.num_training_batches)
        if self.config.max_steps > 0:
            total = min(total, self.config.max_steps)
        factor = schedule(self.config, self.trainer.global_step, self.trainer.current_epoch, total)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.config.lr * factor * self.plateau_factor

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state()
        run = {name: getattr(self, name) for name in ("history", "best", "plateau_factor", "seconds")}
        checkpoint["fastrnn"] = {
            "format": checkpoints.FORMAT,
            "task": self.name,
            "config": dataclasses.asdict(self.config),
            "tokenizer": self.vocabulary_state(),
            "data": self.data_mark,
            "versions": checkpoints.versions(),
            "run": {**run, "rng": rng, "extra": self.extra_state()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        run = dict(checkpoint["fastrnn"]["run"])
        self._rng = run.pop("rng")
        self.load_extra_state(run.pop("extra"))
        for name, value in run.items():
            setattr(self, name, value)


def schedule(config: RunConfig, step: int, epoch: int, total: int) -> float:
    """The factor on the learning rate at `step` of `total`, in `epoch` (both from 0): a pure function, so that a
    resumed run needs no scheduler state."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "step":
        return config.decay ** max(epoch + 1 - config.decay_start, 0)
    if config.schedule == "cosine":
        progress = (step - config.warmup) / max(total - config.warmup, 1)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return 1.0


class CheckedCheckpointIO(TorchCheckpointIO):
    """Lightning's way to disk: our atomic writer, and our reader that checks before it loads."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        checkpoints.save(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return checkpoints.load(path)


def fit(
    task: Task,
    train: Any,
    valid: Any,
    folder: Path,
    resume: Path | None = None,
    echo: Callable[[str], None] = print,
    progress: bool = False,
) -> None:
    """Trains `task` on the loaders `train` and `valid`, checkpoints in `folder`, from `resume` on if given.

    Raises Interrupted on SIGINT or SIGTERM, after the step in progress and its checkpoint.
    """
    config, stopper = task.config, Stopper()
    for name in ("lightning.pytorch", "lightning.fabric"):  # its banners and hints are logged as INFO
        logging.getLogger(name).setLevel(logging.WARNING)
    saver = Saver(folder, config.save_every, stopper, echo)
    trainer = L.Trainer(
        accelerator=accelerator(config.device),
        devices=1,
        max_epochs=config.epochs,
        gradient_clip_val=config.clip or None,
        log_every_n_steps=max(1, min(config.log_every, len(train))),
        logger=CSVLogger(str(folder), name="metrics"),
        plugins=[CheckedCheckpointIO()],
        callbacks=[saver, *([ProgressBar()] if progress else [])],
        enable_progress_bar=progress,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    with stopper.listening(), warnings.catch_warnings():
        # Lightning 2.6 calls a pytree function that torch 2.13 renames; nothing a user could mend.
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", module="lightning.pytorch.utilities._pytree")
        trainer.fit(task, train, valid, ckpt_path=None if resume is None else str(resume), weights_only=True)


def accelerator(device: str) -> str:
    """Lightning's name for `device`; raises UserError where this machine has no such device."""
    present = {
        "auto": True,
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if device not in present:
        raise UserError(f"--device must be one of {', '.join(present)}, got {device}")
    if not present[device]:
        raise UserError(f"--device {device}: torch finds no such device on this machine")
    return device
