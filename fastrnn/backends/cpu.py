"""The C++ engine (csrc/cpu), on the CPU: every cell and option, fp32, fp64, bf16 and fp16.

bf16 and fp16 are storage: the engine calculates in fp32 and carries c in it. Threads follow
`torch.set_num_threads`, and the result does not depend on their number, nor does it change from
run to run. The GEMMs around the engine are torch's own and may differ with the number of threads.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends.base import Backend, Call, Gradients, Query, Result

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_CELLS = {"lstm": 0, "gru": 1, "rnn_tanh": 2, "rnn_relu": 3}


@functools.lru_cache(maxsize=1)
def load() -> tuple[ModuleType | None, str]:
    """The compiled engine, or None and why it is not there."""
    try:
        return importlib.import_module("fastrnn._cpu"), ""
    except ImportError as error:
        return None, f"the C++ engine is not installed ({error}); reinstall fastrnn with a C++17 compiler"


class Cpu(Backend):
    name = "cpu"
    ragged_layout = "packed"

    def unsupported(self, query: Query) -> str | None:
        engine, why_not = load()
        if engine is None:
            return why_not
        if query.device != "cpu":
            return f"the engine runs on CPU tensors, these are on {query.device}"
        if query.dtype not in _DTYPES:
            return f"the engine has no {query.dtype}"
        return None

    def forward(self, call: Call, save: bool) -> Result:
        engine, _ = load()
        assert engine is not None
        cell, x, streams = call.cell, call.x, len(call.weights)
        hidden, out = call.hidden, call.out
        head, weights, _keep = _describe(call)
        y = x.new_empty(*x.shape[:-1], streams * out)
        finals = tuple([torch.empty_like(s, memory_format=torch.contiguous_format) for s in call.states])
        two = cell.states > 1
        saved: tuple[Tensor | None, ...] = (None, None, None)
        if save:
            rows = y.numel() // (streams * out)
            kind = torch.float64 if x.dtype is torch.float64 else torch.float32
            projected = call.weights[0].w_hr is not None
            sizes = (cell.tape * hidden, two * hidden, projected * hidden)
            saved = tuple([torch.empty(streams, rows, n, dtype=kind) if n else None for n in sizes])
        engine.forward(
            head,
            weights,
            y.data_ptr(),
            finals[0].data_ptr(),
            finals[1].data_ptr() if two else 0,
            *[0 if a is None else a.data_ptr() for a in saved],
        )
        return Result(y, finals, saved if save else ())  # type: ignore[arg-type]

    def backward(
        self,
        call: Call,
        saved: tuple[Tensor, ...],
        y: Tensor,
        dy: Tensor,
        dfinals: tuple[Tensor | None, ...],
        need_dx: bool,
        last: bool,
    ) -> Gradients:
        engine, _ = load()
        assert engine is not None
        tape, c, m = saved
        cell, streams, x = call.cell, len(call.weights), call.x
        rows = y.numel() // (streams * call.out)
        head, weights, _keep = _describe(call)
        # Each step reads its part of the tape before it writes its gradients: one buffer can hold both.
        reuse = last and cell.tape == cell.dgates and tape.dtype is y.dtype
        dgates = tape if reuse else y.new_empty(streams, rows, cell.dgates * call.hidden)
        dstates = tuple([torch.empty_like(s, memory_format=torch.contiguous_format) for s in call.states])
        dh = None if m is None else y.new_empty(streams, rows, call.out)
        dx = x.new_empty(streams, rows, x.shape[-1]) if need_dx else None
        dfinals = tuple([None if d is None else d.contiguous() for d in dfinals])
        dy = dy.contiguous()
        two = cell.states > 1
        arguments = (y, tape, c, dy, dfinals[0], dfinals[1] if two else None)
        results = (dgates, dstates[0], dstates[1] if two else None, dh, dx)
        engine.backward(head, weights, *[0 if a is None else a.data_ptr() for a in arguments + results])
        if dx is not None:
            dx = (dx[0] if streams == 1 else dx.sum(0)).view(x.shape)
        return Gradients(dgates, dstates, dh, m if m is None else m.to(y.dtype), dx)

    def info(self) -> dict[str, Any]:
        engine, why_not = load()
        if engine is None:
            return {"built": False, "reason": why_not}
        return {"built": True, "isa": engine.isa(), "isas": engine.isas()}


def _describe(call: Call) -> tuple[list[int], list[int], list[Tensor]]:
    """The call's sizes and addresses, in the order of `Call` in csrc/bindings/cpu.cpp.

    The tensors that come third keep the memory behind copies, made of what is not contiguous.
    """
    keep: list[Tensor] = []

    def address(a: Tensor | None) -> int:
        if a is None:
            return 0
        if not a.is_contiguous():
            a = a.contiguous()
            keep.append(a)
        return a.data_ptr()

    x, states, sizes = call.x, call.states, call.batch_sizes
    head = [
        x.shape[0] if sizes is None else sizes.shape[0],
        states[0].shape[1],
        x.shape[-1],
        call.hidden,
        call.out,
        torch.get_num_threads(),
        _CELLS[call.cell.name],
        _DTYPES[x.dtype],
        address(sizes),
        address(call.resets),
        address(x),
        address(states[0]),
        address(states[1]) if len(states) > 1 else 0,
    ]
    streams: list[int] = []
    for w, reverse in zip(call.weights, call.reverse, strict=True):
        streams += [address(a) for a in w]
        streams.append(reverse)
    return head, streams, keep
