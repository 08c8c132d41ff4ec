"""The way back through all layers, and what autograd sees of both ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn import differentiable, gradients
from fastrnn.backends.base import FIELDS, Gradients, Saved, unflatten
from fastrnn.backends.reference import REFERENCE
from fastrnn.ordinary import ordinary
from fastrnn.recurrence import hooked, keeps_graph
from fastrnn.wavefront import lanes as streams
from fastrnn.wavefront.stack import Chunks, Grid, Stack, Turns, ends, flat, forward, wave


class _Back:
    """The way back of `forward`."""

    def __init__(self, stack: Stack, kept: tuple[Grid, Grid, Grid], needed: tuple[bool, ...], last: bool) -> None:
        self.stack, self.kept, self.needed, self.last = stack, kept, needed, last
        self.chunks, self.lanes = Chunks(stack), streams.lanes_of(stack.x.device, len(stack.weights))
        n = 1 + len(stack.states)
        self.of_weights = [needed[n + i * FIELDS : n + (i + 1) * FIELDS] for i in range(self.chunks.layers)]
        below = [i for i, wanted in enumerate(self.of_weights) if any(wanted)]
        self.of_states = list(enumerate(needed[1:n]))
        self.lowest = 0 if any(needed[:n]) else min(below)  # no layer beneath it needs a gradient
        self.turns = Turns(stack, self.lanes)
        self.grads: Grid = {}
        self.dx: Grid = {}
        self.left: Grid = {}  # events: the gradients of the states are there
        self.done: Grid = {}  # events: that of the input, too
        self.dweights: list[list[Tensor | None]] = [[None] * FIELDS] * self.chunks.layers

    def run(self, douts: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        layers, count, lanes = self.chunks.layers, self.chunks.count, self.lanes
        shape = (*self.stack.x.shape[:2], self.stack.weights[0].w_hh.shape[1])
        dy = self.stack.x.new_zeros(shape) if douts[0] is None else douts[0]
        dys, dfinals = torch.split(dy, self.stack.steps), douts[1:]
        with streams.beside_the_caller(lanes):
            for i, j in wave(layers - self.lowest, count):
                layer, k = layers - 1 - i, count - 1 - j
                lane = lanes.of(layer, k)
                with lanes.on(lane):
                    self.task(layer, k, lane, dys, dfinals)
                    if k == 0 and any(self.of_weights[layer]):
                        self.weights(layer, lane)
        own = [[self.grads[i, 0].dstates[s] for i in range(layers)] if need else None for s, need in self.of_states]
        dx = [self.dx[0, k] for k in range(count)] if self.needed[0] else None
        flat = [a for layer in self.dweights for a in layer]
        lanes.keep(-1, [*flat, *(a for part in (dx, *own) if part for a in part)])
        return [*[None if part is None else torch.cat(part) for part in (dx, *own)], *flat]

    def task(self, layer: int, k: int, lane: int, dys: Sequence[Tensor], dfinals: tuple[Tensor | None, ...]) -> None:
        lanes, (ys, finals, saved) = self.lanes, self.kept
        if layer + 1 < self.chunks.layers:
            lanes.wait(lane, self.done[layer + 1, k])
            dy = self.dx.pop((layer + 1, k))
            lanes.keep(lane, [dy])
            dy = self.chunks.dropped(layer, k, dy)
        else:
            dy = dys[k]
        if k + 1 < self.chunks.count:
            lanes.wait(lane, self.left[layer, k + 1])
            ends: tuple[Tensor | None, ...] = self.grads[layer, k + 1].dstates
            lanes.keep(lane, ends)
        else:
            ends = tuple([None if d is None else d[layer : layer + 1] for d in dfinals])
        call, y = self.chunks.call(layer, k, ys, finals), ys[layer, k]
        lanes.keep(lane, [y, *call.states, *saved[layer, k]])
        want_x = layer > self.lowest or self.needed[0]
        needed = (want_x, *(True,) * len(call.states), *self.of_weights[layer])
        engine, dy = self.stack.engine, dy.contiguous()
        self.turns.wait(lane)
        found = gradients.at_the_gates(engine, call, saved[layer, k], y, dy, ends, needed, self.last, None, gates=True)
        self.left[layer, k] = lanes.record(lane)
        self.turns.end(self.left[layer, k])
        self.grads[layer, k] = found
        if want_x:
            assert found.dgates is not None
            self.dx[layer, k] = found.dx if found.dx is not None else gradients.input_gradient(call, found.dgates)
        self.done[layer, k] = lanes.record(lane)

    def weights(self, layer: int, lane: int) -> None:
        """The last task of a layer: products over all steps, beside what the layers beneath it still have to do."""
        ys, count = self.kept[0], self.chunks.count
        own = [self.grads[layer, k] for k in range(count)]
        parts = [[getattr(g, name) for g in own] for name in ("dgates", "dh", "m")]
        above = [ys[layer, k] for k in range(count)]
        self.lanes.keep(lane, [*above, *(a for part in parts for a in part)])
        below: list[Tensor] = []
        if layer:
            self.lanes.keep(lane, [ys[layer - 1, k] for k in range(count)])
            below = [self.chunks.dropped(layer - 1, k, ys[layer - 1, k]) for k in range(count)]
        dgates, dh, m = [None if part[0] is None else torch.cat(part, 1) for part in parts]
        call = self.stack.whole(layer, torch.cat(below) if layer else self.stack.x)
        whole = Gradients(dgates, (), dh, m)
        self.dweights[layer] = gradients.weight_gradients(call, whole, torch.cat(above), self.of_weights[layer])
        for k in range(count):
            self.grads[layer, k] = Gradients(None, self.grads[layer, k].dstates)


class Layers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, meta: Any, *tensors: Any) -> Any:
        stack = stack_of(meta, tensors)
        y, finals, saved = forward(stack)
        ctx.meta, ctx.inputs, ctx.tasks = meta, len(tensors), list(y)
        ctx.hooked = hooked()
        ctx.save_for_backward(*tensors, *y.values(), *flat(finals), *flat(saved))
        ctx.set_materialize_grads(False)
        out, last = ends(y, finals)
        return out, *last

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> Any:
        tensors, n = ctx.saved_tensors, ctx.inputs
        stack = stack_of(ctx.meta, tensors[:n])
        masks = n - 1 - len(stack.states) - FIELDS * len(stack.weights)
        head: tuple[Tensor | None, ...] = (None,) * (1 + masks)
        needed = ctx.needs_input_grad[1 + masks :]
        if all(d is None for d in douts):
            return head + (None,) * (n - masks)
        if torch.is_grad_enabled() or not ordinary(douts):
            return head + tuple(_differentiable(stack, tensors[masks:n], douts, needed))
        rest, states = tensors[n + len(ctx.tasks) :], stack.cell.states
        y: Grid = dict(zip(ctx.tasks, tensors[n:], strict=False))
        finals: Grid = {t: rest[i * states : (i + 1) * states] for i, t in enumerate(ctx.tasks)}
        rest, fields = rest[len(ctx.tasks) * states :], len(Saved._fields)
        saved: Grid = {t: Saved(*rest[i * fields : (i + 1) * fields]) for i, t in enumerate(ctx.tasks)}
        last = not (ctx.hooked or keeps_graph())
        with torch.autocast(stack.x.device.type, enabled=False):
            grads = _Back(stack, (y, finals, saved), needed, last).run(douts)
        return head + tuple([g if need else None for g, need in zip(grads, needed, strict=True)])


def stack_of(meta: Any, tensors: Any) -> Stack:
    engine, cell, save, steps, at_once, noises, states = meta
    (lengths, resets), x, rest = tensors[:2], tensors[2 + noises], tensors[3 + noises :]
    masks = (lengths, resets, tensors[2 : 2 + noises])
    return Stack(engine, cell, save, steps, at_once, *masks, x, rest[:states], unflatten(rest[states:]))


def _differentiable(stack: Stack, flat: Any, douts: Any, needed: tuple[bool, ...]) -> list[Tensor | None]:
    """The gradients of `flat` as a graph that can be differentiated again, the layers one after the other."""
    with torch.enable_grad():
        own: Any = tuple([a.view_as(a) if need else a for a, need in zip(flat, needed, strict=True)])
        n = 1 + len(stack.states)
        stack = stack._replace(x=own[0], states=own[1:n], weights=unflatten(own[n:]))
        x, ends = stack.x, []
        for layer in range(len(stack.weights)):
            out = differentiable.run(REFERENCE, stack.whole(layer, x))
            x = out.y * stack.noises[layer] if stack.noises and layer + 1 < len(stack.weights) else out.y
            ends.append(out.finals)
        outs = (x, *[torch.cat(a) for a in zip(*ends, strict=True)])
        pairs = [(o, d) for o, d in zip(outs, douts, strict=True) if d is not None and o.requires_grad]
        wanted = [a for a, need in zip(own, needed, strict=True) if need]
        given = ([o for o, _ in pairs], wanted, [d for _, d in pairs])
        found = torch.autograd.grad(*given, create_graph=True, allow_unused=True)
    grads = iter(found)
    return [next(grads) if need else None for need in needed]
