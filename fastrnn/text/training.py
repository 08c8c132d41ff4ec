"""What every training task shares: the Lightning trainer and its parts, the schedule, saving, stopping, reporting.

A task is a `Task` (a LightningModule with a few more words); `fit` trains it, continues it, and stops it cleanly.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Optional

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from . import checkpoint as checkpoints
from .config import RunConfig
from .errors import Interrupted, UserError

LAST, BEST = "last.ckpt", "best.ckpt"


class Task(L.LightningModule):
    """A LightningModule that resumes exactly. A task sets `name`, implements the steps and `describe_epoch`.

    `extra_state` / `load_extra_state` carry what the task itself needs to go on, such as a hidden state.
    """

    name: str

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config = config
        self.history: list[dict[str, float]] = []  # one row per finished epoch
        self.best = math.inf  # lowest validation loss so far
        self.plateau_factor = 1.0
        self.seconds = 0.0  # spent training, over all the sittings of this run
        self._rng: Optional[dict[str, torch.Tensor]] = None

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
        kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[c.optimizer]
        return kind(self.parameters(), lr=c.lr, weight_decay=c.weight_decay)

    def on_train_start(self) -> None:
        if self._rng is not None:
            torch.set_rng_state(self._rng["cpu"])
            if "cuda" in self._rng:
                torch.cuda.set_rng_state(self._rng["cuda"])
            self._rng = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        total = self.trainer.max_epochs * self.trainer.num_training_batches
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

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Optional[bool] = None) -> Any:
        return checkpoints.load(path)


class Stopper:
    """Remembers the first SIGINT or SIGTERM; the second acts as usual."""

    signum: Optional[int] = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Only the main thread may set handlers; elsewhere signals keep their usual effect."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {s: signal.getsignal(s) for s in signals}

        def remember(signum: int, frame: Optional[FrameType]) -> None:
            self.signum = signum
            for s in signals:
                signal.signal(s, before[s])

        for s in signals:
            signal.signal(s, remember)
        try:
            yield
        finally:
            for s in signals:
                signal.signal(s, before[s])


class Saver(Callback):
    """Writes last.ckpt every `save_every` steps, at the ends of epochs and on a signal; best.ckpt when it is best.

    Everything the next step depends on is in the file, so going on from it equals never having stopped.
    """

    def __init__(self, folder: Path, save_every: int, stopper: Stopper, echo: Callable[[str], None]) -> None:
        self.folder, self.save_every, self.stopper, self.echo = folder, save_every, stopper, echo
        self.clock = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, task: Task) -> None:
        self.clock = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, task: Task, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # the end of the epoch saves
        signalled = self.stopper.signum is not None
        if signalled or (self.save_every and trainer.global_step % self.save_every == 0):
            self.save(trainer, task, LAST)
        if signalled:
            self.stop(trainer, f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}")

    def on_train_epoch_end(self, trainer: L.Trainer, task: Task) -> None:
        epoch = trainer.current_epoch + 1
        if len(task.history) >= epoch:
            return  # Lightning calls this again for an epoch whose end was saved
        row = {"epoch": float(epoch), "step": float(trainer.global_step), **task.end_epoch()}
        task.history.append(row)
        better = row["valid_loss"] < task.best
        task.best = min(task.best, row["valid_loss"])
        if task.config.schedule == "plateau" and not better:
            task.plateau_factor *= task.config.decay
        self.save(trainer, task, LAST)
        if better:
            self.save(trainer, task, BEST)
        self.echo(task.describe_epoch(row))
        if self.stopper.signum is not None and epoch < (trainer.max_epochs or 0):
            self.stop(trainer, f"the end of epoch {epoch}")

    def save(self, trainer: L.Trainer, task: Task, name: str) -> None:
        now = time.perf_counter()
        task.seconds += now - self.clock
        self.clock = now
        try:
            trainer.save_checkpoint(self.folder / name)
        except OSError as error:
            raise UserError(f"{self.folder / name}: cannot be written: {error}; what was there is kept") from error

    def stop(self, trainer: L.Trainer, where: str) -> None:
        assert self.stopper.signum is not None
        raise Interrupted(str(self.folder / LAST), where, self.stopper.signum)


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, without its version number and without leaving a line per epoch behind."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=5, leave=False)

    def get_metrics(self, trainer: L.Trainer, task: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, task)
        metrics.pop("v_num", None)
        return metrics

    def init_validation_tqdm(self) -> Any:
        bar = super().init_validation_tqdm()
        bar.leave = False
        return bar


def fit(
    task: Task,
    train: Any,
    valid: Any,
    folder: Path,
    resume: Optional[Path] = None,
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
        max_steps=config.max_steps,
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


def run_folder(out: Optional[str], task: str, overwrite: bool = False) -> Path:
    """The folder of a run, made if need be: `out`, or the first free runs/TASK-001, -002, ...

    Raises UserError if it holds a run already (nothing is overwritten unasked) or cannot be made.
    """
    if out is None:
        number = 1
        while (folder := Path("runs") / f"{task}-{number:03d}").exists():
            number += 1
    else:
        folder = Path(out)
        if (folder / LAST).exists() and not overwrite:
            raise UserError(f"{out} holds a run already: go on with --resume, replace it with --overwrite, or name another --out")  # fmt: skip  # noqa: E501
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}") from None
    return folder


def resume_path(resume: str, out: Optional[str]) -> Optional[Path]:
    """The checkpoint that `--resume` means: a file, a run's folder, or, for "auto", the one in `out` if it is there.

    Raises UserError for a path that does not exist, and for "auto" without `out`.
    """
    if resume == "auto":
        if out is None:
            raise UserError("--resume needs the run: --resume FOLDER, or --out FOLDER --resume")
        path = Path(out) / LAST
        return path if path.exists() else None
    path = Path(resume)
    if path.is_dir():
        path = path / LAST
    if not path.exists():
        raise UserError(f"--resume {resume}: no checkpoint there")
    return path
