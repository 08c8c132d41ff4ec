"""Forward of one layer on plain tensors, without ceremony: a single step of a small layer takes little longer.

One function of the engine (csrc/bindings/quick.cpp) checks what it is given, makes the outputs and runs.
For whatever it does not know, and for every mistake, it answers None, and the call goes the usual way
through `fastrnn.layers`, of which it is a copy for the plainest case only.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastrnn.backends import requested, steps_natively
from fastrnn.backends.base import GATES
from fastrnn.backends.cpu import CODES, load
from fastrnn.backends.native import step
from fastrnn.cells import Cell
from fastrnn.ordinary import watched
from fastrnn.recurrence import record


@functools.lru_cache(maxsize=1)
def _start() -> Any:
    """The engine's function, or None where there is no engine, or a torch that does not tell where tensors lie."""
    engine = load()[0]
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if engine is None or exchange is None:
        return None
    engine.set_exchange(exchange, Tensor, Parameter)
    return engine.quick


def forward(module: Any, cell: Cell, input: Any, hx: Any, single: bool = False, batch_first: bool = False) -> Any:
    """(y, h_n[, c_n]), or (h[, c]) of a single step; None if the call is not of the plainest.

    Args:
        module: has its parameters in `_parameters`, and in `_quick_names` their names, five per stream.
        hx: None, or a tuple of states.
    """
    if watched() or torch._C._is_any_autocast_enabled():
        return None
    asked = requested(module.backend)
    if asked not in ("auto", "cpu"):
        return None
    run = _start()
    if run is None:
        return None
    code = CODES.get(cell.name)
    if code is None:
        return None
    names = module.__dict__.get("_quick_names") or module._name_parameters()
    parameters, threads, grad = module._parameters, torch.get_num_threads(), torch.is_grad_enabled()
    if grad and module.save != GATES:
        return None
    # What `choose` would say: the engine, where it is there; but not to train on some steps.
    natively = grad and single and asked == "auto" and _natively(module, cell, input)
    found = run(parameters, names, code, input, hx, single, batch_first, grad, natively, threads)
    if found is not None and found[0] is None:
        states = hx or (input.new_zeros(input.shape[0], module.hidden_size),) * cell.states
        return step(cell, input, states, [n and parameters[n] for n in names[0][:4]])
    if found is None or found[1] is None:
        return found and found[0]
    weights = [None if name is None else parameters[name] for own in names for name in own]
    return record(cell, input, hx or (), weights, *found)


def _natively(module: Any, cell: Cell, input: Any) -> bool:
    """Would `choose` take torch.nn's kernel to train on this step?"""
    return (
        isinstance(input, Tensor) and input.dim() == 2 and steps_natively(cell.name, input.shape[0], module.hidden_size)
    )
