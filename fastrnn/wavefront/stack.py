"""All layers of a call in chunks, and the way forward through them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn.backends.base import Backend, Call, Weights
from fastrnn.cells import Cell
from fastrnn.wavefront import lanes as streams

States = tuple[Tensor, ...]
Grid = dict[tuple[int, int], Any]  # by layer and chunk


def wave(layers: int, chunks: int) -> Iterator[tuple[int, int]]:
    """Layers and chunks, each after those it depends on; those of one diagonal may run at the same time."""
    for d in range(layers + chunks - 1):
        for layer in range(max(0, d - chunks + 1), min(layers, d + 1)):
            yield layer, d - layer


class Stack(NamedTuple):
    """A call of all layers: what is no tensor, then masks, then inputs."""

    engine: Backend
    cell: Cell
    save: str
    steps: int  # of a chunk
    at_once: int  # recurrences for which there is room
    lengths: Tensor | None  # (B,)
    resets: Tensor | None  # (T, B)
    noises: tuple[Tensor, ...]  # what dropout multiplies by, between layers, (T, B, P); or ()
    x: Tensor  # (T, B, I)
    states: States  # each (L, B, H or P), or ()
    weights: tuple[Weights, ...]  # per layer

    def whole(self, layer: int, x: Tensor) -> Call:
        own = tuple([a[layer : layer + 1] for a in self.states])
        return Call(self.cell, x, own, (self.weights[layer],), (False,), self.lengths, None, self.resets)


class Chunks:
    """The calls of a stack by layer and chunk, whose inputs and states come from others."""

    def __init__(self, stack: Stack) -> None:
        self.stack, T = stack, stack.x.shape[0]
        self.xs = torch.split(stack.x, stack.steps)
        self.count, self.layers = len(self.xs), len(stack.weights)
        self._noises = [torch.split(a, stack.steps) for a in stack.noises]
        self._resets = None if stack.resets is None else torch.split(stack.resets, stack.steps)
        self._lengths: list[Tensor] | None = None
        if stack.lengths is not None:
            starts = range(0, T, stack.steps)
            self._lengths = [(stack.lengths.long() - t).clamp_(0, min(stack.steps, T - t)) for t in starts]

    def dropped(self, layer: int, chunk: int, a: Tensor) -> Tensor:
        """Between layers `layer` and `layer` + 1; a gradient on its way back, too."""
        return a * self._noises[layer][chunk] if self._noises else a

    def call(self, layer: int, k: int, y: Grid, finals: Grid) -> Call:
        """The arguments are those of the tasks before this one."""
        x = self.dropped(layer - 1, k, y[layer - 1, k]) if layer else self.xs[k]
        lengths, resets = [None if a is None else a[k] for a in (self._lengths, self._resets)]
        call = self.stack.whole(layer, x)._replace(lengths=lengths, resets=resets)
        return call._replace(states=finals[layer, k - 1]) if k else call


class Turns:
    """Lets no more recurrences begin than there is room for: each waits for the one so many before it."""

    def __init__(self, stack: Stack, lanes: streams.Lanes) -> None:
        self.lanes = lanes
        self.needed = stack.at_once < len(stack.weights)  # those of one layer wait for each other anyway
        self.ended: deque[Any] = deque(maxlen=stack.at_once)

    def wait(self, lane: int) -> None:
        if self.needed and len(self.ended) == self.ended.maxlen:
            self.lanes.wait(lane, self.ended[0])

    def end(self, event: Any) -> None:
        self.ended.append(event)


def ends(y: Grid, finals: Grid) -> tuple[Tensor, States]:
    layer, chunk = max(finals)
    last = [finals[i, chunk] for i in range(layer + 1)]
    return torch.cat([y[layer, k] for k in range(chunk + 1)]), tuple([torch.cat(a) for a in zip(*last, strict=True)])


def forward(stack: Stack) -> tuple[Grid, Grid, Grid]:
    """y, the final states and what is saved, of each task. Without a backward the y of the last layer alone is left."""
    chunks, lanes = Chunks(stack), streams.lanes_of(stack.x.device, len(stack.weights))
    y: Grid = {}
    finals: Grid = {}
    saved: Grid = {}
    done: Grid = {}
    turns = Turns(stack, lanes)

    def task(layer: int, k: int, lane: int) -> None:
        def ready() -> None:
            if k:
                lanes.wait(lane, done[layer, k - 1])
                lanes.keep(lane, finals[layer, k - 1])
            turns.wait(lane)

        if layer:
            lanes.wait(lane, done[layer - 1, k])
            lanes.keep(lane, [y[layer - 1, k]])
        call = chunks.call(layer, k, y, finals)
        y[layer, k], finals[layer, k], saved[layer, k] = stack.engine.forward_after(call, stack.save, ready)
        done[layer, k] = lanes.record(lane)
        turns.end(done[layer, k])
        if layer and not stack.save:
            del y[layer - 1, k]

    with streams.beside_the_caller(lanes):
        for layer, k in wave(chunks.layers, chunks.count):
            lane = lanes.of(layer, k)
            with lanes.on(lane):
                task(layer, k, lane)
    lanes.keep(-1, [*y.values(), *flat(finals), *flat(saved)])
    return y, finals, saved


def flat(grid: Grid) -> list[Tensor | None]:
    return [a for task in grid.values() for a in task]
