"""From a call to a kernel's arguments.

Tensors of a launch, contiguous but for what is said; symbols as in `fastrnn.backends.base`, XW >= G:

    XG (S, N, XW*H)   x W_ih^T + b_ih in its first G blocks; forward leaves the tape in its first V, backward takes it
    W (S, G*H, H), BIAS (S, G*H)   W_hh and b_hh
    H0, C0, HN, CN, DHN, DCN, DH0, DC0 (S, B, H)   states at both ends, and their gradients
    P (S, NP, H)      the per-unit parameters; DP (S, batch tiles, NP, H) fp32, the tiles' parts of their gradients
    Y, DY (N, S*H)    C, DC (S, N, H)   DG (S, N, D*H), which may lie where the tape does
    LENGTHS (B,)      OFFSETS (T,) first rows of the steps of a packed batch    RESETS uint8, a row each

What is not there is given as some other tensor, which the kernel's flags tell it not to touch.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn.backends.base import Call
from fastrnn.backends.triton import device, watchdog
from fastrnn.backends.triton.plan import PERSISTENT, RESIDENT, Plan

FAST_TYPES = (torch.bfloat16, torch.float16)


class Shape(NamedTuple):
    """Sizes and flags that forward and backward share."""

    T: int
    B: int
    N: int
    H: int
    S: int
    reverse: int  # bit s: stream s runs from the last step to the first
    numbers: tuple[Tensor, Tensor, Tensor]  # LENGTHS, OFFSETS, RESETS
    flags: dict[str, Any]


def shape_of(call: Call, precision: str) -> Shape:
    x, S = call.x, len(call.weights)
    lengths, offsets = call.lengths, None
    if call.batch_sizes is not None:
        T, B, N = call.batch_sizes.numel(), call.batch, x.shape[0]
        lengths, offsets = _places(call.batch_sizes, B, x.device)
    else:
        T, B = x.shape[:2]
        N = T * B
        lengths = None if lengths is None else lengths.contiguous()
    resets = None if call.resets is None else call.resets.contiguous().view(torch.uint8)
    flags = {
        "G": call.cell.gates,
        "NS": call.cell.states,
        "NP": call.cell.params,
        "V": call.cell.tape,
        "S": S,
        "GIVEN": bool(call.states),
        "RAGGED": lengths is not None,
        "PACKED": offsets is not None,
        "RESET": resets is not None,
        "PRECISION": precision,
        "FAST": x.dtype in FAST_TYPES,
        "enable_fp_fusion": True,  # whatever Triton's own default, which changes
    }
    numbers = tuple([x if a is None else a for a in (lengths, offsets, resets)])
    return Shape(T, B, N, call.hidden, S, sum(r << s for s, r in enumerate(call.reverse)), numbers, flags)  # type: ignore[arg-type]


def _places(batch_sizes: Tensor, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lengths of the rows and first rows of the steps, by one copy to the device."""
    T = batch_sizes.numel()
    lengths = (batch_sizes[:, None] > torch.arange(batch, device="cpu")).sum(0)
    both = torch.cat((torch.cumsum(batch_sizes, 0) - batch_sizes, lengths)).to(device)
    return both[T:], both[:T]


def recurrent(call: Call, field: str) -> Tensor | None:
    """w_hh or b_hh of all streams, (S, ...)."""
    parts = [getattr(w, field) for w in call.weights]
    if parts[0] is None:
        return None
    return parts[0].contiguous() if len(parts) == 1 else torch.stack(parts)


def own_values(call: Call) -> Tensor:
    """The cell's per-unit parameters of all streams, (S, NP, H); some other tensor without."""
    return torch.stack([torch.stack(own) for own in call.params]) if call.params else call.x


def forward(
    call: Call,
    shape: Shape,
    plan: Plan,
    xg: Tensor,
    y: Tensor,
    finals: tuple[Tensor, ...],
    c: Tensor | None,
    tape: bool,
) -> None:
    """Fill y, the final states, c if it is given, and the tape over xg."""
    cell, x = call.cell, call.x
    bias, states = recurrent(call, "b_hh"), _pair(call.states, x)
    weights = (recurrent(call, "w_hh"), x if bias is None else bias, own_values(call))
    tensors = [xg, *weights, *states, y, *_pair(finals, x), x if c is None else c]
    flags = {
        **shape.flags,
        "STEP": _compiled(cell.step),
        "XW": xg.shape[-1] // shape.H,
        "BIASED": bias is not None,
        "SAVE_C": c is not None,
        "SAVE_TAPE": tape,
    }
    _launch("forward", plan, shape, tensors, flags, shape.T)


def backward(
    call: Call,
    shape: Shape,
    plan: Plan,
    y: Tensor,
    c: Tensor | None,
    tape: Tensor,
    dy: Tensor,
    dfinals: tuple[Tensor | None, ...],
    dc: Tensor | None,
    dgates: Tensor,
    dstates: tuple[Tensor, ...],
) -> tuple[tuple[Tensor, ...], ...]:
    """Fill dgates and, where the call has initial states, dstates; return the gradients of the per-unit parameters."""
    cell, x = call.cell, call.x
    dh_n, dc_n = (*dfinals, None)[:2]
    given = (y, c, tape, dy, dh_n, dc_n, dc)
    weights = (recurrent(call, "w_hh"), own_values(call))
    tensors = [*weights, *_pair(call.states, x), *[x if a is None else a for a in given]]
    parts = x  # each batch tile's part of the sums over the rows
    if call.params:
        sizes = (shape.S, -(-shape.B // plan.BB), cell.params, shape.H)
        parts = torch.zeros(sizes, dtype=torch.float32, device=x.device)
    tensors += [dgates, *_pair(dstates, x), parts]
    flags = {
        **shape.flags,
        "STEP_BACKWARD": _compiled(cell.step_backward),
        "D": cell.dgates,
        "SPLIT": len(cell.split),
        "XW": tape.shape[-1] // shape.H if cell.tape else 0,
        "HAS_DH": dh_n is not None,
        "HAS_DC": dc_n is not None,
        "TRAIL": dc is not None,
    }
    _launch("backward", plan, shape, tensors, flags, shape.T + bool(call.states))
    return tuple([own.unbind() for own in parts.sum(1).to(x.dtype)]) if call.params else ()


@functools.lru_cache(maxsize=64)
def _compiled(function: Any) -> Any:
    """A cell's text as a kernel may call it; the interpreter calls it as it is."""
    return function if device.interpreted() else importlib.import_module("triton").jit(function)


@functools.lru_cache(maxsize=16)
def kernel_of(schedule: str, direction: str) -> Any:
    kernel = getattr(importlib.import_module(f"fastrnn.backends.triton.{schedule}"), direction)
    if schedule == PERSISTENT and device.interpreted():
        return importlib.import_module("fastrnn.backends.triton.interpreter").Together(kernel)
    return kernel


def _pair(states: tuple[Tensor, ...], other: Tensor) -> tuple[Tensor, Tensor]:
    """h and c, `other` in the place of what is not there."""
    h, c = (*[a.contiguous() for a in states], other, other)[:2]
    return h, c


def _launch(direction: str, plan: Plan, shape: Shape, tensors: list[Any], flags: dict[str, Any], steps: int) -> None:
    try:
        _start(direction, plan, shape, tensors, flags, steps)
    except Exception as error:
        if type(error).__name__ != "OutOfResources":  # Triton's, which is not imported for its name alone
            raise
        way_out = "FASTRNN_TRITON_SCHEDULE=stepwise, or backend 'native'"
        raise RuntimeError(f"the Triton kernel ({plan}) does not fit this device: {error}; use {way_out}") from error


def _start(direction: str, plan: Plan, shape: Shape, tensors: list[Any], flags: dict[str, Any], steps: int) -> None:
    S, B = shape.S, shape.B
    tiles, unit_tiles = -(-B // plan.BB), -(-shape.H // plan.BN)
    sizes = (shape.T, B, shape.N, shape.H, shape.reverse)
    flags |= {"BB": plan.BB, "num_warps": plan.warps, "num_stages": plan.stages}
    kernel = kernel_of(plan.schedule, direction)
    if plan.schedule == RESIDENT:
        kernel[tiles, S](*tensors, *shape.numbers, *sizes, HP=plan.BN, **flags)
        return
    flags |= {"BN": plan.BN, "BK": plan.BK}
    if plan.schedule == PERSISTENT:
        arrived = torch.zeros(S, tiles, dtype=torch.int32, device=tensors[0].device)
        error = watchdog.flag(tensors[0].device)
        flags |= {"NK": -(-shape.H // plan.BK), "launch_cooperative_grid": True}
        grid = (tiles, unit_tiles, S)
        kernel[grid](*tensors, *shape.numbers, arrived, error, *sizes, watchdog.LIMIT, **flags)
        return
    carried = torch.empty(flags["NS"], S, B, shape.H, dtype=torch.float32, device=tensors[0].device)
    head, tail = (*tensors, carried, *shape.numbers), sizes
    grid = (tiles, unit_tiles, S)
    if direction == "backward":
        _steps(kernel, grid, head, tail, flags | {"LAST": False}, shape.T)
        if steps > shape.T:
            kernel[grid](*head, shape.T, *tail, LAST=True, **flags)
    else:
        _steps(kernel, grid, head, tail, flags, shape.T)


def _steps(kernel: Any, grid: tuple[int, ...], head: Any, tail: Any, flags: dict[str, Any], steps: int) -> None:
    """A launch for every k. The first looks the compiled kernel up; the others start it at once, which costs less."""
    found = kernel[grid](*head, 0, *tail, **flags)
    if found is None:  # in the interpreter
        for k in range(1, steps):
            kernel[grid](*head, k, *tail, **flags)
        return
    constants = [flags[name] for name in kernel.arg_names[len(head) + 1 + len(tail) :]]
    start = found[grid]
    for k in range(1, steps):
        start(*head, k, *tail, *constants)
