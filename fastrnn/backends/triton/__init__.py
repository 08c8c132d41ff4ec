"""The Triton backend: fused kernels for NVIDIA GPUs, for every cell, from the cell's own Python text.

One kernel text per schedule (`resident`, `persistent`, `stepwise`), made of the steps in `steps` and `values`; `plan`
chooses, `launch` passes arguments. Neither Triton nor a kernel is loaded before the first call. Storage is of the
input's type, states and sums are fp32. With TRITON_INTERPRET=1 the kernels run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends.base import GATES, Backend, Call, Gradients, Query, Result, Saved
from fastrnn.backends.native import NATIVE
from fastrnn.backends.triton import device, launch, plan, precision, tuning, watchdog
from fastrnn.cells import CELLS

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_UNMEASURED = (
    "not measured against torch.nn's kernels on this device: ask for it with fastrnn.backend('triton'), or call "
    "fastrnn.tune(module, input)"
)


class Triton(Backend):
    name = "triton"
    ragged_layouts = ("padded", "packed")
    takes_params = True

    def unsupported(self, query: Query) -> str | None:
        if query.device == "cuda" or (query.device == "cpu" and device.interpreted()):
            why_not = device.unusable(query.device)
        else:
            why_not = f"its kernels run on CUDA tensors, these are on {query.device}"
        if why_not is not None:
            return why_not
        if query.dtype not in _DTYPES:
            return f"its kernels calculate in fp32, not in {query.dtype}"
        if query.P != query.H:
            return "its kernels have no projection (proj_size)"
        if not (query.I and query.H and query.T and query.B):
            return "it needs at least one step, row, feature and unit"
        cell = CELLS[query.cell]
        if query.S * cell.gates * query.H**2 >= 1 << 31:
            return "its offsets in W_hh have 32 bits, and all directions' W_hh together 2^31 elements or more"
        if cell.split and cell.split != tuple(range(cell.gates - len(cell.split), cell.gates)):
            return f"it takes cells whose split gates are the last ones, not {cell.name}"
        if 0 < cell.tape < cell.gates:
            return f"it keeps the tape in the place of the gates' input, where that of {cell.name} is too short"
        return None

    def passed_over(self, query: Query) -> str | None:
        if query.lengths or NATIVE.unsupported(query) is not None:
            return None  # torch.nn makes the host wait for the device, or cannot run it
        faster = tuning.faster_than_native(query, precision.of(query.dtype))
        if faster is None:
            return _UNMEASURED
        return None if faster else "measured to be slower than torch.nn's kernels here"

    def settings(self, query: Query) -> Any:
        return precision.of(query.dtype), os.environ.get(tuning.SCHEDULE)

    def how(self, query: Query) -> str:
        kind = precision.of(query.dtype)
        limits = device.limits(query.device, query.device_index)
        chosen, reason = tuning.decide(tuning.problem_of(query, kind, False), query.cell, limits)
        return f"{chosen} ({reason})" + (f"; {kind} products" if query.dtype is torch.float32 else "")

    def saved_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        return dtype, torch.float32, dtype

    def share(self, query: Query) -> float:
        """Programs for each multiprocessor, of which every program is given one."""
        limits, kind = device.limits(query.device, query.device_index), precision.of(query.dtype)
        problems = [tuning.problem_of(query, kind, way) for way in (False, True)[: 1 + query.grad]]
        plans = [tuning.decide(p, query.cell, limits)[0] for p in problems]
        return max(map(plan.programs, plans, problems)) / limits.multiprocessors

    def forward(self, call: Call, save: str) -> Result:
        return self.forward_after(call, save, lambda: None)

    def forward_after(self, call: Call, save: str, ready: Callable[[], None]) -> Result:
        cell, x = call.cell, call.x
        shape = launch.shape_of(call, precision.of(x.dtype))
        tape = save == GATES and cell.tape > 0
        blocks = cell.tape if tape else cell.gates
        with torch.no_grad(), device.current(x.device):
            xg = _input_product(call, shape, blocks)
            ready()
            y = x.new_empty(*x.shape[:-1], shape.S * shape.H)
            finals = tuple([x.new_empty(shape.S, shape.B, shape.H) for _ in range(cell.states)])
            c = x.new_empty(shape.S, shape.N, shape.H, dtype=torch.float32) if save and cell.states > 1 else None
            launch.forward(call, shape, _plan(call, shape, False), xg, y, finals, c, tape)
        return Result(y, finals, Saved(xg if tape else None, c) if save else Saved())

    def backward(
        self,
        call: Call,
        saved: Saved,
        y: Tensor,
        dy: Tensor,
        dfinals: tuple[Tensor | None, ...],
        needed: tuple[bool, ...],
        last: bool,
        dc: Tensor | None = None,
        gates: bool = False,
    ) -> Gradients:
        cell, tape = call.cell, saved.tape
        shape = launch.shape_of(call, precision.of(y.dtype))
        with torch.no_grad(), device.current(y.device):
            if last and tape is not None and cell.tape == cell.dgates and tape.dtype is y.dtype:
                dgates = tape  # of which each step reads its part first
            else:
                dgates = y.new_empty(shape.S, shape.N, cell.dgates * shape.H)
            dstates = tuple([y.new_empty(shape.S, shape.B, shape.H) for _ in call.states])
            ends = tuple([None if d is None else d.contiguous() for d in dfinals])
            trail = None if dc is None else dc.contiguous()
            kept = (y, saved.c, y if tape is None else tape)
            douts = (dy.contiguous(), ends, trail)
            dparams = launch.backward(call, shape, _plan(call, shape, True), *kept, *douts, dgates, dstates)
        return Gradients(dgates, dstates, dparams=dparams)

    def info(self) -> dict[str, Any]:
        kind = "cpu" if device.interpreted() else "cuda"
        why_not = device.unusable(kind)
        if why_not is not None:
            return {"available": False, "reason": why_not}
        version = importlib.import_module("triton").__version__
        return {"available": True, "triton": version, "device": device.limits(kind).name}


def _input_product(call: Call, shape: launch.Shape, blocks: int) -> Tensor:
    """x W_ih^T + b_ih of every stream, (S, N, blocks*H), of which the first G*H columns are written."""
    x = call.x.reshape(-1, call.x.shape[-1])
    out = x.new_empty(shape.S, shape.N, blocks * shape.H)
    columns = call.cell.gates * shape.H
    for w, into in zip(call.weights, out, strict=True):
        if w.b_ih is None:
            torch.mm(x, w.w_ih.t(), out=into[:, :columns])
        else:
            torch.addmm(w.b_ih, x, w.w_ih.t(), out=into[:, :columns])
    return out


def _plan(call: Call, shape: launch.Shape, backward: bool) -> plan.Plan:
    x, cell = call.x, call.cell
    watchdog.check(x.device)
    kind = shape.flags["PRECISION"]
    problem = plan.Problem(cell.gates, shape.H, shape.B, shape.S, x.dtype.itemsize, kind, backward)
    return tuning.decide(problem, cell.name, device.limits(x.device.type))[0]
