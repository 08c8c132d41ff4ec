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

from ..backends.watchdog import GaveUp, check_device
from .distributed import is_first, largest
from .errors import Interrupted, UserError
from .kernels import nothing_saved
from .optim import averaged, stale_epochs
from .runs import BEST, LAST


class Stopper:
    """Remembers the first SIGINT or SIGTERM; the second acts as usual."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum: int | None = None
        self.before: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Only the main thread may set handlers; elsewhere signals keep their usual effect."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.before = {s: signal.getsignal(s) for s in self.SIGNALS}
        self.listen()
        try:
            yield
        finally:
            self.restore()

    def listen(self) -> None:
        """Also called when training begins: Lightning has then set a handler of its own, which would stop between the
        batches of one step, and wait for other processes from within the handler."""
        if self.before and self.signum is None:
            for s in self.SIGNALS:
                signal.signal(s, self.remember)

    def remember(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self.restore()

    def restore(self) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)


class Saver(Callback):
    """Writes last.ckpt every `save_every` steps, at the ends of epochs and on a signal; best.ckpt when it is best.

    Everything the next step depends on is in the file, so going on from it equals never having stopped.
    The `task` of each method is a `task.Task` (typed Any: Lightning declares a plain LightningModule there).
    """

    def __init__(self, folder: Path, save_every: int, stopper: Stopper, echo: Callable[[str], None]) -> None:
        self.folder, self.save_every, self.stopper, self.echo = folder, save_every, stopper, echo
        self.clock = time.perf_counter()
        self.cut_short = False  # --max-steps was reached within an epoch

    def on_train_start(self, trainer: L.Trainer, task: Any) -> None:
        self.clock = time.perf_counter()
        self.stopper.listen()
        trainer.should_stop = self.limit_reached(trainer, task) or self.out_of_patience(task)

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress
        trainer.should_stop = self.limit_reached(trainer, task)
        if progress.is_last_batch:
            return  # the end of the epoch saves
        if progress.current.ready % task.config.accumulate:
            trainer.should_stop = False
            return  # gradients of a step not yet taken are in no checkpoint
        self.cut_short = trainer.should_stop
        signum = self.signum(task)
        if signum or self.cut_short or (self.save_every and trainer.global_step % self.save_every == 0):
            self.save(trainer, task, LAST)
        if signum:
            self.stop(signum, f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}")

    def on_train_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        epoch = trainer.current_epoch + 1
        if len(task.history) >= epoch:
            return  # Lightning calls this again for an epoch whose end was saved
        self.check_kernels(task)
        row = {"epoch": float(epoch), "step": float(trainer.global_step), **task.end_epoch()}
        better = task.epoch_ended(row)
        if not self.cut_short:  # else last.ckpt was saved within the epoch, from where the run can be lengthened
            self.save(trainer, task, LAST)
        if better:
            with averaged(trainer.optimizers[0]):  # what was validated
                self.save(trainer, task, BEST)
        self.echo(task.describe_epoch(row))
        signum = self.signum(task)
        if signum and epoch < (trainer.max_epochs or 0):
            self.stop(signum, f"the end of epoch {epoch}")
        if self.out_of_patience(task):
            trainer.should_stop = True
            self.echo(f"no lower validation loss for {task.config.patience} epochs (--patience): stopping")

    def limit_reached(self, trainer: L.Trainer, task: Any) -> bool:
        """Whether --max-steps ends the run here. Set as `should_stop`, on which Lightning still validates; its own
        max_steps would leave the last steps without a validation figure."""
        limit: int = task.config.max_steps
        return 0 < limit <= trainer.global_step

    def out_of_patience(self, task: Any) -> bool:
        """Whether --patience ends the run here; known from the history, so that it holds when resumed."""
        patience: int = task.config.patience
        return 0 < patience <= stale_epochs([row["valid_loss"] for row in task.history])

    def signum(self, task: Any) -> int:
        """The signal that any of the processes got; 0 if none."""
        return largest(self.stopper.signum or 0, task.device)

    def save(self, trainer: L.Trainer, task: Any, name: str) -> None:
        self.check_kernels(task)
        now = time.perf_counter()
        task.seconds += now - self.clock
        self.clock = now
        try:
            trainer.save_checkpoint(self.folder / name)
        except OSError as error:
            raise UserError(f"{self.folder / name}: cannot be written: {error}; what was there is kept") from error

    def check_kernels(self, task: Any) -> None:
        """Waits for the device: neither a checkpoint nor a row of the history may hold what a kernel left as NaN.

        Raises:
            UserError: a kernel of one of the processes gave up since the last checkpoint.
        """
        what = ""
        try:
            check_device()
        except GaveUp as error:
            what = str(error)
        if largest(int(bool(what)), task.device):
            raise nothing_saved(what or "a kernel of another process gave up", self.folder)

    def stop(self, signum: int, where: str) -> None:
        raise Interrupted(str(self.folder / LAST), where, signum, silent=not is_first())


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
