"""The folder of a run, and which checkpoint `--resume` means."""

from __future__ import annotations

from pathlib import Path

from .errors import UserError

LAST, BEST = "last.ckpt", "best.ckpt"


def run_folder(out: str | None, task: str, overwrite: bool = False) -> Path:
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
