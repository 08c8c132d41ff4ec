"""Is a tensor memory and nothing else? Whoever takes addresses or reads values must ask."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

_functorch = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_batched = torch._C._functorch.is_legacy_batchedtensor  # by autograd.grad(is_grads_batched=True)
_tracing = torch._C._get_tracing_state
_PLAIN = {Tensor, Parameter, type(None)}
Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_compiled(function: Function) -> Function:
    """What torch.compiler.assume_constant_result does, without the import of all of Dynamo (0.9 s)."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled  # while torch.compile traces a call it is in the same transformations
def transformed() -> bool:
    """Is one of torch.func's transformations active?"""
    return _functorch() is not None


def traced() -> bool:
    """Is torch.jit.trace at work?"""
    return _tracing() is not None


def dual() -> bool:
    """Is forward-mode differentiation at work?"""
    return forward_ad._current_level >= 0


def watched() -> bool:
    """Must somebody see operations, where a backend would take addresses and change memory?"""
    return is_compiling() or transformed() or dual() or traced() or _dispatch_modes() > 0


def plain(tensors: Iterable[Tensor | None]) -> bool:
    """Are they of torch's own types, and their values those that lie in memory?"""
    if not _PLAIN.issuperset(map(type, tensors)):
        return False
    return not [
        a
        for a in tensors
        if a is not None and (a.is_neg() or (type(a) is Tensor and (a._is_zerotensor() or _batched(a))))
    ]


def ordinary(tensors: tuple[Tensor | None, ...]) -> bool:
    """Are these tensors memory and nothing else, here and now?"""
    return not watched() and plain(tensors)


def faked(tensors: Iterable[Tensor | None]) -> bool:
    """Is one of them without memory, in the hands of a tracer?"""
    from torch._subclasses.fake_tensor import FakeTensor

    return any(isinstance(a, FakeTensor) for a in tensors)


def values(a: Tensor) -> Tensor | None:
    """The tensor under torch.func's wrappers, or None where there are no values to read."""
    if is_compiling():
        return None
    while torch._C._functorch.is_functorch_wrapped_tensor(a):
        a = torch._C._functorch.get_unwrapped(a)
    return a if plain((a,)) and not _dispatch_modes() else None
