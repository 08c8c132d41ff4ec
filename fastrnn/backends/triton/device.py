"""The device that kernels run on: whether it will do, and its limits."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fastrnn.backends.triton.plan import Limits

OLDEST = (7, 5)  # for tanh.approx
_INTERPRETER = Limits("Triton's interpreter", (9, 0), 227 << 10, 132)


def interpreted() -> bool:
    """Do the kernels run in Triton's interpreter? That is settled when Triton is imported, from the environment."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.lru_cache(maxsize=2)
def unusable(kind: str) -> str | None:
    """Why no kernel can run on devices of this kind, and the way out, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (torch's CUDA builds for Linux bring it)"
    triton: Any = importlib.import_module("triton")
    version = tuple(int(n) for n in triton.__version__.split(".")[:2])
    if version < (3, 6):
        return f"it needs Triton 3.6, this is {triton.__version__}: pip install 'triton>=3.6', or a newer torch"
    if kind == "cpu":
        return None
    if torch.version.hip:
        return "it has not been tested on ROCm; backend 'native' runs torch.nn's kernels there"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < OLDEST:
            found = f"{torch.cuda.get_device_name(index)} has {capability[0]}.{capability[1]}"
            return f"its kernels need compute capability 7.5, {found}: use backend 'native'"
    return None


@functools.lru_cache(maxsize=64)
def _limits_of(index: int) -> Limits:
    p: Any = torch.cuda.get_device_properties(index)
    return Limits(p.name, (p.major, p.minor), p.shared_memory_per_block_optin, p.multi_processor_count)


def limits(kind: str, index: int | None = None) -> Limits:
    """Of a CUDA device, torch's current one without an index; of a supposed one in the interpreter."""
    if kind == "cpu":
        return _INTERPRETER
    return _limits_of(torch.cuda.current_device() if index is None else index)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` current, on which Triton launches."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
