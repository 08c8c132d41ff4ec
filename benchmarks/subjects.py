"""The two sides of a comparison: the same weights and inputs, one closure each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from benchmarks.shapes import Case


@dataclass(frozen=True)
class Subject:
    """One side. `iterate` is what is timed; `observe` runs it once and names what it gave."""

    module: nn.Module
    iterate: Callable[[], Any]
    observe: Callable[[], dict[str, Tensor]]
    arguments: tuple[Any, ...]  # what the module is called with
    keywords: dict[str, Any]


def pair(case: Case, cell: str, mode: str, dtype: torch.dtype, library: ModuleType) -> tuple[Subject, Subject]:
    """torch.nn and `library` (fastrnn, or torch.nn itself) on the same weights and inputs."""
    return build(case, cell, mode, dtype, nn), build(case, cell, mode, dtype, library)


def build(case: Case, cell: str, mode: str, dtype: torch.dtype, library: ModuleType) -> Subject:
    """One side alone, on weights and inputs that depend on the case only."""
    module = _module(case, cell, dtype, library)
    own = library is not nn
    leaf, arguments, keywords = _inputs(case, dtype, own)
    if case.form == "lengths" and not own:
        call: Callable[[], Any] = _through_packing(module, leaf, torch.tensor(case.lengths))
    else:
        call = partial(module, *arguments, **keywords)
    if mode == "inference":
        return Subject(module, call, lambda: _outputs(case, call()), arguments, keywords)
    leaf.requires_grad_()
    dy = torch.randn(_output_shape(case), generator=_generator(2)).to(dtype)
    params = list(module.parameters())

    def iterate() -> Any:
        leaf.grad = None
        for p in params:
            p.grad = None
        result = call()
        torch.autograd.backward(_output(case, result), dy)
        return result

    def observe() -> dict[str, Tensor]:
        seen = _outputs(case, iterate())
        for name, a in [("x", leaf), *module.named_parameters()]:
            assert a.grad is not None, name
            seen[f"grad {name}"] = a.grad.clone()
        return seen

    return Subject(module, iterate, observe, arguments, keywords)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _module(case: Case, cell: str, dtype: torch.dtype, library: ModuleType) -> nn.Module:
    """A module of `library` with the weights that torch.nn's initialisation draws from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if case.form in ("cell", "step"):
            source: nn.Module = getattr(nn, cell + "Cell")(case.I, case.H)
        else:
            source = getattr(nn, cell)(case.I, case.H, case.layers, bidirectional=case.bidirectional)
    weights = source.to(dtype).state_dict()
    if library is nn:
        return source
    module: nn.Module
    if case.form == "cell":
        module = getattr(library, cell + "Cell")(case.I, case.H, dtype=dtype)
    elif case.form == "step":
        module = getattr(library, cell)(case.I, case.H, dtype=dtype)
        weights = {f"{name}_l0": w for name, w in weights.items()}
    else:
        module = getattr(library, cell)(case.I, case.H, case.layers, bidirectional=case.bidirectional, dtype=dtype)
    module.load_state_dict(weights)
    return module


def _inputs(case: Case, dtype: torch.dtype, own: bool) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The input that takes a gradient, and the arguments; `own`: those that torch.nn does not take."""
    x = torch.randn(case.T, case.B, case.I, generator=_generator(1)).to(dtype)
    if case.form in ("cell", "step"):
        h, c = torch.randn(2, case.B, case.H, generator=_generator(3)).to(dtype)
        if case.form == "step" and own:
            return x, (x, (h[None], c[None])), {}
        x = x[0]
        return x, (x, (h, c)), {}
    if case.form == "packed":
        packed = pack_padded_sequence(x, torch.tensor(case.lengths), enforce_sorted=False)
        data = packed.data.detach().clone()
        packed = PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        return data, (packed,), {}
    return x, (x,), {"lengths": torch.tensor(case.lengths)} if case.form == "lengths" and own else {}


def _through_packing(module: nn.Module, x: Tensor, lengths: Tensor) -> Callable[[], Any]:
    """What a user of torch.nn writes for a padded batch."""

    def call() -> Any:
        y, states = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(y)[0], states

    return call


def _output_shape(case: Case) -> tuple[int, ...]:
    width = case.H * (2 if case.bidirectional else 1)
    if case.form in ("dense", "lengths"):
        return case.T, case.B, width
    return case.tokens, width


def _output(case: Case, result: Any) -> Tensor:
    y: Tensor = result[0].data if case.form == "packed" else result[0]
    return y


def _outputs(case: Case, result: Any) -> dict[str, Tensor]:
    """y and the final states by name. nn.LSTMCell's h is both, so all of `cell` and `step` is (B, H)."""
    if case.form in ("cell", "step"):
        h, c = result if isinstance(result[1], Tensor) else result[1]
        return {"y": result[0].reshape(case.B, case.H), "h": h.reshape(case.B, case.H), "c": c.reshape(case.B, case.H)}
    states = result[1] if isinstance(result[1], tuple) else (result[1],)
    return {"y": _output(case, result), **dict(zip("hc", states, strict=False))}
