"""CUDA streams beside the caller's own, the events between them, and memory that one frees and another uses."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_MOST = 8


class Lanes:
    """Streams of a CUDA device; lane -1 is the caller's."""

    def __init__(self, device: torch.device, count: int) -> None:
        self.count = count
        self._streams = (*_streams(device, count), torch.cuda.current_stream(device))

    def of(self, layer: int, chunk: int) -> int:
        return (2 * layer + chunk % 2) % self.count

    def on(self, lane: int) -> Any:
        return torch.cuda.stream(self._streams[lane])

    def record(self, lane: int) -> Any:
        """An event after all that was started on `lane`."""
        return self._streams[lane].record_event()

    def wait(self, lane: int, event: Any) -> None:
        self._streams[lane].wait_event(event)

    def keep(self, lane: int, tensors: Sequence[Tensor | None]) -> None:
        """`lane` uses memory that another has allocated: whoever frees it must wait for this use."""
        for a in tensors:
            if a is not None:
                a.record_stream(self._streams[lane])


class InOrder(Lanes):
    """Where there are no streams all is done in the order it is written in."""

    def __init__(self, count: int) -> None:
        self.count = count

    def on(self, lane: int) -> Any:
        return contextlib.nullcontext()

    def record(self, lane: int) -> Any:
        return None

    def wait(self, lane: int, event: Any) -> None:
        pass

    def keep(self, lane: int, tensors: Sequence[Tensor | None]) -> None:
        pass


@functools.lru_cache(maxsize=16)
def _streams(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    return tuple([torch.cuda.Stream(device) for _ in range(count)])  # type: ignore[no-untyped-call]


def lanes_of(device: torch.device, layers: int) -> Lanes:
    count = min(2 * layers, _MOST)
    return Lanes(device, count) if device.type == "cuda" else InOrder(count)


@contextlib.contextmanager
def beside_the_caller(lanes: Lanes) -> Iterator[None]:
    start = lanes.record(-1)
    for lane in range(lanes.count):
        lanes.wait(lane, start)
    try:
        yield
    finally:  # even after an error: what is under way uses the caller's memory
        for lane in range(lanes.count):
            lanes.wait(-1, lanes.record(lane))
