"""Types for type checkers: what `return_states` changes about a call's result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypedDict, TypeVar, overload

from torch import Tensor

from fastrnn.layers import Batch

Lengths = Tensor | Sequence[int] | None
HX = TypeVar("HX")


class Layer(Protocol[HX]):
    """How a module is called."""

    @overload
    def __call__(
        self,
        input: Batch,
        hx: HX | None = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        return_states: Literal[False] = False,
    ) -> tuple[Batch, HX]: ...
    @overload
    def __call__(
        self,
        input: Batch,
        hx: HX | None = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        return_states: Literal[True],
    ) -> tuple[Batch, HX, tuple[Tensor, ...]]: ...


class Options(TypedDict, total=False):
    """The options that every function of `fastrnn.functional` takes."""

    bidirectional: bool
    batch_first: bool
    dropout: float
    training: bool
    lengths: Lengths
    resets: Tensor | None
    backend: str
    save: str


class RnnOptions(Options, total=False):
    nonlinearity: str
