"""The CUDA kernels (csrc/cuda): the weights stay on the chip for the whole sequence.

A layer's input product is a GEMM of torch, the recurrence one launch for all steps and streams, on torch's current
stream and in memory of torch's allocator; nothing waits for the device, so that calls can be captured in CUDA graphs.
16-bit types are storage: sums and the carried states are fp32. The recurrent product of fp32 follows torch's setting
for RNNs and `fastrnn.fp32_precision`: TF32, or three products of TF32, whose error is a few units of fp32's last place.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends import meeting
from fastrnn.backends.base import GATES, Backend, Call, Gradients, Query, Result, Saved
from fastrnn.backends.padding import Sizes, padded, two
from fastrnn.backends.triton import precision
from fastrnn.cells import CELLS, Cell

_NUMBERS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 3}
_TF32 = 2
_UNMEASURED = "its times on a GPU are not known yet: ask for it with fastrnn.backend('cuda')"
Module = tuple[Any, str]


@functools.lru_cache(maxsize=1)
def load() -> Module:
    """The compiled kernels, or None and why they are not there."""
    try:
        module: ModuleType = importlib.import_module("fastrnn._cuda")
    except ImportError as error:
        return None, f"the CUDA kernels are not installed ({error}); reinstall fastrnn with FASTRNN_CUDA=1"
    return module, ""


class Cuda(Backend):
    """Runs on `device`, with the module that `module` loads: that of the GPU, or in tests the emulator's."""

    name = "cuda"
    takes_params = True

    def __init__(self, module: Callable[[], Module] = load, device: str = "cuda") -> None:
        self._module, self._device = module, device
        self._limits = functools.lru_cache(maxsize=None)(self._limits_of)

    def unsupported(self, query: Query) -> str | None:
        if query.device != self._device:
            return f"the kernels run on {self._device} tensors, these are on {query.device}"
        module, why_not = self._module()
        if module is None:
            return why_not
        if self._device == "cuda" and not torch.cuda.is_available():
            return "there is no GPU"
        if query.cell not in module.cells:
            return f"the kernels have no {query.cell}: csrc/cells had not when they were compiled"
        if unlike := CELLS[query.cell].unlike(module.sizes[query.cell]):
            return unlike
        if query.dtype not in _NUMBERS:
            return f"the kernels have no {query.dtype}: bfloat16, float16 or float32, or another backend"
        if query.P != query.H:
            return "the kernels have no projections: proj_size=0, or another backend"
        if not (query.I and query.H and query.B):
            return "the kernels need at least one row, one feature and one unit; use another backend"
        for backward in (False, True)[: 1 + query.grad]:
            try:
                error = self._plan_for(query, backward).error
            except RuntimeError as failure:  # a driver older than the kernels' CUDA runtime: `auto` must go on
                error = f"the device did not say what it can do: {failure}"
            if error:
                return str(error)
        return None

    def passed_over(self, query: Query) -> str | None:
        return _UNMEASURED

    def how(self, query: Query) -> str:
        return "; backward ".join(map(str, self._plans(query)))

    def saved_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        return dtype, torch.float32, dtype

    def plan(
        self, cell: str, number: int, backward: bool, streams: int, batch: int, hidden: int, index: int = 0
    ) -> Any:
        """The kernel and the launch for a call on the CUDA device `index`; its text says what they are."""
        module = self._module()[0]
        return module.plan(module.cells.index(cell), number, backward, streams, batch, hidden, self._limits(index))

    def _plan_for(self, query: Query, backward: bool) -> Any:
        hidden, number = padded(query.H, query.dtype), _number(query.dtype)
        return self.plan(query.cell, number, backward, query.S, query.B, hidden, query.device_index)

    def _plans(self, query: Query) -> list[Any]:
        return [self._plan_for(query, way) for way in (False, True)[: 1 + query.grad]]

    def _limits_of(self, device: int) -> Any:
        with _on(torch.device(self._device, device)):
            return self._module()[0].limits(device)

    def share(self, query: Query) -> float:
        """Blocks for each multiprocessor, of which every block is given one."""
        blocks = [plan.grid[0] * plan.grid[1] for plan in self._plans(query)]
        return float(max(blocks) / self._limits(query.device_index).multiprocessors)

    def forward(self, call: Call, save: str) -> Result:
        return self.forward_after(call, save, lambda: None)

    def forward_after(self, call: Call, save: str, ready: Callable[[], None]) -> Result:
        cell, x = call.cell, call.x
        with torch.no_grad(), _on(x.device):
            sizes = Sizes(call)
            hidden, rows, streams = sizes.padded, sizes.steps * sizes.batch, sizes.streams
            tape = save == GATES and cell.tape > 0  # it takes the place of the input's part of the gates
            blocks = max(cell.gates, cell.tape) if tape else cell.gates
            x_gates, bias = _input(call, sizes, blocks)
            ready()
            y = x.new_empty(sizes.steps, sizes.batch, streams * hidden)
            finals = tuple([x.new_empty(streams, sizes.batch, hidden) for _ in range(cell.states)])
            c = x.new_empty(streams, rows, hidden, dtype=torch.float32) if save and cell.states > 1 else None
            inputs = (x_gates, _recurrent(call, sizes), bias, *sizes.states(call))
            outputs = (y, *two(finals), x_gates if tape else None, c)
            tensors = (*inputs, *outputs, sizes.params(call), _lengths(call), _resets(call))
            self._run("forward", call, sizes, self._plan_of(call, sizes, backward=False), tensors, blocks)
        saved = Saved(sizes.cut(x_gates, cell.tape) if tape else None, None if c is None else sizes.cut(c, 1))
        return Result(sizes.cut(y, streams), tuple([sizes.cut(a, 1) for a in finals]), saved)

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
        cell, x, streams = call.cell, call.x, len(call.weights)
        with torch.no_grad(), _on(x.device):
            sizes = Sizes(call)
            tape = None if saved.tape is None else sizes.pad(saved.tape.to(x.dtype), cell.tape)
            c = None if saved.c is None else sizes.pad(saved.c)
            plan = self._plan_of(call, sizes, backward=True)
            own = tape is not None and (last or tape.data_ptr() != saved.tape.data_ptr())  # type: ignore[union-attr]
            if tape is not None and own and cell.tape == cell.dgates:  # of which each step reads its part first
                dgates = tape
            else:
                dgates = x.new_empty(streams, sizes.steps * sizes.batch, cell.dgates * sizes.padded)
            dstates = tuple([x.new_empty(streams, sizes.batch, sizes.padded) for _ in call.states])
            h0, c0 = sizes.states(call)
            dhn, dcn = two(tuple([None if d is None else sizes.pad(d) for d in dfinals]))
            start = (h0, None if c0 is None else c0.float())
            inputs = (_transposed(call, sizes, plan), tape, c, sizes.pad(y, streams), *start)
            douts = (sizes.pad(dy, streams), dhn, dcn, None if dc is None else sizes.pad(dc))
            results = (dgates, *two(dstates))
            params, dparams = sizes.params(call), None  # of which each batch row has a sum of its own over the steps
            if params is not None:
                dparams = x.new_empty(streams, cell.params, sizes.batch, sizes.padded, dtype=torch.float32)
            tensors = (*inputs, *douts, *results, params, dparams, _lengths(call), _resets(call))
            self._run("backward", call, sizes, plan, tensors)
            added = () if dparams is None else sizes.cut(dparams.sum(2).to(x.dtype), 1)
        dstates = tuple([sizes.cut(a, 1) for a in dstates])
        return Gradients(sizes.cut(dgates, cell.dgates), dstates, dparams=tuple([own.unbind() for own in added]))

    def _plan_of(self, call: Call, sizes: Sizes, backward: bool) -> Any:
        number, index = _number(call.x.dtype), call.x.device.index or 0
        return self.plan(call.cell.name, number, backward, sizes.streams, sizes.batch, sizes.padded, index)

    def _run(
        self, name: str, call: Call, sizes: Sizes, plan: Any, tensors: tuple[Tensor | None, ...], *more: int
    ) -> None:
        module = self._module()[0]
        reverse = sum(backwards << s for s, backwards in enumerate(call.reverse))
        stream = torch.cuda.current_stream().cuda_stream if self._device == "cuda" else 0
        place = meeting.place(plan, call.x.device) if plan.kernel == 2 else (None, None, None)
        tensors = (*tensors, *place)
        addresses = [0 if a is None else a.data_ptr() for a in tensors]
        head = [sizes.steps, sizes.batch, sizes.padded, sizes.streams, reverse, sizes.hidden]
        code = module.cells.index(call.cell.name)
        getattr(module, name)(plan, code, _number(call.x.dtype), head, addresses, stream, *more)

    def info(self) -> dict[str, Any]:
        module, why_not = self._module()
        if module is None:
            return {"built": False, "reason": why_not}
        return {"built": True, "architectures": getattr(module, "architectures", "")}


def _number(dtype: torch.dtype) -> int:
    return _TF32 if precision.of(dtype) == "tf32" else _NUMBERS[dtype]


def _lengths(call: Call) -> Tensor | None:
    return None if call.lengths is None else call.lengths.to(torch.int64).contiguous()


def _resets(call: Call) -> Tensor | None:
    return None if call.resets is None else call.resets.contiguous()


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _recurrent(call: Call, sizes: Sizes) -> Tensor:
    """All W_hh, (S, G*H, H)."""
    gates = call.cell.gates
    all_w = [sizes.pad(sizes.pad_rows(w.w_hh, gates)) for w in call.weights]
    return all_w[0].unsqueeze(0) if len(all_w) == 1 else torch.stack(all_w)


def _transposed(call: Call, sizes: Sizes, plan: Any) -> Tensor:
    """All W_hh^T as a backward kernel reads them: (S, blocks, H, depth), a block's units gate by gate, then zeros."""
    gates, hidden, own = call.cell.gates, sizes.padded, call.cell.gates * plan.units
    shape = (sizes.streams, plan.blocks, hidden, plan.depth)
    out = call.x.new_empty(shape) if own == plan.depth else call.x.new_zeros(shape)
    w = _recurrent(call, sizes).view(sizes.streams, gates, hidden, hidden)
    beyond = plan.blocks * plan.units - hidden  # the last block may have fewer units
    if beyond:
        w = torch.nn.functional.pad(w, (0, 0, 0, beyond))
    by_block = w.view(sizes.streams, gates, plan.blocks, plan.units, hidden).permute(0, 2, 4, 1, 3)
    out[..., :own].view(*shape[:3], gates, plan.units).copy_(by_block)
    return out


def _input(call: Call, sizes: Sizes, blocks: int) -> tuple[Tensor, Tensor | None]:
    """The gates' input part, the first G*H columns of (S, T*B, blocks*H), and the split gates' b_hh (S, split*H).

    The columns of the units that padding adds are zero, even where x is not finite.
    """
    cell, x = call.cell, call.x.reshape(-1, call.x.shape[-1])
    gates = x.new_empty(sizes.streams, x.shape[0], blocks * sizes.padded)
    of_split = []
    for w, into in zip(call.weights, gates, strict=True):
        out = into[:, : cell.gates * sizes.padded]
        w_ih = sizes.pad_rows(w.w_ih, cell.gates)
        if w.b_ih is None or w.b_hh is None:
            torch.mm(x, w_ih.t(), out=out)
        else:
            b_hh = w.b_hh
            if cell.split:
                of_split.append(sizes.pad(_split_rows(cell, b_hh), len(cell.split)))
                b_hh = _without_split(cell, b_hh)
            torch.addmm(sizes.pad(w.b_ih + b_hh, cell.gates), x, w_ih.t(), out=out)
        if sizes.padded > sizes.hidden:
            out.unflatten(-1, (cell.gates, sizes.padded))[..., sizes.hidden :].zero_()
    return gates, torch.stack(of_split) if of_split else None


def _split_rows(cell: Cell, b: Tensor) -> Tensor:  # the split gates are the last ones
    return b.view(cell.gates, -1)[cell.gates - len(cell.split) :].flatten()


def _without_split(cell: Cell, b: Tensor) -> Tensor:
    b = b.clone()
    b.view(cell.gates, -1)[cell.gates - len(cell.split) :].zero_()
    return b


assert all(cell.split == tuple(range(cell.gates - len(cell.split), cell.gates)) for cell in CELLS.values())
