"""What autograd may ask of the C++ engine: some gradients only, the same graph twice, strided tensors, gradcheck."""

import pytest
import torch
from engine_support import CPU, ENGINE, Case, assert_same_bits, inputs_of, make_call, outputs, run
from support import assert_equal

import fastrnn
from fastrnn.backends.base import Weights
from fastrnn.cells import CELLS
from fastrnn.recurrence import recurrence

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(ENGINE is None, reason="the engine is not built"),
]
BOTH = (False, True)
# With few rows the engine makes the gradients of the weights itself, with more it packs.
CASES = {
    "few rows": Case(T=3, B=2),
    "packed weights": Case(T=6, B=5),
    "both directions": Case(T=2, B=3, reverse=BOTH),
    "ragged": Case(T=6, B=5, reverse=BOTH, lengths=True, resets=True),
    "projection": Case(T=4, B=5, P=6, reverse=BOTH),
    "single step": Case(T=1, B=3, single=True),
    "single step of many": Case(T=1, B=20, single=True),
    "single step, projection": Case(T=1, B=3, P=6, single=True),
}
CASES_OF_CELLS = [(c, n) for c in CELLS for n, case in CASES.items() if c == "lstm" or not case.P]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cell", "name"), CASES_OF_CELLS)
def test_each_gradient_alone(cell, name, dtype):
    call = make_call(CASES[name]._replace(cell=cell), dtype, grad=False)
    everything = run(_asking(call, list(inputs_of(call))))
    for wanted in inputs_of(call):
        asking = _asking(call, [wanted])
        outs = outputs(asking)
        g = torch.Generator().manual_seed(1)
        seeds = [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype) for o in outs]
        torch.autograd.backward(outs, seeds)
        for other, a in inputs_of(asking).items():
            if other == wanted:
                assert_equal(f"{wanted} alone", a.grad, everything[f"gradient of {wanted}"], 1e-6)
            else:
                assert a.grad is None


def _asking(call, wanted):
    """The same call on fresh leaves, of which only those named ask for a gradient."""
    fresh = iter([a.detach().clone().requires_grad_(name in wanted) for name, a in inputs_of(call).items()])
    return call.with_flat([None if a is None else next(fresh) for a in call.flat])


@pytest.mark.parametrize(("cell", "name"), CASES_OF_CELLS)
def test_one_output_alone(cell, name):
    """An output that the loss does not depend on comes to backward as None."""
    call = make_call(CASES[name]._replace(cell=cell))
    for k in range(call.cell.states + (not call.single_step)):
        got, want = (
            torch.autograd.grad(outs[k].square().sum(), list(inputs_of(call).values()), allow_unused=True)
            for outs in (outputs(call), outputs(call, reference=True))
        )
        for input_name, g, w in zip(inputs_of(call), got, want, strict=True):
            assert_equal(f"{name} {input_name}", g, torch.zeros_like(g) if w is None else w)


@pytest.mark.parametrize(("cell", "name"), CASES_OF_CELLS)
def test_walking_a_graph_again_gives_the_same(cell, name):
    """The last walk of a graph makes its gradients in the memory of the tape, an earlier one must not."""
    call = make_call(CASES[name]._replace(cell=cell), torch.float32)
    result = recurrence(CPU, call)
    loss = (result.finals[0] if call.single_step else result.y).square().sum()
    inputs = inputs_of(call)
    walks = [
        torch.autograd.grad(loss, list(inputs.values()), retain_graph=keep, allow_unused=True)
        for keep in (True, True, False)
    ]
    first = {k: a for k, a in zip(inputs, walks[0], strict=True) if a is not None}
    for again in walks[1:]:
        assert_same_bits(f"{cell} {name}", dict(zip(inputs, again, strict=True)), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, list(inputs.values()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["few rows", "packed weights", "ragged", "projection", "single step"])
def test_strided_tensors(name, dtype):
    """Every tensor of a call with gaps between its elements gives the bits of its contiguous copy."""
    call = make_call(CASES[name], dtype)

    def spread(a):
        if a is None:
            return None
        wide = torch.full((*a.shape, 3), float("nan"), dtype=a.dtype)
        wide[..., 1] = a.detach()
        assert not wide[..., 1].is_contiguous()
        return wide[..., 1].requires_grad_()

    strided = call.with_flat([spread(a) for a in call.flat])
    assert_same_bits(name, run(strided), run(call))


def test_strided_gradient_of_the_output():
    call = make_call(CASES["packed weights"], torch.float32)
    inputs = list(inputs_of(call).values())
    seed = torch.randn(6, 5, 19)
    dense = torch.autograd.grad(recurrence(CPU, call).y, inputs, seed)
    strided = torch.autograd.grad(recurrence(CPU, call).y.transpose(0, 2), inputs, seed.transpose(0, 2).contiguous())
    expanded = torch.autograd.grad(recurrence(CPU, call).y.sum(), inputs)
    ones = torch.autograd.grad(recurrence(CPU, call).y, inputs, torch.ones(6, 5, 19))
    assert all(map(torch.equal, dense, strided))
    assert all(map(torch.equal, expanded, ones))


@pytest.mark.parametrize(("cell", "name"), CASES_OF_CELLS)
def test_gradcheck(cell, name):
    small = CASES[name]._replace(cell=cell, T=1 if CASES[name].single else 3, I=2, H=3, P=2 if CASES[name].P else 0)
    call = make_call(small._replace(B=min(small.B, 3)) if name != "single step of many" else small._replace(B=13))
    names = list(inputs_of(call))

    def function(*values):
        fresh = dict(zip(names, values, strict=True))
        weights = [
            Weights(*(fresh.get(f"{f} of stream {s}") for f in Weights._fields)) for s in range(len(call.weights))
        ]
        states = tuple(fresh[f"state {k}"] for k in range(len(call.states)))
        result = recurrence(CPU, call._replace(x=fresh["x"], states=states, weights=tuple(weights)))
        return (result.y, *result.finals)

    if cell == "rnn_relu":  # away from the kink
        call = call._replace(x=call.x.detach().abs().add(1).requires_grad_())
    values = [a.detach().clone().requires_grad_() for a in inputs_of(call).values()]
    assert torch.autograd.gradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_empty_batches_and_sequences(cell, sizes):
    """No row: the final states are the initial ones, their gradient passes, and that of all else is zero."""
    call = make_call(Case(cell, *sizes, reverse=BOTH))
    result = recurrence(CPU, call)
    assert result.y.shape == (*sizes, 2 * 19)
    seeds = [torch.randn_like(a) for a in result.finals]
    found = dict(
        zip(inputs_of(call), torch.autograd.grad(result.finals, list(inputs_of(call).values()), seeds), strict=True)
    )
    for k, (a, seed) in enumerate(zip(call.states, seeds, strict=True)):
        if not sizes[0]:
            assert torch.equal(result.finals[k], a)
            assert torch.equal(found[f"state {k}"], seed)
    assert not any(d.any() for name, d in found.items() if not name.startswith("state"))


@pytest.mark.parametrize("cell", CELLS)
def test_inference_is_the_forward_of_training(cell):
    for name in [n for c, n in CASES_OF_CELLS if c == cell]:
        call = make_call(CASES[name]._replace(cell=cell), torch.float32)
        trained = run(call)
        with torch.inference_mode():
            inferred = run(call, backward=False)
        assert_same_bits(f"{cell} {name}", inferred, {k: trained[k] for k in inferred})
        assert all(a.is_inference() for a in inferred.values())


def test_saved_tensors_that_moved():
    """Hooks that hand backward copies of what forward saved."""
    torch.manual_seed(0)
    module, x = fastrnn.LSTM(5, 19, backend="cpu"), torch.randn(7, 5, 5)
    plain = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        y = module(x)[0]
    assert all(map(torch.equal, torch.autograd.grad(y.sum(), list(module.parameters())), plain))
