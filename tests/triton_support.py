"""Calls for the tests of the Triton kernels, on a GPU or in Triton's interpreter.

TRITON_INTERPRET=1 pytest tests/test_triton_*.py         on the CPU
FASTRNN_TEST_DEVICE=cuda pytest tests/test_triton_*.py   on the GPU
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple

import pytest
import torch
from engine_support import Case, like, make_call, outputs, run
from support import assert_equal
from tolerances import ENGINE
from torch import Tensor

from fastrnn.backends import BACKENDS
from fastrnn.backends.base import Call
from fastrnn.backends.triton import device
from fastrnn.backends.triton.plan import SCHEDULES
from fastrnn.cells import CELLS

DEVICE = os.environ.get("FASTRNN_TEST_DEVICE", "cpu")
TRITON = BACKENDS["triton"]
INSTALLED = importlib.util.find_spec("triton") is not None
__all__ = ["CELLS", "DEVICE", "SCHEDULES", "TRITON", "assert_equal", "outputs", "run"]


def require() -> None:
    """Skip the module unless kernels can run here."""
    if not INSTALLED:
        pytest.skip("needs Triton: pip install triton", allow_module_level=True)
    if DEVICE == "cpu" and not device.interpreted():
        pytest.skip("needs TRITON_INTERPRET=1 or FASTRNN_TEST_DEVICE=cuda, see triton_support", allow_module_level=True)
    if device.interpreted():
        patch_once_a_launch()


def patch_once_a_launch() -> None:
    """The interpreter replaces some 300 attributes of triton.language at every call of a function; once is enough."""
    from triton.runtime import interpreter

    if hasattr(interpreter, "_fastrnn"):
        return
    interpreter._fastrnn = True
    seen: set[int] = set()
    patch, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__

    def patch_new(function: Any) -> Any:
        if id(function.__globals__) not in seen:
            seen.add(id(function.__globals__))
            return patch(function)
        return None

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.clear()
        execute(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_new, launch


class Form(NamedTuple):
    """How a case is given to the kernels, besides the fields of `Case`."""

    padded: bool = False  # ragged by `lengths`, zero among them
    stateless: bool = False


def call_of(case: Case, form: Form, dtype: torch.dtype, seed: int = 0) -> Call:
    """A random call on the device; where it is ragged and padded, x holds NaN beyond each row's length."""
    call = make_call(case, dtype, seed)
    if form.stateless:
        call = call._replace(states=())
    if form.padded:
        g = torch.Generator().manual_seed(seed + 1)
        lengths = torch.randint(0, case.T + 1, (case.B,), generator=g, dtype=torch.int32)
        lengths[-1] = 0
        live = torch.arange(case.T)[:, None] < lengths
        resets = None if call.resets is None else call.resets & live
        call = call._replace(lengths=lengths, resets=resets)
    return on_device(call)


def on_device(call: Call) -> Call:
    def move(a: Tensor | None) -> Any:
        return None if a is None else a.detach().to(DEVICE).requires_grad_(a.requires_grad)

    masks = {"lengths": move(call.lengths), "resets": move(call.resets)}
    return call.with_flat([move(a) for a in call.flat])._replace(**masks)


def assert_parity(call: Call, what: str, factor: float = 1.0, **options: Any) -> None:
    """Triton in the call's type against the reference in fp64 on the same numbers: outputs and every gradient."""
    want = run(like(call, torch.float64), reference=True)
    got = run(call, backend=TRITON, **options)
    assert list(got) == list(want)
    dtype = call.x.dtype
    for name, a in got.items():
        assert a.dtype == dtype, f"{what} {name}: {a.dtype}"
        assert_equal(f"{what} {name}", a, want[name].to(dtype), factor * ENGINE[dtype])
