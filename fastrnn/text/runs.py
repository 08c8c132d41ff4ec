"""The folder of a run, and which checkpoint `--resume` means."""

from __future__ import annotations

import shutil
from pathlib import Path

from .errors import UserError

LAST, BEST = "last.ckpt", "best.ckpt"
MADE = (LAST, BEST, "config.yaml", "metrics", "tensorboard", "sample.txt", "curves.png", "confusion-matrix.png",
        "attention-*.png", "report.html")  # fmt: skip


def check_free(out: str | None) -> None:
    """Raises UserError if the folder `out` holds a run already: nothing is overwritten unasked."""
    if out is not None and (Path(out) / LAST).exists():
        raise UserError(
            f"{out} holds a run already: go on with --resume, replace it with --overwrite, or name another --out"
        )


def clear_run(folder: Path) -> None:
    """Removes the run in `folder`, if there is one, so that a new one finds none of its figures and pictures there;
    files that no run makes stay."""
    if not (folder / LAST).exists():
        return
    for path in [path for pattern in MADE for path in folder.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def run_folder(out: str | None, task: str) -> Path:
    """The folder of a run, made if need be: `out`, or the first free runs/TASK-001, -002, ...

    Raises UserError if it cannot be made.
    """
    if out is None:
        number = 1
        while (folder := Path("runs") / f"{task}-{number:03d}").exists():
            number += 1
    else:
        folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}") from None
    return folder


def resume_path(resume: str, out: str | None) -> Path | None:
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
