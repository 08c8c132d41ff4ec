"""The op made of PyTorch operations: for second derivatives, forward mode, and whoever must see operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrnn import packing
from fastrnn.backends.base import NOTHING, STATES, Backend, Call, Output
from fastrnn.backends.reference import REFERENCE
from fastrnn.ordinary import dual, transformed


def run(backend: Backend, call: Call, trail: bool = False) -> Output:
    """Run `call` on a differentiable backend, under torch.func and forward mode on the reference."""
    if transformed() or dual():
        backend = REFERENCE
    single = call.single_step
    if single and backend.takes_single_steps:
        result = backend.forward(call, NOTHING)
        return Output(result.y, result.finals)
    result = packing.run(backend, call.as_sequence() if single else call, STATES if trail else NOTHING)
    if single:
        finals = tuple([a.squeeze_(0) for a in result.finals])  # no views, which FSDP2 warns of
        return Output(finals[0], finals)
    c = result.saved.c
    return Output(result.y, result.finals, (at_every_step(call, c),) if trail and c is not None else ())


def at_every_step(call: Call, c: Tensor) -> Tensor:
    """`Saved.c` as the user sees it, (S, T, B, H) or (S, N, H)."""
    return c.view(c.shape[0], *call.rows, c.shape[-1]).to(call.x.dtype)


def backward(
    call: Call,
    flat: tuple[Tensor | None, ...],
    douts: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    create_graph: bool = True,
    backend: Backend = REFERENCE,
) -> list[Tensor | None]:
    """The gradients of `flat` (x, states, weights, per-unit parameters), as a graph that can be differentiated again.

    It differentiates with respect to views of the inputs, one each, so that it ends at this call and
    counts an input that comes twice once in each place. `douts` are the gradients of y (not for a single
    step), the final states and the trail.
    """
    with torch.enable_grad():
        own: Any = tuple([a if a is None or not need else a.view_as(a) for a, need in zip(flat, needed, strict=True)])
        if not create_graph:
            own = tuple(
                [a if a is None or not n else a.detach().requires_grad_() for a, n in zip(own, needed, strict=True)]
            )
        call = call.with_flat(own)
        result = run(backend, call, trail=len(douts) > 1 + call.cell.states)
        outs = result.finals if call.single_step else (result.y, *result.finals, *result.trail)
        pairs = [(o, d) for o, d in zip(outs, douts, strict=True) if d is not None and o.requires_grad]
        grads = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                [a for a, need in zip(own, needed, strict=True) if need],
                [d for _, d in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return [next(grads) if need else None for need in needed]
