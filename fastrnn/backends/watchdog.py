"""What becomes of a barrier that waits in vain: an error in Python instead of a GPU that hangs.

The kernel sets a flag in page-locked host memory and makes its results NaN. The flag is looked at, without waiting
for the device, before each further launch of such a kernel, and by `check_device`, which waits.
"""

from __future__ import annotations

import threading
from weakref import WeakSet

import torch
from torch import Tensor

_watchdogs: WeakSet[Watchdog] = WeakSet()


class GaveUp(RuntimeError):
    """A kernel whose parts wait for each other waited in vain; its results are NaN."""


class Watchdog:
    """Of one kind of kernel, whose `parts` all have to run at once; `way_out`: what serves in its place."""

    def __init__(self, kernel: str, parts: str, way_out: str) -> None:
        self.kernel, self.parts, self.way_out = kernel, parts, way_out
        self.flags: dict[torch.device, Tensor] = {}
        # Two flags of one device would leave kernels with one that is looked at no more.
        self._making = threading.Lock()
        _watchdogs.add(self)

    def flag(self, device: torch.device) -> Tensor:
        """The flag of a device's kernels: int32 on the CPU, zero while all is well.

        Raises:
            RuntimeError: it is not there yet, and a CUDA graph is being captured.
        """
        device = _indexed(device)
        with self._making:
            if device not in self.flags:
                pinned = device.type == "cuda"
                if pinned and torch.cuda.is_current_stream_capturing():  # which allows no page-locked memory to be made
                    raise RuntimeError(
                        f"the first call of a persistent {self.kernel} kernel on {device} cannot be captured in a CUDA "
                        "graph: make the same call once before the capture"
                    )
                with torch.inference_mode(False):  # of inference's own it could not be lowered again outside
                    self.flags[device] = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=pinned)
            return self.flags[device]

    def check(self, device: torch.device) -> None:
        """Raise if a kernel that has ended on `device` gave up waiting. It says nothing of those still running.

        Raises:
            GaveUp: a barrier was not passed in time; the outputs of that call are NaN.
        """
        device = _indexed(device)
        raised = self.flags.get(device)
        if raised is not None and raised[0]:
            raised.zero_()
            raise GaveUp(
                f"a persistent {self.kernel} kernel on {device} gave up at a barrier, as its {self.parts} did not all "
                "run at once; outputs and gradients of that call are NaN. Something else held the GPU (another "
                f"process, a debugger), or this is a defect: report it, and use {self.way_out}"
            )


def check_device(device: torch.device | str | None = None) -> None:
    """Wait for what runs on the GPU, and raise if a kernel there gave up waiting for others and left NaN.

    The kernels that run in many blocks at once, "K2" of the backend "cuda" and "persistent" of the backend "triton",
    never hang: where a block waits for seconds, results become NaN. The next call of such a kernel raises; this
    function does so for the last ones, too, as before results are kept. It costs a `torch.cuda.synchronize`, or nothing
    where no such kernel has been called, and is not to be called while a CUDA graph is being captured.

    Args:
        device: the one to wait for; by default all on which this process has called such a kernel.

    Raises:
        RuntimeError: a kernel gave up since the last check. It is raised once.
    """
    asked = None if device is None else _indexed(torch.device(device))
    called = {where for dog in _watchdogs for where in tuple(dog.flags) if asked in (None, where)}
    for where in called:
        if where.type == "cuda":
            torch.cuda.synchronize(where)
    for dog in _watchdogs:
        for where in called:
            dog.check(where)


def _indexed(device: torch.device) -> torch.device:
    """The current CUDA device where `device` leaves it open which, so that one device has one key."""
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device
