"""What becomes of a barrier that waits in vain: an error in Python instead of a GPU that hangs.

The kernel sets a flag in page-locked host memory and makes its results NaN. The flag is looked at, without waiting
for the device, before each further launch of such a kernel, and by `check_device`, which waits.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Watchdog:
    """Of one kind of kernel, whose `parts` all have to run at once; `way_out`: what serves in its place."""

    def __init__(self, kernel: str, parts: str, way_out: str) -> None:
        self.kernel, self.parts, self.way_out = kernel, parts, way_out
        self.flags: dict[torch.device, Tensor] = {}
        # Two flags of one device would leave kernels with one that is looked at no more.
        self._making = threading.Lock()

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
            RuntimeError: a barrier was not passed in time; the outputs of that call are NaN.
        """
        device = _indexed(device)
        raised = self.flags.get(device)
        if raised is not None and raised[0]:
            raised.zero_()
            raise RuntimeError(
                f"a persistent {self.kernel} kernel on {device} gave up at a barrier, as its {self.parts} did not all "
                "run at once; outputs and gradients of that call are NaN. Something else held the GPU (another "
                f"process, a debugger), or this is a defect: report it, and use {self.way_out}"
            )


def _indexed(device: torch.device) -> torch.device:
    """The current CUDA device where `device` leaves it open which, so that one device has one key."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
