"""Cells against torch.nn's cells and our own layers, and the functional forms against the modules."""

import pytest
import torch
from support import KINDS, B, H, I, T, assert_equal, both, compare, gradients, inputs_of, leaves, pair, random_states

import fastrnn
from fastrnn import functional

pytestmark = pytest.mark.usefixtures("poisoned")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=str)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("given_hx", [True, False], ids=["hx", "nohx"])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_cells(backend, name, options, batched, given_hx, nonlinearity):
    if name == "RNNCell":
        options = {**options, "nonlinearity": nonlinearity}
    theirs, ours = both(name, I, H, dtype=torch.float64, **options)
    lead = (B,) if batched else ()
    x = torch.randn(*lead, I, dtype=torch.float64, requires_grad=True)
    hx = [torch.randn(*lead, H, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    hx = (tuple(hx) if name == "LSTMCell" else hx[0]) if given_hx else None
    got, want = ours(x, hx), theirs(x, hx)
    assert type(got) is type(want)
    inputs = inputs_of(x, hx)
    expected = gradients(theirs, inputs, leaves(want))
    for a, b in zip(leaves(got), leaves(want), strict=True):
        assert_equal(name, a, b)
    for key, g in gradients(ours, inputs, leaves(got)).items():
        assert_equal(f"{name} gradient of {key}", g, expected[key])


@pytest.mark.parametrize("name", CELLS)
def test_cells_step_by_step_equal_the_layer(backend, name):
    cell, layer = getattr(fastrnn, name)(I, H), getattr(fastrnn, name[:-4])(I, H)
    layer.load_state_dict({k + "_l0": v for k, v in cell.state_dict().items()})
    x, state, outputs = torch.randn(T, B, I), None, []
    for row in x:
        state = cell(row, state)
        outputs.append(leaves(state)[0])
    assert_equal("output", torch.stack(outputs), layer(x)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_functional(backend, kind, batch_first):
    theirs, ours = pair(kind, I, H, 2, bidirectional=True, batch_first=batch_first, dropout=0.5)
    x = torch.randn(*((B, T) if batch_first else (T, B)), I, dtype=torch.float64, requires_grad=True)
    hx = random_states(theirs)
    name, extra = KINDS[kind]
    weights = [functional.Weights(*w) for w in ours._weights()]
    options = {k: v for k, v in extra.items() if k != "proj_size"}

    def run_functional():
        torch.manual_seed(9)
        function = getattr(functional, name.lower())
        return function(
            x, hx, weights, bidirectional=True, batch_first=batch_first, dropout=0.5, training=True, **options
        )

    def run_theirs():
        torch.manual_seed(9)
        return theirs(x, hx)

    compare(kind, ours, theirs, run_functional, run_theirs, inputs_of(x, hx))
    theirs.eval()
    got = getattr(functional, name.lower())(
        x, hx, weights, bidirectional=True, batch_first=batch_first, dropout=0.5, **options
    )
    for a, b in zip(leaves(got), leaves(theirs(x, hx)), strict=True):
        assert_equal("without training no dropout", a, b)
