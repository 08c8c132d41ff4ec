"""The memory in which the blocks of the CUDA kernel K2 meet (csrc/cuda/group.cuh).

The flags are zero when they are made; the kernels count on from launch to launch and never clear them. Launches on one
stream follow each other, so that each stream has flags of its own. A launch that is captured in a CUDA graph, which may
be replayed beside others, gets flags that belong to the graph and are cleared in it.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends.watchdog import Watchdog

watchdog = Watchdog("CUDA", "blocks", "fastrnn.backend('native')")
_flags: dict[tuple[torch.device, int], Tensor] = {}
_making = threading.Lock()
_LEAST = 1024  # more than most devices have multiprocessors: the flags of a stream are made once


def place(plan: Any, device: torch.device, stream: int) -> tuple[Tensor, Tensor, Tensor]:
    """For a launch of `plan` on `stream`: flags, uint64 in int64; room for what is exchanged, bytes; the error flag.

    Raises:
        RuntimeError: an earlier launch on the device waited in vain.
    """
    watchdog.check(device)
    exchanged = torch.empty(plan.exchange, dtype=torch.uint8, device=device)
    return _flags_of(plan.flags, device, stream), exchanged, watchdog.flag(device)


def _flags_of(count: int, device: torch.device, stream: int) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int64, device=device)
    with _making, torch.inference_mode(False):
        found = _flags.get((device, stream))
        if found is None or found.numel() < count:
            found = _flags[device, stream] = torch.zeros(max(count, _LEAST), dtype=torch.int64, device=device)
        return found
