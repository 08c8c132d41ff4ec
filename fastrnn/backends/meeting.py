"""The memory in which the blocks of the CUDA kernel K2 meet (csrc/cuda/group.cuh), made anew for each launch.

Nothing of it outlives the call. Flags that were kept for a stream would lie wherever the allocator of the moment put
them: under torch.compile(mode="reduce-overhead") the call that comes before the capture runs in the memory of the graph
to come, where torch allows no tensor that it does not know, and takes the memory back. So the flags are cleared on the
stream before each launch, a few hundred numbers beside a loop over all time steps, in a captured call as in any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrnn.backends.watchdog import Watchdog

watchdog = Watchdog("CUDA", "blocks", "fastrnn.backend('native')")


def place(plan: Any, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For a launch of `plan` on the current stream, which has to keep them until then.

    Returns:
        Flags, zero, uint64 in int64; room for what is exchanged, bytes; the error flag.

    Raises:
        RuntimeError: an earlier launch on the device waited in vain, or this is the first one and is being captured.
    """
    watchdog.check(device)
    flags = torch.zeros(plan.flags, dtype=torch.int64, device=device)
    return flags, torch.empty(plan.exchange, dtype=torch.uint8, device=device), watchdog.flag(device)
