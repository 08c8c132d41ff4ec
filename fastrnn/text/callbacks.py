"""What happens around the steps of any training task: saving, stopping on a signal, the progress bar."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, TQDMProgressBar

from .errors import Interrupted, UserError
from .runs import BEST, LAST


class Stopper:
    """Remembers the first SIGINT or SIGTERM; the second acts as usual."""

    signum: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Only the main thread may set handlers; elsewhere signals keep their usual effect."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {s: signal.getsignal(s) for s in signals}

        def remember(signum: int, frame: FrameType | None) -> None:
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
    The `task` of each method is a `training.Task` (typed Any: Lightning declares a plain LightningModule there).
    """

    def __init__(self, folder: Path, save_every: int, stopper: Stopper, echo: Callable[[str], None]) -> None:
        self.folder, self.save_every, self.stopper, self.echo = folder, save_every, stopper, echo
        self.clock = time.perf_counter()
        self.cut_short = False  # --max-steps was reached within an epoch

    def on_train_start(self, trainer: L.Trainer, task: Any) -> None:
        self.clock = time.perf_counter()
        trainer.should_stop = self.limit_reached(trainer, task)

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = self.limit_reached(trainer, task)
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # the end of the epoch saves
        self.cut_short = trainer.should_stop
        signalled = self.stopper.signum is not None
        if signalled or self.cut_short or (self.save_every and trainer.global_step % self.save_every == 0):
            self.save(trainer, task, LAST)
        if signalled:
            self.stop(trainer, f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}")

    def on_train_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        epoch = trainer.current_epoch + 1
        if len(task.history) >= epoch:
            return  # Lightning calls this again for an epoch whose end was saved
        row = {"epoch": float(epoch), "step": float(trainer.global_step), **task.end_epoch()}
        task.history.append(row)
        better = row["valid_loss"] < task.best
        task.best = min(task.best, row["valid_loss"])
        if task.config.schedule == "plateau" and not better:
            task.plateau_factor *= task.config.decay
        if not self.cut_short:  # else last.ckpt was saved within the epoch, from where the run can be lengthened
            self.save(trainer, task, LAST)
        if better:
            self.save(trainer, task, BEST)
        self.echo(task.describe_epoch(row))
        if self.stopper.signum is not None and epoch < (trainer.max_epochs or 0):
            self.stop(trainer, f"the end of epoch {epoch}")

    def limit_reached(self, trainer: L.Trainer, task: Any) -> bool:
        """Whether --max-steps ends the run here. Set as `should_stop`, on which Lightning still validates; its own
        max_steps would leave the last steps without a validation figure."""
        limit: int = task.config.max_steps
        return 0 < limit <= trainer.global_step

    def save(self, trainer: L.Trainer, task: Any, name: str) -> None:
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
    """Lightning's bar, counting epochs from 1, without the log's version and without leaving a line behind."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=5, leave=False)

    def get_metrics(self, trainer: L.Trainer, task: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, task)
        metrics.pop("v_num", None)
        return metrics

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")

    def init_validation_tqdm(self) -> Any:
        bar = super().init_validation_tqdm()
        bar.leave = False
        return bar
