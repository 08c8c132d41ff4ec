"""Per-sample gradients by torch.func.vmap(grad(functional_call)), against a loop over the samples."""

from __future__ import annotations

import pytest
import torch
from support import KINDS, B, H, I, T, assert_equal, leaves
from torch import nn
from torch.func import functional_call, grad, vmap

import fastrnn

CELLS = ("RNNCell", "LSTMCell", "GRUCell")


def weighted(module, samples, masked=None):
    """A loss of one sample: its outputs and states weighted at random. `masked` names a last tensor per sample."""
    seeds = [torch.randn_like(o) for o in leaves(module(samples[0][0]))]

    def loss(parameters, x, *mask):
        keywords = {masked: mask[0]} if masked else {}
        outputs = leaves(functional_call(module, parameters, (x,), keywords))
        return sum((o * s).sum() for o, s in zip(outputs, seeds, strict=True))

    return loss


def compare(loss, module, samples):
    parameters = dict(module.named_parameters())
    detached = {name: p.detach() for name, p in parameters.items()}
    got = vmap(grad(loss), in_dims=(None, *(0 for _ in samples)))(detached, *samples)
    for b in range(B):
        own = [tuple(a[b] for a in s) if isinstance(s, tuple) else s[b] for s in samples]
        want = torch.autograd.grad(loss(parameters, *own), list(parameters.values()))
        for name, w in zip(parameters, want, strict=True):
            assert_equal(f"sample {b}, {name}", got[name][b], w)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_layers(backend, kind, options):
    name, extra = KINDS[kind]
    module = getattr(fastrnn, name)(I, H, **extra, **options, dtype=torch.float64)
    samples = (torch.randn(B, T, I, dtype=torch.float64),)
    compare(weighted(module, samples), module, samples)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_with_resets(resets_backend, kind):
    name, extra = KINDS[kind]
    module = getattr(fastrnn, name)(I, H, **extra, dtype=torch.float64)
    samples = (torch.randn(B, T, I, dtype=torch.float64), torch.rand(B, T) < 0.3)
    compare(weighted(module, samples, "resets"), module, samples)


@pytest.mark.parametrize("name", CELLS)
def test_cells(backend, name):
    module = getattr(fastrnn, name)(I, H, dtype=torch.float64)
    x, h = torch.randn(B, I, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)

    def loss(parameters, x, hx):
        outputs = leaves(functional_call(module, parameters, (x, hx)))
        return sum((k * o.square()).sum() for k, o in enumerate(outputs, 1))

    compare(loss, module, (x, (h, 2 * h) if name == "LSTMCell" else h))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_torch_has_no_rule_for_it(name):
    """Already of the forward; the gradient alone finds a slow way for LSTM in fp32, and fails otherwise."""
    module, x = getattr(nn, name)(I, H), torch.randn(B, T, I)
    parameters = {key: p.detach() for key, p in module.named_parameters()}
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        vmap(lambda x: functional_call(module, parameters, (x,))[0])(x)
