"""A run from end to end, for any task: what `--resume` means, data, the Lightning trainer, saving, the report."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml  # type: ignore[import-untyped]
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from ..backends.watchdog import GaveUp
from . import checkpoint as checkpoints
from .callbacks import ProgressBar, Saver, Stopper
from .config import RunConfig, resumed
from .distributed import FOLDER, alone, check_launch, is_first
from .errors import UserError
from .kernels import nothing_saved, trusted
from .runs import BEST, check_free, clear_run, resume_path, run_folder
from .task import Echo, Result, Task

PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def train(
    kind: type[Task],
    config: Any,
    resume: str | None = None,
    given: dict[str, Any] | None = None,
    overwrite: bool = False,
    echo: Echo = print,
) -> Any:
    """Trains a task as `config` says and returns its Result; the commands `fastrnn train TASK`.

    Args:
        config: of the run, a kind.Config; when resuming, only what `given` names of it counts.
        resume: a checkpoint or run folder to go on from; "auto" is config.out, from the start if it is empty.
        given: options set explicitly, by field name; when resuming they are compared with the saved run's.
        overwrite: replace a run that lies in config.out.
        echo: gets each line of the report.

    Raises:
        UserError: bad data, options or checkpoint. Interrupted: after a signal, with the checkpoint written.
    """
    lines: list[str] = []

    def say(line: str) -> None:
        if is_first():
            lines.append(line)
            echo(line)

    start = None if resume is None else resume_path(resume, config.out)
    if resume is not None and start is None:
        say(f"nothing to resume in {config.out}: starting from the beginning")
    saved = None if start is None else checkpoints.load(start, kind.name)["fastrnn"]
    config = resumed(kind.Config(**saved["config"]), given or {}) if saved else kind.configure(config)
    check_launch(config, start is not None)
    check_device(config)
    check_packages(kind.packages(config))
    out = wanted_folder(config, start, given or {}, overwrite)
    if config.threads:
        torch.set_num_threads(config.threads)
    data = kind.load(config, saved)
    if saved is not None and saved["data"] != data.mark:
        raise UserError(f"--resume: the training data is not what {start} was trained on ({data.name})")
    torch.manual_seed(config.seed)
    task = kind(config, data)
    folder = agreed_folder(kind.name, out, config.world)
    task.config = config = dataclasses.replace(config, out=str(folder))
    if is_first():  # from here on the run begins: whatever was wrong before has left the folder as it was
        if start is None:
            clear_run(folder)
        (folder / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
    for line in [*task.describe(), f"{torch.get_num_threads()} threads, run in {folder}"]:
        say(line)
    fit(task, folder, start, say)
    return conclude(task, folder, say, lines)


def wanted_folder(config: RunConfig, start: Path | None, given: dict[str, Any], overwrite: bool) -> str | None:
    """The folder that is asked for: of a continued run its own, or another. UserError: a run is in the way."""
    if start is None:
        out, free = config.out, overwrite
    else:
        out = given.get("out") or str(start.parent)
        free = overwrite or Path(out).resolve() == start.parent.resolve()
    if is_first() and not free:
        check_free(out)
    return out


def agreed_folder(name: str, out: str | None, world: int) -> Path:
    """`out`, or a new folder: chosen by the first process, told to those that Lightning starts after it."""
    if not is_first():
        out = os.environ.get(FOLDER) or out
        if out is None:
            raise UserError("a run that a launcher starts needs --out FOLDER, the same for all processes")
        return Path(out)
    folder = run_folder(out, name)
    if world > 1:
        os.environ[FOLDER] = str(folder)
    return folder


class CheckedCheckpointIO(TorchCheckpointIO):
    """Lightning's way to disk: our atomic writer, and our reader that checks before it loads."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        checkpoints.save(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return checkpoints.load(path)


def plugins() -> list[Any]:
    found: list[Any] = [CheckedCheckpointIO()]
    if SLURMEnvironment.detect():  # without Lightning's own way to save and requeue
        found.append(SLURMEnvironment(auto_requeue=False))
    return found


def fit(task: Task, folder: Path, resume: Path | None, echo: Echo) -> None:
    """Trains `task` on its loaders, checkpoints in `folder`, from `resume` on if given.

    Raises Interrupted on SIGINT or SIGTERM, after the step in progress and its checkpoint. UserError: a kernel gave up.
    """
    config, stopper, data = task.config, Stopper(), task.data
    for name in ("lightning.pytorch", "lightning.fabric"):  # its banners and hints are logged as INFO
        logging.getLogger(name).setLevel(logging.WARNING)
    progress = sys.stderr.isatty() if config.progress is None else config.progress
    saver = Saver(folder, config.save_every, stopper, echo)
    trainer = L.Trainer(
        accelerator=config.device,
        devices=config.devices,
        num_nodes=config.nodes,
        strategy=strategy(config),
        precision=PRECISION[config.precision],  # type: ignore[arg-type]
        max_epochs=config.epochs,
        accumulate_grad_batches=config.accumulate,
        log_every_n_steps=max(1, min(config.log_every, len(data.train) // config.accumulate)),
        logger=loggers(config, folder),
        plugins=plugins(),
        callbacks=[saver, *([ProgressBar()] if progress else [])],
        enable_progress_bar=progress,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    with stopper.listening(), warnings.catch_warnings():
        # Lightning 2.6 calls a pytree function that torch 2.13 renames; nothing a user could mend.
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", module="lightning.pytorch.utilities._pytree")
        # The task has already summed over processes what it logs.
        warnings.filterwarnings("ignore", ".*It is recommended to use .*sync_dist=True")
        # Said once all layers are unfrozen, of what freezing needs (`strategy`).
        warnings.filterwarnings("ignore", ".*find_unused_parameters=True was specified in DDP constructor")
        # A linear layer's output over time is a view, and nothing edits it in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        ckpt = None if resume is None else str(resume)
        try:
            trainer.fit(task, data.train, data.valid, ckpt_path=ckpt, weights_only=True)
        except GaveUp as error:  # raised by the call after the one that gave up, within a step of this process alone
            end_others(trainer)
            raise nothing_saved(str(error), folder) from error


def end_others(trainer: L.Trainer) -> None:
    """Ends the processes that Lightning has started from this one, as they would wait for it within a step. Where this
    one was started by another, that one ends the rest when it ends with an error."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(signal.SIGKILL)  # nothing less ends who waits within NCCL


def conclude(task: Task, folder: Path, echo: Echo, lines: list[str]) -> Any:
    """The task's result, and the report of the run; in the first process only (the others return None)."""
    if not is_first():
        return None
    way_on = f"its results are not to be trusted: score {folder / BEST} anew with fastrnn evaluate"
    with alone(), trusted(way_on):
        result: Result = task.finish(folder, echo)
    if task.config.report:
        from .report import write_report

        page = write_report(task, result, lines)
        echo(f"report: {page}")
    return result


def loggers(config: RunConfig, folder: Path) -> list[Any]:
    found: list[Any] = [CSVLogger(str(folder), name="metrics")]
    if config.tensorboard:
        from lightning.pytorch.loggers import TensorBoardLogger

        found.append(TensorBoardLogger(str(folder), name="tensorboard"))
    return found


def strategy(config: RunConfig) -> Any:
    """Lightning's strategy for `config`: one process, DDP, or FSDP2."""
    if config.strategy == "fsdp":
        from .sharding import ShardedStrategy

        return ShardedStrategy(config.world)
    if config.world == 1 and config.strategy != "ddp":
        return "auto"
    # Layers frozen for a while have no gradients to be averaged, which DDP must be told to expect.
    return "ddp_find_unused_parameters_true" if getattr(config, "pretrained", None) else "ddp"


def check_packages(messages: dict[str, str]) -> None:
    """Raises UserError with the message of the first package that is missing: at the start of a run, not at its end."""
    for name, message in messages.items():
        try:
            import_module(name)
        except ModuleNotFoundError:
            raise UserError(message) from None


def check_device(config: RunConfig) -> None:
    """Raises UserError where this machine has no such device, or the device no such arithmetic."""
    present = {
        "auto": True,
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    device = config.device
    if device not in present:
        raise UserError(f"--device must be one of {', '.join(present)}, got {device}")
    if not present[device]:
        raise UserError(f"--device {device}: torch finds no such device on this machine")
    if config.precision == "fp16" and config.strategy == "fsdp":
        raise UserError("--strategy fsdp trains in fp32 or bf16, not --precision fp16")
    if config.precision == "fp16" and not (present["cuda"] and device in ("auto", "cuda")):
        raise UserError("--precision fp16 trains on CUDA devices only; --precision bf16 trains on the CPU, too")
