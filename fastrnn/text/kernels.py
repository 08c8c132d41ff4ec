"""What the harness makes of a kernel that gave up waiting (backends/watchdog.py): one line, and nothing kept of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..backends.watchdog import GaveUp, check_device
from .errors import UserError
from .runs import LAST


def nothing_saved(what: str, folder: Path) -> UserError:
    """The end of the training run in `folder`, in which `what` happened after the last checkpoint, and how to go on."""
    last = folder / LAST
    way_on = f"continue with --resume {last}" if last.exists() else "start again"
    return UserError(f"{what}; nothing of it was saved: {way_on}")


@contextmanager
def trusted(way_on: str) -> Iterator[None]:
    """Around what computes results: waits for the device after it.

    Raises:
        UserError: a kernel gave up; the message ends with `way_on`.
    """
    try:
        yield
        check_device()
    except GaveUp as error:
        raise UserError(f"{error}; {way_on}") from error
