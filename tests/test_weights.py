"""Weights that are replaced, shared, dropped, normalised, pruned or averaged: read at every call, kept nowhere else.

tests/test_module_api.py compares the common modifications with torch.nn's. Here are those that torch.nn gets wrong,
because it keeps a list of its weights beside the attributes and compares the two at each call, and those that wrappers
make. pyproject.toml turns warnings into errors, so that none of this warns either. On CUDA torch.nn warns of weights
that "are not part of single contiguous chunk of memory"; on the CPU it fails as the tests named `test_torch_nn...` say.
"""

import copy
import gc
import weakref

import pytest
import torch
from support import B, H, T, assert_equal, both, gradients, leaves
from torch import nn
from torch.nn.functional import dropout
from torch.nn.utils import parameters_to_vector, parametrizations, parametrize, prune, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastrnn

LAYERS, CELLS = ("RNN", "LSTM", "GRU"), ("RNNCell", "LSTMCell", "GRUCell")
F64 = torch.float64
every_module = pytest.mark.parametrize("name", LAYERS + CELLS)


def module(name, library=fastrnn, seed=3, **options):
    torch.manual_seed(seed)
    return getattr(library, name)(H, H, dtype=F64, **options)


def hh(name):
    return "weight_hh" if "Cell" in name else "weight_hh_l0"


def arguments(name, grad=False):
    """An input, and for a cell its state too, without which weight_hh would not matter."""
    x = torch.randn((B, H) if "Cell" in name else (T, B, H), dtype=F64, requires_grad=grad)
    state = torch.randn(B, H, dtype=F64)
    return {"LSTMCell": (x, (state, state)), "GRUCell": (x, state), "RNNCell": (x, state)}.get(name, (x,))


def output(m, args):
    return leaves(m(*args))[0]


def like(m, **changed):
    """What a fresh torch.nn module of the same kind computes with m's weights, some of them changed."""
    fresh = getattr(nn, type(m).__name__)(H, H, dtype=F64)
    fresh.load_state_dict({**{n: getattr(m, n).detach() for n, _ in fresh.named_parameters()}, **changed})
    return fresh


class Counted(nn.Module):
    """Twice the weight, and how often it was asked for."""

    calls = 0

    def forward(self, w):
        self.calls += 1
        return 2 * w


def evaluations(name, library):
    m, count = module(name, library), Counted()
    parametrize.register_parametrization(m, hh(name), count)
    count.calls = 0
    m(*arguments(name))
    return count.calls


@every_module
def test_a_parametrization_is_evaluated_once_per_call(backend, name):
    assert evaluations(name, fastrnn) == 1


@pytest.mark.parametrize("name", LAYERS)
def test_torch_nn_evaluates_a_parametrization_several_times_per_call(name):
    assert evaluations(name, nn) > 1


def power_iterations(name, library, calls):
    """After training with spectral_norm for some calls: its vector u, what it should be, and the last output."""
    m = module(name, library)
    parametrizations.spectral_norm(m, hh(name))
    norm = getattr(m.parametrizations, hh(name))
    want, args = copy.deepcopy(norm), arguments(name)
    for _ in range(calls):
        got, w = output(m, args), want()
    return norm[0]._u, want[0]._u, got, output(like(module(name), **{hh(name): w.detach()}), args)


@every_module
def test_spectral_norm_in_training_makes_one_power_iteration_per_call(backend, name):
    u, expected, got, want = power_iterations(name, fastrnn, 3)
    assert torch.equal(u, expected)
    assert_equal("output", got, want)


@pytest.mark.parametrize("name", LAYERS)
def test_torch_nn_makes_more_power_iterations_than_calls(name):
    u, expected, *_ = power_iterations(name, nn, 3)
    assert not torch.equal(u, expected)


def swapped_state(name, library):
    """load_state_dict as torch's future default does it: the parameters are swapped, not filled."""
    m, state = module(name, library), copy.deepcopy(module(name, library, seed=8).state_dict())
    args = arguments(name)
    m(*args)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        m.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    return output(m, args), output(like(m, **state), args)


@every_module
def test_parameters_can_be_swapped(backend, name):
    assert_equal("after load_state_dict", *swapped_state(name, fastrnn))
    m, other, args = module(name), module(name, seed=8), arguments(name)
    want = output(like(m, **{hh(name): getattr(other, hh(name)).detach()}), args)
    m(*args), other(*args)
    torch.utils.swap_tensors(getattr(m, hh(name)), getattr(other, hh(name)))
    assert_equal("after swap_tensors", output(m, args), want)


@pytest.mark.parametrize("name", LAYERS)
def test_torch_nn_parameters_cannot_be_swapped(name):
    with pytest.raises(RuntimeError, match="weakref"):
        swapped_state(name, nn)


@every_module
def test_a_deleted_weight_is_gone(backend, name):
    m = module(name)
    delattr(m, hh(name))
    with pytest.raises(AttributeError, match=hh(name)):
        m(*arguments(name))


@pytest.mark.parametrize("name", LAYERS)
def test_torch_nn_computes_with_a_deleted_weight(name):
    m, args = module(name, nn), arguments(name)
    want = output(m, args)
    delattr(m, hh(name))
    assert torch.equal(output(m, args), want)


@every_module
def test_a_replaced_weight_is_freed(backend, name):
    m, args = module(name), arguments(name)
    output(m, args).sum().backward()
    old = weakref.ref(getattr(m, hh(name)))
    setattr(m, hh(name), nn.Parameter(torch.zeros_like(getattr(m, hh(name)))))
    gc.collect()
    assert old() is None
    assert_equal("output", output(m, args), output(like(m), args))


@every_module
def test_assigned_state_dict(backend, name):
    """load_state_dict(assign=True): the tensors of the state_dict become the weights, also from a meta module."""
    m, args = module(name), arguments(name)
    m(*args)
    for target in (m, module(name, device="meta")):
        state = module(name, seed=8).state_dict(keep_vars=True)
        target.load_state_dict(state, assign=True)
        assert all(p is state[n] for n, p in target.named_parameters())
        assert_equal("output", output(target, args), output(like(target), args))
        output(target, args).sum().backward()
        assert all(t.grad is not None for t in state.values())


@every_module
def test_weight_drop(backend, name):
    """AWD-LSTM's way: the raw weight is a parameter, and before each call a dropped copy takes the weight's place."""
    results, args = [], arguments(name)
    for library in (nn, fastrnn):
        m = module(name, library)
        raw = getattr(m, hh(name))
        delattr(m, hh(name))
        m.register_parameter("raw", raw)
        torch.manual_seed(6)
        steps = []
        for _ in range(3):
            setattr(m, hh(name), dropout(raw, 0.5))
            steps.append(output(m, args))
        sum(y.pow(2).sum() for y in steps).backward()
        results.append([*steps, raw.grad])
    assert not torch.equal(results[1][0], results[1][1])
    for got, want in zip(results[1], results[0], strict=True):
        assert_equal("output or gradient", got, want)


@every_module
def test_a_network_that_makes_the_weights(backend, name):
    """A hypernetwork: gradients go through the weight into what made it."""
    maker, args, results = nn.Linear(4, H * H, dtype=F64), arguments(name), []
    code = torch.randn(getattr(module(name), hh(name)).shape[0] // H, 4, dtype=F64)
    for library in (nn, fastrnn):
        m = module(name, library)
        delattr(m, hh(name))
        setattr(m, hh(name), maker(code).view(-1, H))
        results.append([output(m, args), *torch.autograd.grad(output(m, args).pow(2).sum(), list(maker.parameters()))])
    for got, want in zip(results[1], results[0], strict=True):
        assert_equal("output or gradient", got, want)


@every_module
def test_cached_and_removed_parametrizations(backend, name):
    m, count, args = module(name), Counted(), arguments(name)
    parametrize.register_parametrization(m, hh(name), count)
    count.calls = 0
    with parametrize.cached():
        first, second = output(m, args), output(m, args)
    assert count.calls == 1
    assert torch.equal(first, second)
    (first + second).sum().backward()
    assert getattr(m.parametrizations, hh(name)).original.grad.any()
    parametrize.remove_parametrizations(m, hh(name))
    assert type(m) is getattr(fastrnn, name)
    assert torch.equal(output(m, args), first)


@every_module
def test_pruned_again_and_for_good(backend, name):
    m, args = module(name), arguments(name)
    prune.random_unstructured(m, hh(name), 0.3)
    prune.l1_unstructured(m, hh(name), 0.4)
    output(m, args).sum().backward()
    mask, raw = getattr(m, hh(name) + "_mask"), getattr(m, hh(name) + "_orig")
    assert not raw.grad[mask == 0].any()
    with torch.no_grad():
        raw.mul_(2)
    assert_equal("output", output(m, args), output(like(m, **{hh(name): (raw * mask).detach()}), args))
    prune.remove(m, hh(name))
    assert_equal("output", output(m, args), output(like(m), args))


@pytest.mark.parametrize("name", LAYERS)
def test_tied_directions_layers_and_head(backend, name):
    """One tensor in four places: both directions, the next layer, and the matrix after the layers."""
    results, args = [], arguments(name)
    for library in (nn, fastrnn):
        m = module(name, library, num_layers=2, bidirectional=True)
        m.weight_hh_l0_reverse = m.weight_hh_l1 = m.weight_hh_l1_reverse = m.weight_hh_l0
        y = output(m, args)[..., :H] @ m.weight_hh_l0.t()
        results.append([y, *gradients(m, {}, [y]).values()])
    assert len(results[0]) == len(results[1])
    for got, want in zip(results[1], results[0], strict=True):
        assert_equal("output or gradient", got, want)


@every_module
def test_functional_call_of_a_part(backend, name):
    """Some weights given, the others the module's own; a parametrized one by its original."""
    theirs, ours = both(name, H, H, dtype=F64)
    args, new = arguments(name), torch.randn_like(getattr(ours, hh(name))).requires_grad_()
    results = []
    for m in (theirs, ours):
        y = leaves(torch.func.functional_call(m, {hh(name): new}, args))[0]
        parametrize.register_parametrization(m, hh(name), Counted())
        key = f"parametrizations.{hh(name)}.original"
        z = leaves(torch.func.functional_call(m, {key: new}, args))[0]
        results.append(
            [y, z, *torch.autograd.grad((y * z).sum(), [new, *(p for n, p in m.named_parameters() if n[0] == "b")])]
        )
    for got, want in zip(results[1], results[0], strict=True):
        assert_equal("output or gradient", got, want)


@every_module
def test_weights_as_views_of_one_buffer(backend, name):
    """vector_to_parameters makes every weight a view of one vector, which others may then write to."""
    m, args = module(name), arguments(name)
    m(*args)
    flat = parameters_to_vector(m.parameters()).detach() * 2
    vector_to_parameters(flat, m.parameters())
    assert_equal("as views", output(m, args), output(like(m), args))
    flat.mul_(0.25)
    assert_equal("after a change of the vector", output(m, args), output(like(m), args))


@every_module
def test_frozen_into_buffers(backend, name):
    m, args = module(name), arguments(name, grad=True)
    want = output(m, args)
    for key, p in list(m.named_parameters()):
        delattr(m, key)
        m.register_buffer(key, p.detach())
    assert not list(m.parameters())
    assert torch.equal(output(m, args), want)
    output(m, args).sum().backward()
    assert args[0].grad.any()


@every_module
def test_averaged_weights(backend, name):
    """An exponential moving average that follows training."""
    m, args = module(name), arguments(name)
    averaged = AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer, want = torch.optim.SGD(m.parameters(), 0.5), None
    for _ in range(3):
        optimizer.zero_grad()
        output(m, args).pow(2).sum().backward()
        optimizer.step()
        averaged.update_parameters(m)
        own = [p.detach().clone() for p in m.parameters()]
        want = own if want is None else [0.5 * (a + b) for a, b in zip(want, own, strict=True)]
    names = [n for n, _ in m.named_parameters()]
    assert_equal("averaged", output(averaged, args), output(like(m, **dict(zip(names, want, strict=True))), args))
