"""The choice of a backend: by name or by rule, with its reason."""

import pytest
import torch
from support import B, H, I, T, usable_backends
from torch import nn

import fastrnn
from fastrnn import backends
from fastrnn.backends import BACKENDS, NAMES, choose
from fastrnn.backends.base import Backend, Query
from fastrnn.cells import CELLS

QUERY = Query("lstm", "cpu", torch.float32, T, B, I, H, H, 1)


@pytest.fixture
def broken(monkeypatch):
    """A backend that runs nothing, first in auto's list."""

    class Broken(Backend):
        name = "broken"

        def unsupported(self, query):
            return "it is broken"

    monkeypatch.setattr(backends, "BACKENDS", {"broken": Broken(), **BACKENDS})
    monkeypatch.setattr(backends, "NAMES", ("broken", *NAMES))
    backends.clear_choices()
    yield
    backends.clear_choices()


def test_reference_runs_everything():
    for cell in CELLS:
        assert "reference" in usable_backends(cell, torch.float64, True, True)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "auto"])
def test_by_name_runs_or_raises_with_the_reason(name):
    why_not = BACKENDS[name].unsupported(QUERY)
    if why_not is None:
        assert choose(QUERY, name).backend is BACKENDS[name]
    else:
        with pytest.raises(RuntimeError, match="cannot run this call") as raised:
            choose(QUERY, name)
        assert why_not in str(raised.value)


def test_no_fallback_from_a_name(broken):
    with pytest.raises(RuntimeError, match="'broken' cannot run this call: it is broken"):
        choose(QUERY, "broken")
    with fastrnn.backend("broken"), pytest.raises(RuntimeError, match="it is broken"):
        fastrnn.LSTM(I, H)(torch.zeros(T, B, I))


def test_native_has_no_resets():
    with pytest.raises(RuntimeError, match="resets"):
        fastrnn.LSTM(I, H, backend="native")(torch.zeros(T, B, I), resets=torch.zeros(T, B, dtype=torch.bool))


def test_auto_names_what_it_passed_over(broken):
    choice = choose(QUERY)
    assert choice.backend.name in BACKENDS
    assert "broken: it is broken" in choice.reason


def test_context_manager_nests_and_ends():
    assert choose(QUERY, "auto").backend is choose(QUERY).backend
    with fastrnn.backend("reference"):
        assert choose(QUERY).backend.name == "reference"
        with fastrnn.backend("native"):
            assert choose(QUERY).backend.name == "native"
        assert choose(QUERY).backend.name == "reference"
        with pytest.raises(ZeroDivisionError), fastrnn.backend("native"):
            _ = 1 / 0
        assert choose(QUERY).backend.name == "reference"
        with fastrnn.backend("auto"):
            automatic = choose(QUERY).backend
    assert choose(QUERY).backend is automatic


def test_module_goes_before_context(monkeypatch):
    ran = []
    for b in ("native", "reference"):
        original = BACKENDS[b].forward
        monkeypatch.setattr(
            BACKENDS[b], "forward", lambda call, save, o=original, b=b: (ran.append(b), o(call, save))[1]
        )
    with fastrnn.backend("reference"):
        fastrnn.LSTM(I, H, backend="native")(torch.zeros(T, B, I))
        fastrnn.LSTM(I, H)(torch.zeros(T, B, I))
        fastrnn.GRUCell(I, H, backend="native")(torch.zeros(B, I))
        fastrnn.GRUCell(I, H)(torch.zeros(B, I))
    assert ran == ["native", "reference"] * 2


@pytest.mark.parametrize("make", [fastrnn.RNN, fastrnn.LSTM, fastrnn.GRU])
def test_explain_says_what_will_run(make, capsys):
    module, x = make(I, H, 2, bidirectional=True), torch.randn(T, B, I)
    choice = fastrnn.explain(module, x)
    printed = capsys.readouterr().out
    assert f"{make.__name__} T={T} B={B} I={I} H={H} torch.float32 cpu with gradients" in printed
    assert f"{choice.backend.name} ({choice.reason})" in printed
    with torch.no_grad():
        fastrnn.explain(module, x)
    assert "with gradients" not in capsys.readouterr().out
    with fastrnn.backend("reference"):
        assert fastrnn.explain(module, x).backend.name == "reference"
    assert "asked for by name" in capsys.readouterr().out


def test_explain_options_and_cells(capsys):
    module, x = fastrnn.LSTM(I, H), torch.randn(T, B, I)
    resets = torch.zeros(T, B, dtype=torch.bool)
    assert fastrnn.explain(module, x, lengths=[T] * B, resets=resets).backend.name != "native"
    h = torch.zeros(B, H)
    assert fastrnn.explain(fastrnn.LSTMCell(I, H), x[0], (h, h)).backend.name in BACKENDS
    assert "LSTMCell T=1" in capsys.readouterr().out
    with pytest.raises(TypeError, match="expected a fastrnn module, got LSTM"):
        fastrnn.explain(nn.LSTM(I, H), x)
    with pytest.raises(RuntimeError, match="features"):
        fastrnn.explain(module, x[..., 1:])
    with pytest.raises(TypeError, match="one step"):
        fastrnn.explain(fastrnn.GRUCell(I, H), x[0], lengths=[1])


def test_choice_depends_on_what_the_query_says():
    """Choices are remembered; a later, different call must not get an earlier one's."""
    module = fastrnn.LSTM(I, H)
    x, resets = torch.zeros(T, B, I), torch.zeros(T, B, dtype=torch.bool)
    plain = module._prepare(x, None, None, None).query
    assert plain.grad
    assert not plain.ragged
    assert not plain.resets
    assert module._prepare(x, None, [T] * B, None).query.ragged
    assert module._prepare(x, None, None, resets).query.resets
    with torch.no_grad():
        assert not module._prepare(x, None, None, None).query.grad
    assert not module.requires_grad_(False)._prepare(x, None, None, None).query.grad
    assert module._prepare(x, (torch.zeros(1, B, H, requires_grad=True), torch.zeros(1, B, H)), None, None).query.grad
    assert module.double()._prepare(x.double(), None, None, None).query.dtype == torch.float64


@pytest.mark.parametrize(
    ("cell", "rows", "size", "name"),
    [
        ("lstm", 1, 512, "cpu"),
        ("lstm", 16, 512, "native"),
        ("gru", 64, 128, "cpu"),
        ("rnn_tanh", 1, 16, "cpu"),
        ("rnn_tanh", 16, 16, "native"),
    ],
)
@pytest.mark.skipif("cpu" not in usable_backends("lstm", torch.float32, False, False), reason="needs the engine")
def test_training_a_cell_goes_by_what_was_measured(cell, rows, size, name):
    kind = {"lstm": "LSTMCell", "gru": "GRUCell", "rnn_tanh": "RNNCell"}[cell]
    module, x = getattr(fastrnn, kind)(size, size), torch.randn(rows, size)
    assert fastrnn.explain(module, x).backend.name == name
    with torch.no_grad():
        assert fastrnn.explain(module, x).backend.name == "cpu"
    out = module(x)
    graph = (out[0] if isinstance(out, tuple) else out).grad_fn
    assert ("_Recurrence" in graph.name()) == (name == "cpu")
