"""What becomes of a barrier that waits in vain: an error in Python instead of a GPU that hangs.

The kernel sets a flag in page-locked host memory and makes its results NaN. The flag is looked at, without waiting
for the device, before each further persistent launch, and by `check`, after a synchronisation.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

LIMIT = 1 << 22  # looks at a counter, each of which takes more than half a microsecond: seconds, where a step takes few


_flags: dict[torch.device, Tensor] = {}
_making = threading.Lock()  # two flags of one device would leave kernels with one that is looked at no more


def flag(device: torch.device) -> Tensor:
    """The flag of a device's kernels: int32 on the CPU, zero while all is well."""
    with _making:
        if device not in _flags:
            pinned = device.type == "cuda"
            with torch.inference_mode(False):  # of inference's own it could not be lowered again outside
                _flags[device] = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=pinned)
        return _flags[device]


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
