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

from fastrnn.bench.shapes import Case


@dataclass(frozen=True)
class Subject:
    """One side. `iterate` is what is timed; `read` names what it has returned."""

    module: nn.Module
    iterate: Callable[[], Any]
    read: Callable[[Any], dict[str, Tensor]]
    arguments: tuple[Any, ...] = ()  # what the module is called with
    keywords: dict[str, Any] | None = None

    def observe(self) -> dict[str, Tensor]:
        """Outputs, states and gradients of an iteration, by name."""
        return {name: a.detach() for name, a in self.read(self.iterate()).items()}


def pair(
    case: Case, cell: str, mode: str, dtype: torch.dtype, library: ModuleType, device: str = "cpu"
) -> tuple[Subject, Subject]:
    """torch.nn and `library` (fastrnn, or torch.nn itself) on the same weights and inputs."""
    return build(case, cell, mode, dtype, nn, device), build(case, cell, mode, dtype, library, device)


def build(
    case: Case,
    cell: str,
    mode: str,
    dtype: torch.dtype,
    library: ModuleType,
    device: str = "cpu",
    backend: str | None = None,
) -> Subject:
    """One side alone, on weights and inputs that depend on the case only; `backend`: fastrnn's, for this side alone."""
    module = make_module(case, cell, dtype, library).to(device)
    if backend is not None:
        module.backend = backend  # type: ignore[assignment]
    own = library is not nn
    leaf, arguments, keywords = _inputs(case, dtype, own, device)
    if case.form == "lengths" and not own:
        call: Callable[[], Any] = _through_packing(module, leaf, torch.tensor(case.lengths))
    else:
        call = partial(module, *arguments, **keywords)
    read: Callable[[Any], dict[str, Tensor]] = partial(_outputs, case)
    if mode != "inference":
        leaf.requires_grad_()
    if mode == "training":
        named = {"x": leaf, **dict(module.named_parameters())}
        call, read = training(call, partial(_output, case), read, named, upstream(case, dtype, leaf))
    return Subject(module, call, read, arguments, keywords)


def training(
    call: Callable[[], Any],
    output: Callable[[Any], Tensor],
    read: Callable[[Any], dict[str, Tensor]],
    named: dict[str, Tensor],
    dy: Tensor,
) -> tuple[Callable[[], Any], Callable[[Any], dict[str, Tensor]]]:
    """`iterate` and `read` of training: backward from `dy` at `output`, and the gradients of `named`.

    On a CPU they go into `.grad`, as in training; on a GPU they are returned, since CUDA graphs are captured on streams
    of their own.
    """
    leaves = list(named.values())

    def accumulate() -> Any:
        for a in leaves:
            a.grad = None
        result = call()
        torch.autograd.backward(output(result), dy)
        return result, [a.grad for a in leaves]

    def give() -> Any:
        result = call()
        return result, torch.autograd.grad(output(result), leaves, dy)

    def read_all(returned: Any) -> dict[str, Tensor]:
        result, grads = returned
        missing = [name for name, g in zip(named, grads, strict=True) if g is None]
        assert not missing, f"no gradient of {missing}"
        return {**read(result), **{f"grad {name}": g for name, g in zip(named, grads, strict=True)}}

    return give if dy.is_cuda else accumulate, read_all


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_input(case: Case, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """x (T, B, I)."""
    return torch.randn(case.T, case.B, case.I, generator=_generator(1)).to(device, dtype)


def upstream(case: Case, dtype: torch.dtype, leaf: Tensor) -> Tensor:
    """The gradient that comes from above, of the output's shape, on the input's device."""
    width = case.H * (2 if case.bidirectional else 1)
    shape = (case.T, case.B, width) if case.form in ("dense", "lengths") else (case.tokens, width)
    return torch.randn(shape, generator=_generator(2)).to(leaf.device, dtype)


def make_module(case: Case, cell: str, dtype: torch.dtype, library: ModuleType) -> nn.Module:
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


def _inputs(case: Case, dtype: torch.dtype, own: bool, device: str) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The input that takes a gradient, and the arguments; `own`: those that torch.nn does not take."""
    x = make_input(case, dtype, device)
    if case.form in ("cell", "step"):
        h, c = torch.randn(2, case.B, case.H, generator=_generator(3)).to(device, dtype)
        if case.form == "step" and own:
            return x, (x, (h[None], c[None])), {}
        x = x[0]
        return x, (x, (h, c)), {}
    if case.form == "packed":
        packed = pack_padded_sequence(x, torch.tensor(case.lengths), enforce_sorted=False)
        data = packed.data.detach().clone()
        packed = PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        return data, (packed,), {}
    given = {"lengths": torch.tensor(case.lengths, device=device)} if case.form == "lengths" and own else {}
    return x, (x,), given


def _through_packing(module: nn.Module, x: Tensor, lengths: Tensor) -> Callable[[], Any]:
    """What a user of torch.nn writes for a padded batch."""

    def call() -> Any:
        y, states = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(y)[0], states

    return call


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
