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

from fastrnn.backends.base import GATES, Backend, Call, Gradients, Params, Query, Result, Saved, Weights
from fastrnn.cells import CELLS

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
CODES: dict[str, int] = {}  # of the engine's cells, in the order of csrc/cells/list.h; empty until `load`
_CONTIGUOUS = torch.contiguous_format
_ZEROS = (None, None)  # initial states that are not there: the engine starts from zero


@functools.lru_cache(maxsize=1)
def load() -> tuple[ModuleType | None, str]:
    """The compiled engine, or None and why it is not there."""
    try:
        engine = importlib.import_module("fastrnn._cpu")
    except ImportError as error:
        return None, f"the C++ engine is not installed ({error}); reinstall fastrnn with a C++17 compiler"
    CODES.update({name: code for code, name in enumerate(engine.cells())})
    return engine, ""


class Cpu(Backend):
    name = "cpu"
    ragged_layouts = ("packed",)
    takes_single_steps = True
    takes_params = True

    def unsupported(self, query: Query) -> str | None:
        engine, why_not = load()
        if engine is None:
            return why_not
        if query.device != "cpu":
            return f"the engine runs on CPU tensors, these are on {query.device}"
        if query.cell not in CODES:
            return f"the engine has no {query.cell}: csrc/cells had not when it was compiled"
        if unlike := CELLS[query.cell].unlike(engine.sizes()[query.cell]):
            return unlike
        if not (query.I and query.H):
            return "the engine needs at least one feature and one unit"
        if query.dtype not in _DTYPES:
            return f"the engine has no {query.dtype}"
        return None

    def forward(self, call: Call, save: str) -> Result:
        cell, x, weights = call.cell, call.x, call.weights
        rows, out = weights[0].w_hh.shape
        hidden, streams = rows // cell.gates, len(weights)
        head, flat, params, _keep = _describe(call, hidden, out)
        batch = head[1]
        c_n = None
        if call.batch_sizes is None and x.dim() == 2:
            y = h_n = x.new_empty(batch, out)
            if cell.states > 1:
                c_n = x.new_empty(batch, hidden)
        else:
            y = x.new_empty(*x.shape[:-1], streams * out)
            h_n = x.new_empty(streams, batch, out)
            if cell.states > 1:
                c_n = x.new_empty(streams, batch, hidden)
        finals = (h_n,) if c_n is None else (h_n, c_n)
        addresses = (y.data_ptr(), h_n.data_ptr(), 0 if c_n is None else c_n.data_ptr())
        if not save:
            _engine().forward(head, flat, params, *addresses, 0, 0, 0)
            return Result(y, finals)
        kind = torch.float64 if x.dtype is torch.float64 else torch.float32
        tokens = y.numel() // (streams * out)
        tape = save == GATES and cell.tape
        sizes = (tape * hidden, (c_n is not None) * hidden, (tape and weights[0].w_hr is not None) * hidden)
        saved = Saved._make([x.new_empty(streams, tokens, n, dtype=kind) if n else None for n in sizes])
        _engine().forward(head, flat, params, *addresses, *[0 if a is None else a.data_ptr() for a in saved])
        return Result(y, finals, saved)

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
        tape, c, m = saved
        assert tape is not None or not call.cell.tape
        cell, streams, x = call.cell, len(call.weights), call.x
        hidden, out = call.hidden, call.out
        rows = y.numel() // (streams * out)
        head, weights, params, _keep = _describe(call, hidden, out)
        # The engine adds up in the type of the weights: with 16 bits few rows only, or too much would be lost.
        narrow = y.dtype in (torch.bfloat16, torch.float16)
        few = call.weights[0].w_hr is None and call.batch_sizes is None and rows <= _engine().few_rows
        dweights = None if gates or (narrow and not few) else _weight_gradients(call, needed)
        dgates: Tensor | None = None  # a chunk of steps at a time, in scratch memory
        if narrow or gates:
            dgates = y.new_empty(streams, rows, cell.dgates * hidden)
        elif last and cell.tape == cell.dgates:  # in the tape, of which each step reads its part first
            dgates = tape
        two = cell.states > 1
        dstates = tuple([y.new_empty(streams, call.batch, n) for n in (out, hidden)[: len(call.states)]])
        dh0, dc0 = (*dstates, None, None)[:2]
        dh = None if m is None else y.new_empty(streams, rows, out)
        dx = x.new_empty(streams, rows, x.shape[-1]) if needed[0] else None
        dfinals = tuple([None if d is None else d.contiguous() for d in dfinals])
        dy = dy.contiguous()
        dc = None if dc is None else dc.contiguous()
        arguments = (y, tape, c, m, dy, dfinals[0], dfinals[1] if two else None, dc)
        results = (dgates, dh0, dc0, dh, dx)
        addresses = [0 if a is None else a.data_ptr() for a in arguments + results]
        into = [0 if a is None else a.data_ptr() for w in dweights or () for a in w]
        dparams: Params = ()
        if params:
            dparams = tuple(
                [tuple([torch.empty_like(p, memory_format=_CONTIGUOUS) for p in own]) for own in call.params]
            )
        _engine().backward(head, weights, params, *addresses, into, [d.data_ptr() for own in dparams for d in own])
        if dx is not None:
            dx = (dx[0] if streams == 1 else dx.sum(0)).view(x.shape)
        return Gradients(dgates, dstates, dh, m if m is None else m.to(y.dtype), dx, dweights, dparams)

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
                [
                    torch.empty_like(a, memory_format=_CONTIGUOUS) if n and a is not None else None
                    for a, n in zip(w, needed[first:], strict=False)
                ]
            )
        )
        first += len(w)
    return tuple(out)


def _engine() -> Any:
    return load()[0]


def _address(a: Tensor) -> int:
    address = a.data_ptr()
    if not address and a.numel():  # the engine takes it for a tensor that was not given, or reads there
        raise RuntimeError(f"the engine needs tensors with memory, this one of shape {tuple(a.shape)} has none")
    return address


def _describe(call: Call, hidden: int, out: int) -> tuple[list[int], list[int], list[int], list[Tensor]]:
    """The call's sizes and addresses, in the order of `Call` in csrc/bindings/cpu.cpp.

    The tensors that come last keep the memory behind copies, made of what is not contiguous.
    """
    cell, x, states, weights, reverse, _, sizes, resets, params = call
    keep: list[Tensor] = []
    pointers = []
    for a in (sizes, resets, x, *(states or _ZEROS)):
        if a is None:
            pointers.append(0)
            continue
        if not a.is_contiguous():
            a = a.contiguous()
            keep.append(a)
        pointers.append(_address(a))
    if len(pointers) == 4:
        pointers.append(0)
    if sizes is not None:
        steps, batch = sizes.shape[0], call.batch
    elif x.dim() == 2:
        steps, batch = 1, x.shape[0]
    else:
        steps, batch = x.shape[:2]
    threads = torch.get_num_threads()
    head = [steps, batch, x.shape[-1], hidden, out, threads, CODES[cell.name], _DTYPES[x.dtype], *pointers]
    streams: list[int] = []
    for w, backwards in zip(weights, reverse, strict=True):
        for a in w:
            if a is None:
                streams.append(0)
                continue
            if not a.is_contiguous():
                a = a.contiguous()
                keep.append(a)
            streams.append(_address(a))
        streams.append(backwards)
    if not params:
        return head, streams, [], keep
    own = [p.contiguous() for stream in params for p in stream]
    return head, streams, list(map(_address, own)), keep + own
