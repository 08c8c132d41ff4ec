"""Checkpoints: written atomically, checked on loading, read as data (`weights_only`), never as code.

A file is Lightning's checkpoint (weights, optimiser, loop counters, loader position) with one more entry, "fastrnn":
the task, its configuration, the tokenizer, the versions, and what exact resuming needs.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from .errors import UserError

FORMAT = 2
HEAD = {"format", "task", "config", "tokenizer", "data", "versions", "run"}  # of the entry "fastrnn"


def versions() -> dict[str, str]:
    """Versions of what made a checkpoint."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("fastrnn", "lightning", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def save(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Writes `checkpoint` to `path` so that a reader, or a crash, sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):  # torch's own, of a full disk
            raise error.__context__ from None
        raise


def load(path: str | Path, task: str | None = None) -> dict[str, Any]:
    """The checkpoint at `path`, on the CPU.

    Raises UserError for a missing, truncated, damaged or foreign file, and for one of another task than `task`.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a checkpoint file; its checkpoints are {path}/best.ckpt and last.ckpt")
    verify(path)
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's message says how to run what the file holds
        raise UserError(f"{path}: not a checkpoint of fastrnn: it holds more than data, and is not read") from None
    except Exception as error:  # torch raises many types for what a zip archive may hold
        raise UserError(f"{path}: not a checkpoint of fastrnn ({str(error).splitlines()[0]})") from None
    head = checkpoint.get("fastrnn") if isinstance(checkpoint, dict) else None
    if not isinstance(head, dict) or not isinstance(head.get("format"), int) or not head.keys() >= HEAD:
        raise UserError(f"{path}: a PyTorch file, but not a checkpoint of fastrnn")
    if head["format"] < FORMAT:
        raise UserError(
            f"{path}: of format {head['format']}, and this fastrnn reads {FORMAT} only: train again, or use the "
            f"fastrnn that wrote it ({head['versions']['fastrnn']})"
        )
    if head["format"] > FORMAT:
        raise UserError(f"{path}: written by a newer fastrnn ({head['versions']['fastrnn']}); upgrade fastrnn")
    if task is not None and head["task"] != task:
        raise UserError(f"{path}: a checkpoint of task {head['task']}, not {task}")
    return checkpoint


def weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of the model within a task's `model`."""
    return {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items() if k.startswith("model.")}


def verify(path: Path) -> None:
    """Compares the checksum of every record: torch.load alone would read flipped bits as weights."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(f"{path}: truncated, or not a checkpoint of fastrnn ({error})") from None
    if damaged is not None:
        raise UserError(f"{path}: damaged (checksum of {damaged})")
