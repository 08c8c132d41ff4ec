"""Several layers side by side on a GPU: the sequence passes through them in chunks, like a wave.

Layer l runs chunk k while layer l - 1 runs chunk k + 1, and on the way back while layer l + 1 runs chunk k - 1. Each
layer has two streams by turns, so that the input's product of a chunk, and the gradient of its input, run beside the
recurrence of its neighbour, also where there is one layer only. The backends know nothing of it but
`Backend.forward_after`. Gradients of the weights are products over all steps, as ever. Under 16 bits a state is rounded
to them where it passes from chunk to chunk.

No more recurrences are under way than the GPU has multiprocessors for (`Backend.share`). Kernels whose blocks wait for
each other are launched cooperatively, which promises that all blocks of a launch run at once, or the launch waits; that
they would all find room in any case makes the wavefront independent of how the hardware keeps that promise.

FASTRNN_WAVEFRONT: "auto", the rule of `decide`; 0, never; a number of steps, chunks of so many on any device.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop

from fastrnn.backends.base import NOTHING, Backend, Query, Weights, flatten
from fastrnn.cells import CELLS, Cell
from fastrnn.ordinary import ordinary
from fastrnn.wavefront.backward import Layers
from fastrnn.wavefront.stack import Stack, States, ends, forward

SETTING = "FASTRNN_WAVEFRONT"
_IN_GRAPHS, _BY_THE_HOST = 64, 256  # steps of a chunk, where a CUDA graph will start it and where Python does


class Decision(NamedTuple):
    steps: int  # of a chunk; 0: the layers run one after the other
    reason: str
    at_once: int = 1  # recurrences for which there is room


def decide(engine: Backend, query: Query, layers: int, trail: bool = False) -> Decision:
    """Chunks of how many steps, and why.

    Raises:
        ValueError: FASTRNN_WAVEFRONT is none of its values.
    """
    asked = os.environ.get(SETTING, "auto")
    if asked != "auto" and not asked.isdecimal():
        raise ValueError(f"{SETTING}: expected 'auto', 0 or a number of steps, got {asked!r}")
    forced = None if asked == "auto" else int(asked)
    steps = forced or (_IN_GRAPHS if _captured(query) else _BY_THE_HOST)
    why_not = f"{SETTING}=0" if forced == 0 else _impossible(engine, query, trail, steps)
    share = engine.share(query) if why_not is None else 1.0
    if why_not is None and forced is None:
        why_not = None if share <= 0.5 else f"one of them takes {share:.0%} of the GPU"
        chunks = -(-query.T // steps)
        steps = -(-query.T // chunks)  # none much shorter than the others
    if why_not is not None:
        return Decision(0, f"layers one after the other: {why_not}")
    at_once = max(int(1 / share), 1)
    what = f"wavefront: {layers} layers" if layers > 1 else "the input's product beside the recurrence"
    room = f", {at_once} at a time" if at_once < layers else ""
    return Decision(steps, f"{what}{room}, {-(-query.T // steps)} chunks of {steps} steps", at_once)


def _impossible(engine: Backend, query: Query, trail: bool, steps: int) -> str | None:
    if query.S > 1:
        return "those of two directions need the whole sequence"
    if query.ragged and not query.lengths:
        return "the batch is packed"
    if CELLS[query.cell].params:
        return "the cell has per-unit parameters"
    if trail:
        return "all states are asked for"
    if engine.differentiable:
        return f"{engine.name} is not run in chunks"
    if query.device != "cuda" and os.environ.get(SETTING, "auto") == "auto":
        return f"a wavefront is for CUDA devices, this is {query.device}"
    if type(query.T) is not int:
        return "T is unknown"
    return f"T={query.T} is one chunk of {steps} steps" if steps >= query.T else None


def _captured(query: Query) -> bool:
    return query.device == "cuda" and torch.cuda.is_current_stream_capturing()


def run(
    engine: Backend,
    cell: Cell,
    save: str,
    wave: Decision,
    dropout: float,
    x: Tensor,
    states: States,
    weights: Sequence[Weights],
    lengths: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, States] | None:
    """y (T, B, P) and the final states of all layers; None where tensors are not plain memory."""
    flat = (x, *states, *flatten(tuple(weights)))
    if not ordinary(flat):
        return None
    noises: tuple[Tensor, ...] = ()
    if dropout:  # drawn in the order of the layers, so that a seed draws what it always draws
        out = weights[0].w_hh.shape[1]
        noises = tuple([drop(x.new_ones(*x.shape[:2], out), dropout, True) for _ in weights[1:]])
    stack = Stack(engine, cell, save, wave.steps, wave.at_once, lengths, resets, noises, x, states, tuple(weights))
    if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in flat):
        meta = (engine, cell, save, wave.steps, wave.at_once, len(noises), len(states))
        y, *finals = Layers.apply(meta, lengths, resets, *noises, *flat)  # type: ignore[no-untyped-call]
        return y, tuple(finals)
    y, finals, _ = forward(stack._replace(save=NOTHING))
    return ends(y, finals)
