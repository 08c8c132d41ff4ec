"""A run of `fastrnn train lm` in one of two processes, in which a kernel gives up: run by test_text_gave_up.py.

Arguments: how (a key of WAYS), the rank that it happens to, then those of the command line.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import torch

from fastrnn.backends import meeting
from fastrnn.cli import main
from fastrnn.text.tasks.lm import LmTask

STEP = 55  # with steps 20 apart saved, the epoch having 50
CPU = torch.device("cpu")


def seen_at_a_checkpoint() -> None:
    meeting.watchdog.flag(CPU).fill_(1)


def seen_by_the_next_call() -> None:
    meeting.watchdog.flag(CPU).fill_(1)
    meeting.watchdog.check(CPU)


def nothing() -> None:
    pass


def wait_long() -> None:
    """As within a collective that another process never enters, and that no closed connection ends."""
    time.sleep(3600)


WAYS: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {  # what that rank does, and the other
    "checkpoint": (seen_at_a_checkpoint, nothing),
    "call": (seen_by_the_next_call, nothing),
    "stuck": (seen_by_the_next_call, wait_long),
}


def run(how: str, rank: str, line: list[str]) -> int:
    own = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    act = WAYS[how][own != rank]
    plain = LmTask.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == STEP:
            act()
        return plain(self, batch, batch_idx)

    LmTask.training_step = training_step
    return main(line)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2], sys.argv[3:]))
