"""A watch over operations that must stay on one device: no value read by the host, nothing copied to or from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}
LITERALS = {
    torch.tensor,
    torch.as_tensor,
    torch.asarray,
    torch.from_numpy,
    Tensor.new_tensor,
}  # seen by no dispatch mode


@contextmanager
def stays_on(device: str) -> Iterator[list[str]]:
    """AssertionError at an operation that needs a value or has a tensor elsewhere; the names of those that came."""
    with _Operations(device) as mode, _Literals():
        yield mode.seen


class _Operations(TorchDispatchMode):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        if _masked(args[1]) if function in INDEXED else READS.intersection(function.tags):
            raise AssertionError(f"{function} reads a value")
        for a in tree_leaves((args, kwargs)):
            if isinstance(a, torch.device) and a.type != self.device:
                raise AssertionError(f"{function} goes to the {a}")
        out = function(*args, **(kwargs or {}))
        for a in tree_leaves((args, kwargs, out)):
            if isinstance(a, Tensor) and a.device.type != self.device:
                raise AssertionError(f"{function} has a tensor of shape {tuple(a.shape)} on the {a.device}")
        return out


def _masked(indices: list[Tensor | None]) -> bool:
    return any(a is not None and a.dtype in (torch.bool, torch.uint8) for a in indices)


class _Literals(TorchFunctionMode):
    """Tensors made of Python's numbers, which are copied from the host."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in LITERALS:
            raise AssertionError(f"{function.__name__} copies from the host")
        if function in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, (list, range)) for i in index):
                raise AssertionError(f"{function.__name__} copies its index {index} from the host")
        return function(*args, **(kwargs or {}))
