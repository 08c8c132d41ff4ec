"""What becomes of a barrier that waits in vain: an error in Python instead of a GPU that hangs.

The kernel sets a flag in page-locked host memory and makes its results NaN. The flag is looked at, without waiting
for the device, before each further launch of such a kernel from Python, and by `check_device`, which waits.
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
    """Of one kind of kernel, whose `parts` all have to run at once; `ways_out`: what serves in its place."""

    def __init__(self, kernel: str, parts: str, *ways_out: str) -> None:
        self.kernel, self.parts, self.ways_out = kernel, parts, ways_out
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
        """Raise if a kernel on `device` gave up waiting. It waits for none that still runs, unless one did give up.

        Raises:
            GaveUp: a barrier was not passed in time; the outputs of that call are NaN.
        """
        device = _indexed(device)
        raised = self.flags.get(device)
        if raised is not None and raised[0]:
            # Other blocks of that launch may still give up, and would raise a flag that has been lowered. In a capture
            # nothing can be waited for; torch.cuda.graph has waited before it.
            if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
                torch.cuda.synchronize(device)
            _lower({device})


def check_device(device: torch.device | str | None = None) -> None:
    """Wait for what runs on the GPU, and raise if a kernel there gave up waiting for others and left NaN.

    The kernels that run in many blocks at once, "K2" of the backend "cuda" and "persistent" of the backend "triton",
    never hang: where a block waits for seconds, results become NaN. The next call of such a kernel raises; this
    function does so for the last ones, too, as before results are kept. The replay of a CUDA graph, and with it
    `torch.compile(mode="reduce-overhead")` once it has captured, runs no Python and raises nothing: call this after
    replays, at the latest before their results are kept. It costs a `torch.cuda.synchronize`, or nothing where no such
    kernel has been called, and is not to be called while a CUDA graph is being captured.

    Args:
        device: the one to wait for; by default all on which this process has called such a kernel.

    Raises:
        RuntimeError: kernels gave up since the last check; it names all of them, and is raised once.
    """
    called = {where for dog in tuple(_watchdogs) for where in tuple(dog.flags)}
    if device is not None:
        asked = torch.device(device)
        # Which one is current can be asked only where there is one.
        called = {where for where in called if where.type == asked.type and where == _indexed(asked)}
    for where in called:
        if where.type == "cuda":
            torch.cuda.synchronize(where)
    _lower(called)


def _lower(devices: set[torch.device]) -> None:
    """Lower all flags of `devices`, which have been waited for, and raise one error for those that were up."""
    raised = []
    for dog in tuple(_watchdogs):
        for where in devices:
            flag = dog.flags.get(where)
            if flag is not None and flag[0]:
                flag.zero_()
                raised.append((f"{dog.kernel} kernel on {where}", dog))
    if not raised:
        return
    raised.sort(key=lambda found: found[0])
    kernels = "; ".join(
        f"a persistent {what} gave up at a barrier, as its {dog.parts} did not all run at once" for what, dog in raised
    )
    ways_out = " or ".join(dict.fromkeys(way for _, dog in raised for way in dog.ways_out))
    raise GaveUp(
        f"{kernels}; outputs and gradients of {'that call' if len(raised) == 1 else 'those calls'} are NaN. Something "
        f"else held the GPU (another process, a debugger), or this is a defect: report it, and use {ways_out}"
    )


def _indexed(device: torch.device) -> torch.device:
    """The current CUDA device where `device` leaves it open which, so that one device has one key."""
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device
