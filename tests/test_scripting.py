"""TorchScript: torch.jit.script says what to use instead; torch.jit.trace takes any T and B, or refuses."""

from __future__ import annotations

import warnings

import pytest
import torch
from support import KINDS, B, H, I, T, assert_equal, leaves
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import scripting

CELLS = ("RNNCell", "LSTMCell", "GRUCell")


@pytest.fixture(autouse=True)
def _filters():
    """Those that the import set, before which pytest has set its own."""
    with warnings.catch_warnings():
        scripting.ignore_tracer_warnings()
        yield


pytestmark = pytest.mark.filterwarnings(r"ignore:.torch\.jit:DeprecationWarning")


class Model(nn.Module):
    """A recurrent module inside another, called with keywords."""

    def __init__(self, inner: nn.Module, **keywords: torch.Tensor) -> None:
        super().__init__()
        self.inner, self.keywords = inner, keywords

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return leaves(self.inner(x, **self.keywords))[0]


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", *CELLS])
def test_scripting_names_what_to_use_instead(name):
    module = getattr(fastrnn, name)(I, H)
    for outer in (module, nn.Sequential(nn.Linear(I, I), module)):
        with pytest.raises(NotImplementedError, match=rf"fastrnn\.{name}.*torch\.compile.*torch\.export"):
            torch.jit.script(outer)
    torch.jit.script(nn.Sequential(nn.Linear(I, I)))
    assert leaves(module(torch.randn(B, I)))[0].shape == (B, H), "unharmed"


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_takes_any_number_of_steps_and_rows(backend, kind, options):
    name, extra = KINDS[kind]
    module = getattr(fastrnn, name)(I, H, **extra, **options)
    traced = torch.jit.trace(module, torch.randn(T, B, I))
    for shape in ((T, B, I), (T + 4, B - 2, I), (1, 1, I)):
        x = torch.randn(shape)
        for got, want in zip(leaves(traced(x)), leaves(module(x)), strict=True):
            assert_equal(f"traced at {shape}", got, want)


@pytest.mark.parametrize("name", CELLS)
def test_a_trace_of_a_cell(backend, name):
    module = getattr(fastrnn, name)(I, H)
    traced = torch.jit.trace(module, torch.randn(B, I))
    x = torch.randn(B + 2, I)
    for got, want in zip(leaves(traced(x)), leaves(module(x)), strict=True):
        assert_equal("traced", got, want)


def test_a_trace_trains():
    module = fastrnn.LSTM(I, H, 2)
    traced = torch.jit.trace(module, torch.randn(T, B, I))
    x = torch.randn(T + 1, B, I)
    want = torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))
    got = torch.autograd.grad(traced(x)[0].square().sum(), list(traced.parameters()))
    for a, b in zip(got, want, strict=True):
        assert_equal("gradient", a, b)


def test_a_trace_refuses_what_it_would_freeze():
    module, x = fastrnn.GRU(I, H), torch.randn(T, B, I)
    for keywords in ({"lengths": torch.full((B,), T)}, {"resets": torch.zeros(T, B, dtype=torch.bool)}):
        with pytest.raises(RuntimeError, match=rf"would record {next(iter(keywords))}.*torch\.export"):
            torch.jit.trace(Model(module, **keywords), x)
    packed = pack_padded_sequence(x, torch.full((B,), T))

    def run(data: torch.Tensor) -> torch.Tensor:
        return module(packed._replace(data=data))[0].data

    with pytest.raises(RuntimeError, match="PackedSequence"):
        torch.jit.trace(run, packed.data)
