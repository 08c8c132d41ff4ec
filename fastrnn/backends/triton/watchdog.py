"""What becomes of a barrier that waits in vain: an error in Python instead of a GPU that hangs.

The kernel sets a flag in page-locked host memory and makes its results NaN. The flag is looked at, without waiting
for the device, before each further persistent launch, and by `check`, after a synchronisation.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

LIMIT = 1 << 22  # looks at a counter, each of which takes more than half a microsecond: seconds, where a step takes few


@functools.lru_cache(maxsize=64)
def flag(device: torch.device) -> Tensor:
    """The flag of a device's kernels: int32, zero while all is well."""
    return torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")


def check(device: torch.device) -> None:
    """Raise if a kernel that has ended on `device` gave up waiting. It says nothing of those still running.

    Raises:
        RuntimeError: a barrier was not passed in time; the outputs of that call are NaN.
    """
    raised = flag(device)
    if raised[0]:
        raised.zero_()
        raise RuntimeError(
            f"a persistent Triton kernel on {device} gave up at a barrier, as its programs did not all run at once; "
            "outputs and gradients of that call are NaN. Something else held the GPU (another process, a debugger), "
            "or this is a defect: report it, and use fastrnn.backend('native') or FASTRNN_TRITON_SCHEDULE=stepwise"
        )
