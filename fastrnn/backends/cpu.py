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
        call = _contiguous(call)
        cell, x, streams = call.cell, call.x, len(call.weights)
        hidden, out = call.hidden, call.out
        y = x.new_empty(*x.shape[:-1], streams * out)
        finals = tuple(torch.empty_like(s) for s in call.states)
        rows = y.numel() // (streams * out)
        saved: list[Tensor | None] = [None, None, None]
        if save:
            kind = torch.float64 if x.dtype is torch.float64 else torch.float32
            if cell.tape:
                saved[0] = torch.empty(streams, rows, cell.tape * hidden, dtype=kind)
            if cell.states > 1:
                saved[1] = torch.empty(streams, rows, hidden, dtype=kind)
            if call.weights[0].w_hr is not None:
                saved[2] = torch.empty(streams, rows, hidden, dtype=kind)
        head, weights = _describe(call)
        c_n = finals[1] if cell.states > 1 else None
        engine.forward(head, weights, *map(_address, (y, finals[0], c_n, *saved)))
        return Result(y, finals, tuple(saved) if save else ())  # type: ignore[arg-type]

    def backward(
        self,
        call: Call,
        saved: tuple[Tensor, ...],
        y: Tensor,
        dy: Tensor,
        dfinals: tuple[Tensor | None, ...],
    ) -> Gradients:
        engine, _ = load()
        assert engine is not None
        call = _contiguous(call)
        tape, c, m = saved
        cell, streams = call.cell, len(call.weights)
        rows = y.numel() // (streams * call.out)
        dgates = y.new_empty(streams, rows, cell.dgates * call.hidden)
        dstates = tuple(torch.empty_like(s) for s in call.states)
        dh = None if m is None else y.new_empty(streams, rows, call.out)
        head, weights = _describe(call)
        dfinals = tuple(None if d is None else d.contiguous() for d in dfinals)
        two = cell.states > 1
        arguments = (y, tape, c, dy.contiguous(), dfinals[0], dfinals[1] if two else None)
        results = (dgates, dstates[0], dstates[1] if two else None, dh)
        engine.backward(head, weights, *map(_address, arguments), *map(_address, results))
        return Gradients(dgates, dstates, dh, m if m is None else m.to(y.dtype))

    def info(self) -> dict[str, Any]:
        engine, why_not = load()
        if engine is None:
            return {"built": False, "reason": why_not}
        return {"built": True, "isa": engine.isa(), "isas": engine.isas()}


def _contiguous(call: Call) -> Call:
    """The call on contiguous tensors; the same tensors where they are already."""
    return call._replace(
        x=call.x.contiguous(),
        states=tuple(s.contiguous() for s in call.states),
        weights=tuple(w._make(None if a is None else a.contiguous() for a in w) for w in call.weights),
        batch_sizes=None if call.batch_sizes is None else call.batch_sizes.contiguous(),
        resets=None if call.resets is None else call.resets.contiguous(),
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _describe(call: Call) -> tuple[list[int], list[int]]:
    """The call's sizes and addresses, in the order of `Call` in csrc/bindings/cpu.cpp."""
    steps = call.x.shape[0] if call.batch_sizes is None else call.batch_sizes.numel()
    two = len(call.states) > 1
    head = [
        steps,
        call.states[0].shape[1],
        call.x.shape[-1],
        call.hidden,
        call.out,
        torch.get_num_threads(),
        _CELLS[call.cell.name],
        _DTYPES[call.x.dtype],
        _address(call.batch_sizes),
        _address(call.resets),
        call.x.data_ptr(),
        call.states[0].data_ptr(),
        call.states[1].data_ptr() if two else 0,
    ]
    streams: list[int] = []
    for w, reverse in zip(call.weights, call.reverse, strict=True):
        streams += [_address(a) for a in w]
        streams.append(reverse)
    return head, streams
