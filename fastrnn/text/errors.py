"""The errors of the harness that are the user's to mend: one line, naming the file or option and the remedy."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The command line prints the message alone and exits with code 2."""


class Interrupted(Exception):
    """Training was stopped by a signal, at a step boundary, after its checkpoint was written."""

    def __init__(self, checkpoint: str, where: str, signum: int, silent: bool = False) -> None:
        super().__init__(f"stopped at {where}; continue with --resume {checkpoint}")
        self.checkpoint = checkpoint
        self.signum = signum
        self.silent = silent  # another process of the run says it
