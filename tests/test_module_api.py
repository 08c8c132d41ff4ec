"""The drop-in itself: arguments, attributes, initialisation, state_dict, copies, and weights that are replaced."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from support import B, H, I, T, assert_equal, both, gradients, leaves
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastrnn

LAYERS, CELLS = ("RNN", "LSTM", "GRU"), ("RNNCell", "LSTMCell", "GRUCell")
OPTIONS = [
    {},
    {"num_layers": 3, "bidirectional": True},
    {"bias": False, "batch_first": True},
    {"num_layers": 2, "dropout": 0.25},
    {"dtype": torch.float64},
]


def all_pairs():
    cases = [(n, o) for n in LAYERS for o in OPTIONS]
    cases += [("LSTM", {"proj_size": 4, "num_layers": 2, "bidirectional": True}), ("RNN", {"nonlinearity": "relu"})]
    cases += [(n, o) for n in CELLS for o in ({}, {"bias": False}, {"dtype": torch.float64})]
    return [*cases, ("RNNCell", {"nonlinearity": "relu"})]


@pytest.mark.parametrize(("name", "options"), all_pairs(), ids=str)
def test_same_arguments_attributes_and_initial_weights(name, options):
    theirs, ours = both(name, I, H, **options)
    assert repr(ours) == repr(theirs)
    want, got = theirs.state_dict(), ours.state_dict()
    assert list(got) == list(want)
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    public = {k for k in dir(theirs) if not k.startswith("_")}
    assert public <= set(dir(ours)), public - set(dir(ours))
    for key in theirs.__constants__:
        assert getattr(ours, key) == getattr(theirs, key), key
    assert isinstance(ours, nn.RNNCellBase if "Cell" in name else nn.RNNBase)
    assert not isinstance(ours, getattr(nn, name))  # torch.compile refuses these
    torch.manual_seed(4)
    theirs.reset_parameters()
    torch.manual_seed(4)
    ours.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_positional_arguments(name):
    args = {
        "RNN": (I, H, 2, "relu", False, True, 0.5, True),
        "LSTM": (I, H, 2, False, True, 0.5, True, 3),
        "GRU": (I, H, 2, False, True, 0.5, True),
        "RNNCell": (I, H, False, "relu", "cpu", torch.float64),
        "LSTMCell": (I, H, False, "cpu", torch.float64),
        "GRUCell": (I, H, False, "cpu", torch.float64),
    }[name]
    theirs, ours = both(name, *args)
    assert repr(ours) == repr(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    names = list(inspect.signature(getattr(fastrnn, name)).parameters)
    documented = ["input_size", "hidden_size"]
    assert names[:2] == documented
    assert "backend" in names


@pytest.mark.parametrize("name", LAYERS)
def test_all_weights_and_flat_weights(name):
    theirs, ours = both(name, I, H, 2, bidirectional=True)
    for a, b in zip(ours.all_weights, theirs.all_weights, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    ours.flatten_parameters()
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    ours.weight_hh_l0 = nn.Parameter(torch.zeros_like(ours.weight_hh_l0))
    assert ours._flat_weights[1] is ours.weight_hh_l0


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_on_one_layer_warns(name):
    """As torch.nn does, in the same words; it has no effect, and on two layers there is no warning."""
    messages = []
    for library in (nn, fastrnn):
        with pytest.warns(UserWarning, match="num_layers greater than 1") as warned:
            module = getattr(library, name)(I, H, dropout=0.5)
        messages.append([str(w.message) for w in warned])
    assert messages[0] == messages[1]
    x = torch.randn(T, B, I)
    assert torch.equal(module(x)[0], module.eval()(x)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = getattr(fastrnn, name)(I, H, 2, dropout=0.5)
    assert not torch.equal(module(x)[0], module.eval()(x)[0])


@pytest.mark.parametrize(("name", "options"), all_pairs(), ids=str)
def test_state_dict_loads_both_ways(name, options):
    theirs, ours = getattr(nn, name)(I, H, **options), getattr(fastrnn, name)(I, H, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(
        (B, I) if "Cell" in name else (T, B, I),
        dtype=theirs.weight_ih.dtype if "Cell" in name else theirs.weight_ih_l0.dtype,
    )
    ours.eval(), theirs.eval()
    for a, b in zip(leaves(ours(x)), leaves(theirs(x)), strict=True):
        assert_equal("after loading", a, b)
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for a, b in zip(leaves(ours(x)), leaves(theirs(x)), strict=True):
        assert_equal("after loading back", a, b)


def copies(module):
    yield "deepcopy", copy.deepcopy(module)
    yield "copy", copy.copy(module)
    yield "pickle", pickle.loads(pickle.dumps(module))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    yield "torch.save", torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_copies(backend, name):
    module = getattr(fastrnn, name)(I, H, backend="reference")
    x = torch.randn((B, I) if "Cell" in name else (T, B, I))
    want = leaves(module(x))
    for how, twin in copies(module):
        assert type(twin) is type(module), how
        assert twin.backend == "reference"
        assert all(torch.equal(a, b) for a, b in zip(leaves(twin(x)), want, strict=True)), how
        if how == "copy":
            continue
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        assert not any(t.any() for t in leaves(twin(x))), f"{how}: the copy's own weights are used"
        assert all(torch.equal(a, b) for a, b in zip(leaves(module(x)), want, strict=True)), how


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_to_and_back(backend, name):
    theirs, ours = both(name, I, H)
    x = torch.randn((B, I) if "Cell" in name else (T, B, I), dtype=torch.float64)
    ours(x.float())
    ours.double(), theirs.double()
    for a, b in zip(leaves(ours(x)), leaves(theirs(x)), strict=True):
        assert_equal("after .double()", a, b)
    meta = copy.deepcopy(ours).to("meta")
    assert all(p.device.type == "meta" for p in meta.parameters())
    meta.to_empty(device="cpu").load_state_dict(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(leaves(meta(x)), leaves(ours(x)), strict=True))


# Weights that are not what they were when the module was made.


def check_same(theirs, ours, x):
    got, want = leaves(ours(x)), leaves(theirs(x))
    for a, b in zip(got, want, strict=True):
        assert_equal("output or state", a, b)
    expected = gradients(theirs, {"input": x}, want)
    for name, g in gradients(ours, {"input": x}, got).items():
        assert_equal(f"gradient of {name}", g, expected[name])


def modified(how, module):
    """The same modification for torch.nn's module and ours."""
    cell = isinstance(module, nn.RNNCellBase)
    hh, ih = ("weight_hh", "weight_ih") if cell else ("weight_hh_l0", "weight_ih_l0")
    if how == "weight_norm":
        parametrizations.weight_norm(module, hh)
    elif how == "old weight_norm":
        nn.utils.weight_norm(module, hh)
    elif how == "spectral_norm":
        parametrizations.spectral_norm(module, hh).eval()
    elif how == "parametrize":
        parametrize.register_parametrization(module, hh, Doubled())
        parametrize.register_parametrization(module, ih, Doubled())
    elif how == "prune":
        prune.l1_unstructured(module, hh, amount=0.4)
    elif how == "tied":
        setattr(module, ih, getattr(module, hh))
    elif how == "new parameter":
        setattr(module, hh, nn.Parameter(getattr(module, hh).detach() * 2))
    elif how == "data":
        getattr(module, hh).data = getattr(module, hh).data * 2
    elif how == "in place":
        with torch.no_grad():
            getattr(module, hh).mul_(2)
    return module


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


HOW = ("weight_norm", "old weight_norm", "spectral_norm", "parametrize", "prune", "tied")
HOW = (*HOW, "new parameter", "data", "in place")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_modified_weights(backend, name, how):
    theirs, ours = both(name, H, H, dtype=torch.float64)
    x = torch.randn((B, H) if "Cell" in name else (T, B, H), dtype=torch.float64, requires_grad=True)
    ours(x)  # whatever a call remembers must not outlive the change
    torch.manual_seed(1)
    modified(how, theirs)
    torch.manual_seed(1)
    modified(how, ours)
    check_same(theirs, ours, x)
    with torch.no_grad():
        for module in (theirs, ours):
            for p in module.parameters():
                p.mul_(0.5)
    check_same(theirs, ours, x)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_functional_call_and_back(backend, name):
    theirs, ours = both(name, I, H, dtype=torch.float64)
    x = torch.randn((B, I) if "Cell" in name else (T, B, I), dtype=torch.float64)
    before = leaves(ours(x))
    swapped = {n: (p * 0.5).detach().requires_grad_() for n, p in ours.named_parameters()}
    got = leaves(torch.func.functional_call(ours, swapped, (x,)))
    want = leaves(torch.func.functional_call(theirs, swapped, (x,)))
    for a, b in zip(got, want, strict=True):
        assert_equal("functional_call", a, b)
    tensors = list(swapped.values())
    for n, a, b in zip(
        swapped, torch.autograd.grad(got[0].sum(), tensors), torch.autograd.grad(want[0].sum(), tensors), strict=True
    ):
        assert_equal(f"gradient of {n}", a, b)
    assert all(torch.equal(a, b) for a, b in zip(leaves(ours(x)), before, strict=True))


def test_two_modules_share_one_parameter(backend):
    theirs, ours = [], []
    for library, modules in ((nn, theirs), (fastrnn, ours)):
        torch.manual_seed(0)
        a, b = library.GRU(H, H, dtype=torch.float64), library.GRU(H, H, dtype=torch.float64)
        b.weight_hh_l0 = a.weight_hh_l0
        modules.append(nn.ModuleList([a, b]))
    x = torch.randn(T, B, H, dtype=torch.float64)
    grads = []
    for (m,) in (theirs, ours):
        m[1](m[0](x)[0])[0].sum().backward()
        grads.append(m[0].weight_hh_l0.grad)
        assert m[1].weight_hh_l0.grad is m[0].weight_hh_l0.grad
    assert_equal("the shared gradient", grads[1], grads[0])


def test_in_place_change_between_forward_and_backward_is_noticed(backend):
    module = fastrnn.LSTM(I, H)
    y = module(torch.randn(T, B, I, requires_grad=True))[0]
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", LAYERS)
def test_autocast(backend, name):
    module = getattr(fastrnn, name)(I, H, 2)
    x = torch.randn(T, B, I, requires_grad=True)
    want = leaves(module(x))
    with torch.autocast("cpu", torch.bfloat16):
        got = leaves(module(x))
        single = leaves(module.double()(x.double()))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).abs().max() < 0.03
    assert all(a.dtype == torch.float64 for a in single)
    module.float()
    got[0].sum().backward()
    assert x.grad.dtype == torch.float32


def test_autocast_cells_keep_the_dtype_of_their_state(backend):
    cell = fastrnn.LSTMCell(I, H)
    with torch.autocast("cpu", torch.bfloat16):
        assert [a.dtype for a in cell(torch.randn(B, I))] == [torch.float32] * 2
