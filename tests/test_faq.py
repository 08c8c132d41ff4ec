"""docs/faq.md: each message is provoked in torch.nn, and what is said of fastrnn is done."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support import B, H, I, T
from torch import nn
from torch.export import Dim
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn

PAGE = (Path(__file__).parent.parent / "docs" / "faq.md").read_text()
HEADINGS = re.findall(r"^### (.*)$", PAGE, re.M)
CUDA = "*On CUDA only"


class Entry(NamedTuple):
    """`what(library)` raises or warns of the heading's message with torch.nn (or of `message`, where the heading is
    a question or a shorter form); with fastrnn it raises `ours`, or where that is None it runs."""

    what: Callable[[Any], Any]
    ours: str | None = None
    message: str | None = ""  # None: nothing to provoke on a CPU, or no error at all


def x() -> torch.Tensor:
    return torch.randn(T, B, I)


def state(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(shape), torch.zeros(shape)


def backward_of_windows(library: Any) -> None:
    layer, carried = library.LSTM(I, H), None
    for _ in range(2):
        y, carried = layer(x(), carried)
        y.sum().backward()


def in_place(library: Any) -> None:
    y, _ = library.LSTM(I, H)(x())
    y.mul_(2)
    y.sum().backward()


def in_eval_mode(library: Any) -> None:
    layer = library.LSTM(I, H).eval()
    layer(x())[0].sum().backward()
    assert layer.weight_hh_l0.grad is not None


def cleared(library: Any) -> None:
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[3] = True
    layer, a = library.LSTM(I, H), x()
    torch.testing.assert_close(layer(a, resets=resets)[0][3:], layer(a[3:])[0])


def penalty(library: Any) -> None:
    layer, a = library.LSTM(I, H), x().requires_grad_()
    (g,) = torch.autograd.grad(layer(a)[0].sum(), a, create_graph=True)
    g.square().sum().backward()
    assert layer.weight_hh_l0.grad is not None


def scattered_weights(library: Any) -> None:
    layer = library.LSTM(I, H)
    layer.weight_hh_l0 = nn.Parameter(torch.randn(H, 4 * H).t())
    layer.flatten_parameters()
    layer(x())


def empty_rows(library: Any) -> None:
    if library is nn:
        pack_padded_sequence(x(), [T, 0, 3, 2, 1], enforce_sorted=False)
    assert not library.LSTM(I, H)(x(), lengths=[T, 0, 3, 2, 1])[0][:, 1].any()


def unsorted(library: Any) -> None:
    if library is nn:
        pack_padded_sequence(x(), [3, T, 3, 2, 1])
    library.LSTM(I, H)(x(), lengths=[3, T, 3, 2, 1])


def lengths_elsewhere(library: Any) -> None:
    if library is nn:
        pack_padded_sequence(x(), torch.tensor([T, 4, 3, 2, 1], device="meta"))
    layer = library.LSTM(I, H, device="meta", backend="reference")
    layer(x().to("meta"), lengths=torch.tensor([T, 4, 3, 2, 1], device="meta", dtype=torch.int32))


def exported(library: Any) -> None:
    dims = ({0: Dim("T", max=100), 1: Dim("B", max=100)},)
    program = torch.export.export(library.LSTM(I, H), (x(),), dynamic_shapes=dims)
    assert program.module()(torch.randn(2 * T, B, I))[0].shape == (2 * T, B, H)


def mapped(library: Any) -> None:
    layer = library.LSTM(I, H)
    assert torch.vmap(lambda a: layer(a)[0])(torch.randn(3, T, B, I)).shape == (3, T, B, H)


def private(library: Any) -> None:
    pytest.importorskip("opacus", reason="needs Opacus")
    from opacus.validators import ModuleValidator

    import fastrnn.opacus  # noqa: F401

    model = nn.Sequential(library.LSTM(I, H))
    if library is nn:
        ModuleValidator.validate(model, strict=True)
    assert not ModuleValidator.validate(ModuleValidator.fix(model))


ENTRIES = {
    "Expected hidden[0] size": Entry(
        lambda L: L.LSTM(I, H)(x(), state(1, B - 1, H)), f"hx: expected shape (1, {B}, {H})"
    ),
    "For batched 3-D input, hx should also be 3-D": Entry(
        lambda L: L.GRU(I, H)(x(), torch.zeros(1, H)), "hx: expected 3 dimensions to go with this input"
    ),
    "input.size(-1) must be equal to input_size": Entry(lambda L: L.LSTM(12, H)(x()), "input: expected 12 features"),
    "Expected input to be 2D or 3D": Entry(lambda L: L.LSTM(I, H)(x()[None]), "input: expected 2 or 3 dimensions"),
    "index 1 is out of bounds for dimension 0 with size 1": Entry(
        lambda L: L.LSTM(I, H)(x(), torch.zeros(1, B, H)), "hx: expected a tuple (h_0, c_0) of Tensors, got a Tensor"
    ),
    "argument 'input' (position 1) must be Tensor, not tuple": Entry(
        lambda L: nn.Sequential(L.LSTM(I, H), nn.Linear(H, 2))(x()), "argument 'input' (position 1) must be Tensor"
    ),
    "RNN input dtype (torch.float64) does not match weight dtype": Entry(
        lambda L: L.LSTM(I, H)(x().double()), "input: expected the weights' dtype torch.float32, got torch.float64"
    ),
    "Length of all samples has to be greater than 0": Entry(empty_rows),
    "`lengths` array must be sorted in decreasing order when `enforce_sorted` is True": Entry(unsorted),
    "'lengths' argument should be a 1D CPU int64 tensor": Entry(lengths_elsewhere),
    "Expected sequence length to be larger than 0 in RNN": Entry(lambda L: L.LSTM(I, H)(x()[:0])),
    "Trying to backward through the graph a second time": Entry(
        backward_of_windows, "Trying to backward through the graph a second time"
    ),
    "one of the variables needed for gradient computation has been modified by an inplace operation": Entry(
        in_place, "modified by an inplace operation"
    ),
    "cudnn RNN backward can only be called in training mode": Entry(in_eval_mode, message=None),
    "How do I reset the hidden state in the middle of a batch?": Entry(
        cleared, message="unexpected keyword argument 'resets'"
    ),
    "the derivative for '_cudnn_rnn_backward' is not implemented": Entry(penalty, message=None),
    "dropout option adds dropout after all but last recurrent layer": Entry(
        lambda L: L.LSTM(I, H, dropout=0.5), "dropout option adds dropout"
    ),
    "RNN module weights are not part of single contiguous chunk of memory": Entry(scattered_weights, message=None),
    "Dynamo does not support RNN, GRU, or LSTM": Entry(
        lambda L: torch.compile(L.LSTM(I, H), fullgraph=True, backend="eager")(x())
    ),
    "You marked T as dynamic but your code specialized it to be a constant": Entry(exported),
    "Batching rule not implemented for aten::lstm.input": Entry(mapped),
    "torch.jit.script is deprecated": Entry(
        lambda L: torch.jit.script(L.LSTM(I, H)), "use torch.compile", "`torch.jit.script` is deprecated"
    ),
    "We do not support nn.LSTM because its implementation uses special modules": Entry(private),
}


def outcome(what: Callable[[Any], Any], library: Any) -> str:
    """The error that it raises, or the warnings that it gives, as text; "" if neither."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            what(library)
        except Exception as error:
            return f"{error}"
    return " ".join(str(w.message) for w in caught)


def test_every_heading_has_its_test():
    assert list(ENTRIES) == HEADINGS


@pytest.mark.parametrize("heading", ENTRIES)
def test_the_message_is_torch_nns(heading):
    message = ENTRIES[heading].message
    if message is None:
        section = PAGE.split(f"### {heading}\n", 1)[1].split("\n### ", 1)[0]
        assert CUDA in section or "*A warning, on CUDA only" in section
        pytest.skip("not to be had on a CPU")
    assert (message or heading) in outcome(ENTRIES[heading].what, nn)


@pytest.mark.parametrize("heading", ENTRIES)
def test_what_fastrnn_does(heading):
    entry = ENTRIES[heading]
    got = outcome(entry.what, fastrnn)
    assert got == "" if entry.ours is None else entry.ours in got, got
