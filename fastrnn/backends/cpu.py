"""The C++ engine (csrc/cpu), on the CPU: every cell and option, fp32, fp64, bf16 and fp16.

bf16 and fp16 are storage: the engine calculates in fp32 and carries c in it. Threads follow
`torch.set_num_threads`, and the result does not depend on their number, nor does it change from
run to run. With storage of 16 bits the gradients of the weights are GEMMs of torch, which may differ with
the number of threads.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends.base import Backend, Call, Gradients, Query, Result, Weights

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
    takes_single_steps = True

    def unsupported(self, query: Query) -> str | None:
        engine, why_not = load()
        if engine is None:
            return why_not
        if query.device != "cpu":
            return f"the engine runs on CPU tensors, these are on {query.device}"
        if not (query.I and query.H):
            return "the engine needs at least one feature and one unit"
        if query.dtype not in _DTYPES:
            return f"the engine has no {query.dtype}"
        return None

    def forward(self, call: Call, save: bool) -> Result:
        cell, x, states, weights = call.cell, call.x, call.states, call.weights
        rows, out = weights[0].w_hh.shape
        streams = len(weights)
        head, flat, _keep = _describe(call, rows // cell.gates, out)
        two = cell.states > 1
        finals = tuple([torch.empty_like(s) if s.is_contiguous() else torch.empty_like(s.contiguous()) for s in states])
        tokens = x.shape[0]
        if x.dim() == 3:
            batch = x.shape[1]
            y = x.new_empty(tokens, batch, streams * out)
            tokens *= batch
        elif call.batch_sizes is None:
            y = finals[0]
        else:
            y = x.new_empty(tokens, streams * out)
        c_n = finals[1].data_ptr() if two else 0
        if not save:
            _engine().forward(head, flat, y.data_ptr(), finals[0].data_ptr(), c_n, 0, 0, 0)
            return Result(y, finals)
        hidden = rows // cell.gates
        kind = torch.float64 if x.dtype is torch.float64 else torch.float32
        sizes = (cell.tape * hidden, two * hidden, (weights[0].w_hr is not None) * hidden)
        saved = tuple([torch.empty(streams, tokens, n, dtype=kind) if n else None for n in sizes])
        addresses = [0 if a is None else a.data_ptr() for a in saved]
        _engine().forward(head, flat, y.data_ptr(), finals[0].data_ptr(), c_n, *addresses)
        return Result(y, finals, saved)  # type: ignore[arg-type]

    def backward(
        self,
        call: Call,
        saved: tuple[Tensor, ...],
        y: Tensor,
        dy: Tensor,
        dfinals: tuple[Tensor | None, ...],
        needed: tuple[bool, ...],
        last: bool,
        dc: Tensor | None = None,
    ) -> Gradients:
        tape, c, m = saved
        cell, streams, x = call.cell, len(call.weights), call.x
        hidden, out = call.hidden, call.out
        rows = y.numel() // (streams * out)
        head, weights, _keep = _describe(call, hidden, out)
        # The engine adds up in the type of the weights: with 16 bits few rows only, or too much would be lost.
        narrow = y.dtype in (torch.bfloat16, torch.float16)
        few = call.weights[0].w_hr is None and call.batch_sizes is None and rows <= _engine().few_rows
        dweights = _weight_gradients(call, needed) if few or not narrow else None
        dgates: Tensor | None = None  # a chunk of steps at a time, in scratch memory
        if narrow:
            dgates = y.new_empty(streams, rows, cell.dgates * hidden)
        elif last and cell.tape == cell.dgates:  # in the tape, of which each step reads its part first
            dgates = tape
        dstates = tuple([torch.empty_like(s, memory_format=torch.contiguous_format) for s in call.states])
        dh = None if m is None else y.new_empty(streams, rows, out)
        dx = x.new_empty(streams, rows, x.shape[-1]) if needed[0] else None
        dfinals = tuple([None if d is None else d.contiguous() for d in dfinals])
        dy = dy.contiguous()
        dc = None if dc is None else dc.contiguous()
        two = cell.states > 1
        arguments = (y, tape, c, m, dy, dfinals[0], dfinals[1] if two else None, dc)
        results = (dgates, dstates[0], dstates[1] if two else None, dh, dx)
        addresses = [0 if a is None else a.data_ptr() for a in arguments + results]
        into = [0 if a is None else a.data_ptr() for w in dweights or () for a in w]
        _engine().backward(head, weights, *addresses, into)
        if dx is not None:
            dx = (dx[0] if streams == 1 else dx.sum(0)).view(x.shape)
        return Gradients(dgates, dstates, dh, m if m is None else m.to(y.dtype), dx, dweights)

    def info(self) -> dict[str, Any]:
        engine, why_not = load()
        if engine is None:
            return {"built": False, "reason": why_not}
        return {"built": True, "isa": engine.isa(), "isas": engine.isas()}


def _weight_gradients(call: Call, needed: tuple[bool, ...]) -> tuple[Weights, ...]:
    """Empty tensors for the gradients of the weights, None where none is needed."""
    first, out = 1 + call.cell.states, []
    for w in call.weights:
        out.append(
            Weights._make(
                [a.new_empty(a.shape) if n and a is not None else None for a, n in zip(w, needed[first:], strict=False)]
            )
        )
        first += len(w)
    return tuple(out)


def _engine() -> Any:
    return load()[0]


def _describe(call: Call, hidden: int, out: int) -> tuple[list[int], list[int], list[Tensor]]:
    """The call's sizes and addresses, in the order of `Call` in csrc/bindings/cpu.cpp.

    The tensors that come third keep the memory behind copies, made of what is not contiguous.
    """
    cell, x, states, weights, reverse, _, sizes, resets = call
    keep: list[Tensor] = []
    pointers = []
    for a in (sizes, resets, x, *states):
        if a is None:
            pointers.append(0)
            continue
        if not a.is_contiguous():
            a = a.contiguous()
            keep.append(a)
        pointers.append(a.data_ptr())
    if len(states) == 1:
        pointers.append(0)
    shape = x.shape
    single = sizes is None and len(shape) == 2
    steps = 1 if single else shape[0] if sizes is None else sizes.shape[0]
    threads = torch.get_num_threads()
    head = [steps, states[0].shape[-2], shape[-1], hidden, out, threads, _CELLS[cell.name], _DTYPES[x.dtype], *pointers]
    streams: list[int] = []
    for w, backwards in zip(weights, reverse, strict=True):
        for a in w:
            if a is None:
                streams.append(0)
                continue
            if not a.is_contiguous():
                a = a.contiguous()
                keep.append(a)
            streams.append(a.data_ptr())
        streams.append(backwards)
    return head, streams, keep
